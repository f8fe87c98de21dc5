"""Advantages equal the published sums, and only truncation is bootstrapped."""

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo


@st.composite
def rollouts(draw, gae_lambdas):
    """The arguments of compute_advantages, with random numbers in them."""
    num_steps = draw(st.integers(1, 12))
    num_envs = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    done_probability = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))

    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num_steps, num_envs, generator=generator)
    values = torch.randn(num_steps + 1, num_envs, generator=generator)
    chances = torch.rand(num_steps + 1, num_envs, generator=generator)
    return {
        "rewards": rewards,
        "values": values,
        "dones": (chances < done_probability).float(),
        "gamma": draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
        "gae_lambda": draw(st.sampled_from(gae_lambdas)),
    }


def last_step(x, t, env):
    """The last step of the episode or rollout that step t is in; whether it ended."""
    num_steps = len(x["rewards"])
    for k in range(t, num_steps):
        if x["dones"][k + 1, env]:
            return k, True
    return num_steps - 1, False


def discounted_return(x, t, env, horizon):
    """The rewards of up to ``horizon`` steps, then V of what follows them."""
    last, ended = last_step(x, t, env)
    stop = min(t + horizon - 1, last)
    total = 0.0
    for k in range(t, stop + 1):
        total += x["gamma"] ** (k - t) * x["rewards"][k, env].item()
    if stop < last or not ended:
        total += x["gamma"] ** (stop + 1 - t) * x["values"][stop + 1, env].item()
    return total


def weighted_advantage(x, t, env):
    """[GAE] equation 16, where the longest horizon takes the weight of those beyond it.

    (1 - lambda) * the sum of lambda^(n - 1) * the advantage over n steps
    """
    gae_lambda = x["gae_lambda"]
    last, _ = last_step(x, t, env)
    longest = last - t + 1
    value = x["values"][t, env].item()
    total = 0.0
    for n in range(1, longest + 1):
        weight = gae_lambda ** (n - 1)
        if n < longest:
            weight *= 1 - gae_lambda
        total += weight * (discounted_return(x, t, env, n) - value)
    return total


def for_each_step(function, x):
    num_steps, num_envs = x["rewards"].shape
    rows = [[function(x, t, env) for env in range(num_envs)] for t in range(num_steps)]
    return torch.tensor(rows)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=150)
@given(rollouts(gae_lambdas=[0.0, 0.3, 0.95, 1.0]))
def test_gae_equals_the_weighted_sum_of_n_step_advantages(x):
    advantages, returns = ppo.compute_advantages(**x)
    assert_near(advantages, for_each_step(weighted_advantage, x))
    assert returns.equal(advantages + x["values"][:-1])


@settings(deadline=None, max_examples=150)
@given(rollouts(gae_lambdas=[1.0]))
def test_with_lambda_1_advantages_are_discounted_returns_minus_values(x):
    advantages, returns = ppo.compute_advantages(**x)
    num_steps = len(x["rewards"])
    expected = for_each_step(lambda *where: discounted_return(*where, num_steps), x)
    assert_near(returns, expected)
    assert_near(advantages, expected - x["values"][:-1])


class FarSighted(ppo.Agent):
    """Knows V, ten times the observation, and keeps the returns that it is to learn.

    The gradient of the value loss is newvalue - returns, which gives them away.
    """

    def __init__(self, envs):
        super().__init__(envs)
        self.slope = torch.nn.Parameter(torch.tensor(10.0))
        self.returns = {}  # of each observation

    def get_value(self, obs):
        return self.slope * obs[:, 0]

    def evaluate_actions(self, obs, action):
        logprob, entropy, value = super().evaluate_actions(obs, action)

        def keep(gradient):
            returns = value.detach() - gradient * len(value)
            for position, number in zip(obs[:, 0], returns, strict=True):
                step = round(10 * position.item())
                self.returns.setdefault(step, []).append(number.item())

        value.register_hook(keep)
        return logprob, entropy, value


def make_next_step_envs(args, seed, video=None):
    return ppo.vectorize(ppo.make_env, args, seed, AutoresetMode.NEXT_STEP)


def make_mixed_envs(args, seed, video=None):
    ids = iter(["environments:TimeLimit5-v0", "environments:Terminates5-v0"])

    def make_env(args, render_mode):
        return gym.make(next(ids))

    return ppo.vectorize(make_env, args, seed, AutoresetMode.SAME_STEP)


@pytest.fixture
def targets(run):
    """targets(env_id) plays two whole episodes of five steps in two environments.

    Returns what the critic is to learn: {step of an episode: four sorted numbers}.
    """

    def targets(env_id, flags="--bootstrap-truncation", make_envs=ppo.make_envs):
        # In NEXT_STEP mode, each episode is followed by a step that only resets.
        num_steps = 12 if make_envs is make_next_step_envs else 10
        agent = run(
            f"--env-id environments:{env_id} --num-envs 2 --num-steps {num_steps} "
            f"--total-timesteps {2 * num_steps} --num-minibatches 1 --update-epochs 1 "
            "--no-gae --gamma 0.9 --learning-rate 0 --no-clip-vloss --vf-coef 1 "
            f"{flags}",
            Agent=FarSighted,
            make_envs=make_envs,
        ).agent
        return {step: sorted(agent.returns[step]) for step in agent.returns}

    return targets


def rewards_to_come(step):
    return sum(0.9**k for k in range(5 - step))


def and_v_of_the_last_observation(step):
    return rewards_to_come(step) + 0.9 ** (5 - step) * 5.0


def all_four(function):
    return {step: pytest.approx([function(step)] * 4) for step in range(5)}


MODES = pytest.mark.parametrize("make_envs", [ppo.make_envs, make_next_step_envs])


@MODES
@pytest.mark.parametrize("env_id", ["TimeLimit5-v0", "Reusing5-v0"])
def test_truncation_is_bootstrapped_with_v_of_the_last_observation(
    env_id, make_envs, targets
):
    found = targets(env_id, make_envs=make_envs)
    assert found == all_four(and_v_of_the_last_observation)


@MODES
@pytest.mark.parametrize("env_id", ["Terminates5-v0", "Both5-v0"])
def test_an_end_is_not_bootstrapped_even_if_it_comes_with_the_time_limit(
    env_id, make_envs, targets
):
    assert targets(env_id, make_envs=make_envs) == all_four(rewards_to_come)


def test_each_environment_is_bootstrapped_by_itself(targets):
    found = targets("TimeLimit5-v0", make_envs=make_mixed_envs)
    for step in range(5):
        low = rewards_to_come(step)
        high = and_v_of_the_last_observation(step)
        assert found[step] == pytest.approx([low, low, high, high])


def test_by_default_truncation_counts_as_an_end(targets):
    assert targets("TimeLimit5-v0", flags="") == all_four(rewards_to_come)
