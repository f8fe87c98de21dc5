"""A plain PPO for actions of several parts and for masks, as one first writes it down.

It has no vector environments: each environment is stepped, reset and asked for its mask
by hand. ppo_multi_discrete.py must give the same episodes and the same parameters.

    python -m tests.reference.plain_multi_discrete --env-id Taxi-v4
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

DEFAULTS = {}  # those of ppo.py


def sizes_of_parts(space):
    """The number of choices of each part of an action."""
    if isinstance(space, gym.spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, gym.spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.flatten()]
    if isinstance(space, gym.spaces.MultiBinary):
        return [2] * int(np.prod(space.shape))
    return [int(part.n) for part in space.spaces]


def action_for_env(space, parts):
    """The numbers of the parts, as the environment takes them."""
    if isinstance(space, gym.spaces.Discrete):
        return np.int64(parts[0])
    if isinstance(space, gym.spaces.Tuple):
        return tuple(np.int64(part) for part in parts)
    return np.array(parts, dtype=space.dtype).reshape(space.shape)


def mask_of(env, info, sizes):
    """One row of booleans for all parts, True where a choice is valid."""
    if "action_mask" in info:
        mask = info["action_mask"]
    elif hasattr(env.unwrapped, "action_masks"):
        mask = env.unwrapped.action_masks()
    else:
        mask = np.ones(sum(sizes))
    # One row, or one for each part.
    row = np.concatenate([np.asarray(piece).reshape(-1) for piece in mask]) != 0
    assert len(row) == sum(sizes)

    begin = 0
    for size in sizes:
        if not row[begin : begin + size].any():
            row[begin : begin + size] = True
        begin += size
    return row


class Agent(nn.Module):
    def __init__(self, obs_dim, sizes):
        super().__init__()
        self.sizes = sizes

        def layer(inputs, outputs, gain):
            linear = nn.Linear(inputs, outputs)
            nn.init.orthogonal_(linear.weight, gain)
            nn.init.constant_(linear.bias, 0.0)
            return linear

        self.critic = nn.Sequential(
            layer(obs_dim, 64, np.sqrt(2)),
            nn.Tanh(),
            layer(64, 64, np.sqrt(2)),
            nn.Tanh(),
            layer(64, 1, 1.0),
        )
        self.actor = nn.Sequential(
            layer(obs_dim, 64, np.sqrt(2)),
            nn.Tanh(),
            layer(64, 64, np.sqrt(2)),
            nn.Tanh(),
            layer(64, sum(sizes), 0.01),
        )

    def get_action(self, x, mask, action=None):
        """Returns actions (rows, parts), log-probabilities and entropies (rows,)."""
        logits = torch.where(mask, self.actor(x), -1e8)
        chosen = []
        logprobs = []
        entropies = []
        begin = 0
        for part, size in enumerate(self.sizes):
            policy = Categorical(logits=logits[:, begin : begin + size])
            choice = policy.sample() if action is None else action[:, part]
            chosen.append(choice)
            logprobs.append(policy.log_prob(choice))
            entropies.append(policy.entropy())
            begin += size
        return (
            torch.stack(chosen, dim=-1),
            sum(logprobs),
            sum(entropies),
        )


def train(args):
    """Print the episodes; return the agent."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)

    envs = [
        gym.wrappers.RecordEpisodeStatistics(ppo.make_env(args))
        for _ in range(args.num_envs)
    ]
    obs_dim = envs[0].observation_space.shape[0]
    space = envs[0].action_space
    sizes = sizes_of_parts(space)
    agent = Agent(obs_dim, sizes)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True
    )

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, obs_dim))
    masks = torch.zeros((*shape, sum(sizes)), dtype=torch.bool)
    actions = torch.zeros((*shape, len(sizes)))
    logprobs = torch.zeros(shape)
    rewards = torch.zeros(shape)
    dones = torch.zeros(shape)

    global_step = 0
    next_obs = torch.zeros(args.num_envs, obs_dim)
    next_mask = torch.zeros((args.num_envs, sum(sizes)), dtype=torch.bool)
    next_done = torch.zeros(args.num_envs)
    for i, env in enumerate(envs):
        first_obs, info = env.reset(seed=args.seed + i)
        next_obs[i] = torch.Tensor(first_obs)
        next_mask[i] = torch.tensor(mask_of(env, info, sizes))
    for update in range(1, args.num_updates + 1):
        if args.anneal_lr:
            frac = 1.0 - (update - 1.0) / args.num_updates
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate

        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            masks[step] = next_mask
            dones[step] = next_done
            with torch.no_grad():
                action, logprob, _ = agent.get_action(obs[step], masks[step])
            actions[step] = action
            logprobs[step] = logprob

            cut_off = []  # environments whose episode a time limit has ended,
            last_obs = []  # and what was seen last in it
            for i, env in enumerate(envs):
                parts = action[i].tolist()
                seen, reward, terminated, truncated, info = env.step(
                    action_for_env(space, parts)
                )
                rewards[step, i] = float(reward)
                next_done[i] = float(terminated or truncated)
                if truncated and not terminated:
                    cut_off.append(i)
                    last_obs.append(torch.Tensor(seen))
                if terminated or truncated:
                    episode = info["episode"]
                    print(
                        f"global_step={global_step}, "
                        f"episodic_return={episode['r']}, "
                        f"episodic_length={episode['l']}"
                    )
                    seen, info = env.reset()
                next_obs[i] = torch.Tensor(seen)
                next_mask[i] = torch.tensor(mask_of(env, info, sizes))
            if args.bootstrap_truncation and cut_off:
                with torch.no_grad():
                    last_value = agent.critic(torch.stack(last_obs)).flatten()
                rewards[step, cut_off] += args.gamma * last_value

        # The values of the rollout are computed at once, as in ppo.py. One by one they
        # would differ in their last bits.
        all_obs = torch.cat([obs, next_obs[None]]).reshape(-1, obs_dim)
        with torch.no_grad():
            all_values = agent.critic(all_obs).reshape(-1, args.num_envs)
        values = all_values[:-1]
        next_value = all_values[-1]

        advantages, returns = advantages_and_returns(
            args, rewards, dones, values, next_done, next_value
        )

        b_obs = obs.reshape(-1, obs_dim)
        b_masks = masks.reshape(-1, sum(sizes))
        b_actions = actions.reshape(-1, len(sizes))
        b_old = [kind.reshape(-1) for kind in (logprobs, advantages, returns, values)]
        b_inds = np.arange(args.batch_size)
        for _ in range(args.update_epochs):
            np.random.shuffle(b_inds)
            for mb_inds in np.array_split(b_inds, args.num_minibatches):
                _, newlogprob, entropy = agent.get_action(
                    b_obs[mb_inds], b_masks[mb_inds], b_actions[mb_inds]
                )
                newvalue = agent.critic(b_obs[mb_inds]).view(-1)

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
