"""PPO for pictures of any kind: only what differs from ppo.py and ppo_atari.py.

    python ppo_pixels.py
    python ppo_pixels.py --env-id my_module:MyGame-v0 --frame-stack 4

Pictures may be gray or have channels, first or last, in bytes or in real numbers.
From a Dict, its one picture is taken, and the rest is left out. The actions are
numbered. All flags are those of ppo.py, and one more, --frame-stack, which shows the
last pictures together, so that the agent sees what moves. By default this program plays
Catch, a small game that comes with it.

Details A8 and A9 of ppo_atari.py hold here, too, A9 for any range of values. Pictures
of 36 pixels or more on each side get the layers of ppo_atari.py, and smaller ones get
smaller filters.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "torch>=2.6,<3",
#     "gymnasium[classic-control]>=1.4,<2",
#     "numpy>=1.26,<3",
#     "cloudpickle>=3,<4",
#     "tensorboard>=2.18,<3",
#     "wandb>=0.31,<1",
#     "moviepy>=2.1,<3",
#     "tqdm>=4.66,<5",
# ]
# ///

import math

import gymnasium as gym
import numpy as np
import torch.nn as nn

import ppo
import ppo_atari
from ppo import layer_init

LARGEST = 96  # the longest side in pixels; larger pictures are made smaller


class Catch(gym.Env):
    """A ball falls through a picture, and a bar of three pixels has to catch it.

    Actions: 0 moves the bar to the left, 1 leaves it, 2 moves it to the right. An
    episode is one ball. It brings 1 if the ball is caught, and -1 if it is not.
    """

    observation_space = gym.spaces.Box(0, 255, (20, 20, 1), np.uint8)
    action_space = gym.spaces.Discrete(3)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bar = int(self.np_random.integers(1, 19))  # its middle
        self.ball = int(self.np_random.integers(0, 20))
        self.height = 0
        return self.picture(), {}

    def step(self, action):
        self.bar = min(max(self.bar + int(action) - 1, 1), 18)
        self.height += 1
        is_down = self.height == 19
        reward = 0.0
        if is_down:
            reward = 1.0 if abs(self.ball - self.bar) <= 1 else -1.0
        return self.picture(), reward, is_down, False, {}

    def picture(self):
        picture = np.zeros((20, 20, 1), np.uint8)
        picture[19, self.bar - 1 : self.bar + 2] = 128
        picture[self.height, self.ball] = 255
        return picture

    def render(self):
        large = self.picture().repeat(8, axis=0).repeat(8, axis=1)
        return large.repeat(3, axis=2)


gym.register("Catch-v0", Catch)


def make_env(args, render_mode=None):
    """Make one environment, with pictures of (channels, height, width) pixels."""
    env = ppo.make_raw_env(args, render_mode)
    env = find_picture(env)
    env = channels_first(env)
    env = make_smaller(env)
    if args.frame_stack > 1:
        channels, height, width = env.observation_space.shape
        env = gym.wrappers.FrameStackObservation(env, args.frame_stack)
        shape = (args.frame_stack * channels, height, width)
        env = gym.wrappers.ReshapeObservation(env, shape)
    return env


def make_envs(args, seed, video=None, render_mode=None):
    """As in ppo.py, but for pictures."""
    if args.vectorization_mode == "vector_entry_point":
        raise ppo.RunEnded("pictures need --vectorization-mode sync or async")
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = ppo.vectorize(make_env, args, seed, same_step, video, render_mode)
    ppo.check_actions(args, envs)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs, stats_key=ppo.STATISTICS)


def is_picture(space):
    """Whether a space holds pictures: (height, width), or three axes with channels."""
    return isinstance(space, gym.spaces.Box) and len(space.shape) in (2, 3)


def find_picture(env):
    """Take the picture out of a Dict. Raises RunEnded if there is none, or several."""
    space = env.observation_space
    if is_picture(space):
        return env
    names = []
    if isinstance(space, gym.spaces.Dict):
        names = [name for name, part in space.items() if is_picture(part)]
    if len(names) != 1:
        raise ppo.RunEnded(
            f"{env.spec.id}: its observations are {space}, not one picture (for other "
            "observations: python ppo.py)"
        )
    name = names[0]
    return gym.wrappers.TransformObservation(env, lambda obs: obs[name], space[name])


def channels_first(env):
    """Give pictures the shape (channels, height, width), which PyTorch wants.

    If two neighboring axes are equally long, they are height and width. Otherwise the
    shorter one of the first and the last axis is that of the channels.
    """
    shape = env.observation_space.shape
    if len(shape) == 2:
        return gym.wrappers.ReshapeObservation(env, (1, *shape))
    is_first = shape[0] < shape[2]
    if (shape[0] == shape[1]) != (shape[1] == shape[2]):
        is_first = shape[1] == shape[2]
    if is_first:
        return env
    return transform(env, lambda obs: np.moveaxis(obs, -1, 0))


def make_smaller(env):
    """Average squares of pixels, so that no side is longer than LARGEST.

    Rows and columns that do not fill a square are cut off.
    """
    _, height, width = env.observation_space.shape
    longest = max(height, width)
    side = math.ceil(longest / LARGEST)  # of a square, in pixels
    if side == 1:
        return env
    rows = height // side
    columns = width // side

    def average(obs):
        cut = obs[:, : rows * side, : columns * side]
        squares = cut.reshape(len(obs), rows, side, columns, side)
        return squares.mean(axis=(2, 4)).astype(obs.dtype)

    return transform(env, average)


def transform(env, function):
    """Apply a function to all observations, and to the limits of their space."""
    space = env.observation_space
    low = function(space.low)
    high = function(space.high)
    space = gym.spaces.Box(low, high, dtype=space.dtype)
    return gym.wrappers.TransformObservation(env, function, space)


class Agent(ppo_atari.Agent):
    """As in ppo_atari.py, but for pictures of any size and any range of values."""

    def __init__(self, envs):
        super().__init__(envs)
        space = envs.single_observation_space
        self.low = float(space.low.min())
        self.range = float(space.high.max()) - self.low
        if not self.range < 1e30:  # a space without limits: values stay
            self.low = 0.0
            self.range = 1.0

    def make_convolutions(self, shape):
        # The large filters of ppo_atari.py need pictures of 36 pixels or more. They
        # cover all of a side only if dividing it by 8 leaves 4, as with 36, 44 and 84.
        # Others get up to 7 zeros at the right and at the bottom.
        channels, height, width = shape
        if min(height, width) >= 36:
            margin = nn.ZeroPad2d((0, (36 - width) % 8, 0, (36 - height) % 8))
            return nn.Sequential(margin, *super().make_convolutions(shape))

        # In smaller pictures each pixel matters, so the filters are small, and padding
        # lets them see the borders. Some pictures use little of their range: those of
        # MiniGrid go from 0 to 10 of 255. The last layer but one normalizes what was
        # seen, over all channels and places, to the same size for all of them. (Ba et
        # al. 2016, arXiv:1607.06450)
        return nn.Sequential(
            layer_init(nn.Conv2d(channels, 16, kernel_size=3, padding=1)),
            nn.ReLU(),
            layer_init(nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1)),
            nn.ReLU(),
            nn.GroupNorm(num_groups=1, num_channels=64),
            nn.Flatten(),
        )

    def scale(self, obs):
        # As in detail A9, with the range of the space instead of 0 to 255.
        return (obs.float() - self.low) / self.range


def add_flags(parser):
    """Add the flag that ppo.py does not have."""
    add = parser.add_argument_group("the pictures").add_argument
    add("--frame-stack", type=ppo.positive_int, help="pictures that are seen at once")


DEFAULTS = {
    "exp_name": "ppo_pixels",
    "env_id": "Catch-v0",
    "total_timesteps": 100000,
    "num_envs": 8,
    "clip_coef": 0.1,
    "frame_stack": 1,
}

if __name__ == "__main__":
    ppo.main(make_envs=make_envs, Agent=Agent, add_flags=add_flags, **DEFAULTS)
