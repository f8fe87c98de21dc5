"""CartPole with steps of 5 ms, for environments that take their time.

python ppo.py --env-id benchmark.slow_cartpole:SlowCartPole-v0
"""

import time

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv


class SlowCartPole(CartPoleEnv):
    def step(self, action):
        time.sleep(0.005)
        return super().step(action)


gym.register("SlowCartPole-v0", SlowCartPole, max_episode_steps=500)
