"""A plain PPO for continuous actions, as one first writes it down.

It has no vector environments and no wrappers, and takes every statistic by hand.
ppo_continuous_action.py must give the same episodes and the same parameters.

    python -m tests.reference.plain_continuous --env-id Hopper-v5
"""

import random
import sys

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Normal

import ppo
from ppo_continuous_action import DEFAULTS
from tests.reference.common import advantages_and_returns, gradient_step


class Agent(nn.Module):
    def __init__(self, obs_dim, action_dim):
        super().__init__()

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
            layer(64, action_dim, 0.01),
        )
        self.actor_logstd = nn.Parameter(torch.zeros(action_dim))

    def get_action_and_value(self, x, action=None):
        policy = Normal(self.actor(x), torch.exp(self.actor_logstd))
        if action is None:
            action = policy.sample()
        logprob = policy.log_prob(action).sum(1)
        return action, logprob, policy.entropy().sum(1), self.critic(x)


class Statistics:
    """Mean and variance of all rows so far, joined with those of the new ones.

    (Chan, Golub and LeVeque 1979)
    """

    def __init__(self, shape=(), dtype=np.float64):
        self.mean = np.zeros(shape, dtype)
        self.var = np.ones(shape, dtype)
        self.count = 1e-4

    def update(self, rows):
        mean = np.mean(rows, axis=0)
        var = np.var(rows, axis=0)
        count = len(rows)

        delta = mean - self.mean
        total = self.count + count
        self.mean = self.mean + delta * count / total
        squares = self.var * self.count + var * count
        squares = squares + np.square(delta) * self.count * count / total
        self.var = squares / total
        self.count = total


def train(args):
    """Print the episodes.

    Returns the agent, and the statistics of observations and of discounted returns.
    """
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)

    envs = [gym.make(args.env_id) for _ in range(args.num_envs)]
    obs_dim = envs[0].observation_space.shape[0]
    action_dim = envs[0].action_space.shape[0]
    agent = Agent(obs_dim, action_dim)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True
    )

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(*shape, obs_dim)
    actions = torch.zeros(*shape, action_dim)
    logprobs = torch.zeros(shape)
    rewards = torch.zeros(shape)
    dones = torch.zeros(shape)

    # These begin as float32 because Gymnasium's do.
    obs_statistics = Statistics(obs_dim, np.float32)

    return_statistics = Statistics()
    discounted = np.zeros(args.num_envs)
    episodic_return = np.zeros(args.num_envs)
    episodic_length = np.zeros(args.num_envs, int)

    def normalize(raw):
        obs_statistics.update(raw)
        raw = (raw - obs_statistics.mean) / np.sqrt(obs_statistics.var + 1e-8)
        return torch.Tensor(np.clip(raw, -10, 10))

    raw_obs = [env.reset(seed=args.seed + i)[0] for i, env in enumerate(envs)]
    next_obs = normalize(np.array(raw_obs))
    next_done = np.zeros(args.num_envs, bool)
    global_step = 0
    for update in range(1, args.num_updates + 1):
        if args.anneal_lr:
            frac = 1.0 - (update - 1.0) / args.num_updates
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate

        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            dones[step] = torch.Tensor(next_done)
            with torch.no_grad():
                action, logprob, _, _ = agent.get_action_and_value(obs[step])
            actions[step] = action
            logprobs[step] = logprob

            raw_obs = []
            raw_rewards = np.zeros(args.num_envs)
            was_done = next_done
            next_done = np.zeros(args.num_envs, bool)
            terminations = np.zeros(args.num_envs, bool)
            for i, env in enumerate(envs):
                if was_done[i]:  # this step only resets
                    raw_obs.append(env.reset()[0])
                    episodic_return[i] = 0
                    episodic_length[i] = 0
                    continue
                low = env.action_space.low
                high = env.action_space.high
                clipped = np.clip(action[i].numpy(), low, high)
                raw, raw_rewards[i], terminations[i], truncated, _ = env.step(clipped)
                raw_obs.append(raw)
                next_done[i] = terminations[i] or truncated
                episodic_return[i] += raw_rewards[i]
                episodic_length[i] += 1
                if next_done[i]:
                    print(
                        f"global_step={global_step}, "
                        f"episodic_return={episodic_return[i]}, "
                        f"episodic_length={episodic_length[i]}"
                    )
            next_obs = normalize(np.array(raw_obs))

            # The discounted sum of an episode's rewards ends with the episode.
            played = ~was_done
            for i in np.flatnonzero(played):
                discounted[i] = args.gamma * discounted[i] + raw_rewards[i]
            if played.any():
                return_statistics.update(discounted[played])
            discounted[next_done] = 0
            scaled = raw_rewards / np.sqrt(return_statistics.var + 1e-8)
            rewards[step] = torch.Tensor(np.clip(scaled, -10, 10))

        # The values of the rollout are computed at once, as in ppo.py. One by one they
        # would differ in their last bits.
        all_obs = torch.cat([obs, next_obs[None]]).reshape(-1, obs_dim)
        with torch.no_grad():
            all_values = agent.critic(all_obs).reshape(-1, args.num_envs)
        values = all_values[:-1]
        next_value = all_values[-1]
        advantages, returns = advantages_and_returns(
            args, rewards, dones, values, torch.Tensor(next_done), next_value
        )

        b_obs = obs.reshape(-1, obs_dim)
        b_actions = actions.reshape(-1, action_dim)
        b_old = [kind.reshape(-1) for kind in (logprobs, advantages, returns, values)]

        # The steps that only reset are not learned from.
        b_dones = dones.reshape(-1)
        b_inds = np.array([i for i in range(args.batch_size) if not b_dones[i]])
        for _ in range(args.update_epochs):
            np.random.shuffle(b_inds)
            for mb_inds in np.array_split(b_inds, args.num_minibatches):
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(
                    b_obs[mb_inds], b_actions[mb_inds]
                )
                new = newlogprob, entropy, newvalue
                old = [kind[mb_inds] for kind in b_old]
                gradient_step(args, agent, optimizer, new, old)

    return agent, obs_statistics, return_statistics


if __name__ == "__main__":
    train(ppo.parse_args(sys.argv[1:], **DEFAULTS))
