"""Small environments with known answers, and some that break.

Their ids are environments:Counting-v0 and so on.
"""

import os
import signal
import sys
import threading

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space


class Corridor(gym.Env):
    """Walks from 0 to ``end``, whatever is done. Each step brings a reward of 1.

    The observation is the position over 10.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, end=10**9, render_mode=None):
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
        self.end = end
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.position += 1
        obs = np.array([self.position / 10], np.float32)
        return obs, 1.0, self.position == self.end, False, {}

    def render(self):
        return np.full((32, 32, 3), self.position % 256, np.uint8)


class ThreeSteps(Corridor):
    """Episodes of three steps with a reward of 1 each."""

    def __init__(self, render_mode=None):
        super().__init__(end=3, render_mode=render_mode)


def register(entry_point, **options):
    """Make it the environment Odd-v0 of a test."""
    gym.registry.pop("Odd-v0", None)
    gym.register("Odd-v0", entry_point, **options)


class ReusingCorridor(Corridor):
    """Writes all observations into one array, as some environments do to save time."""

    def __init__(self, end=10**9, render_mode=None):
        super().__init__(end, render_mode)
        self.array = np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        self.array[:], info = super().reset(seed=seed)
        return self.array, info

    def step(self, action):
        self.array[:], *rest = super().step(action)
        return self.array, *rest


gym.register("Endless-v0", Corridor)
gym.register("Terminates5-v0", Corridor, kwargs={"end": 5})
gym.register("Terminates7-v0", Corridor, kwargs={"end": 7})
gym.register("TimeLimit5-v0", Corridor, max_episode_steps=5)
gym.register("Both5-v0", Corridor, kwargs={"end": 5}, max_episode_steps=5)
gym.register("Reusing5-v0", ReusingCorridor, max_episode_steps=5)


class Toy(gym.Env):
    """Episodes of one step; its spaces and its reward are what a test needs."""

    def __init__(
        self, observation_space=None, action_space=None, reward=0.0, render_mode=None
    ):
        self.observation_space = observation_space or gym.spaces.Box(-1, 1, (2,))
        self.action_space = action_space or gym.spaces.Discrete(2)
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), self.reward, True, False, {}


class Mission(gym.spaces.Space):
    """A text, as MiniGrid has it. Gymnasium knows nothing about its size."""


class WithoutRenderMode(Toy):
    def __init__(self):
        super().__init__()


def uninstalled(**options):
    message = 'Box2D is not installed, run `pip install "gymnasium[box2d]"`'
    raise gym.error.DependencyNotInstalled(message)


def register_toy(name, **options):
    gym.register(f"{name}-v0", Toy, kwargs=options)


MISSION = {"image": gym.spaces.Box(0, 1, (3,)), "mission": Mission()}

register_toy("MultiDiscrete", action_space=gym.spaces.MultiDiscrete([2, 3]))
register_toy("FromOne", action_space=gym.spaces.Discrete(2, start=1))
register_toy(
    "NoFixedSize", observation_space=gym.spaces.Sequence(gym.spaces.Discrete(3))
)
register_toy("Mission", observation_space=gym.spaces.Dict(MISSION))
register_toy("Exploding", reward=1e30)
gym.register("WithoutRenderMode-v0", WithoutRenderMode)
gym.register("Uninstalled-v0", uninstalled)


# Batched environments

# Episode k of sub-environment i has LENGTHS[(i + k) % 4] steps. Every other episode is
# truncated, the rest terminates.
LENGTHS = (1, 3, 5, 2)


class Counting(gym.vector.VectorEnv):
    """Counts. Observations: sub-environment, episode, step of it, whether it is over.

    The reward of a step is its number within the episode, counted from 1.
    """

    def __init__(self, num_envs, autoreset_mode=AutoresetMode.NEXT_STEP):
        self.metadata = {}
        if autoreset_mode is not None:
            self.metadata["autoreset_mode"] = autoreset_mode
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def observe(self):
        index = np.arange(self.num_envs)
        columns = [index, self.episode, self.step_count, self.over]
        return np.stack(columns, axis=1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.episode, self.step_count, self.over = np.zeros((3, self.num_envs), int)
        return self.observe(), {}

    def begin_episode(self, which):
        self.episode[which] += 1
        self.step_count[which] = 0
        self.over[which] = 0

    def step(self, actions):
        only_resets = self.over == 1
        self.begin_episode(only_resets)
        self.step_count[~only_resets] += 1
        # What a step brings that only resets must not matter.
        rewards = np.where(only_resets, 1000, self.step_count)

        index = np.arange(self.num_envs)
        lengths = np.array(LENGTHS)[(index + self.episode) % len(LENGTHS)]
        over = ~only_resets & (self.step_count == lengths)
        self.over[:] = over
        truncations = over & (self.episode % 2 == 1)
        terminations = over & ~truncations

        infos = {}
        if self.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP:
            final_obs = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(over):
                final_obs[i] = self.observe()[i]
            infos = {"final_obs": final_obs, "_final_obs": over}
            self.begin_episode(over)
        return self.observe(), rewards, terminations, truncations, infos


MODES = {
    "Counting": AutoresetMode.NEXT_STEP,
    "CountingSameStep": AutoresetMode.SAME_STEP,
    "CountingDisabled": AutoresetMode.DISABLED,
    "CountingUntagged": None,
}
for name, mode in MODES.items():
    options = {"autoreset_mode": mode}
    gym.register(f"{name}-v0", vector_entry_point=Counting, kwargs=options)


# CartPoles that cannot be kept in a checkpoint


class EzPole(CartPoleEnv, gym.utils.EzPickle):
    """Pickles without complaint and comes back as a new one, as simulators in C do."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        gym.utils.EzPickle.__init__(self)


class LockedPole(CartPoleEnv):
    """Refuses to be pickled."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.lock = threading.Lock()


gym.register("EzPole-v0", EzPole, max_episode_steps=500)
gym.register("LockedPole-v0", LockedPole, max_episode_steps=500)


# CartPoles that break


class HotMotor(Exception):
    """An error that can be pickled but not unpickled, as it is made with two words."""

    def __init__(self, name, state):
        super().__init__(f"the {name}\nis {state}")


class Locked(Exception):
    """An error that cannot be pickled."""

    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


class Breaking(CartPoleEnv):
    """Breaks in the 150th step of sub-environment ``which`` of a run with seed 1.

    RaisesAtReset does so when it is reset for the first time.
    """

    def __init__(self, how, which, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.how = how
        self.which = which
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.breaks = seed == 1 + self.which
            if self.breaks and self.how == "RaisesAtReset":
                self.break_now()
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.steps += 1
        obs, reward, *rest = super().step(action)
        if self.steps == 150 and self.breaks:
            reward = self.break_now()
        return obs, reward, *rest

    def break_now(self):
        if self.how == "GivesNaN":
            return float("nan")
        if self.how == "AsksToStop":
            os.kill(os.getpid(), signal.SIGTERM)
            return 1.0
        if self.how == "Exits":
            sys.exit()
        if self.how == "Dies":
            os._exit(3)
        if self.how == "IsKilled":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "RaisesLocked":
            raise Locked("the motor is 100% hot")
        raise HotMotor("motor", "100% hot")

    def close(self):
        if self.how == "RaisesTwice" and self.steps >= 150:
            raise ValueError("the motor has melted")
        super().close()


WAYS = [
    "Raises",
    "RaisesTwice",
    "RaisesAtReset",
    "RaisesLocked",
    "GivesNaN",
    "AsksToStop",
    "Exits",
    "Dies",
    "IsKilled",
]
for how in WAYS:
    for which in range(4):
        options = {"how": how, "which": which}
        gym.register(
            f"{how}{which}-v0", Breaking, kwargs=options, max_episode_steps=500
        )
