"""PPO for Atari games: only what differs from ppo.py, which does the rest.

    pip install ale-py
    python ppo_atari.py --env-id ALE/Breakout-v5
    python ppo_atari.py --env-id ALE/Pong-v5 --track

A step takes four frames of the game. All flags are those of ppo.py, some with other
defaults. Returns that are printed and logged are of whole games, in the game's own
points. Nine more implementation details belong to Atari games. The emulator ale-py does
most of them, in C++. Search for "Detail A5", for example:

    A1. no-ops                      A6. the sign of rewards
    A2. skipped frames              A7. four frames at once
    A3. lost lives                  A8. a shared network
    A4. fire                        A9. pixels from 0 to 1
    A5. small gray frames

Sources are named as in ppo.py. [DQN] is Mnih et al. 2015, doi:10.1038/nature14236, and
[wrappers] is a file of [baselines], common/atari_wrappers.py.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "torch>=2.6,<3",
#     "gymnasium[classic-control]>=1.4,<2",
#     "ale-py>=0.12,<1",
#     "numpy>=1.26,<3",
#     "cloudpickle>=3,<4",
#     "tensorboard>=2.18,<3",
#     "wandb>=0.31,<1",
#     "moviepy>=2.1,<3",
#     "tqdm>=4.66,<5",
# ]
# ///

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Categorical

import ppo
from ppo import layer_init


def make_envs(args, seed, video=None, render_mode=None):
    """As in ppo.py, but for the games of ale-py.

    Observations: (num_envs, 4, 84, 84), in bytes.
    """
    if not args.env_id.startswith("ALE/"):
        raise ppo.RunEnded(
            f"--env-id {args.env_id}: games have ids like ALE/Breakout-v5 (for others "
            "there are ppo.py and ppo_continuous_action.py)"
        )
    if args.vectorization_mode != "vector_entry_point" or render_mode == "human":
        raise ppo.RunEnded(
            "games need --vectorization-mode vector_entry_point, and have no window"
        )

    wrappers = gym.wrappers.vector
    envs = make_games(args)
    if video:
        envs = wrappers.RecordVideo(
            Screen(envs), record_first_only=True, fps=15, **video
        )

    # This comes before the next two, so it counts whole games and all their points.
    envs = wrappers.RecordEpisodeStatistics(envs, stats_key=ppo.STATISTICS)

    # Detail A6: the sign of rewards. Points differ by orders of magnitude between
    # games. With their signs the same flags suit all games, at the price that 1 and 100
    # look the same. ([DQN]; ale-py does it, too, but then nobody knows the points.)
    envs = wrappers.TransformReward(envs, np.sign)
    return LostLives(envs)


def make_games(args):
    """Make ale-py's batch of games, in NEXT_STEP mode."""
    options = {
        # Detail A1: no-ops. Nothing is done for up to 30 frames, so that games differ
        # from the beginning. ([DQN]; [wrappers])
        "noop_max": 30,
        # Detail A2: skipped frames. Each action is kept for four frames, which is a
        # quarter of the work. Some things are drawn in every other frame only, so a
        # pixel is the brighter one of the last two frames. ([DQN])
        "frameskip": 4,
        "maxpool": True,
        # Detail A4: fire. Some games wait until it is pressed, maybe for ever, so it is
        # pressed for the agent. ([wrappers])
        "use_fire_reset": True,
        # Detail A5: small gray frames. A fourteenth of the 210 x 160 x 3 numbers shows
        # about as much. ([DQN])
        "img_height": 84,
        "img_width": 84,
        "grayscale": True,
        # Detail A7: four frames at once. A single frame does not show which way the
        # ball is flying. ([DQN])
        "stack_num": 4,
        "reward_clipping": False,  # see A6
        "repeat_action_probability": 0.0,  # [DQN] did without repeated, "sticky" ones
        "num_threads": args.num_threads,
        **args.env_kwargs,
    }
    try:
        return gym.make_vec(
            f"ale_py:{args.env_id}",
            args.local_num_envs,
            vectorization_mode=args.vectorization_mode,
            **options,
        )
    except (gym.error.Error, ModuleNotFoundError) as error:
        message = (
            f"--env-id {args.env_id}: {error} (The games need: pip install ale-py)"
        )
        raise ppo.RunEnded(message) from error


class Screen(gym.vector.VectorObservationWrapper):
    """Shows RecordVideo the newest of the frames that the agent sees."""

    render_mode = "rgb_array"

    def observations(self, observations):
        self.frames = observations[:, -1].copy()
        return observations

    def render(self):
        large = self.frames.repeat(4, axis=1).repeat(4, axis=2)
        rgb = large[..., None].repeat(3, axis=3)
        return list(rgb)


class LostLives(gym.vector.VectorWrapper):
    """Ends an episode when a life is lost, while the game goes on."""

    # Detail A3: lost lives. An end costs all the rewards that might have followed, and
    # so the agent learns what a life is worth. ([DQN]) ale-py's own option starts a new
    # game at each lost life, so that later lives would never be played.
    #
    # In NEXT_STEP mode, train() does not learn from the step after an end. Here the
    # game goes on in this step, and it presses fire, as at the start of a game (A4).

    def reset(self, *, seed=None, options=None):
        buttons = [action.name for action in self.unwrapped.ale.get_action_set()]
        self.fire = buttons.index("FIRE") if "FIRE" in buttons else 0
        if seed is not None:
            seed = (
                seed + np.arange(self.num_envs)
            ) % 2**31  # ale-py takes no larger one
        obs, infos = super().reset(seed=seed, options=options)
        self.lives = infos["lives"]
        self.lost = np.zeros(self.num_envs, dtype=bool)
        return obs, infos

    def step(self, actions):
        actions = np.where(self.lost, self.fire, actions)
        obs, rewards, terminations, truncations, infos = super().step(actions)
        self.lost = infos["lives"] < self.lives
        self.lives = infos["lives"]
        return obs, rewards, terminations | self.lost, truncations, infos


class Agent(ppo.Agent):
    """As in ppo.py, but one network sees the frames for both actor and critic."""

    def __init__(self, envs):
        nn.Module.__init__(self)  # not ppo.Agent's networks
        shape = envs.single_observation_space.shape
        num_actions = envs.single_action_space.n

        # Detail A8: a shared network. Actor and critic need to see much the same, and
        # seeing is costly. ([A3C]) Now vf_coef matters: it weighs one against the other
        # (detail 10 of ppo.py).
        convolutions = self.make_convolutions(shape)
        num_features = convolutions(torch.zeros(1, *shape)).numel()
        self.network = nn.Sequential(
            *convolutions,
            layer_init(nn.Linear(num_features, 512)),
            nn.ReLU(),
        )
        self.network.to(memory_format=torch.channels_last)  # faster on a CPU
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)

    def make_convolutions(self, shape):
        """The layers that look at pictures of this shape: (channels, height, width)."""
        channels = shape[0]
        return nn.Sequential(  # the layers of [DQN]
            layer_init(nn.Conv2d(channels, 32, kernel_size=8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, kernel_size=4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, kernel_size=3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
        )

    def scale(self, obs):
        # Detail A9: pixels from 0 to 1. They come as bytes from 0 to 255, but networks
        # learn best from numbers around 1. ([baselines])
        return obs / 255

    def see(self, obs):
        return self.network(self.scale(obs))

    def get_value(self, obs):
        return self.critic(self.see(obs)).squeeze(-1)

    def get_policy(self, obs):
        return Categorical(logits=self.actor(self.see(obs)), validate_args=False)

    def evaluate_actions(self, obs, action):
        hidden = self.see(obs)  # once for both
        policy = Categorical(logits=self.actor(hidden), validate_args=False)
        value = self.critic(hidden).squeeze(-1)
        return policy.log_prob(action), policy.entropy(), value


DEFAULTS = {
    "exp_name": "ppo_atari",
    "env_id": "ALE/Breakout-v5",
    "vectorization_mode": "vector_entry_point",
    "total_timesteps": 10000000,
    "num_envs": 8,
    "clip_coef": 0.1,
}

if __name__ == "__main__":
    ppo.main(make_envs=make_envs, Agent=Agent, **DEFAULTS)
