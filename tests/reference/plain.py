"""A plain PPO: each operation as one first writes it down.

ppo.py must give the same episodes, and faster. Adam is fused here, too, because another
one gives other last bits and, sooner or later, other episodes.

    python -m tests.reference.plain --env-id CartPole-v1
"""

import random
import sys
import time

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Categorical

import ppo


class Agent(nn.Module):
    def __init__(self, obs_dim, num_actions):
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
            layer(64, num_actions, 0.01),
        )

    def get_action_and_value(self, x, action=None):
        policy = Categorical(logits=self.actor(x))
        if action is None:
            action = policy.sample()
        return action, policy.log_prob(action), policy.entropy(), self.critic(x)


def train(args):
    """Print the episodes and the steps per second; return the agent."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)

    def make_env():
        return gym.wrappers.RecordEpisodeStatistics(ppo.make_env(args))

    envs = gym.vector.SyncVectorEnv(
        [make_env] * args.num_envs,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    obs_shape = envs.single_observation_space.shape
    agent = Agent(obs_shape[0], envs.single_action_space.n)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True
    )

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, *obs_shape))
    actions = torch.zeros(shape)
    logprobs = torch.zeros(shape)
    rewards = torch.zeros(shape)
    dones = torch.zeros(shape)
    values = torch.zeros(shape)

    global_step = 0
    start = time.time()
    next_obs = torch.Tensor(envs.reset(seed=args.seed)[0])
    next_done = torch.zeros(args.num_envs)
    for update in range(1, args.num_updates + 1):
        if args.anneal_lr:
            frac = 1.0 - (update - 1.0) / args.num_updates
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate

        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            dones[step] = next_done
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(next_obs)
            values[step] = value.flatten()
            actions[step] = action
            logprobs[step] = logprob

            next_obs, reward, terminated, truncated, infos = envs.step(action.numpy())
            rewards[step] = torch.tensor(reward).view(-1)
            for i in range(args.num_envs):
                if args.bootstrap_truncation and truncated[i] and not terminated[i]:
                    final_obs = torch.Tensor(infos["final_obs"][i])
                    with torch.no_grad():
                        rewards[step, i] += args.gamma * agent.critic(final_obs)[0]
                if terminated[i] or truncated[i]:
                    episode = infos["final_info"]["episode"]
                    print(
                        f"global_step={global_step}, "
                        f"episodic_return={episode['r'][i]}, "
                        f"episodic_length={episode['l'][i]}"
                    )
            next_obs = torch.Tensor(next_obs)
            next_done = torch.Tensor(np.logical_or(terminated, truncated))

        with torch.no_grad():
            next_value = agent.critic(next_obs).reshape(1, -1)
        if args.gae:
            advantages = torch.zeros_like(rewards)
            last = 0
            for t in reversed(range(args.num_steps)):
                if t == args.num_steps - 1:
                    nonterminal = 1.0 - next_done
                    following = next_value
                else:
                    nonterminal = 1.0 - dones[t + 1]
                    following = values[t + 1]
                delta = rewards[t] + args.gamma * following * nonterminal - values[t]
                last = delta + args.gamma * args.gae_lambda * nonterminal * last
                advantages[t] = last
            returns = advantages + values
        else:
            returns = torch.zeros_like(rewards)
            for t in reversed(range(args.num_steps)):
                if t == args.num_steps - 1:
                    nonterminal = 1.0 - next_done
                    following = next_value
                else:
                    nonterminal = 1.0 - dones[t + 1]
                    following = returns[t + 1]
                returns[t] = rewards[t] + args.gamma * nonterminal * following
            advantages = returns - values

        b_obs = obs.reshape((-1, *obs_shape))
        b_logprobs = logprobs.reshape(-1)
        b_actions = actions.reshape(-1)
        b_advantages = advantages.reshape(-1)
        b_returns = returns.reshape(-1)
        b_values = values.reshape(-1)
        b_inds = np.arange(args.batch_size)
        for _ in range(args.update_epochs):
            np.random.shuffle(b_inds)
            for begin in range(0, args.batch_size, args.minibatch_size):
                mb_inds = b_inds[begin : begin + args.minibatch_size]
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(
                    b_obs[mb_inds], b_actions[mb_inds]
                )
                logratio = newlogprob - b_logprobs[mb_inds]
                ratio = logratio.exp()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()

                mb_advantages = b_advantages[mb_inds]
                if args.norm_adv:
                    mb_advantages = mb_advantages - mb_advantages.mean()
                    mb_advantages = mb_advantages / (b_advantages[mb_inds].std() + 1e-8)

                loss1 = -mb_advantages * ratio
                clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                loss2 = -mb_advantages * clipped_ratio
                pg_loss = torch.max(loss1, loss2).mean()

                newvalue = newvalue.view(-1)
                if args.clip_vloss:
                    unclipped = (newvalue - b_returns[mb_inds]) ** 2
                    change = newvalue - b_values[mb_inds]
                    change = change.clamp(-args.clip_coef, args.clip_coef)
                    v_clipped = b_values[mb_inds] + change
                    clipped = (v_clipped - b_returns[mb_inds]) ** 2
                    v_loss = 0.5 * torch.max(unclipped, clipped).mean()
                else:
                    v_loss = 0.5 * ((newvalue - b_returns[mb_inds]) ** 2).mean()

                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

            if args.target_kl is not None and approx_kl > args.target_kl:
                break

    envs.close()
    print(f"SPS={global_step / (time.time() - start):.0f}")
    return agent


if __name__ == "__main__":
    train(ppo.parse_args(sys.argv[1:]))
