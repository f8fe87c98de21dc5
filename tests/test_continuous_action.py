"""Continuous actions: a normal distribution, clipped actions, statistics that are right, kept, and frozen in use."""

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import launch, parse_episodes, result_of

import evaluate
import ppo
from benchmark import plain_continuous
from variants.continuous_action import DEFAULTS, Agent, make_envs

SMALL = "--env-id test_continuous_action:Noting-v0 --num-envs 3 --num-steps 40 --num-minibatches 4 --update-epochs 2 "
PENDULUM = "--env-id Pendulum-v1 --num-envs 2 --num-steps 200 --num-minibatches 4 --update-epochs 2 --no-anneal-lr "


class Noting(gym.Env):
    """Odd scales, seven steps or (a time limit) nine an episode; notes what it gets and gives."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.float32([-0.5, 0]), np.float32([1, 0.25]))
    notes = {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.note = self.notes[seed] = []
        self.steps, self.episode = 0, getattr(self, "episode", -1) + 1
        obs = self.np_random.normal([1000, -3], [50, 0.01])
        self.note.append((None, obs, 0.0, False, False))
        return obs, {}

    def step(self, action):
        self.steps += 1
        obs, reward = self.np_random.normal([1000, -3], [50, 0.01]), self.np_random.normal(200, 100)
        over = self.steps == 7 and self.episode % 2 == 0, self.steps == 9
        self.note.append((action.copy(), obs, reward, *over))
        return obs, reward, *over, {}


gym.register("Noting-v0", Noting)


class KeepingAgent(Agent):
    kept = []  # observations and actions as they are in the update

    def get_action_and_value(self, obs, action=None):
        if action is not None:
            self.kept.append((obs, action))
        return super().get_action_and_value(obs, action)


class FirstLookAgent(Agent):
    first = None  # the observation that the run begins with

    def get_action_and_value(self, obs, action=None):
        FirstLookAgent.first = obs.numpy()[0] if self.first is None else self.first
        return super().get_action_and_value(obs, action)


@pytest.fixture
def train(capsys, workdir):
    """train("--seed 2") as the module's command would, in this process; returns the agent and what was printed."""
    Noting.notes.clear()
    KeepingAgent.kept.clear()

    def train(flags, Agent=Agent):
        agent = ppo.train(ppo.parse_args(flags.split(), **DEFAULTS), make_envs, Agent)
        return agent, capsys.readouterr().out

    return train


def environments(flags=SMALL):
    args = ppo.parse_args(flags.split(), **DEFAULTS)
    return args, make_envs(args, args.num_envs, args.seed)


def folder():
    return max(Path("runs").glob("*"), key=os.path.getmtime)


def state(agent):
    """All running statistics in one list of numbers."""
    return [x.tolist() if hasattr(x, "tolist") else x for rms in agent.get_extra_state() for x in rms]


def test_log_probability_and_entropy_are_those_of_a_normal_distribution():
    _, envs = environments()
    agent, obs = Agent(envs), torch.randn(50, 2)
    torch.nn.init.normal_(agent.actor_logstd)
    torch.nn.init.orthogonal_(agent.actor[-1].weight)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    policy = torch.distributions.MultivariateNormal(agent.actor(obs), torch.diag(agent.actor_logstd.exp() ** 2))
    assert logprob.allclose(policy.log_prob(action), atol=1e-5) and entropy.allclose(policy.entropy())
    assert logprob.shape == entropy.shape == value.shape == (50,) and action.shape == (50, 2)
    again = agent.get_action_and_value(obs, action)
    assert all(x.equal(y) for x, y in zip(again, (action, logprob, entropy, value), strict=True))


def test_actions_are_drawn_around_the_mean_and_the_best_one_is_the_mean():
    _, envs = environments()
    agent, obs = Agent(envs), torch.randn(1, 2).expand(40000, 2)
    agent.actor_logstd.data = torch.tensor([0.0, -2.0])
    drawn, best = agent.get_action_and_value(obs)[0], agent.get_best_action(obs)[0]
    assert drawn.mean(0).allclose(best, atol=0.02) and best.equal(agent.actor(obs)[0])
    assert drawn.std(0).allclose(agent.actor_logstd.exp(), rtol=0.02)


def test_the_deviation_is_one_at_first_and_learned_whatever_the_state():
    _, envs = environments()
    agent = Agent(envs)
    assert agent.actor_logstd.equal(torch.zeros(2)) and agent.actor_logstd.requires_grad


def test_actor_and_critic_share_nothing():
    _, envs = environments()
    agent = Agent(envs)
    agent.get_value(torch.randn(5, 2)).sum().backward()
    assert all(x.grad is None for x in (*agent.actor.parameters(), agent.actor_logstd))
    assert not {id(x) for x in agent.actor.parameters()} & {id(x) for x in agent.critic.parameters()}


def test_environments_get_clipped_actions_and_the_learner_keeps_what_was_drawn(train):
    train(SMALL + "--total-timesteps 120 --update-epochs 1", KeepingAgent)
    drawn = np.concatenate([action.numpy() for _, action in KeepingAgent.kept])
    received = np.array([action for note in Noting.notes.values() for action, *_ in note if action is not None])
    low, high = Noting.action_space.low, Noting.action_space.high
    assert (drawn < low).any() and (drawn > high).any(), "nothing to clip"
    assert sorted(np.clip(drawn, low, high).tolist()) == sorted(received.tolist())


def test_statistics_are_those_of_all_observations_and_of_the_discounted_sums_of_rewards(train):
    agent, _ = train(SMALL + "--total-timesteps 480 --gamma 0.9")
    raw, sums = [], []
    for note in Noting.notes.values():
        total = 0.0
        for action, obs, reward, terminated, _ in note:
            raw.append(obs)
            if action is not None:
                total = total * 0.9 * (not terminated) + reward
                sums.append(total)
    obs, returns = agent.statistics()
    assert len(raw) == 3 * 161 and round(obs.count) == len(raw) and round(returns.count) == len(sums) < len(raw)
    np.testing.assert_allclose(obs.mean, np.mean(raw, 0), rtol=1e-4)
    np.testing.assert_allclose(obs.var, np.var(raw, 0), rtol=0.1)  # they begin as mean 0 and variance 1, of weight 1e-4
    np.testing.assert_allclose(returns.var, np.var(sums), rtol=1e-3)


def test_the_agent_sees_normalized_and_clipped_observations_and_rewards_of_order_one(monkeypatch):
    args, envs = environments()
    next_obs, rewards = [envs.reset(seed=1)[0]], []
    for _ in range(300):
        obs, reward, *_ = envs.step(envs.action_space.sample())
        next_obs.append(obs)
        rewards.append(reward)
    rms, raw = envs.env.env.env.obs_rms, Noting.notes[1][-1][1]
    assert obs.dtype == np.float32
    assert np.allclose(obs[0], (raw - rms.mean) / np.sqrt(rms.var + 1e-8), atol=1e-4)
    assert 0.8 < np.std(next_obs[100:]) < 1.2 and abs(np.mean(next_obs[100:])) < 0.2
    assert np.abs(next_obs).max() <= 10 and 0.05 < np.std(rewards[100:]) < 2
    monkeypatch.setattr(rms, "var", rms.var / 1e6)
    envs.env.env.return_rms.var /= 1e6
    obs, reward, *_ = envs.step(envs.action_space.sample())
    assert np.abs(obs).max() == np.abs(reward).max() == 10, "not clipped"


def test_printed_returns_are_raw(train):
    _, out = train(SMALL + "--total-timesteps 480")
    expected = []
    for note in Noting.notes.values():
        total, length = 0.0, 0
        for action, _, reward, terminated, truncated in note:
            total, length = (total + reward, length + 1) if action is not None else (0.0, 0)
            expected += [(total, length)] if terminated or truncated else []
    assert sorted((r, n) for _, r, n in parse_episodes(out)) == sorted(expected) and len(expected) > 50


@pytest.mark.parametrize(
    "flags",
    [
        "--env-id Hopper-v5 --num-steps 512 --num-minibatches 8 --update-epochs 2 --total-timesteps 2048 --seed 3",
        "--env-id HalfCheetah-v5 --num-envs 3 --num-steps 100 --num-minibatches 6 --total-timesteps 2100 --ent-coef 0.1"
        " --update-epochs 2 --seed 4",
        PENDULUM + "--total-timesteps 3200 --gamma 0.9",
    ],
)
def test_equals_a_plain_loop_to_the_last_bit(train, capsys, flags):
    agent, out = train(flags)
    plain, *statistics = plain_continuous.train(ppo.parse_args(flags.split(), **DEFAULTS))
    expected = capsys.readouterr().out
    assert parse_episodes(out) == parse_episodes(expected) and (parse_episodes(out) or "Cheetah" in flags)
    params = dict(plain.named_parameters())
    assert all(params.pop(name).equal(x) for name, x in agent.named_parameters()) and not params
    for ours, theirs in zip(agent.statistics(), statistics, strict=True):
        assert np.array_equal(ours.mean, theirs.mean) and np.array_equal(ours.var, theirs.var)


def test_worker_processes_give_the_same_episodes(train):
    flags = PENDULUM + "--total-timesteps 1600 --vectorization-mode "
    assert parse_episodes(train(flags + "async")[1]) == parse_episodes(train(flags + "sync")[1]) != []


def test_a_resumed_run_goes_on_with_its_statistics_as_if_nothing_had_happened(train):
    whole, out = train(PENDULUM + "--total-timesteps 2400")
    train(PENDULUM + "--total-timesteps 1200")
    resumed, rest = train(f"{PENDULUM} --total-timesteps 2400 --resume {folder()}")
    assert "could not be saved" not in rest and state(resumed) == state(whole)
    assert parse_episodes(rest) == [x for x in parse_episodes(out) if x[0] > 1200] != []
    assert all(x.equal(y) for x, y in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_where_an_environment_cannot_be_saved_its_statistics_are(train):
    flags = "--env-id InvertedPendulum-v5 --num-steps 128 --num-minibatches 4 --no-anneal-lr "
    first, _ = train(flags + "--total-timesteps 512")
    saved = ppo.load_checkpoint(str(folder()))[1]["agent"]["_extra_state"]
    assert [x.tolist() if hasattr(x, "tolist") else x for rms in saved for x in rms] == state(first)
    resumed, out = train(f"{flags} --total-timesteps 640 --resume {folder()}")
    assert "new episodes start" in out
    assert 128 <= resumed.statistics()[0].count - first.statistics()[0].count <= 129  # one more is of the new reset


def test_the_first_observation_after_a_resume_is_normalized_by_the_saved_statistics(train):
    flags = "--env-id InvertedPendulum-v5 --num-steps 128 --num-minibatches 4 --no-anneal-lr --update-epochs 1 "
    mean, var, *_ = state(train(flags + "--total-timesteps 512")[0])
    train(f"{flags} --total-timesteps 640 --resume {folder()}", FirstLookAgent)
    raw, _ = gym.make("InvertedPendulum-v5").reset(seed=1 + 512)
    assert np.allclose(FirstLookAgent.first, (raw - mean) / np.sqrt(var), atol=0.05)


def test_evaluation_freezes_the_statistics(train):
    train(PENDULUM + "--total-timesteps 1200")
    _, checkpoint = ppo.load_checkpoint(str(folder()))
    args, envs = environments(PENDULUM)
    agent = Agent(envs)
    agent.load_state_dict(checkpoint["agent"])
    before = state(agent.eval())
    assert round(before[2]) == 2 * 601
    obs, _ = envs.reset(seed=5)
    for _ in range(20):
        obs, *_ = envs.step(agent.get_best_action(torch.from_numpy(obs)).detach().numpy())
    assert state(agent) == before and not agent.training, "not frozen"
    raw = np.array(envs.unwrapped.call("_get_obs"))
    assert np.allclose(obs, (raw - before[0]) / np.sqrt(np.array(before[1]) + 1e-8), atol=1e-5)
    agent.train()
    envs.step(envs.action_space.sample())
    assert state(agent) != before, "frozen for ever"


def test_evaluate_plays_with_the_saved_statistics(train, capsys):
    """Without them each observation would be divided by other numbers, and the return be another one."""
    agent, _ = train(PENDULUM + "--total-timesteps 1200")
    evaluate.main([str(folder()), "--episodes", "1", "--deterministic", "--seed", "7"])
    (printed,) = [float(x.split("=")[-1]) for x in capsys.readouterr().out.splitlines() if x.startswith("episode=0")]
    env, (mean, var, *_) = gym.make("Pendulum-v1"), state(agent)
    obs, over, total = env.reset(seed=7)[0], False, 0.0
    while not over:
        seen = np.clip((obs - np.float32(mean)) / np.sqrt(np.float32(var) + 1e-8), -10, 10)
        action = agent.get_best_action(torch.Tensor(seen)[None])[0].detach().numpy()
        obs, reward, _, over, _ = env.step(np.clip(action, -2, 2))
        total += reward
    assert printed == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id CartPole-v1", "python ppo.py"),
        ("--env-id test_continuous_action:Whole-v0", "Box of real numbers"),
        ("--env-id test_continuous_action:Square-v0", "Box of real numbers"),
        ("--env-id Pendulum-v1 --vectorization-mode vector_entry_point", "sync or async"),
    ],
)
def test_what_it_cannot_do_gets_one_line_and_leaves_nothing_behind(capsys, workdir, flags, words):
    with pytest.raises(SystemExit) as exit_info:
        ppo.main(flags.split(), make_envs=make_envs, Agent=Agent, **DEFAULTS)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line and "logger" not in line]
    assert exit_info.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not any(workdir.iterdir())


class Whole(Noting):
    action_space = gym.spaces.Box(0, 5, (2,), np.int64)


class Square(Noting):
    action_space = gym.spaces.Box(0, 1, (2, 2))


gym.register("Whole-v0", Whole)
gym.register("Square-v0", Square)


def test_ppo_itself_names_the_program_for_continuous_actions(fails):
    assert "python -m variants.continuous_action" in fails("--env-id Pendulum-v1")[1]


@pytest.mark.slow
def test_learns_to_balance_a_pendulum(train):
    _, out = train("--env-id InvertedPendulum-v5 --total-timesteps 30720")
    assert (
        np.mean([r for _, r, _ in parse_episodes(out)][:20])
        < 40
        < 200
        < np.mean([r for _, r, _ in parse_episodes(out)][-10:])
    )


@pytest.mark.slow
def test_the_command_trains_is_killed_is_resumed_and_is_watched(workdir):
    flags = "--env-id Hopper-v5 --num-steps 256 --num-minibatches 8 --total-timesteps 7680 --checkpoint-interval 1e-9"
    process = launch("-m", "variants.continuous_action", *flags.split())
    deadline = time.monotonic() + 100
    while not list(Path("runs").glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert result_of(process).code == -signal.SIGKILL
    before = ppo.load_checkpoint(str(folder()))[1]
    result = result_of(launch("-m", "variants.continuous_action", "--resume"))
    assert result.code == 0, result.err
    after = ppo.load_checkpoint(str(folder()))[1]
    counts = [round(x["agent"]["_extra_state"][0][2]) for x in (before, after)]
    played = (30 - before["update"]) * 256
    assert after["update"] == 30 and counts[0] == 7681 - played and counts[1] - counts[0] in (played, played + 1)
    result = result_of(launch(Path(ppo.__file__).parent / "evaluate.py", folder(), "--episodes", 2))
    assert result.code == 0 and "mean=" in result.out, result.err


@pytest.mark.slow
def test_torchrun_trains_one_policy(workdir):
    options = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    flags = PENDULUM + "--total-timesteps 1600"
    result = result_of(launch(*options, "-m", "variants.continuous_action", *flags.split()))
    assert result.code == 0 and parse_episodes(result.out), result.err
    assert round(ppo.load_checkpoint(str(folder()))[1]["agent"]["_extra_state"][0][2]) == 801
