"""A plain PPO for continuous actions, as one first writes it down: no vector environments, no wrappers, every statistic
by hand. ppo_continuous_action.py must give the same episodes and the same parameters."""

import random
import sys

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Normal

import ppo
from ppo_continuous_action import DEFAULTS


class Agent(nn.Module):
    def __init__(self, obs_dim, action_dim):
        super().__init__()

        def layer(inputs, outputs, gain):
            linear = nn.Linear(inputs, outputs)
            nn.init.orthogonal_(linear.weight, gain)
            nn.init.constant_(linear.bias, 0.0)
            return linear

        g = np.sqrt(2)
        self.critic = nn.Sequential(layer(obs_dim, 64, g), nn.Tanh(), layer(64, 64, g), nn.Tanh(), layer(64, 1, 1.0))
        self.actor = nn.Sequential(
            layer(obs_dim, 64, g), nn.Tanh(), layer(64, 64, g), nn.Tanh(), layer(64, action_dim, 0.01)
        )
        self.actor_logstd = nn.Parameter(torch.zeros(action_dim))

    def get_action_and_value(self, x, action=None):
        policy = Normal(self.actor(x), torch.exp(self.actor_logstd))
        if action is None:
            action = policy.sample()
        return action, policy.log_prob(action).sum(1), policy.entropy().sum(1), self.critic(x)


class Statistics:
    """Mean and variance of all rows so far, joined with those of the new ones (Chan, Golub and LeVeque 1979)."""

    def __init__(self, shape=(), dtype=np.float64):
        self.mean, self.var, self.count = np.zeros(shape, dtype), np.ones(shape, dtype), 1e-4

    def update(self, rows):
        mean, var, count = np.mean(rows, axis=0), np.var(rows, axis=0), len(rows)
        delta, total = mean - self.mean, self.count + count
        self.mean = self.mean + delta * count / total
        squares = self.var * self.count + var * count + np.square(delta) * self.count * count / total
        self.var, self.count = squares / total, total


def train(args):
    """Prints episodes; returns the agent and the statistics of observations and of discounted returns."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    envs = [gym.make(args.env_id) for _ in range(args.num_envs)]
    obs_dim, action_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    agent = Agent(obs_dim, action_dim)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    shape = (args.num_steps, args.num_envs)
    obs, actions = torch.zeros(*shape, obs_dim), torch.zeros(*shape, action_dim)
    logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))

    obs_statistics, return_statistics = Statistics(obs_dim, np.float32), Statistics()  # float32 at first: Gymnasium's
    discounted = np.zeros(args.num_envs, np.float32)  # as Gymnasium's
    episodic_return, episodic_length = np.zeros(args.num_envs), np.zeros(args.num_envs, int)

    def normalize(raw):
        obs_statistics.update(raw)
        raw = (raw - obs_statistics.mean) / np.sqrt(obs_statistics.var + 1e-8)
        return torch.Tensor(np.clip(raw, -10, 10))

    next_obs = normalize(np.array([env.reset(seed=args.seed + i)[0] for i, env in enumerate(envs)]))
    next_done = np.zeros(args.num_envs, bool)
    global_step = 0
    for update in range(1, args.num_updates + 1):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1.0 - (update - 1.0) / args.num_updates) * args.learning_rate
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            dones[step] = torch.Tensor(next_done)
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(next_obs)
            actions[step], logprobs[step], values[step] = action, logprob, value.flatten()

            raw_obs, raw_rewards, was_done = [], np.zeros(args.num_envs), next_done
            next_done, terminations = np.zeros(args.num_envs, bool), np.zeros(args.num_envs, bool)
            for i, env in enumerate(envs):
                if was_done[i]:  # this step only resets
                    raw_obs.append(env.reset()[0])
                    episodic_return[i], episodic_length[i] = 0, 0
                    continue
                clipped = np.clip(action[i].numpy(), env.action_space.low, env.action_space.high)
                raw, raw_rewards[i], terminations[i], truncated, _ = env.step(clipped)
                raw_obs.append(raw)
                next_done[i] = terminations[i] or truncated
                episodic_return[i] += raw_rewards[i]
                episodic_length[i] += 1
                if next_done[i]:
                    r, length = episodic_return[i], episodic_length[i]
                    print(f"global_step={global_step}, episodic_return={r}, episodic_length={length}")
            next_obs = normalize(np.array(raw_obs))

            played = ~was_done
            for i in np.flatnonzero(played):  # Gymnasium's way: an episode's last reward begins the next one's sum
                discounted[i] = discounted[i] * args.gamma * (1 - terminations[i]) + raw_rewards[i]
            if played.any():
                return_statistics.update(discounted[played])
            scaled = raw_rewards / np.sqrt(return_statistics.var + 1e-8)
            rewards[step] = torch.Tensor(np.clip(scaled, -10, 10))

        with torch.no_grad():
            next_value = agent.critic(next_obs).flatten()
        advantages, last = torch.zeros_like(rewards), 0
        for t in reversed(range(args.num_steps)):
            if t == args.num_steps - 1:
                nonterminal, following = 1.0 - torch.Tensor(next_done), next_value
            else:
                nonterminal, following = 1.0 - dones[t + 1], values[t + 1]
            delta = rewards[t] + args.gamma * following * nonterminal - values[t]
            advantages[t] = last = delta + args.gamma * args.gae_lambda * nonterminal * last
        returns = advantages + values

        b_obs, b_actions = obs.reshape(-1, obs_dim), actions.reshape(-1, action_dim)
        b_logprobs, b_advantages = logprobs.reshape(-1), advantages.reshape(-1)
        b_returns, b_values = returns.reshape(-1), values.reshape(-1)
        b_inds = np.array([i for i in range(args.batch_size) if not dones.reshape(-1)[i]])  # not the resetting steps
        for _ in range(args.update_epochs):
            np.random.shuffle(b_inds)
            for mb_inds in np.array_split(b_inds, args.num_minibatches):
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
                ratio = (newlogprob - b_logprobs[mb_inds]).exp()
                mb_advantages = b_advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                loss1 = -mb_advantages * ratio
                loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(loss1, loss2).mean()
                newvalue = newvalue.view(-1)
                unclipped = (newvalue - b_returns[mb_inds]) ** 2
                change = torch.clamp(newvalue - b_values[mb_inds], -args.clip_coef, args.clip_coef)
                clipped = (b_values[mb_inds] + change - b_returns[mb_inds]) ** 2
                v_loss = 0.5 * torch.max(unclipped, clipped).mean()
                loss = pg_loss - args.ent_coef * entropy.mean() + v_loss * args.vf_coef
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
    return agent, obs_statistics, return_statistics


if __name__ == "__main__":
    train(ppo.parse_args(sys.argv[1:], **DEFAULTS))
