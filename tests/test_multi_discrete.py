"""ppo_multi_discrete.py: independent parts, masks, and the spaces that it takes."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same_results, parse_episodes

import evaluate
import ppo
from ppo_multi_discrete import DEFAULTS, Agent, IndependentParts, make_envs
from tests.reference import plain_multi_discrete

SHORT = "--num-steps 16 --total-timesteps 256 --env-id Parts-v0"

SPACES = {
    "MultiDiscrete": gym.spaces.MultiDiscrete([2, 3, 4]),
    "shifted": gym.spaces.MultiDiscrete([2, 3], start=[5, -1]),
    "two axes": gym.spaces.MultiDiscrete([[2, 3], [3, 2]]),
    "MultiBinary": gym.spaces.MultiBinary(3),
    "Tuple": gym.spaces.Tuple(
        (gym.spaces.Discrete(3), gym.spaces.Discrete(2, start=4))
    ),
    "Discrete": gym.spaces.Discrete(5),
    "Discrete from 1": gym.spaces.Discrete(3, start=1),
}
SIZES = {
    "MultiDiscrete": [2, 3, 4],
    "shifted": [2, 3],
    "two axes": [2, 3, 3, 2],
    "MultiBinary": [2, 2, 2],
    "Tuple": [3, 2],
    "Discrete": [5],
    "Discrete from 1": [3],
}


class Masked(gym.Env):
    """Four steps with random masks. An action that is not valid breaks it.

    ``kind`` names its space, ``way`` says how it gives its masks: "info", "parts",
    "method" or "none".
    """

    observation_space = gym.spaces.Box(-1, 1, (3,))

    def __init__(self, kind, way, render_mode=None):
        self.action_space = SPACES[kind]
        self.sizes = SIZES[kind]
        self.way = way
        if way == "method":
            self.action_masks = lambda: np.concatenate(self.mask)

    def observe(self):
        self.steps += 1
        obs = self.np_random.random(3).astype(np.float32)
        self.mask = []
        for size in self.sizes:
            part = self.np_random.integers(0, 2, size)
            self.mask.append(part.astype(np.int8))
        info = {}
        if self.way == "info":
            info["action_mask"] = np.concatenate(self.mask)
        if self.way == "parts":
            info["action_mask"] = tuple(self.mask)
        return obs, info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe()

    def step(self, action):
        assert self.action_space.contains(action)
        if self.way != "none":
            for number, part in zip(self.numbers(action), self.mask, strict=True):
                assert part[number] or not part.any()
        obs, info = self.observe()
        return obs, float(np.sum(action)), self.steps == 5, False, info

    def numbers(self, action):
        """The parts of an action, counted from 0."""
        space = self.action_space
        if isinstance(space, gym.spaces.Tuple):
            pairs = zip(action, space, strict=True)
            return [number - part.start for number, part in pairs]
        start = 0 if isinstance(space, gym.spaces.MultiBinary) else space.start
        return np.ravel(action - start)


def register(kind, way="none"):
    gym.registry.pop("Parts-v0", None)
    gym.register("Parts-v0", Masked, kwargs={"kind": kind, "way": way})


@pytest.fixture
def train(run):
    """train(flags) trains as the program does, in this process; see run."""
    return functools.partial(run, make_envs=make_envs, Agent=Agent, **DEFAULTS)


def make_agent(kind="MultiDiscrete"):
    """An agent whose logits differ, and the number of its logits."""
    register(kind)
    torch.manual_seed(1)
    args = ppo.parse_args(SHORT.split(), **DEFAULTS)
    agent = Agent(make_envs(args, 1))
    torch.nn.init.orthogonal_(agent.actor[-1].weight)
    return agent, sum(SIZES[kind])


# The two details


def test_log_probabilities_and_entropies_of_parts_add_up():
    torch.manual_seed(1)
    logits = torch.randn(4, 5)
    policy = IndependentParts(logits, [2, 3])
    first = logits[:, :2].softmax(1)
    second = logits[:, 2:].softmax(1)
    joint = first[:, :, None] * second[:, None, :]
    for a in range(2):
        for b in range(3):
            action = torch.tensor([[a, b]] * 4)
            assert policy.log_prob(action).exp().allclose(joint[:, a, b])
    entropy = -(joint * joint.log()).sum((1, 2))
    assert policy.entropy().allclose(entropy, atol=1e-6)
    assert policy.mode.equal(torch.stack([first.argmax(1), second.argmax(1)], 1))


def test_parts_are_drawn_independently_with_their_probabilities():
    torch.manual_seed(1)
    logits = torch.tensor([0.0, 1.0, 2.0, 0.0, -1.0])
    drawn = IndependentParts(logits.expand(100_000, 5), [2, 3]).sample()
    counts = torch.zeros(2, 3)
    for a in range(2):
        for b in range(3):
            counts[a, b] = ((drawn[:, 0] == a) & (drawn[:, 1] == b)).float().mean()
    joint = logits[:2].softmax(0)[:, None] * logits[2:].softmax(0)
    assert counts.allclose(joint, atol=0.01)


def test_what_is_masked_has_no_probability_and_no_gradient():
    agent, num_choices = make_agent()
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0]]).float()
    obs = torch.cat([mask, torch.randn(1, 3)], dim=1)
    probs = torch.cat([part.probs[0] for part in agent.get_policy(obs).parts])
    assert probs.shape == (num_choices,)
    assert ((probs > 0) == (mask[0] > 0)).all()

    action = torch.tensor([[0.0, 1.0, 2.0]])
    logprob, entropy, _ = agent.evaluate_actions(obs, action)
    (logprob + entropy).sum().backward()
    gradient = agent.actor[-1].bias.grad
    assert not gradient[mask[0] == 0].any()
    assert gradient[:2].all()


def test_a_part_without_a_valid_choice_is_not_masked():
    agent, num_choices = make_agent()
    own_obs = torch.randn(1, 3)
    nothing = torch.cat([torch.zeros(1, num_choices), own_obs], dim=1)
    everything = torch.cat([torch.ones(1, num_choices), own_obs], dim=1)
    for part, expected in zip(
        agent.get_policy(nothing).parts, agent.get_policy(everything).parts, strict=True
    ):
        assert part.probs.equal(expected.probs)


def test_the_critic_does_not_see_the_mask():
    agent, num_choices = make_agent()
    own_obs = torch.randn(1, 3)
    values = []
    for number in (0.0, 1.0):
        mask = torch.full((1, num_choices), number)
        values.append(agent.get_value(torch.cat([mask, own_obs], dim=1)))
    assert values[0].equal(values[1])


# Spaces and ways to give a mask


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("way", ["none", "info", "parts", "method"])
def test_every_space_gets_its_own_actions_and_no_invalid_one(kind, way, train):
    register(kind, way)
    result = train(SHORT)
    assert result.episodes


def test_without_masks_invalid_actions_are_tried(run):
    register("MultiDiscrete", "info")
    settings = {**DEFAULTS, "masks": False}
    with pytest.raises(AssertionError):
        run(SHORT, make_envs=make_envs, Agent=Agent, **settings)


def test_a_mask_of_a_wrong_length_is_one_line(fails):
    class Wrong(Masked):
        def observe(self):
            obs, _ = super().observe()
            return obs, {"action_mask": np.ones(4)}

    gym.registry.pop("Parts-v0", None)
    gym.register("Parts-v0", Wrong, kwargs={"kind": "MultiDiscrete", "way": "none"})
    main = functools.partial(ppo.main, make_envs=make_envs, Agent=Agent, **DEFAULTS)
    _, line = fails(SHORT, main=main, leaves_files=True)
    assert "4 numbers" in line
    assert "9 choices" in line


def test_spaces_that_do_not_suit_are_one_line(fails):
    main = functools.partial(ppo.main, make_envs=make_envs, Agent=Agent, **DEFAULTS)
    _, line = fails("--env-id Pendulum-v1", main=main)
    assert "ppo_continuous_action.py" in line
    _, line = fails("--vectorization-mode vector_entry_point", main=main)
    assert "sync or async" in line


# The whole program


@pytest.mark.parametrize(
    "flags",
    [
        "--total-timesteps 2048",
        "--seed 2 --env-id Taxi-v4 --num-envs 2 --num-steps 64 --total-timesteps 1024",
        "--seed 3 --bootstrap-truncation --learning-rate 1e-3 --no-clip-vloss "
        "--num-minibatches 2 --total-timesteps 2048",
        "--seed 4 --env-id Parts-v0 --target-kl 0.02 --total-timesteps 2048",
    ],
)
def test_every_episode_and_parameter_equals_that_of_the_plain_program(
    flags, train, capsys
):
    register("MultiDiscrete", "parts")
    result = train(flags)
    args = ppo.parse_args(flags.split(), **DEFAULTS)
    plain = plain_multi_discrete.train(args)
    assert result.episodes == parse_episodes(capsys.readouterr().out) != []
    pairs = zip(result.agent.parameters(), plain.parameters(), strict=True)
    for parameter, expected in pairs:
        assert parameter.equal(expected)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_killed_run_goes_on_and_is_watched(mode, train, crash):
    flags = (
        f"--total-timesteps 2048 --checkpoint-interval 1e-9 --vectorization-mode {mode}"
    )
    folder = crash(flags, update=3, make_envs=make_envs, Agent=Agent, **DEFAULTS)
    resumed = train(f"--resume {folder}")
    if mode == "sync":
        assert_same_results(resumed, train(flags), after_step=1024)
    for more in ([], ["--deterministic"]):
        assert len(evaluate.main([str(folder), "--episodes", "2", *more])) == 2
