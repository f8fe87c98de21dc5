"""ppo_atari.py: what the agent sees, when its episodes end, and its network."""

import functools
import pickle
import signal
import time
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, finish, frames, parse_episodes, scalars, start
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import evaluate
import ppo
from ppo_atari import DEFAULTS, Agent, LostLives, make_envs
from tests.reference import plain_atari

PROGRAM = ROOT / "ppo_atari.py"
SMALL = "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1 "
FIRE = 1


@pytest.fixture
def train(run):
    """train(flags) trains as the program does, in this process; see run."""
    return functools.partial(run, make_envs=make_envs, Agent=Agent, **DEFAULTS)


def environments(flags=""):
    args = ppo.parse_args(flags.split(), **DEFAULTS)
    return make_envs(args, args.seed)


@pytest.fixture
def agent():
    torch.manual_seed(1)
    return Agent(environments("--num-envs 1"))


# What the agent sees


def shrink(screen):
    """84 x 84 pixels, each the mean of the area that it covers of 210 x 160."""
    return areas(210) @ screen @ areas(160).T


def areas(size):
    """How much of each old pixel lies in each new one, in parts of the new one."""
    edges = np.linspace(0, size, 85)
    low = np.maximum.outer(edges[:-1], np.arange(size))
    high = np.minimum.outer(edges[1:], np.arange(1, size + 1))
    return np.maximum(high - low, 0) * 84 / size


def test_it_sees_four_small_gray_pictures_each_the_brighter_of_two_frames():
    """The last frames of an emulator that is played in the same way say so."""
    envs = environments("--env-id ALE/SpaceInvaders-v5 --num-envs 1 --seed 5")
    obs, infos = envs.reset(seed=5)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path("space_invaders"))
    buttons = ale.getMinimalActionSet()
    ale.act(ale_py.Action.FIRE)
    for _ in range(infos["frame_number"][0] - 1):
        ale.act(ale_py.Action.NOOP)

    pictures = []
    flickers = 0
    for action in np.random.default_rng(0).integers(0, len(buttons), 60):
        obs, *_ = envs.step(np.array([action]))
        screens = []
        for _ in range(4):
            ale.act(buttons[action])
            screens.append(ale.getScreenGrayscale())
        flickers += (screens[2] != screens[3]).any()
        pictures.append(shrink(np.maximum(screens[2], screens[3])))
        if len(pictures) >= 4:
            assert np.abs(obs[0] - np.array(pictures[-4:])).max() <= 1  # it rounds
    assert obs.shape == (1, 4, 84, 84)
    assert obs.dtype == np.uint8
    assert flickers > 0


def test_games_begin_after_fire_and_up_to_29_frames_in_which_nothing_is_done():
    envs = environments("--num-envs 1")
    lengths = []
    for seed in (1, 1, 2):
        _, infos = envs.reset(seed=seed)
        lengths.append(int(infos["frame_number"][0]))
    assert lengths[0] == lengths[1] != lengths[2]

    lengths = set()
    for _ in range(100):
        _, infos = envs.unwrapped.reset()
        lengths.add(int(infos["episode_frame_number"][0]))
    assert 1 <= min(lengths) < 5
    assert 25 < max(lengths) <= 29


def test_actions_are_never_replaced_by_the_last_one():
    """Sticky actions would part two games with the same start and the same actions."""
    envs = environments("--num-envs 1")
    games = []
    for _ in range(2):
        envs.reset(seed=1)
        rng = np.random.default_rng(0)
        game = []
        for _ in range(100):
            obs, *_ = envs.step(rng.integers(0, 4, 1))
            game.append(obs.sum())
        games.append(game)
    assert games[0] == games[1]
    assert envs.unwrapped.spec.kwargs["repeat_action_probability"] == 0


def test_seeds_are_those_of_the_sub_environments_and_may_be_large():
    envs = environments("--num-envs 3")
    together, _ = envs.reset(seed=7)
    for i in range(3):
        alone, _ = environments("--num-envs 1").reset(seed=7 + i)
        np.testing.assert_array_equal(alone[0], together[i])
    envs.reset(seed=2**32 - 1)


# When episodes end


def test_the_learner_gets_signs_and_the_record_gets_points():
    """Both are compared with those of ale-py's batch without our wrappers."""
    envs = environments("--env-id ALE/SpaceInvaders-v5 --num-envs 2")
    envs.reset(seed=1)
    games = ale_py.AtariVectorEnv(
        "space_invaders", 2, reward_clipping=False, life_loss_info=True
    )
    games.reset(seed=1)

    rng = np.random.default_rng(0)
    points = np.zeros(2)
    lost = np.zeros(2, bool)
    over = np.zeros(2, bool)
    learned = set()
    records = 0
    for _ in range(1000):
        actions = rng.integers(0, 6, 2)
        _, rewards, terminations, truncations, infos = envs.step(actions)
        learned |= set(rewards.tolist())

        actions = np.where(lost, FIRE, actions)
        _, raw, terminated, truncated, raw_infos = games.step(actions)
        np.testing.assert_array_equal(terminations, terminated)
        np.testing.assert_array_equal(truncations, truncated)
        points = np.where(over, 0, points + raw)
        lost = terminated & (raw_infos["lives"] > 0)
        over = (terminated | truncated) & ~lost
        recorded = infos.get(f"_{ppo.STATISTICS}", np.zeros(2, bool))
        np.testing.assert_array_equal(recorded, over)
        if over.any():
            returns = infos[ppo.STATISTICS]["r"]
            np.testing.assert_array_equal(returns[over], points[over])
            assert points.max() > 10
            records += 1
    assert learned == {0, 1}
    assert records >= 2


def test_a_lost_life_ends_the_episode_and_fire_is_pressed_but_the_game_goes_on():
    """Without fire, which nobody else presses here, the ball would not come back."""
    envs = environments("--num-envs 1")
    left_or_right = functools.partial(np.random.default_rng(0).integers, 2, 4, 1)
    right = np.array([2])
    _, infos = envs.reset(seed=1)
    lives = infos["lives"][0]
    ends = games = 0
    while games < 2:
        _, _, terminations, truncations, infos = envs.step(left_or_right())
        assert terminations[0] == (infos["lives"][0] < lives)
        assert not truncations[0]
        lives = infos["lives"][0]
        is_recorded = ppo.STATISTICS in infos
        assert is_recorded == (terminations[0] and lives == 0)
        if not terminations[0]:
            continue

        ends += 1
        assert ends <= 10
        frame = infos["episode_frame_number"][0]
        if is_recorded:
            games += 1
            length = infos[ppo.STATISTICS]["l"][0]
            assert frame - 29 <= 4 * length <= frame
        _, _, terminations, _, infos = envs.step(right)
        next_frame = infos["episode_frame_number"][0]
        if is_recorded:
            assert next_frame < 30  # of a new game
            assert infos["lives"][0] == 5
        else:
            assert next_frame == frame + 4  # of the same game
            assert infos["lives"][0] == lives
            assert not terminations[0]
        lives = infos["lives"][0]
    assert ends == 10


def test_a_game_without_a_fire_button_or_lives_is_one_episode():
    envs = environments("--env-id ALE/Freeway-v5 --num-envs 1")
    envs.reset(seed=1)
    over = np.zeros(1, bool)
    while not over[0]:
        _, _, terminations, truncations, infos = envs.step(np.array([1]))
        over = terminations | truncations
    assert infos[ppo.STATISTICS]["r"][0] > 10
    assert infos[ppo.STATISTICS]["l"][0] > 1000


class Noting(gym.vector.VectorWrapper):
    """Notes (rewards, over) of each step."""

    def __init__(self, envs, notes):
        super().__init__(envs)
        self.notes = notes

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = super().step(actions)
        self.notes.append((rewards, terminations | truncations))
        return obs, rewards, terminations, truncations, infos


def test_returns_end_at_a_lost_life_and_the_step_after_it_is_not_learned_from(train):
    """The critic says 0 to all, so the value loss is half the mean square of them."""
    notes = []
    learned = []

    class BlindAgent(Agent):
        def get_value(self, obs):
            return torch.zeros(len(obs))

        def evaluate_actions(self, obs, action):
            logprob, entropy, value = super().evaluate_actions(obs, action)
            learned.append(len(obs))
            return logprob, entropy, 0 * value

    result = train(
        "--num-envs 2 --num-steps 256 --total-timesteps 512 --num-minibatches 1 "
        "--update-epochs 1 --gae-lambda 1 --gamma 0.9",
        make_envs=lambda args, seed, video: Noting(make_envs(args, seed), notes),
        Agent=BlindAgent,
    )
    rewards, over = map(np.array, zip(*notes, strict=True))
    lives_lost = over.sum() - len(result.episodes)
    assert lives_lost >= 4
    assert rewards.any()

    follows_an_end = np.zeros_like(over)
    follows_an_end[1:] = over[:-1]
    assert learned == [512 - follows_an_end.sum()]
    returns = np.zeros((257, 2))
    for t in reversed(range(256)):
        returns[t] = rewards[t] + 0.9 * ~over[t] * returns[t + 1]
    expected = 0.5 * (returns[:-1][~follows_an_end] ** 2).mean()
    (_, value_loss), *_ = scalars(result.folder)["losses/value_loss"]
    assert value_loss == pytest.approx(expected, rel=1e-5)


# The network


def test_pixels_are_divided_by_255_wherever_the_network_is_used(agent):
    inputs = []
    first_layer = agent.network[0]
    first_layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    obs = torch.full((3, 4, 84, 84), 255, dtype=torch.uint8)
    agent.get_value(obs)
    action, _ = agent.get_action(obs)
    agent.evaluate_actions(obs, action)
    agent.get_policy(obs)
    assert len(inputs) == 4
    for pixels in inputs:
        assert pixels.dtype == torch.float32
        assert (pixels == 1).all()


def test_actor_and_critic_share_one_network_and_one_pass(agent):
    passes = []
    agent.network.register_forward_hook(lambda *args: passes.append(1))
    obs = torch.randint(255, (6, 4, 84, 84), dtype=torch.uint8)
    action = torch.randint(4, (6,))
    logprob, entropy, value = agent.evaluate_actions(obs, action)
    assert len(passes) == 1
    assert logprob.shape == entropy.shape == value.shape == (6,)
    for output in (logprob, value):
        agent.zero_grad()
        output.sum().backward(retain_graph=True)
        for parameter in agent.network.parameters():
            assert parameter.grad.abs().sum() > 0

    assert agent.get_value(obs).allclose(value)
    logits = agent.actor(agent.network(obs / 255))
    assert logits.abs().max() < 0.1
    logprobs = logits.log_softmax(dim=-1)
    assert logprob.allclose(logprobs[range(6), action])
    assert entropy.allclose(-(logprobs.exp() * logprobs).sum(dim=-1))
    assert agent.get_policy(obs).mode.equal(logits.argmax(dim=-1))


def test_an_agent_can_be_pickled(agent):
    obs = torch.randint(255, (2, 4, 84, 84), dtype=torch.uint8)
    copy = pickle.loads(pickle.dumps(agent))
    assert copy.get_value(obs).equal(agent.get_value(obs))


# Whole runs


def test_buffers_hold_bytes(train):
    dtypes = set()

    class LookingAgent(Agent):
        def evaluate_actions(self, obs, action):
            dtypes.add(obs.dtype)
            return super().evaluate_actions(obs, action)

    train(SMALL + "--total-timesteps 128", Agent=LookingAgent)
    assert dtypes == {torch.uint8}


SLOW = (
    "--total-timesteps 4096 --update-epochs 2 --ent-coef 0.1 --env-id ALE/Pong-v5 "
    "--max-grad-norm 0.1 --seed 5"
)


@pytest.mark.parametrize(
    "flags", ["--total-timesteps 768", pytest.param(SLOW, marks=pytest.mark.slow)]
)
def test_it_equals_a_plain_loop_to_the_last_bit(train, capsys, flags):
    flags = f"--num-envs 4 --num-steps 64 --update-epochs 1 {flags}"
    result = train(flags)
    plain = plain_atari.train(ppo.parse_args(flags.split(), **DEFAULTS))
    assert result.episodes == parse_episodes(capsys.readouterr().out)
    assert result.episodes
    parameters = dict(result.agent.named_parameters())
    expected = dict(plain.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(parameters[name].equal(expected[name]) for name in expected)


def test_videos_are_of_whole_games(train):
    flags = SMALL + "--num-envs 1 --num-steps 400 --total-timesteps 400"
    result = train(f"{flags} --capture-video")
    _, _, length = result.episodes[0]
    (video,) = Path("videos").glob("*/*episode-0.mp4")
    pictures = frames(video)
    assert length <= len(pictures) <= length + 1  # moviepy may lose the last one
    assert pictures[0].shape == (336, 336, 3)
    assert any((picture != pictures[0]).any() for picture in pictures)


def test_a_run_is_resumed_and_is_watched(train):
    flags = SMALL + "--num-envs 1 --num-steps 200 --no-anneal-lr"
    first = train(f"{flags} --total-timesteps 200")
    resumed = train(f"--resume {first.folder} --total-timesteps 400")
    assert "new episodes" in resumed.out
    assert resumed.episodes[0][0] > 200
    # One update moves a parameter by little; another agent would be far away.
    before = first.agent.state_dict()
    after = resumed.agent.state_dict()
    assert 0 < after["actor.weight"].dist(before["actor.weight"]) < 0.05

    returns = evaluate.main([str(first.folder), "--episodes", "1", "--capture-video"])
    assert len(returns) == 1
    assert len(list(Path("videos").glob("*/evaluation/*.mp4"))) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id CartPole-v1", "ppo.py"),
        ("--env-id Hopper-v5", "ppo_continuous_action.py"),
        ("--env-id BreakoutNoFrameskip-v4", "ALE/Breakout-v5"),
        ("--env-id ALE/Brekout-v5", "Breakout"),
        ("--vectorization-mode sync", "vector_entry_point"),
    ],
)
def test_what_it_cannot_do_gets_one_line(fails, flags, words):
    code, line = fails(flags, make_envs=make_envs, Agent=Agent, **DEFAULTS)
    assert code == 2
    assert words in line


class Lamps(gym.Env):
    """A small game: a lamp shines in one of four corners, whose number is a point."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(4)

    def picture(self):
        self.corner = self.np_random.integers(4)
        y, x = 42 * np.array(divmod(self.corner, 2))
        obs = np.zeros((4, 84, 84), np.uint8)
        obs[:, y + 10 : y + 30, x + 10 : x + 30] = 200
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed if seed is None else int(seed))
        self.steps = 0
        return self.picture(), {"lives": 0}

    def step(self, action):
        self.steps += 1
        reward = float(action == self.corner)
        return self.picture(), reward, self.steps == 20, False, {"lives": 0}


class WithoutFire:
    """Takes the place of the emulator, which knows the buttons."""

    def get_action_set(self):
        return []


def make_lamps(args, seed, video=None):
    envs = gym.vector.SyncVectorEnv([Lamps] * args.local_num_envs)
    envs.ale = WithoutFire()
    envs = RecordEpisodeStatistics(envs, stats_key=ppo.STATISTICS)
    return LostLives(envs)


@pytest.mark.slow
def test_it_learns_what_it_sees(train):
    flags = "--num-steps 32 --total-timesteps 6144 --learning-rate 1e-3"
    episodes = train(f"{flags} --update-epochs 2", make_envs=make_lamps).episodes
    returns = [episodic_return for _, episodic_return, _ in episodes]
    assert np.mean(returns[:10]) < 9
    assert np.mean(returns[-10:]) > 15


def wait_for_step(step):
    """Wait until the newest run has saved this step, and return its folder."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if list(Path("runs").glob("*/checkpoint.pt")):
            folder = ppo.find_run("newest")
            if ppo.load_checkpoint(folder)["global_step"] >= step:
                return folder
        time.sleep(0.1)
    pytest.fail(f"no checkpoint of step {step} came")


@pytest.mark.slow
def test_the_command_trains_is_killed_and_is_resumed():
    flags = SMALL + "--total-timesteps 4096 --checkpoint-interval 1e-9"
    process = start(PROGRAM, *flags.split())
    folder = wait_for_step(128)
    process.send_signal(signal.SIGKILL)
    assert finish(process).code == -signal.SIGKILL

    saved = ppo.load_checkpoint(folder)["global_step"]
    process = start(PROGRAM, "--resume")
    assert wait_for_step(saved + 2 * 128) == folder
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.code == 128 + signal.SIGTERM, result.err
    assert "to go on" in result.out
