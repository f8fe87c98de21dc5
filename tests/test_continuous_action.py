"""ppo_continuous_action.py: its policy, its clipping, and its running statistics.

The statistics are right, kept in checkpoints, and frozen in evaluation.
"""

import functools
import gc
import itertools
import pickle
import signal
import time
import weakref
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, finish, parse_episodes, start, torchrun

import evaluate
import ppo
from ppo_continuous_action import DEFAULTS, Agent, make_envs
from tests.reference import plain_continuous

PROGRAM = ROOT / "ppo_continuous_action.py"
NOTING = "--env-id Noting-v0 --num-envs 3 --num-steps 40 --num-minibatches 4 "
PENDULUM = (
    "--env-id Pendulum-v1 --num-envs 2 --num-steps 200 --num-minibatches 4 "
    "--update-epochs 2 --no-anneal-lr "
)
INVERTED = (
    "--env-id InvertedPendulum-v5 --num-steps 128 --num-minibatches 4 "
    "--update-epochs 1 --no-anneal-lr "
)

NOTES = {}  # {seed: [(action, obs, reward, terminated, truncated), ...]} of Noting


class Noting(gym.Env):
    """Notes what it gets and what it gives. Its scales are odd.

    Episodes have 7 steps, or 9 if a time limit cuts them off; these take turns.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.float32([-0.5, 0]), np.float32([1, 0.25]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.notes = NOTES[seed] = []
            self.episode = -1
        self.episode += 1
        self.steps = 0
        obs = self.observe()
        self.notes.append((None, obs, 0.0, False, False))
        return obs, {}

    def observe(self):
        return self.np_random.normal([1000, -3], [50, 0.01])

    def step(self, action):
        self.steps += 1
        obs = self.observe()
        reward = self.np_random.normal(200, 100)
        terminated = self.steps == 7 and self.episode % 2 == 0
        truncated = self.steps == 9
        self.notes.append((action.copy(), obs, reward, terminated, truncated))
        return obs, reward, terminated, truncated, {}


class Whole(Noting):
    action_space = gym.spaces.Box(0, 5, (2,), np.int64)


class Square(Noting):
    action_space = gym.spaces.Box(0, 1, (2, 2))


gym.register("Noting-v0", Noting)
gym.register("Whole-v0", Whole)
gym.register("Square-v0", Square)


@pytest.fixture
def train(run):
    """train(flags) trains as the program does, in this process; see run."""
    NOTES.clear()
    return functools.partial(run, make_envs=make_envs, Agent=Agent, **DEFAULTS)


def environments(flags=NOTING):
    args = ppo.parse_args(flags.split(), **DEFAULTS)
    return make_envs(args, args.seed)


@pytest.fixture
def agent():
    """An agent for two numbers as observations and two as actions."""
    torch.manual_seed(1)
    return Agent(environments())


def statistics(state_dict):
    """Mean, variance and count of observations and of returns, as one list."""
    numbers = []
    for i in range(2):
        state = state_dict[f"statistics.{i}._extra_state"]
        numbers += [state["mean"].tolist(), state["var"].tolist(), state["count"]]
    return numbers


# The policy


def test_log_probability_and_entropy_are_those_of_a_normal_distribution(agent):
    obs = torch.randn(50, 2)
    torch.nn.init.normal_(agent.actor_logstd)
    torch.nn.init.orthogonal_(agent.actor[-1].weight)
    action, logprob = agent.get_action(obs)
    variance = torch.diag(agent.actor_logstd.exp() ** 2)
    expected = torch.distributions.MultivariateNormal(agent.actor(obs), variance)
    assert action.shape == (50, 2)
    assert logprob.allclose(expected.log_prob(action), atol=1e-5)

    logprob_again, entropy, value = agent.evaluate_actions(obs, action)
    assert logprob_again.equal(logprob)
    assert entropy.allclose(expected.entropy())
    assert value.equal(agent.get_value(obs))
    assert logprob.shape == entropy.shape == value.shape == (50,)


def test_actions_are_drawn_around_the_mean_which_is_the_likeliest_one(agent):
    obs = torch.randn(1, 2).expand(40000, 2)
    agent.actor_logstd.data = torch.tensor([0.0, -2.0])
    drawn, _ = agent.get_action(obs)
    likeliest = agent.get_policy(obs).mode[0]
    assert likeliest.equal(agent.actor(obs)[0])
    assert drawn.mean(0).allclose(likeliest, atol=0.02)
    assert drawn.std(0).allclose(agent.actor_logstd.exp(), rtol=0.02)


def test_the_deviation_is_one_at_first_and_learned_whatever_the_state(agent):
    assert agent.actor_logstd.equal(torch.zeros(2))
    agent.get_policy(torch.randn(5, 2)).entropy().sum().backward()
    assert agent.actor_logstd.grad.equal(torch.full((2,), 5.0))


def test_actor_and_critic_share_nothing(agent):
    agent.get_value(torch.randn(5, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in agent.critic.parameters())
    assert all(parameter.grad is None for parameter in agent.actor.parameters())
    assert agent.actor_logstd.grad is None


def test_an_agent_can_be_pickled_and_does_not_hold_the_environments():
    envs = environments()
    agent = Agent(envs)
    obs, _ = envs.reset(seed=1)
    copy = pickle.loads(pickle.dumps(agent))
    obs = torch.as_tensor(obs)
    assert copy.get_policy(obs).mode.equal(agent.get_policy(obs).mode)
    assert statistics(copy.state_dict()) == statistics(agent.state_dict())

    held = weakref.ref(envs.unwrapped)
    del envs
    gc.collect()
    assert held() is None


# The wrappers


def test_environments_get_clipped_actions_and_the_learner_keeps_those_drawn(train):
    kept = []

    class KeepingAgent(Agent):
        def evaluate_actions(self, obs, action):
            kept.append(action)
            return super().evaluate_actions(obs, action)

    train(NOTING + "--total-timesteps 120 --update-epochs 1", Agent=KeepingAgent)
    drawn = torch.cat(kept).numpy()
    low, high = Noting.action_space.low, Noting.action_space.high
    assert (drawn < low).any()
    assert (drawn > high).any()
    notes = itertools.chain(*NOTES.values())
    received = [action.tolist() for action, *_ in notes if action is not None]
    assert sorted(np.clip(drawn, low, high).tolist()) == sorted(received)


def test_statistics_are_of_all_observations_and_discounted_sums_of_rewards(train):
    agent = train(NOTING + "--total-timesteps 480 --gamma 0.9").agent
    raw = []
    sums = []
    for notes in NOTES.values():
        total = 0.0
        for action, obs, reward, *_ in notes:
            raw.append(obs)
            if action is None:  # a reset
                total = 0.0
            else:
                total = 0.9 * total + reward
                sums.append(total)

    of_obs, of_returns = agent.statistics
    assert len(raw) == 3 * 161
    assert round(of_obs.rms.count) == len(raw)
    assert round(of_returns.rms.count) == len(sums) < len(raw)
    # They begin as mean 0 and variance 1, which counts as a ten-thousandth of a sample.
    np.testing.assert_allclose(of_obs.mean, np.mean(raw, axis=0), rtol=1e-4)
    np.testing.assert_allclose(of_obs.var, np.var(raw, axis=0), rtol=0.1)
    np.testing.assert_allclose(of_returns.var, np.var(sums), rtol=1e-3)


class TenSteps(gym.Env):
    """Each step brings 1, and a time limit ends the episode after ten."""

    observation_space = gym.spaces.Box(0, 10, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.full(1, self.steps, np.float32)
        return obs, 1.0, False, self.steps == 10, {}


gym.register("TenSteps-v0", TenSteps)


def test_an_episode_s_rewards_do_not_change_the_scale_of_the_next_one_s():
    envs = environments("--env-id TenSteps-v0 --num-envs 2")
    envs.reset(seed=1)
    for _ in range(20 * 11):  # with the steps that only reset
        envs.step(envs.action_space.sample())
    _, of_returns = envs.statistics
    sums = [(1 - 0.99**n) / (1 - 0.99) for n in range(1, 11)]
    assert np.sqrt(of_returns.var) == pytest.approx(np.std(sums), rel=1e-3)


def test_the_agent_sees_normalized_observations_and_rewards_of_order_one():
    NOTES.clear()
    envs = environments()
    obs, _ = envs.reset(seed=1)
    seen, rewards = [], []
    for _ in range(300):
        obs, reward, *_ = envs.step(envs.action_space.sample())
        seen.append(obs.copy())
        rewards.append(reward)

    of_obs, _ = envs.statistics
    _, last_raw, *_ = NOTES[1][-1]
    expected = (last_raw - of_obs.mean) / np.sqrt(of_obs.var + 1e-8)
    np.testing.assert_allclose(obs[0], expected, atol=1e-4)
    assert obs.dtype == np.float32
    assert 0.8 < np.std(seen[100:]) < 1.2
    assert abs(np.mean(seen[100:])) < 0.2
    assert 0.05 < np.std(rewards[100:]) < 2


def test_outliers_are_clipped_to_ten():
    envs = environments()
    envs.reset(seed=1)
    for _ in range(50):
        envs.step(envs.action_space.sample())
    for kind in envs.statistics:
        kind.rms.var = kind.rms.var / 1e6
        kind.eval()  # or it would take in the next step, too
    obs, reward, *_ = envs.step(envs.action_space.sample())
    assert np.abs(obs).max() == 10
    assert np.abs(reward).max() == 10


def test_printed_returns_are_the_environments_own(train):
    episodes = train(NOTING + "--total-timesteps 480").episodes
    expected = []
    for notes in NOTES.values():
        total = length = 0
        for action, _, reward, terminated, truncated in notes:
            if action is None:
                total = length = 0
                continue
            total += reward
            length += 1
            if terminated or truncated:
                expected.append((total, length))
    printed = [(episodic_return, length) for _, episodic_return, length in episodes]
    assert len(printed) > 50
    assert sorted(printed) == sorted(expected)


# Whole runs


@pytest.mark.parametrize(
    "flags",
    [
        "--env-id Hopper-v5 --num-steps 512 --num-minibatches 8 --update-epochs 2 "
        "--total-timesteps 1536 --seed 3",
        "--env-id HalfCheetah-v5 --num-envs 3 --num-steps 100 --num-minibatches 6 "
        "--update-epochs 2 --total-timesteps 1200 --ent-coef 0.1 --seed 4",
        PENDULUM + "--total-timesteps 2000 --gamma 0.9",
    ],
)
def test_it_equals_a_plain_loop_to_the_last_bit(train, capsys, flags):
    result = train(flags)
    args = ppo.parse_args(flags.split(), **DEFAULTS)
    plain, *plain_statistics = plain_continuous.train(args)
    assert result.episodes == parse_episodes(capsys.readouterr().out)
    assert result.episodes or "HalfCheetah" in flags  # whose episodes are longer

    parameters = dict(result.agent.named_parameters())
    expected = dict(plain.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(parameters[name].equal(expected[name]) for name in expected)
    for ours, theirs in zip(result.agent.statistics, plain_statistics, strict=True):
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        np.testing.assert_array_equal(ours.var, theirs.var)


def test_worker_processes_give_the_same_episodes(train):
    flags = PENDULUM + "--total-timesteps 800 --vectorization-mode "
    assert train(flags + "async").episodes == train(flags + "sync").episodes != []


def test_a_resumed_run_goes_on_with_its_statistics_as_if_nothing_had_happened(train):
    whole = train(PENDULUM + "--total-timesteps 1600")
    first = train(PENDULUM + "--total-timesteps 800")
    resumed = train(f"--resume {first.folder} --total-timesteps 1600")
    assert "new episodes" not in resumed.out
    assert first.episodes + resumed.episodes == whole.episodes
    assert resumed.episodes

    expected = whole.agent.state_dict()
    state_dict = resumed.agent.state_dict()
    assert statistics(state_dict) == statistics(expected)
    parameters = [name for name, _ in whole.agent.named_parameters()]
    assert all(state_dict[name].equal(expected[name]) for name in parameters)


def test_statistics_are_kept_where_an_environment_cannot_be(train):
    """The first observation after a resume is normalized by them."""
    first_seen = []

    class LookingAgent(Agent):
        __module__ = Agent.__module__  # or a checkpoint would name another program

        def get_action(self, obs):
            first_seen[:] = first_seen or [obs.numpy().copy()]
            return super().get_action(obs)

    first = train(INVERTED + "--total-timesteps 512")
    saved = statistics(ppo.load_checkpoint(first.folder)["agent"])
    assert saved == statistics(first.agent.state_dict())

    flags = f"--resume {first.folder} --total-timesteps 640"
    resumed = train(flags, Agent=LookingAgent)
    assert "new episodes" in resumed.out
    mean, variance, count, *_ = saved
    raw, _ = gym.make("InvertedPendulum-v5").reset(seed=1 + 512)
    expected = (raw - mean) / np.sqrt(variance)
    np.testing.assert_allclose(first_seen[0][0], expected, atol=0.05)

    # They have seen 128 steps more, and the observation of the reset.
    count_now = statistics(resumed.agent.state_dict())[2]
    assert round(count_now - count) == 129


def test_evaluation_freezes_the_statistics(train):
    trained = train(PENDULUM + "--total-timesteps 1200")
    envs = environments(PENDULUM)
    agent = Agent(envs)
    agent.load_state_dict(ppo.load_checkpoint(trained.folder)["agent"])
    before = statistics(agent.state_dict())
    mean, variance, count, *_ = before
    assert round(count) == 2 * 601

    agent.eval()
    obs, _ = envs.reset(seed=5)
    for _ in range(20):
        action = agent.get_policy(torch.as_tensor(obs)).mode
        obs, *_ = envs.step(action.detach().numpy())
    assert statistics(agent.state_dict()) == before
    raw = np.array(envs.unwrapped.call("_get_obs"))
    expected = (raw - mean) / np.sqrt(np.array(variance) + 1e-8)
    np.testing.assert_allclose(obs, expected, atol=1e-5)

    agent.train()
    envs.step(envs.action_space.sample())
    assert statistics(agent.state_dict()) != before


def test_evaluate_plays_with_the_saved_statistics(train):
    trained = train(PENDULUM + "--total-timesteps 1200")
    flags = ["--episodes", "1", "--deterministic", "--seed", "7"]
    (episodic_return,) = evaluate.main([str(trained.folder), *flags])

    mean, variance, *_ = statistics(trained.agent.state_dict())
    env = gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=7)
    truncated = False
    total = 0.0
    while not truncated:
        seen = (obs - np.float32(mean)) / np.sqrt(np.float32(variance) + 1e-8)
        seen = torch.Tensor(np.clip(seen, -10, 10))
        action = trained.agent.get_policy(seen[None]).mode[0].detach().numpy()
        obs, reward, _, truncated, _ = env.step(np.clip(action, -2, 2))
        total += reward
    assert episodic_return == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id CartPole-v1", "python ppo.py"),
        ("--env-id Whole-v0", "Box of real numbers"),
        ("--env-id Square-v0", "Box of real numbers"),
        (
            "--env-id Pendulum-v1 --vectorization-mode vector_entry_point",
            "sync or async",
        ),
    ],
)
def test_what_it_cannot_do_gets_one_line(fails, flags, words):
    code, line = fails(flags, make_envs=make_envs, Agent=Agent, **DEFAULTS)
    assert code == 2
    assert words in line


def test_ppo_names_the_program_for_continuous_actions(fails):
    code, line = fails("--env-id Pendulum-v1")
    assert code == 2
    assert f"there is {PROGRAM.name}" in line


@pytest.mark.slow
def test_it_learns_to_balance_a_pendulum(train):
    flags = "--env-id InvertedPendulum-v5 --total-timesteps 20480 "
    flags += "--num-minibatches 8 --learning-rate 0.001"
    episodes = train(flags).episodes
    returns = [episodic_return for _, episodic_return, _ in episodes]
    assert np.mean(returns[:20]) < 40
    assert np.mean(returns[-10:]) > 200


def wait_for_checkpoint():
    """Wait until the newest run has saved itself, and return its folder."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if list(Path("runs").glob("*/checkpoint.pt")):
            return ppo.find_run("newest")
        time.sleep(0.1)
    pytest.fail("no checkpoint came")


@pytest.mark.slow
def test_the_command_trains_is_killed_is_resumed_and_is_watched():
    flags = "--env-id Hopper-v5 --num-steps 256 --num-minibatches 8 --update-epochs 4"
    flags += " --total-timesteps 7680 --checkpoint-interval 1e-9"
    process = start(PROGRAM, *flags.split())
    folder = wait_for_checkpoint()
    process.send_signal(signal.SIGKILL)
    assert finish(process).code == -signal.SIGKILL
    before = ppo.load_checkpoint(folder)
    assert before["global_step"] < 7680

    result = finish(start(PROGRAM, "--resume"))
    assert result.code == 0, result.err
    after = ppo.load_checkpoint(folder)
    assert after["global_step"] == 7680
    # Each step of the run is counted once, and so is each reset.
    counts = [round(statistics(saved["agent"])[2]) for saved in (before, after)]
    assert counts == [before["global_step"] + 1, 7680 + 2]

    result = finish(start(ROOT / "evaluate.py", folder, "--episodes", 2))
    assert result.code == 0, result.err
    assert "mean=" in result.out


@pytest.mark.slow
def test_torchrun_trains_one_policy():
    result = finish(torchrun(PENDULUM + "--total-timesteps 800", script=PROGRAM))
    assert result.code == 0, result.err
    assert result.episodes
    saved = ppo.load_checkpoint(ppo.find_run("newest"))
    assert round(statistics(saved["agent"])[2]) == 401
