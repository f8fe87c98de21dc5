"""Atari games: what the agent sees is what the comments say, and lost lives end its episodes, but not the games."""

import os
import signal
import time
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import frames, launch, parse_episodes, result_of

import evaluate
import ppo
from benchmark import plain_atari
from variants.atari import DEFAULTS, Agent, LostLives, make_envs

SMALL = "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1 "
SLOW = "--total-timesteps 4096 --update-epochs 2 --ent-coef 0.1 --env-id ALE/Pong-v5 --max-grad-norm 0.1 --seed 5"


class KeepingAgent(Agent):
    kept = []  # observations and actions as they are in the update

    def get_action_and_value(self, obs, action=None):
        if action is not None:
            self.kept.append((obs, action))
        return super().get_action_and_value(obs, action)


@pytest.fixture
def train(capsys, workdir):
    """train("--seed 2") as the module's command would, in this process; returns the agent and what was printed."""

    def train(flags, Agent=Agent, make_envs=make_envs):
        agent = ppo.train(ppo.parse_args(flags.split(), **DEFAULTS), make_envs, Agent)
        return agent, capsys.readouterr().out

    return train


def environments(flags=""):
    args = ppo.parse_args(flags.split(), **DEFAULTS)
    return make_envs(args, args.num_envs, args.seed)


def folder():
    return max(Path("runs").glob("*"), key=os.path.getmtime)


def plain_game(num_envs, seed, game="breakout", **options):
    """ale-py's batch without wrappers, and its answer to reset."""
    games = ale_py.AtariVectorEnv(game, num_envs, reward_clipping=False, **options)
    return games, games.reset(seed=seed)


def shrink(screen):
    """84x84 pixels, each the mean of the area that it covers of 210x160."""

    def areas(size):
        edges = np.linspace(0, size, 85)
        low, high = np.maximum.outer(edges[:-1], np.arange(size)), np.minimum.outer(edges[1:], np.arange(1, size + 1))
        return np.maximum(high - low, 0) * 84 / size

    return areas(210) @ screen @ areas(160).T


def test_the_agent_sees_the_last_four_pictures_each_the_brighter_of_two_frames_in_84x84_gray():
    envs = environments("--env-id ALE/SpaceInvaders-v5 --num-envs 1 --seed 5")
    obs, infos = envs.reset(seed=5)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path("space_invaders"))
    buttons, pictures, flickers = ale.getMinimalActionSet(), [], 0
    ale.act(ale_py.Action.FIRE)
    for _ in range(infos["frame_number"][0] - 1):  # so many frames were fire, then nothing
        ale.act(ale_py.Action.NOOP)
    for action in np.random.default_rng(0).integers(0, len(buttons), 60):
        obs, *_ = envs.step(np.array([action]))
        screens = []
        for _ in range(4):
            ale.act(buttons[action])
            screens.append(ale.getScreenGrayscale())
        flickers += (screens[2] != screens[3]).any()
        pictures.append(shrink(np.maximum(screens[2], screens[3])))
        if len(pictures) >= 4:
            assert np.abs(obs[0] - np.array(pictures[-4:])).max() <= 1  # rounding
    assert obs.shape == (1, 4, 84, 84) and obs.dtype == np.uint8 and flickers > 0


def test_games_begin_after_fire_and_up_to_29_frames_in_which_nothing_is_done():
    envs = environments("--num-envs 1")
    starts = [int(envs.reset(seed=seed)[1]["frame_number"][0]) for seed in (1, 1, 2)]
    assert starts[0] == starts[1] != starts[2], "not by the seed"
    games = envs.unwrapped
    starts = {int(games.reset()[1]["episode_frame_number"][0]) for _ in range(200)}
    assert 1 <= min(starts) < 5 and 25 < max(starts) <= 29


def test_actions_are_never_replaced_by_the_last_one():
    """Sticky actions, the default of ALE/...-v5, would part two games with the same start and the same actions."""
    envs = environments("--num-envs 1")
    frames = []
    for _ in range(2):
        envs.reset(seed=1)
        rng = np.random.default_rng(0)
        frames.append([envs.step(rng.integers(0, 4, 1))[0].sum() for _ in range(100)])
    assert frames[0] == frames[1] and envs.unwrapped.spec.kwargs["repeat_action_probability"] == 0


def test_seeds_are_those_of_the_sub_environments_and_may_be_large():
    envs = environments("--num-envs 3")
    together = envs.reset(seed=7)[0]
    for i in range(3):
        assert (environments("--num-envs 1").reset(seed=7 + i)[0] == together[i]).all()
    envs.reset(seed=2**32 - 1)


def test_the_learner_gets_signs_and_the_record_gets_points():
    envs = environments("--env-id ALE/SpaceInvaders-v5 --num-envs 2")
    envs.reset(seed=1)
    games, _ = plain_game(2, 1, "space_invaders", life_loss_info=True)
    rng, points, learned, records = np.random.default_rng(0), np.zeros(2), set(), 0
    lost, over = np.zeros((2, 2), bool)
    for _ in range(1000):
        actions = rng.integers(0, 6, 2)
        _, rewards, terminations, truncations, infos = envs.step(actions)
        learned |= set(rewards.tolist())
        _, raw, terminated, truncated, raw_infos = games.step(np.where(lost, 1, actions))  # 1 is fire
        assert (terminations == terminated).all() and (truncations == truncated).all()
        points = np.where(over, 0, points + raw)
        lost = terminated & (raw_infos["lives"] > 0)
        over = (terminated | truncated) & ~lost
        assert over.tolist() == infos.get("_episode_statistics", np.zeros(2, bool)).tolist()
        if over.any():
            assert infos["episode_statistics"]["r"][over].tolist() == points[over].tolist() and points.max() > 10
            records += 1
    assert learned == {0, 1} and records >= 2


def test_a_lost_life_ends_the_episode_and_fire_is_pressed_but_the_game_goes_on():
    envs = environments("--num-envs 1")
    _, infos = envs.reset(seed=1)
    ends, games, last, rng = 0, 0, infos, np.random.default_rng(0)
    while games < 2:
        obs, _, terminations, truncations, infos = envs.step(rng.integers(2, 4, 1))  # never fire
        lives = infos["lives"][0]
        assert terminations[0] == (lives < last["lives"][0]) and not truncations[0]
        assert ("episode_statistics" in infos) == (terminations[0] and lives == 0)
        if terminations[0]:
            ends += 1
            if lives:
                frame = infos["episode_frame_number"][0]
                _, _, terminations, _, infos = envs.step(np.array([2]))
                assert infos["episode_frame_number"][0] == frame + 4 and not terminations[0], "not the same game"
                assert infos["lives"][0] == lives
            else:
                games, length = games + 1, infos["episode_statistics"]["l"][0]
                assert infos["episode_frame_number"][0] - 29 <= 4 * length <= infos["episode_frame_number"][0]
                _, _, terminations, _, infos = envs.step(np.array([2]))
                assert infos["episode_frame_number"][0] < 30 and infos["lives"][0] == 5, "no new game"
        last = infos
        assert ends <= 5 * (games + 1)
    assert ends == 10, "without fire, which nobody else presses, the ball would never come back"


def test_a_game_without_a_fire_button_or_lives_is_one_episode():
    envs = environments("--env-id ALE/Freeway-v5 --num-envs 1")
    envs.reset(seed=1)
    while True:
        _, _, terminations, truncations, infos = envs.step(np.array([1]))
        if terminations[0] or truncations[0]:
            break
    assert infos["episode_statistics"]["r"][0] > 10 and infos["episode_statistics"]["l"][0] > 1000


def test_advantages_end_at_a_lost_life_and_the_step_after_it_is_not_learned_from(train, monkeypatch):
    seen, compute = {}, ppo.compute_advantages

    def keep(rewards, values, dones, *options):
        seen.update(rewards=rewards.copy(), values=values.copy(), dones=dones.copy())
        seen["advantages"], returns = compute(rewards, values, dones, *options)
        return seen["advantages"], returns

    monkeypatch.setattr(ppo, "compute_advantages", keep)
    KeepingAgent.kept.clear()
    _, out = train(SMALL + "--num-steps 256 --total-timesteps 512", KeepingAgent)
    ends = seen["dones"][1:] == 1
    assert ends.sum() >= 2 * len(parse_episodes(out)) > 0, "no lives were lost, but for the last"
    assert (seen["advantages"] == seen["rewards"] - seen["values"][:-1])[ends].all()
    learned = sum(len(action) for _, action in KeepingAgent.kept)
    assert learned == 512 - ends[:-1].sum()


def test_pixels_are_divided_by_255_wherever_the_network_is_used():
    agent, obs = Agent(environments("--num-envs 1")), torch.full((3, 4, 84, 84), 255, dtype=torch.uint8)
    inputs = []
    agent.network[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    agent.get_value(obs), agent.get_action_and_value(obs), agent.get_best_action(obs)
    assert len(inputs) == 3 and all(x.dtype == torch.float32 and (x == 1).all() for x in inputs)


def test_actor_and_critic_share_one_network_and_one_pass():
    agent, obs = Agent(environments("--num-envs 1")), torch.randint(255, (6, 4, 84, 84), dtype=torch.uint8)
    passes = []
    agent.network.register_forward_hook(lambda *args: passes.append(1))
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    assert len(passes) == 1 and action.shape == logprob.shape == entropy.shape == value.shape == (6,)
    for output in (logprob.sum(), value.sum()):
        agent.zero_grad()
        output.backward(retain_graph=True)
        assert all(x.grad.abs().sum() > 0 for x in agent.network.parameters())
    assert agent.get_value(obs).allclose(value)
    logits = agent.actor(agent.network(obs / 255))
    assert logprob.allclose(logits.log_softmax(-1)[range(6), action]) and logits.abs().max() < 0.1
    assert agent.get_best_action(obs).equal(logits.argmax(-1))


def test_buffers_hold_bytes(train):
    KeepingAgent.kept.clear()
    train(SMALL + "--total-timesteps 128", KeepingAgent)
    assert {obs.dtype for obs, _ in KeepingAgent.kept} == {torch.uint8}


@pytest.mark.parametrize("flags", ["--total-timesteps 1024", pytest.param(SLOW, marks=pytest.mark.slow)])
def test_equals_a_plain_loop_to_the_last_bit(train, capsys, flags):
    flags = f"--num-envs 4 --num-steps 64 --update-epochs 1 {flags}"
    agent, out = train(flags)
    plain = plain_atari.train(ppo.parse_args(flags.split(), **DEFAULTS))
    assert parse_episodes(out) == parse_episodes(capsys.readouterr().out) and parse_episodes(out)
    params = dict(plain.named_parameters())
    assert all(params.pop(name).equal(x) for name, x in agent.named_parameters()) and not params


def test_videos_are_of_whole_games(train):
    _, out = train(SMALL + "--num-envs 1 --num-steps 400 --total-timesteps 400 --capture-video")
    _, _, length = parse_episodes(out)[0]
    (video,) = Path("videos").glob("*/*episode-0.mp4")
    pictures = frames(video)
    assert length <= len(pictures) <= length + 1 and pictures[0].shape == (336, 336, 3)  # moviepy may lose the last
    assert any((a != b).any() for a, b in zip(pictures, pictures[1:], strict=False))


def test_resumes_and_is_watched(train, capsys):
    train(SMALL + "--num-envs 1 --num-steps 200 --no-anneal-lr --total-timesteps 200")
    saved = ppo.load_checkpoint(str(folder()))[1]["agent"]
    args = f"{SMALL} --num-envs 1 --num-steps 200 --no-anneal-lr --total-timesteps 400 --resume {folder()}"
    agent, out = train(args)
    assert "new episodes start" in out and parse_episodes(out)[0][0] > 200
    assert agent.actor.bias.dist(saved["actor.bias"]) < 0.01
    evaluate.main([str(folder()), "--episodes", "1", "--capture-video"])
    assert "mean=" in capsys.readouterr().out and len(list(Path("videos").glob("*/evaluation/*.mp4"))) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id CartPole-v1", "python ppo.py"),
        ("--env-id Hopper-v5", "variants.continuous_action"),
        ("--env-id BreakoutNoFrameskip-v4", "ALE/Breakout-v5"),
        ("--env-id ALE/Brekout-v5", "Breakout"),
        ("--vectorization-mode sync", "vector_entry_point"),
    ],
)
def test_what_it_cannot_do_gets_one_line_and_leaves_nothing_behind(capsys, workdir, flags, words):
    with pytest.raises(SystemExit) as exit_info:
        ppo.main(flags.split(), make_envs=make_envs, Agent=Agent, **DEFAULTS)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line and "logger" not in line]
    assert exit_info.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not any(workdir.iterdir())


class Lamps(gym.Env):
    """A small game: a lamp shines in one of four corners; pressing the corner's number brings a point."""

    observation_space, action_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(4)

    def picture(self):
        self.corner = self.np_random.integers(4)
        obs, half = np.zeros((4, 84, 84), np.uint8), 42 * np.array(divmod(self.corner, 2))
        obs[:, half[0] + 10 : half[0] + 30, half[1] + 10 : half[1] + 30] = 200
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed if seed is None else int(seed))
        self.steps = 0
        return self.picture(), {"lives": 0}

    def step(self, action):
        self.steps += 1
        reward = float(action == self.corner)
        return self.picture(), reward, self.steps == 20, False, {"lives": 0}


def lamps(args, num_envs, seed, video=None, render_mode=None):
    envs = gym.vector.SyncVectorEnv([Lamps] * num_envs)
    envs.ale = type("ALE", (), {"get_action_set": lambda self: []})()
    return LostLives(gym.wrappers.vector.RecordEpisodeStatistics(envs, stats_key="episode_statistics"))


@pytest.mark.slow
def test_learns_what_it_sees(train):
    flags = "--num-steps 32 --total-timesteps 6144 --learning-rate 1e-3 --update-epochs 2"
    _, out = train(flags, make_envs=lamps)
    returns = [r for _, r, _ in parse_episodes(out)]
    assert np.mean(returns[:10]) < 9 and np.mean(returns[-10:]) > 15, returns


@pytest.mark.slow
def test_the_command_trains_is_killed_and_is_resumed(workdir):
    flags = SMALL + "--total-timesteps 4096 --checkpoint-interval 1e-9"
    process = launch("-m", "variants.atari", *flags.split())
    deadline = time.monotonic() + 100
    while not list(Path("runs").glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert result_of(process).code == -signal.SIGKILL
    before = ppo.load_checkpoint(str(folder()))[1]["update"]
    process = launch("-m", "variants.atari", "--resume", "--total-timesteps", "4096")
    while ppo.load_checkpoint(str(folder()))[1]["update"] < before + 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    result = result_of(process)
    assert result.code == 128 + signal.SIGTERM and "to go on" in result.out, result.err
