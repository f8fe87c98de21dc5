"""A plain PPO for images, as one first writes it down.

It has no vector environments and no wrappers for images. ppo_pixels.py must give the
same episodes and the same parameters. Pictures above 96 x 96, which that program makes
smaller, are left out here.

    python -m tests.reference.plain_pixels
"""

import random
import sys

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Categorical

import ppo
from tests.reference.common import advantages_and_returns, gradient_step

# Strides of the weights of the convolutions in memory; they may change the last bits.
MEMORY_FORMAT = torch.channels_last

DEFAULTS = {"env_id": "PlainDot-v0", "num_envs": 8, "clip_coef": 0.1}


class Dot(gym.Env):
    """A white dot beside one of the four sides; the right answer is that side.

    ``layout`` is "last", "first" or "none", where the channels are; ``dtype`` of the
    pictures is np.uint8 or np.float32; ``in_dict`` puts them in a Dict.
    """

    action_space = gym.spaces.Discrete(4)

    def __init__(
        self,
        height=10,
        width=10,
        channels=3,
        layout="last",
        dtype=np.uint8,
        high=255,
        in_dict=False,
        render_mode=None,
    ):
        self.height = height
        self.width = width
        self.channels = channels
        self.layout = layout
        self.dtype = dtype
        self.high = high
        self.in_dict = in_dict
        self.render_mode = render_mode
        shape = self.draw(0, 0).shape
        self.observation_space = gym.spaces.Box(0, high, shape, dtype)
        if in_dict:
            self.observation_space = gym.spaces.Dict(
                {"life": gym.spaces.Discrete(43), "view": self.observation_space}
            )

    def draw(self, row, column):
        picture = np.zeros((self.height, self.width, self.channels), self.dtype)
        picture[row, column] = self.high
        if self.layout == "first":
            return picture.transpose(2, 0, 1)
        if self.layout == "none":
            return picture[:, :, 0]
        return picture

    def observe(self):
        self.side = int(self.np_random.integers(4))
        row = int(self.np_random.integers(self.height))
        column = int(self.np_random.integers(self.width))
        if self.side == 0:
            row = 0
        elif self.side == 1:
            column = self.width - 1
        elif self.side == 2:
            row = self.height - 1
        else:
            column = 0
        # A corner belongs to two sides, so the dot keeps away from corners.
        if self.side in (0, 2):
            column = min(max(column, 1), self.width - 2)
        else:
            row = min(max(row, 1), self.height - 2)
        picture = self.draw(row, column)
        return {"life": 42, "view": picture} if self.in_dict else picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        reward = 1.0 if action == self.side else 0.0
        return self.observe(), reward, False, False, {}


def register(name, **options):
    gym.register(f"Plain{name}-v0", Dot, kwargs=options, max_episode_steps=16)


register("Dot")
register("DotFirst", height=12, width=14, layout="first")
register("DotGray", height=11, width=10, layout="none")
register("DotFloat", dtype=np.float32, high=1.0)
register("DotFloat255", dtype=np.float32, high=255.0)
register("DotDict", in_dict=True)
register("DotOne", height=13, width=20, channels=1)
register("Dot36", height=36, width=36)
register("Dot84", height=84, width=84, channels=4, layout="first")
register("Dot96", height=64, width=96)


def key_of_image(space):
    """The key of the only image, or None if there is no Dict."""
    if not isinstance(space, gym.spaces.Dict):
        return None
    keys = [
        key
        for key, part in space.spaces.items()
        if isinstance(part, gym.spaces.Box) and len(part.shape) >= 2
    ]
    assert len(keys) == 1
    return keys[0]


def channels_first(picture):
    """The picture as an array of its own, channels x height x width."""
    if picture.ndim == 2:
        picture = picture[None]
    elif picture.shape[2] <= picture.shape[0]:  # channels are fewer than rows
        picture = picture.transpose(2, 0, 1)
    return np.array(picture, order="C")


class Agent(nn.Module):
    def __init__(self, image_space, num_actions):
        super().__init__()
        channels, height, width = channels_first(np.zeros(image_space.shape)).shape
        assert max(height, width) <= 96
        if image_space.dtype == np.uint8:
            self.divisor = 255.0
        else:
            self.divisor = float(np.max(image_space.high))
            assert np.isfinite(self.divisor)

        def layer(module, gain=2**0.5):
            nn.init.orthogonal_(module.weight, gain)
            nn.init.constant_(module.bias, 0.0)
            return module

        # Filters, size, stride and padding of each layer. A margin of zeros below and
        # to the right lets the large ones end exactly at the last pixel.
        layers = []
        if min(height, width) >= 36:
            below = -(height - 36) % 8
            right = -(width - 36) % 8
            layers.append(nn.ZeroPad2d((0, right, 0, below)))
            height += below
            width += right
            kinds = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)]
        else:
            kinds = [(16, 3, 1, 1), (32, 3, 2, 1), (64, 3, 2, 1)]
        for filters, kernel, stride, padding in kinds:
            convolution = nn.Conv2d(
                channels, filters, kernel, stride=stride, padding=padding
            )
            layers.append(layer(convolution))
            layers.append(nn.ReLU())
            channels = filters
            height = (height + 2 * padding - kernel) // stride + 1
            width = (width + 2 * padding - kernel) // stride + 1
        if kinds[0][0] == 16:  # the small ones
            layers.append(nn.GroupNorm(1, channels))
        layers.append(nn.Flatten())
        layers.append(layer(nn.Linear(channels * height * width, 512)))
        layers.append(nn.ReLU())
        self.network = nn.Sequential(*layers).to(memory_format=MEMORY_FORMAT)
        self.actor = layer(nn.Linear(512, num_actions), 0.01)
        self.critic = layer(nn.Linear(512, 1), 1.0)

    def see(self, x):
        x = x.float()
        if self.divisor != 1.0:
            x = x / self.divisor
        return self.network(x)


def train(args):
    """Print the episodes; return the agent."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)

    envs = [
        gym.wrappers.RecordEpisodeStatistics(
            gym.make(args.env_id, disable_env_checker=True)
        )
        for _ in range(args.num_envs)
    ]
    image_space = envs[0].observation_space
    key = key_of_image(image_space)
    if key is not None:
        image_space = image_space[key]
    agent = Agent(image_space, envs[0].action_space.n)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True
    )

    def picture_of(seen):
        return torch.from_numpy(channels_first(seen if key is None else seen[key]))

    pictures = [
        picture_of(env.reset(seed=args.seed + i)[0]) for i, env in enumerate(envs)
    ]
    next_obs = torch.stack(pictures)  # of the environment's own dtype
    next_done = torch.zeros(args.num_envs)
    picture_shape = next_obs.shape[1:]

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, *picture_shape), dtype=next_obs.dtype)
    actions = torch.zeros(shape)
    logprobs = torch.zeros(shape)
    rewards = torch.zeros(shape)
    dones = torch.zeros(shape)

    global_step = 0
    for update in range(1, args.num_updates + 1):
        if args.anneal_lr:
            frac = 1.0 - (update - 1.0) / args.num_updates
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate

        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            dones[step] = next_done
            with torch.no_grad():
                policy = Categorical(logits=agent.actor(agent.see(next_obs)))
                action = policy.sample()
                logprob = policy.log_prob(action)
            actions[step] = action
            logprobs[step] = logprob

            cut_off = []  # environments whose episode a time limit has ended,
            last_obs = []  # and what was seen last in it
            pictures = []
            for i, env in enumerate(envs):
                seen, reward, terminated, truncated, info = env.step(
                    np.int64(action[i].item())
                )
                rewards[step, i] = float(reward)
                next_done[i] = float(terminated or truncated)
                if truncated and not terminated:
                    cut_off.append(i)
                    last_obs.append(picture_of(seen))
                if terminated or truncated:
                    episode = info["episode"]
                    print(
                        f"global_step={global_step}, "
                        f"episodic_return={episode['r']}, "
                        f"episodic_length={episode['l']}"
                    )
                    seen, _ = env.reset()
                pictures.append(picture_of(seen))
            next_obs = torch.stack(pictures)
            if args.bootstrap_truncation and cut_off:
                with torch.no_grad():
                    last_value = agent.critic(agent.see(torch.stack(last_obs)))
                rewards[step, cut_off] += args.gamma * last_value.flatten()

        # The values of the rollout are computed at once, as in ppo.py. One by one they
        # would differ in their last bits.
        all_obs = torch.cat([obs, next_obs[None]]).reshape(-1, *picture_shape)
        with torch.no_grad():
            all_values = agent.critic(agent.see(all_obs)).reshape(-1, args.num_envs)
        values = all_values[:-1]
        next_value = all_values[-1]

        advantages, returns = advantages_and_returns(
            args, rewards, dones, values, next_done, next_value
        )

        b_obs = obs.reshape(-1, *picture_shape)
        b_actions = actions.reshape(-1)
        b_old = [kind.reshape(-1) for kind in (logprobs, advantages, returns, values)]
        b_inds = np.arange(args.batch_size)
        for _ in range(args.update_epochs):
            np.random.shuffle(b_inds)
            for mb_inds in np.array_split(b_inds, args.num_minibatches):
                hidden = agent.see(b_obs[mb_inds])
                policy = Categorical(logits=agent.actor(hidden))
                newlogprob = policy.log_prob(b_actions[mb_inds])
                entropy = policy.entropy()
                newvalue = agent.critic(hidden).view(-1)

                new = newlogprob, entropy, newvalue
                old = [kind[mb_inds] for kind in b_old]
                approx_kl = gradient_step(args, agent, optimizer, new, old)

            if args.target_kl is not None and approx_kl > args.target_kl:
                break

    for env in envs:
        env.close()
    return agent


if __name__ == "__main__":
    train(ppo.parse_args(sys.argv[1:], **DEFAULTS))
