"""Advantages and returns equal the formulas, term by term; truncation is bootstrapped, termination is not."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo


@st.composite
def rollouts(draw):
    num_steps, num_envs = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    done_probability = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))

    return {
        "rewards": rng.normal(size=(num_steps, num_envs)).astype(np.float32),
        "values": rng.normal(size=(num_steps + 1, num_envs)).astype(np.float32),
        "dones": (rng.random((num_steps + 1, num_envs)) < done_probability).astype(np.float32),
        "gamma": draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
        "gae_lambda": draw(st.sampled_from([0.0, 0.3, 0.95, 1.0])),
    }


def episode_end(x, t, env):
    """The first step at or after t that ends an episode of this environment, or the last one; and whether it ended."""
    num_steps = len(x["rewards"])
    for k in range(t, num_steps):
        if x["dones"][k + 1, env]:
            return k, True
    return num_steps - 1, False


def discounted_return(x, t, env, horizon):
    """Rewards of steps t to t + horizon of the same episode, then the critic's value of what follows them."""
    last, terminated = episode_end(x, t, env)
    k = min(t + horizon, last)
    total = sum(x["gamma"] ** (i - t) * float(x["rewards"][i, env]) for i in range(t, k + 1))
    if k < last or not terminated:
        total += x["gamma"] ** (k + 1 - t) * float(x["values"][k + 1, env])
    return total


@settings(deadline=None, max_examples=150)
@given(rollouts())
def test_gae_equals_the_weighted_sum_of_n_step_advantages(x):
    """[GAE] equation 16: A_t = (1 - lambda) * sum of lambda^(n-1) * n-step advantages; the longest takes the rest."""
    advantages, returns = ppo.compute_advantages(**x)
    assert advantages.dtype == returns.dtype == np.float32
    for t in range(x["rewards"].shape[0]):
        for env in range(x["rewards"].shape[1]):
            longest, lam = episode_end(x, t, env)[0] - t, x["gae_lambda"]
            weights = [(1 - lam) * lam**n for n in range(longest)] + [lam**longest]
            n_step = [discounted_return(x, t, env, n) - float(x["values"][t, env]) for n in range(longest + 1)]
            assert float(advantages[t, env]) == pytest.approx(np.dot(weights, n_step), rel=1e-4, abs=1e-4)
    assert (returns == advantages + x["values"][:-1]).all()


@settings(deadline=None, max_examples=150)
@given(rollouts())
def test_no_gae_gives_discounted_returns_minus_values(x):
    advantages, returns = ppo.compute_advantages(**x, gae=False)
    for t in range(x["rewards"].shape[0]):
        for env in range(x["rewards"].shape[1]):
            expected = discounted_return(x, t, env, horizon=10**6)
            assert float(returns[t, env]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (advantages == returns - x["values"][:-1]).all()


class Corridor(gym.Env):
    """Walks from 0 to ``end`` whatever is done, reward 1 a step; the observation is the position over 10."""

    observation_space = gym.spaces.Box(-1, 10, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, end=10**9, render_mode=None):
        self.end = end

    def reset(self, *, seed=None, options=None):
        self.position = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.position += 1
        return np.array([self.position / 10], np.float32), 1.0, self.position == self.end, False, {}


class ReusingCorridor(Corridor):
    """Writes every observation into the same array, as some environments do to save time."""

    def __init__(self, render_mode=None):
        super().__init__()
        self.array = np.zeros(1, np.float32)

    def reset(self, **kwargs):
        self.array[:], info = super().reset(**kwargs)
        return self.array, info

    def step(self, action):
        self.array[:], *rest = super().step(action)
        return self.array, *rest


gym.register("Reusing5-v0", ReusingCorridor, max_episode_steps=5, disable_env_checker=True)
gym.register("TimeLimit5-v0", Corridor, max_episode_steps=5)
gym.register("Terminates5-v0", Corridor, kwargs={"end": 5})
gym.register("Both5-v0", Corridor, kwargs={"end": 5}, max_episode_steps=5)


@pytest.mark.parametrize(
    "env_id, bootstrapped",
    [("TimeLimit5-v0", True), ("Reusing5-v0", True), ("Terminates5-v0", False), ("Both5-v0", False)],
)
def test_only_truncation_is_bootstrapped_with_the_value_of_the_final_observation(
    env_id, bootstrapped, run, monkeypatch
):
    agents, rollouts, original = [], [], ppo.compute_advantages

    class SpiedAgent(ppo.Agent):
        def __init__(self, envs):
            super().__init__(envs)
            agents.append(self)

    def spy(rewards, *args):
        with torch.no_grad():  # before the update: the agent that played
            final_value = float(agents[-1].get_value(torch.tensor([[0.5]])))
        rollouts.append((rewards.copy(), final_value))
        return original(rewards, *args)

    monkeypatch.setattr(ppo, "compute_advantages", spy)
    flags = f"--env-id {env_id} --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 32 --gamma 0.9"
    run(flags, Agent=SpiedAgent)
    run(flags + " --bootstrap-truncation", Agent=SpiedAgent)
    assert len(rollouts) == 4
    for (plain, _), (rewards, _) in zip(rollouts[:2], rollouts[2:], strict=True):
        assert (plain == 1).all()
        assert np.array_equal(rewards, plain) is not bootstrapped
    # Episodes last 5 steps: the first rollout of 8 holds one end, in step 4; the second ones in steps 1 and 6.
    for (rewards, final_value), ends in zip(rollouts[2:], ([4], [1, 6]), strict=True):
        expected = np.ones((8, 2))
        expected[ends] += 0.9 * final_value if bootstrapped else 0.0
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)
        assert abs(final_value) > 1e-3  # else the test could not tell
