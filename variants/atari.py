"""PPO for Atari games: what differs from ppo.py, which does the rest. Run it from the repository's folder.

    pip install ale-py                                      # the emulator and the games
    python -m variants.atari                                # Breakout, 10,000,000 steps of 4 frames
    python -m variants.atari --env-id ALE/Pong-v5 --track   # the flags are those of ppo.py

Nine details (search for "Detail A5", say), most of which ale-py does, in C++. The games: A1 no-ops, A2 skipped frames,
A3 lost lives, A4 fire, A5 84x84 gray pixels, A6 the sign of rewards, A7 four frames at once. The agent: A8 a network
shared by actor and critic, A9 pixels from 0 to 1. Printed returns are of whole games, in their own points. Sources as
in ppo.py, and [DQN] Mnih et al. 2015, doi:10.1038/nature14236; [wrappers] of [baselines]: common/atari_wrappers.py.
"""

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.wrappers import vector as wrappers
from torch.distributions import Categorical

import ppo


def make_envs(args, num_envs, seed, video=None, render_mode=None):
    """As in ppo.py, but for the games of ale-py. Observations: (num_envs, 4, 84, 84), in bytes."""
    if not args.env_id.startswith("ALE/"):
        raise ValueError("games have ids like ALE/Breakout-v5 (others: python ppo.py or -m variants.continuous_action)")
    if args.vectorization_mode != "vector_entry_point" or render_mode == "human":
        raise ValueError("games of ale-py need --vectorization-mode vector_entry_point, and have no window")
    # Detail A1, noop_max: nothing is done for 0 to noop_max - 1 frames, so that games differ. ([DQN]; [wrappers])
    # Detail A2, frameskip: each action is kept for four frames: a quarter of the work. maxpool: some things are drawn
    # in every other frame only; a pixel is the brighter one of the last two frames. ([DQN])
    # Detail A4, use_fire_reset: some games wait for fire, maybe for ever; it is pressed for the agent. ([wrappers])
    # Detail A5, img_height, img_width, grayscale: a fourteenth of the 210x160x3 numbers shows about as much. ([DQN])
    # Detail A7, stack_num: a single frame does not show which way the ball is flying, four do. ([DQN])
    options = {"noop_max": 30, "frameskip": 4, "maxpool": True, "use_fire_reset": True, "stack_num": 4}
    options |= {"img_height": 84, "img_width": 84, "grayscale": True, "reward_clipping": False}  # see A6
    options |= {"repeat_action_probability": 0.0, "num_threads": args.num_threads}  # no repeated, "sticky" ones: [DQN]
    envs = gym.make_vec("ale_py:" + args.env_id, num_envs, vectorization_mode=args.vectorization_mode, **options)
    if video:
        envs = wrappers.RecordVideo(Screen(envs), record_first_only=True, fps=15, **video)
    envs = wrappers.RecordEpisodeStatistics(envs, stats_key="episode_statistics")  # first, so of whole games, unclipped
    # Detail A6: points differ by orders of magnitude between games; their signs let the same flags do for all, at the
    # price that 1 and 100 look the same. ([DQN]; reward_clipping does it too, but then nobody knows the points)
    return LostLives(wrappers.TransformReward(envs, np.sign))


class Screen(gym.vector.VectorObservationWrapper):
    """Shows RecordVideo the newest of the frames that the agent sees."""

    render_mode = "rgb_array"

    def observations(self, observations):
        self.frames = observations[:, -1].copy()
        return observations

    def render(self):
        return list(self.frames[..., None].repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3))


class LostLives(gym.vector.VectorWrapper):
    """A lost life ends an episode, but not the game."""

    def reset(self, *, seed=None, options=None):
        buttons = [action.name for action in self.unwrapped.ale.get_action_set()]
        self.fire = buttons.index("FIRE") if "FIRE" in buttons else 0
        seed = seed if seed is None else (seed + np.arange(self.num_envs)) % 2**31  # ale-py takes none above that
        obs, infos = super().reset(seed=seed, options=options)
        self.lives, self.lost = infos["lives"], np.zeros(self.num_envs, bool)
        return obs, infos

    def step(self, actions):
        # Detail A3: the end costs all rewards that might have followed, which is how the agent learns to value a life.
        # ([DQN]; ale-py's episodic_life would start a new game: later lives would never be played.) For train the next
        # step is NEXT_STEP mode's reset, not learned from: the game goes on, so it presses fire, as at its start (A4).
        obs, rewards, terminations, truncations, infos = super().step(np.where(self.lost, self.fire, actions))
        self.lost = infos["lives"] < self.lives
        self.lives = infos["lives"]
        return obs, rewards, terminations | self.lost, truncations, infos


class Agent(nn.Module):
    def __init__(self, envs):
        super().__init__()
        # Detail A8: actor and critic need to see much the same, and seeing is costly: they share it ([A3C]). Now
        # vf_coef weighs one against the other (detail 10). The layers are those of [DQN].
        convolutions = [(4, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)]  # channels in and out, size, stride
        layers = [x for shape in convolutions for x in (ppo.layer_init(nn.Conv2d(*shape)), nn.ReLU())]
        layers += [nn.Flatten(), ppo.layer_init(nn.Linear(64 * 7 * 7, 512)), nn.ReLU()]
        self.network = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # a fifth less time on a CPU
        self.actor = ppo.layer_init(nn.Linear(512, envs.single_action_space.n), std=0.01)
        self.critic = ppo.layer_init(nn.Linear(512, 1), std=1.0)

    def get_value(self, obs):
        return self.critic(self.network(obs / 255)).squeeze(-1)

    def get_action_and_value(self, obs, action=None):
        hidden = self.network(obs / 255)  # Detail A9: bytes, 0 to 255; networks want numbers of order 1 ([baselines])
        policy = Categorical(logits=self.actor(hidden), validate_args=False)
        action = policy.sample() if action is None else action
        return action, policy.log_prob(action), policy.entropy(), self.critic(hidden).squeeze(-1)

    def get_best_action(self, obs):
        return self.actor(self.network(obs / 255)).argmax(-1)


DEFAULTS = {"env_id": "ALE/Breakout-v5", "exp_name": "atari", "vectorization_mode": "vector_entry_point"}
DEFAULTS |= {"total_timesteps": 10000000, "num_envs": 8, "clip_coef": 0.1}

if __name__ == "__main__":
    ppo.main(make_envs=make_envs, Agent=Agent, **DEFAULTS)
