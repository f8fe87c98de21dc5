"""A plain PPO for Atari games, as one first writes it down.

It takes ale-py's batch of games as it is, and counts lives and points by hand.
ppo_atari.py must give the same episodes and the same parameters.

    python -m tests.reference.plain_atari --env-id ALE/Breakout-v5
"""

import random
import sys

import ale_py
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Categorical

import ppo
from ppo_atari import DEFAULTS


class Agent(nn.Module):
    def __init__(self, num_actions):
        super().__init__()

        def layer(module, gain=2**0.5):
            nn.init.orthogonal_(module.weight, gain)
            nn.init.constant_(module.bias, 0.0)
            return module

        self.network = nn.Sequential(
            layer(nn.Conv2d(4, 32, kernel_size=8, stride=4)),
            nn.ReLU(),
            layer(nn.Conv2d(32, 64, kernel_size=4, stride=2)),
            nn.ReLU(),
            layer(nn.Conv2d(64, 64, kernel_size=3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer(nn.Linear(3136, 512)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.actor = layer(nn.Linear(512, num_actions), 0.01)
        self.critic = layer(nn.Linear(512, 1), 1.0)

    def get_action_and_value(self, x, action=None):
        hidden = self.network(x / 255.0)
        policy = Categorical(logits=self.actor(hidden))
        if action is None:
            action = policy.sample()
        return action, policy.log_prob(action), policy.entropy(), self.critic(hidden)


def train(args):
    """Print the episodes; return the agent."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)

    game = args.env_id.removeprefix("ALE/").removesuffix("-v5").lower()
    games = ale_py.AtariVectorEnv(
        game, args.num_envs, life_loss_info=True, reward_clipping=False
    )
    fire = games.ale.get_action_set().index(ale_py.Action.FIRE)
    agent = Agent(games.single_action_space.n)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True
    )

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(*shape, 4, 84, 84)
    actions = torch.zeros(shape)
    logprobs = torch.zeros(shape)
    rewards = torch.zeros(shape)
    dones = torch.zeros(shape)
    values = torch.zeros(shape)

    points = [0.0] * args.num_envs
    length = [0] * args.num_envs
    game_over = [False] * args.num_envs
    life_lost = [False] * args.num_envs

    global_step = 0
    next_obs = torch.Tensor(games.reset(seed=args.seed)[0])
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
            actions[step] = action
            logprobs[step] = logprob
            values[step] = value.flatten()

            buttons = action.numpy().copy()
            for i in range(args.num_envs):
                if life_lost[i]:
                    buttons[i] = fire
            next_obs, reward, terminated, truncated, infos = games.step(buttons)

            for i in range(args.num_envs):
                if game_over[i]:  # this step only began the next game
                    points[i] = 0.0
                    length[i] = 0
                else:
                    points[i] += float(reward[i])
                    length[i] += 1
                # ale-py reports a lost life and the end of a game in the same way.
                life_lost[i] = bool(terminated[i] and infos["lives"][i] > 0)
                game_lost = terminated[i] and not life_lost[i]
                game_over[i] = bool(truncated[i] or game_lost)
                if game_over[i]:
                    print(
                        f"global_step={global_step}, episodic_return={points[i]}, "
                        f"episodic_length={length[i]}"
                    )
                rewards[step, i] = float(np.sign(reward[i]))
            next_obs = torch.Tensor(next_obs)
            next_done = torch.Tensor(np.logical_or(terminated, truncated))

        with torch.no_grad():
            next_value = agent.critic(agent.network(next_obs / 255.0)).flatten()
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

        b_obs = obs.reshape(-1, 4, 84, 84)
        b_actions = actions.reshape(-1)
        b_logprobs = logprobs.reshape(-1)
        b_advantages = advantages.reshape(-1)
        b_returns = returns.reshape(-1)
        b_values = values.reshape(-1)

        # The step after an end is not learned from.
        b_dones = dones.reshape(-1)
        b_inds = np.array([i for i in range(args.batch_size) if not b_dones[i]])
        for _ in range(args.update_epochs):
            np.random.shuffle(b_inds)
            for mb_inds in np.array_split(b_inds, args.num_minibatches):
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(
                    b_obs[mb_inds], b_actions[mb_inds]
                )
                ratio = (newlogprob - b_logprobs[mb_inds]).exp()

                mb_advantages = b_advantages[mb_inds]
                mb_advantages = mb_advantages - mb_advantages.mean()
                mb_advantages = mb_advantages / (b_advantages[mb_inds].std() + 1e-8)

                loss1 = -mb_advantages * ratio
                clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                loss2 = -mb_advantages * clipped_ratio
                pg_loss = torch.max(loss1, loss2).mean()

                newvalue = newvalue.view(-1)
                unclipped = (newvalue - b_returns[mb_inds]) ** 2
                change = newvalue - b_values[mb_inds]
                change = change.clamp(-args.clip_coef, args.clip_coef)
                clipped = (b_values[mb_inds] + change - b_returns[mb_inds]) ** 2
                v_loss = 0.5 * torch.max(unclipped, clipped).mean()

                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

    return agent


if __name__ == "__main__":
    train(ppo.parse_args(sys.argv[1:], **DEFAULTS))
