"""ppo_pixels.py: pictures of every kind arrive as numbers from 0 to 1."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same_results, parse_episodes

import evaluate
import ppo
import ppo_atari
from ppo_pixels import DEFAULTS, Agent, make_envs
from tests.reference import plain_pixels

SHORT = "--num-envs 2 --num-steps 16 --total-timesteps 64"


@pytest.fixture
def train(run):
    """train(flags) trains as the program does, in this process; see run."""
    return functools.partial(run, make_envs=make_envs, Agent=Agent, **DEFAULTS)


@pytest.fixture
def program():
    return functools.partial(ppo.main, make_envs=make_envs, Agent=Agent, **DEFAULTS)


class Still(gym.Env):
    """Always shows the same picture, in episodes of four steps."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, space, picture, render_mode=None):
        self.observation_space = space
        self.picture = picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.picture, {}

    def step(self, action):
        self.steps += 1
        return self.picture, float(self.steps), self.steps == 4, False, {}


def environments(space, picture, **settings):
    gym.registry.pop("Still-v0", None)
    gym.register("Still-v0", Still, kwargs={"space": space, "picture": picture})
    flags = f"--env-id Still-v0 {SHORT}".split()
    return make_envs(ppo.parse_args(flags, **{**DEFAULTS, **settings}), 1)


def seen(envs):
    """What the network gets of the first observation."""
    obs, _ = envs.reset(seed=1)
    return Agent(envs).scale(torch.as_tensor(obs))


BYTES = np.random.default_rng(1).integers(0, 256, (12, 14, 3), np.uint8)
FLOATS = (BYTES / 255).astype(np.float32)

KINDS = {
    "bytes": (gym.spaces.Box(0, 255, BYTES.shape, np.uint8), BYTES),
    "floats to 1": (gym.spaces.Box(0, 1, FLOATS.shape), FLOATS),
    "floats from -1": (gym.spaces.Box(-1, 1, FLOATS.shape), 2 * FLOATS - 1),
    "channels first": (
        gym.spaces.Box(0, 255, (3, 12, 14), np.uint8),
        BYTES.transpose(2, 0, 1),
    ),
    "gray": (gym.spaces.Box(0, 255, (12, 14), np.uint8), BYTES[:, :, 0]),
    "in a Dict": (
        gym.spaces.Dict(
            lives=gym.spaces.Discrete(3),
            view=gym.spaces.Box(0, 255, BYTES.shape, np.uint8),
        ),
        {"lives": 2, "view": BYTES},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_arrive_from_0_to_1_with_the_channels_first(kind):
    pixels = seen(environments(*KINDS[kind]))
    expected = torch.as_tensor(FLOATS.transpose(2, 0, 1))
    if kind == "gray":
        expected = expected[:1]
    assert pixels.shape == (2, *expected.shape)
    assert pixels[0].allclose(expected, atol=1e-6)


@pytest.mark.parametrize("size", [(10, 10), (35, 36), (36, 36), (240, 320), (64, 200)])
def test_every_size_fits_and_large_pictures_are_averaged(size):
    picture = np.full((*size, 3), 51, np.uint8)
    picture[: size[0] // 2] = 255
    envs = environments(gym.spaces.Box(0, 255, picture.shape, np.uint8), picture)
    pixels = seen(envs)
    assert max(pixels.shape[2:]) <= 96
    assert pixels[0, 0, 0, 0] == 1
    assert pixels[0, 0, -1, -1] == pytest.approx(0.2)
    agent = Agent(envs)
    obs, _ = envs.reset(seed=1)
    assert agent.get_value(torch.as_tensor(obs)).shape == (2,)
    kinds = [layer for layer in agent.network if isinstance(layer, torch.nn.Conv2d)]
    side = 8 if min(pixels.shape[2:]) >= 36 else 3
    assert kinds[0].kernel_size == (side, side)


@pytest.mark.parametrize(
    "size", [(5, 5), (10, 11), (20, 20), (35, 40), (36, 41), (64, 96)]
)
def test_every_pixel_up_to_the_borders_is_seen(size):
    space = gym.spaces.Box(0, 1, (1, *size))
    agent = Agent(environments(space, np.zeros(space.shape, np.float32)))
    picture = torch.rand(1, 1, *size, requires_grad=True)
    features = agent.network[:-2](picture)  # before the last layers
    (features * torch.rand_like(features)).sum().backward()
    for border in (picture.grad[..., 0, :], picture.grad[..., -1, :]):
        assert border.any()
    for border in (picture.grad[..., :, 0], picture.grad[..., :, -1]):
        assert border.any()


def test_small_pictures_that_use_the_lowest_values_only_are_seen_as_well():
    """Those of MiniGrid go from 0 to 10, though their range ends at 255."""
    space = gym.spaces.Box(0, 255, (3, 7, 7), np.uint8)
    agent = Agent(environments(space, np.zeros(space.shape, np.uint8)))
    picture = torch.randint(0, 11, (1, 3, 7, 7), dtype=torch.uint8)
    with torch.no_grad():
        low = agent.see(picture)
        high = agent.see(25 * picture)
    torch.testing.assert_close(low, high, rtol=0.2, atol=0.05)
    assert high.std() > 0.1


@pytest.mark.parametrize("limit", [np.inf, np.finfo(np.float32).max])
def test_values_without_limits_stay_as_they_are(limit):
    space = gym.spaces.Box(-limit, limit, (1, 10, 10), np.float32)
    agent = Agent(environments(space, np.zeros(space.shape, np.float32)))
    picture = torch.rand(1, 1, 10, 10)
    assert agent.scale(picture).equal(picture)


def test_large_pictures_have_the_network_of_atari():
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    envs = environments(space, np.zeros(space.shape, np.uint8))
    torch.manual_seed(1)
    ours = Agent(envs)
    torch.manual_seed(1)
    theirs = ppo_atari.Agent(envs)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.equal(two)


def test_stacked_frames_show_what_moves():
    args = ppo.parse_args(SHORT.split(), **{**DEFAULTS, "frame_stack": 3})
    envs = make_envs(args, 1)
    first, _ = envs.reset(seed=1)
    first = first.copy()
    assert first.shape == (2, 3, 20, 20)
    assert (first[:, 0] == first[:, 2]).all()
    second, *_ = envs.step(np.array([1, 1]))
    assert (second[:, :2] == first[:, 1:]).all()
    assert (second[:, 2] != first[:, 2]).any()


@pytest.mark.parametrize(
    "flags",
    [
        "--env-id PlainDot-v0 --num-steps 16 --total-timesteps 512",
        "--env-id PlainDotFirst-v0 --seed 2 --num-envs 3 --num-steps 32 "
        "--num-minibatches 2 --bootstrap-truncation --total-timesteps 384",
        "--env-id PlainDotGray-v0 --num-envs 4 --num-steps 32 --total-timesteps 384",
        "--env-id PlainDotFloat-v0 --num-envs 4 --num-steps 32 --total-timesteps 384",
        "--env-id PlainDotDict-v0 --num-envs 4 --num-steps 32 --total-timesteps 384",
        "--env-id PlainDot36-v0 --num-envs 2 --num-steps 32 --total-timesteps 192",
    ],
)
def test_every_episode_and_parameter_equals_that_of_the_plain_program(
    flags, train, capsys
):
    result = train(flags)
    plain = plain_pixels.train(ppo.parse_args(flags.split(), **DEFAULTS))
    assert result.episodes == parse_episodes(capsys.readouterr().out) != []
    pairs = zip(result.agent.parameters(), plain.parameters(), strict=True)
    for parameter, expected in pairs:
        assert parameter.equal(expected)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_killed_run_goes_on_and_is_watched(mode, train, crash):
    flags = (
        "--num-envs 2 --num-steps 32 --total-timesteps 320 --checkpoint-interval 1e-9 "
        f"--vectorization-mode {mode}"
    )
    folder = crash(flags, update=3, make_envs=make_envs, Agent=Agent, **DEFAULTS)
    resumed = train(f"--resume {folder}")
    if mode == "sync":
        assert_same_results(resumed, train(flags), after_step=128)
    assert len(evaluate.main([str(folder), "--episodes", "2"])) == 2


def test_what_is_no_picture_is_one_line(program, fails):
    _, line = fails("--env-id CartPole-v1", main=program)
    assert "not one picture" in line
    assert "python ppo.py" in line
    _, line = fails("--vectorization-mode vector_entry_point", main=program)
    assert "sync or async" in line


def test_the_plain_program_says_that_it_flattens_pictures(run):
    out = run("--env-id Catch-v0 --num-steps 16 --total-timesteps 64").out
    assert out.count("ppo_pixels.py looks at them as pictures") == 1


@pytest.mark.slow
def test_a_picture_of_bytes_is_learned(train):
    flags = "--env-id PlainDot-v0 --learning-rate 0.001 --total-timesteps 30000"
    returns = [episodic_return for _, episodic_return, _ in train(flags).episodes]
    assert np.mean(returns[:50]) < 6  # of 16; chance is 4
    assert np.mean(returns[-50:]) > 12
