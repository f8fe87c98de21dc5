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
from tests.reference.common import advantages_and_returns, gradient_step


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
        advantages, returns = advantages_and_returns(
            args, rewards, dones, values, next_done, next_value
        )

        b_obs = obs.reshape(-1, 4, 84, 84)
        b_actions = actions.reshape(-1)
        b_old = [kind.reshape(-1) for kind in (logprobs, advantages, returns, values)]

        # The step after an end is not learned from.
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

    return agent


if __name__ == "__main__":
    train(ppo.parse_args(sys.argv[1:], **DEFAULTS))
