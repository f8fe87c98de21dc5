"""What real users bring: odd environments, schedulers and copies of agents."""

import copy
import multiprocessing
import pickle
import random
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import Counting, ThreeSteps, register

import evaluate
import ppo
import ppo_atari
import ppo_continuous_action

SHORT = "--env-id Odd-v0 --num-steps 16 --total-timesteps 64"  # one update


# Spaces

OBSERVATIONS = {
    "Discrete": (gym.spaces.Discrete(5), 5),
    "image": (gym.spaces.Box(0, 255, (4, 3, 2), np.uint8), 24),
    "float64": (gym.spaces.Box(-1, 1, (3,), np.float64), 3),
    "Tuple": (
        gym.spaces.Tuple((gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,)))),
        5,
    ),
    "Dict": (
        gym.spaces.Dict(a=gym.spaces.MultiBinary(3), b=gym.spaces.Box(-1, 1, (2, 2))),
        7,
    ),
}


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations_of_every_fixed_size_are_flattened(kind, run):
    space, size = OBSERVATIONS[kind]

    class Sampling(ThreeSteps):
        observation_space = space

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return space.sample(), {}

        def step(self, action):
            return space.sample(), *super().step(action)[1:]

    register(Sampling)
    result = run(SHORT)
    assert result.agent.actor[0].in_features == size
    ends = np.repeat([12, 24, 36, 48, 60], 4)  # of five episodes in four environments
    assert result.episodes == [(end, 3.0, 3) for end in ends]


@pytest.mark.parametrize(
    "env_id",
    ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "environments:WithoutRenderMode-v0"],
)
def test_environments_of_every_kind_train_and_are_watched(env_id, run):
    result = run(f"--env-id {env_id} --total-timesteps 1024")
    returns = evaluate.main([str(result.folder), "--episodes", "2"])
    assert len(returns) == 2
    assert np.isfinite(returns).all()


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_actions_belong_to_the_space_of_actions(dtype, mode, run):
    class Strict(ThreeSteps):
        action_space = gym.spaces.Discrete(3, dtype=dtype)

        def step(self, action):
            assert self.action_space.contains(action)
            return super().step(action)

    register(Strict)
    result = run(f"{SHORT} --vectorization-mode {mode}")
    assert len(result.episodes) == 20
    assert evaluate.main([str(result.folder), "--episodes", "2"]) == [3.0, 3.0]


# Worker processes draw random numbers of their own


class Drawing(ThreeSteps):
    """Takes its rewards from a generator that all environments of a process share."""

    def __init__(self, draw, render_mode=None):
        super().__init__(render_mode)
        self.draw = draw

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.draw(), *rest


DRAWS = {
    "random": random.random,
    "numpy": np.random.random,
    "torch": lambda: torch.rand(1).item(),
}


@pytest.mark.parametrize("generator", DRAWS)
def test_each_worker_seeds_the_global_generators_with_its_own_seed(generator, run):
    register(Drawing, kwargs={"draw": DRAWS[generator]})
    returns = []
    for seed in (5, 6):
        episodes = run(f"{SHORT} --vectorization-mode async --seed {seed}").episodes
        returns.append({episodic_return for _, episodic_return, _ in episodes})

    # The workers have the seeds 5 to 8 and 6 to 9, and each plays five episodes.
    assert len(returns[0]) == 4 * 5
    assert len(returns[0] & returns[1]) == 3 * 5


@pytest.fixture
def start_method():
    """Give back the way in which this process starts others."""
    before = multiprocessing.get_start_method()
    yield lambda name: multiprocessing.set_start_method(name, force=True)
    multiprocessing.set_start_method(before, force=True)


DRAWING_MODULE = """
import gymnasium, numpy
from gymnasium.envs.classic_control import CartPoleEnv

class Drawing(CartPoleEnv):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, numpy.random.random(), *rest

gymnasium.register("Drawing-v0", Drawing)
"""


@pytest.mark.slow
def test_spawned_workers_draw_as_forked_ones_do(
    run, start_method, workdir, monkeypatch
):
    """On macOS and Windows workers are spawned, so nothing is copied to them."""
    Path("drawing.py").write_text(DRAWING_MODULE)
    monkeypatch.syspath_prepend(workdir)
    flags = "--env-id drawing:Drawing-v0 --vectorization-mode async"
    played = []
    for method in ("fork", "spawn"):
        start_method(method)
        played.append(run(f"{flags} --num-envs 2 --total-timesteps 256").episodes)
    assert played[0] == played[1] != []


# What environments say about their episodes


@pytest.mark.parametrize("info", [7, "seven", {"r": 1.0, "l": 1}, None], ids=str)
def test_an_info_called_episode_is_not_taken_for_statistics(info, run):
    class Chatty(ThreeSteps):
        def step(self, action):
            return *super().step(action)[:4], {"episode": info}

    register(Chatty)
    lengths = [(r, length) for _, r, length in run(SHORT).episodes]
    assert lengths == [(3.0, 3)] * 20


def test_a_batch_s_own_statistics_are_not_taken_for_ours(run):
    class Chatty(Counting):
        def step(self, actions):
            *step, infos = super().step(actions)
            infos["episode"] = {
                "r": np.ones(self.num_envs),
                "l": np.ones(self.num_envs, dtype=int),
            }
            infos["_episode"] = np.ones(self.num_envs, dtype=bool)
            return *step, infos

    played = []
    for batch in (Counting, Chatty):
        register(None, vector_entry_point=batch)
        flags = f"{SHORT} --vectorization-mode vector_entry_point"
        played.append(run(flags).episodes)
    assert played[0] == played[1] != []


def test_an_environment_that_can_be_started_only_once_trains_alone(run):
    started = []

    class Once(ThreeSteps):
        def __init__(self, render_mode=None):
            super().__init__(render_mode)
            assert not started, "the licence is in use"
            started.append(self)

    register(Once)
    assert len(run(f"{SHORT} --num-envs 1 --num-steps 64").episodes) == 21


# Schedulers, and copies of agents


@pytest.mark.parametrize("world_size", [None, "", "1", "2", "two"])
def test_a_scheduler_s_variables_do_not_make_a_group(world_size, run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    result = run("--total-timesteps 512")
    assert result.episodes  # which process 1 of a group would not print

    def set_device(device):
        raise LookupError(device)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", set_device)
    with pytest.raises(LookupError, match=r"^cuda:0$"):
        run()


@pytest.mark.parametrize("program", [ppo, ppo_continuous_action, ppo_atari])
def test_agents_can_be_copied_and_pickled(program):
    args = ppo.parse_args([], **getattr(program, "DEFAULTS", {}))
    envs = program.make_envs(args, seed=1)
    obs = torch.as_tensor(envs.reset(seed=1)[0].copy())
    agent = program.Agent(envs)
    value = agent.get_value(obs)
    mode = agent.get_policy(obs).mode

    for twin in (copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))):
        assert twin.get_value(obs).equal(value)
        assert twin.get_policy(obs).mode.equal(mode)

        # They share nothing. What the one learns, the other does not know.
        for parameter in twin.parameters():
            parameter.data += 0.1
        assert not twin.get_value(obs).equal(value)
        assert agent.get_value(obs).equal(value)
        if program is ppo_continuous_action:
            mean = agent.statistics[0].mean.copy()
            twin.statistics[0].update(np.full(obs.shape, 1000.0))
            assert (agent.statistics[0].mean == mean).all()
    envs.close()
