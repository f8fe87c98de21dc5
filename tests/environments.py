"""Environments with known answers, and some that break. Their ids are environments:Counting-v0 and so on."""

import os
import signal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

LENGTHS = 1, 3, 5, 2  # episode k of sub-environment i has LENGTHS[(i + k) % 4] steps; odd ones are truncated


class Counting(gym.vector.VectorEnv):
    """Observation: sub-environment, episode, step of the episode, whether it is over. Reward: step + 1, in [0] * 2."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def observe(self):
        return np.stack([np.arange(self.num_envs), self.episode, self.step_count, self.over], 1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.episode, self.step_count, self.over = np.zeros((3, self.num_envs), int)
        return self.observe(), {}

    def begin_episode(self, which):
        self.episode[which] += 1
        self.step_count[which] = self.over[which] = 0

    def step(self, actions):
        same_step = self.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP
        dummy = self.over == 1
        self.begin_episode(dummy)
        self.step_count[~dummy] += 1
        rewards = np.where(dummy, 1000, self.step_count)  # what a dummy step brings must not matter
        length = np.array(LENGTHS)[(np.arange(self.num_envs) + self.episode) % len(LENGTHS)]
        self.over[:] = over = ~dummy & (self.step_count == length)
        truncations, infos = over & (self.episode % 2 == 1), {}
        if same_step and over.any():
            final = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(over):
                final[i] = self.observe()[i]
            infos = {"final_obs": final, "_final_obs": over}
            self.begin_episode(over)
        return self.observe(), rewards, over & ~truncations, truncations, infos


class CountingSameStep(Counting):
    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}


class CountingUntagged(Counting):
    metadata = {}


class Breaking(gym.Env):
    """One sub-environment of a run with seed 1 breaks in its fifth step."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, how, which):
        self.how, self.which, self.steps = how, which, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.breaks = seed == 1 + self.which
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 5 and self.breaks:
            if self.how == "raises":
                raise RuntimeError("the motor is hot")
            if self.how == "exits":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(2, np.float32), 1.0, False, False, {}


for vector_env in (Counting, CountingSameStep, CountingUntagged):
    gym.register(f"{vector_env.__name__}-v0", vector_entry_point=vector_env)
for how in ("raises", "exits", "killed"):
    for which in range(4):
        gym.register(f"{how.capitalize()}{which}-v0", Breaking, kwargs={"how": how, "which": which})
