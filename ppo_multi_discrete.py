"""PPO for actions of several parts, and for masks: only what differs from ppo.py.

    python ppo_multi_discrete.py
    python ppo_multi_discrete.py --no-masks
    python ppo_multi_discrete.py --env-id Taxi-v4 --total-timesteps 1000000

An action may have several parts, each of them numbered: MultiDiscrete, MultiBinary, or
a Tuple of Discrete. Not every choice is valid in every situation, and masks exclude
those that are not. By default this program plays a game of putting things in order. An
action says which thing to take, and where to put it. All flags are those of ppo.py, and
one more, --no-masks. Two more details belong to such actions. Search for "Detail M1",
for example:

    M1. independent parts               M2. masks

An environment tells which choices are valid in one of two ways: by its infos, as
info["action_mask"], in reset() and in every step(), or by a method action_masks(). A
mask is a row of 0 and 1, for all choices of the first part, then for those of the
second, and so on. It may also be given as one array for each part.

Sources are named as in ppo.py. [Masks] is Huang and Ontanon 2020, arXiv:2006.14171.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "torch>=2.6,<3",
#     "gymnasium[classic-control,toy-text]>=1.4,<2",
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


class Sorting(gym.Env):
    """Four things lie in twelve places, and thing i belongs in place i.

    The first part of an action says from which place to take a thing, the second one
    where to put it. If there is no thing, or if the other place is taken, nothing
    happens. Putting a thing where it belongs brings 1, and taking it away from there
    costs 1. An episode ends after 20 actions at the latest.

    Observations: (12, 4), 1 where the thing of this column lies in the place of this
    row. At first the places 0 to 3 are empty.
    """

    NUM_THINGS = 4
    NUM_PLACES = 12

    def __init__(self, render_mode=None):
        shape = (self.NUM_PLACES, self.NUM_THINGS)
        self.observation_space = gym.spaces.Box(0, 1, shape, np.float32)
        self.action_space = gym.spaces.MultiDiscrete([self.NUM_PLACES] * 2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        places = self.np_random.choice(
            np.arange(self.NUM_THINGS, self.NUM_PLACES), self.NUM_THINGS, replace=False
        )
        self.things = np.zeros((self.NUM_PLACES, self.NUM_THINGS), np.float32)
        self.things[places, np.arange(self.NUM_THINGS)] = 1
        return self.things.copy(), {"action_mask": self.action_mask()}

    def step(self, action):
        source, target = action
        in_order = self.number_in_order()
        if self.things[source].any() and not self.things[target].any():
            self.things[target] = self.things[source]
            self.things[source] = 0
        reward = self.number_in_order() - in_order
        terminated = self.number_in_order() == self.NUM_THINGS
        info = {"action_mask": self.action_mask()}
        return self.things.copy(), reward, terminated, False, info

    def number_in_order(self):
        return int(np.trace(self.things))  # the diagonal: thing i in place i

    def action_mask(self):
        is_taken = self.things.any(axis=1)
        return np.concatenate([is_taken, ~is_taken]).astype(np.int8)


gym.register("Sorting-v0", Sorting, max_episode_steps=20)


def make_env(args, render_mode=None):
    """As in ppo.py, but actions are rows of numbers, and observations hold masks."""
    return PartsAndMask(ppo.make_env(args, render_mode), use_masks=args.masks)


def make_envs(args, seed, video=None, render_mode=None):
    """As in ppo.py, but for actions of several parts."""
    if args.vectorization_mode == "vector_entry_point":
        message = "actions of several parts need --vectorization-mode sync or async"
        raise ppo.RunEnded(message)
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = ppo.vectorize(make_env, args, seed, same_step, video, render_mode)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs, stats_key=ppo.STATISTICS)


class PartsAndMask(gym.Wrapper):
    """Makes actions MultiDiscrete, counted from 0, and puts masks before observations.

    So the mask is kept with its observation in the rollout, and needs no buffer of its
    own. The critic does not see it.
    """

    def __init__(self, env, use_masks):
        super().__init__(env)
        self.use_masks = use_masks
        self.sizes = sizes_of_parts(env)
        self.action_space = gym.spaces.MultiDiscrete(self.sizes)

        observations = env.observation_space
        is_box = isinstance(observations, gym.spaces.Box)
        if not is_box or len(observations.shape) != 1:
            message = f"{env.spec.id}: its observations are {observations}, not flat"
            raise ppo.RunEnded(message)
        num_choices = sum(self.sizes)
        dtype = observations.dtype
        low = np.concatenate([np.zeros(num_choices, dtype), observations.low])
        high = np.concatenate([np.ones(num_choices, dtype), observations.high])
        self.observation_space = gym.spaces.Box(low, high, dtype=dtype)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.with_mask(obs, info), info

    def step(self, action):
        obs, *rest, info = self.env.step(self.own_action(action))
        return self.with_mask(obs, info), *rest, info

    def own_action(self, action):
        """The action as the environment wants it."""
        space = self.env.action_space
        if isinstance(space, gym.spaces.Discrete):
            return space.start + action[0]
        if isinstance(space, gym.spaces.Tuple):
            parts = zip(action, space, strict=True)
            return tuple(part.start + number for number, part in parts)
        own = action.reshape(space.shape).astype(space.dtype)
        if isinstance(space, gym.spaces.MultiDiscrete):
            own += space.start
        return own

    def with_mask(self, obs, info):
        num_choices = sum(self.sizes)
        mask = np.ones(num_choices)
        if self.use_masks and "action_mask" in info:
            mask = flat_mask(info["action_mask"])
        elif self.use_masks and self.env.has_wrapper_attr("action_masks"):
            mask = flat_mask(self.env.get_wrapper_attr("action_masks")())
        if len(mask) != num_choices:
            raise ppo.RunEnded(
                f"{self.spec.id}: its action mask has {len(mask)} numbers, but its "
                f"actions have {num_choices} choices in all"
            )
        return np.concatenate([mask, obs]).astype(self.observation_space.dtype)


def flat_mask(mask):
    """One row, also if there is one array for each part."""
    return np.concatenate([np.ravel(part) for part in mask])


def sizes_of_parts(env):
    """How many choices each part of an action has. Raises RunEnded for other spaces."""
    space = env.action_space
    if isinstance(space, gym.spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.nvec.flatten().tolist()
    if isinstance(space, gym.spaces.MultiBinary):
        return [2] * int(np.prod(space.shape))
    if isinstance(space, gym.spaces.Tuple):
        if all(isinstance(part, gym.spaces.Discrete) for part in space):
            return [int(part.n) for part in space]
    raise ppo.RunEnded(
        f"{env.spec.id}: its actions are {space}, not MultiDiscrete, MultiBinary, a "
        "Tuple of Discrete, or Discrete (for a Box: python ppo_continuous_action.py)"
    )


class IndependentParts:
    """The distribution of an action that has several parts.

    logits: (..., all choices of all parts), sizes: the number of choices of each part.
    """

    # Detail M1: independent parts. Each part of an action has its own logits, and is
    # drawn without regard to the others. So 12 * 12 actions need 24 logits instead of
    # 144. The price is that the choice in one part cannot depend on what was drawn in
    # another, and that a mask cannot forbid a pair. The probabilities of independent
    # parts multiply. So their logarithms add up, and so do the entropies. ([Huang])

    def __init__(self, logits, sizes):
        self.parts = []
        for part in logits.split(sizes, dim=-1):
            self.parts.append(Categorical(logits=part, validate_args=False))

    def sample(self):
        return torch.stack([part.sample() for part in self.parts], dim=-1)

    @property
    def mode(self):
        return torch.stack([part.mode for part in self.parts], dim=-1)

    def log_prob(self, action):
        numbers = action.unbind(dim=-1)
        pairs = zip(self.parts, numbers, strict=True)
        return sum(part.log_prob(number) for part, number in pairs)

    def entropy(self):
        return sum(part.entropy() for part in self.parts)


class Agent(ppo.Agent):
    """As in ppo.py, but the actor has logits for each part, and some are masked."""

    def __init__(self, envs):
        nn.Module.__init__(self)  # not ppo.Agent's networks
        self.sizes = envs.single_action_space.nvec.tolist()
        self.num_choices = sum(self.sizes)
        obs_dim = envs.single_observation_space.shape[0] - self.num_choices

        self.critic = nn.Sequential(
            layer_init(nn.Linear(obs_dim, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )
        self.actor = nn.Sequential(
            layer_init(nn.Linear(obs_dim, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, self.num_choices), std=0.01),
        )

    def get_value(self, obs):
        own_obs = obs[:, self.num_choices :]
        return super().get_value(own_obs)

    def get_policy(self, obs):
        mask = obs[:, : self.num_choices] > 0
        own_obs = obs[:, self.num_choices :]
        logits = self.actor(own_obs.float())

        # Detail M2: masks. Where an action is not valid, its logit becomes -1e8. So its
        # probability is exactly 0, and so is the gradient of its logit: the agent
        # neither tries it nor has to learn that it is no use. (-1e8 is the number in
        # [Masks]; any other that is far below all logits would do.) The update needs
        # the same masks as the rollout, or the ratio would compare two different
        # policies. It has them, as they are a part of the observation. ([Masks])
        #
        # A part may have no valid choice at all, where an environment only waits or has
        # ended. Such a part stays unmasked. With -1e8 everywhere, rounding would lose
        # the logarithms of its probabilities.
        masked_parts = []
        for part in mask.split(self.sizes, dim=-1):
            has_choice = part.any(dim=-1, keepdim=True)
            masked_parts.append(part | ~has_choice)
        mask = torch.cat(masked_parts, dim=-1)
        logits = torch.where(mask, logits, -1e8)
        return IndependentParts(logits, self.sizes)


def add_flags(parser):
    """Add the flag that ppo.py does not have."""
    add = parser.add_argument_group("the masks").add_argument
    add("--masks", action=ppo.Switch, help="use masks if there are any")


DEFAULTS = {
    "exp_name": "ppo_multi_discrete",
    "env_id": "Sorting-v0",
    "total_timesteps": 200000,
    "masks": True,
}

if __name__ == "__main__":
    ppo.main(make_envs=make_envs, Agent=Agent, add_flags=add_flags, **DEFAULTS)
