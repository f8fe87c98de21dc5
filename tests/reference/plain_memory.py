"""A plain PPO with an LSTM, as one first writes it down.

Its states are carried, reset and computed anew step by step, by hand. ppo_memory.py
must give the same episodes and the same parameters.

    python -m tests.reference.plain_memory

The environment is a CartPole whose velocities are not seen. In an update the LSTM gets
the steps between two resets in one call; with --no-whole-sequences, each step alone.
"""

import argparse
import random

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.envs.classic_control import CartPoleEnv
from torch.distributions import Categorical

import ppo
from tests.reference.common import advantages_and_returns, gradient_step

# What is seen: the position of the cart and the angle of the pole, divided by these.
SEEN = [0, 2]
RANGES = [2.4, 0.2095]


class PositionsOnly(gym.ObservationWrapper):
    """CartPole without velocities."""

    def __init__(self, render_mode=None):
        super().__init__(CartPoleEnv(render_mode=render_mode))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation):
        return (observation[SEEN] / np.array(RANGES)).astype(np.float32)


gym.register("PlainPositionsOnly-v0", PositionsOnly, max_episode_steps=500)

DEFAULTS = {
    "env_id": "PlainPositionsOnly-v0",
    "total_timesteps": 100000,
    "num_envs": 8,
    "num_steps": 32,
    "num_minibatches": 1,
    "update_epochs": 20,
    "learning_rate": 1e-3,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "ent_coef": 0.0,
}


class Agent(nn.Module):
    def __init__(self, obs_dim, num_actions):
        super().__init__()

        def layer(inputs, outputs, gain):
            linear = nn.Linear(inputs, outputs)
            nn.init.orthogonal_(linear.weight, gain)
            nn.init.constant_(linear.bias, 0.0)
            return linear

        self.encoder = nn.Sequential(layer(obs_dim, 64, np.sqrt(2)), nn.Tanh())
        self.lstm = nn.LSTM(64, 64)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter, 1.0)
            else:
                nn.init.constant_(parameter, 0.0)
        self.actor = layer(64, num_actions, 0.01)
        self.critic = layer(64, 1, 1.0)


def train(args, whole_sequences=True):
    """Print the episodes; return the agent."""
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
    obs_dim = envs.single_observation_space.shape[0]
    agent = Agent(obs_dim, envs.single_action_space.n)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True
    )
    assert args.num_envs % args.num_minibatches == 0

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros((*shape, obs_dim))
    actions = torch.zeros(shape)
    logprobs = torch.zeros(shape)
    rewards = torch.zeros(shape)
    dones = torch.zeros(shape)
    hiddens = torch.zeros((args.num_steps + 1, args.num_envs, 64))

    global_step = 0
    next_obs = torch.Tensor(envs.reset(seed=args.seed)[0])
    next_done = torch.zeros(args.num_envs)
    h = torch.zeros(1, args.num_envs, 64)
    c = torch.zeros(1, args.num_envs, 64)
    for update in range(1, args.num_updates + 1):
        if args.anneal_lr:
            frac = 1.0 - (update - 1.0) / args.num_updates
            optimizer.param_groups[0]["lr"] = frac * args.learning_rate

        # The state before the rollout. It may still be that of an episode which has
        # ended; dones[0] tells.
        first_h = h.clone()
        first_c = c.clone()
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            dones[step] = next_done
            with torch.no_grad():
                h = h * (1.0 - next_done).view(1, -1, 1)
                c = c * (1.0 - next_done).view(1, -1, 1)
                out, (h, c) = agent.lstm(agent.encoder(next_obs)[None], (h, c))
                policy = Categorical(logits=agent.actor(out[0]))
                action = policy.sample()
                logprob = policy.log_prob(action)
            hiddens[step] = out[0]
            actions[step] = action
            logprobs[step] = logprob

            next_obs, reward, terminated, truncated, infos = envs.step(action.numpy())
            rewards[step] = torch.tensor(reward).view(-1)
            cut_off = truncated & ~terminated
            if args.bootstrap_truncation and cut_off.any():
                # With the state after this step: nothing has begun anew before the
                # last observation.
                last_obs = torch.Tensor(np.stack(infos["final_obs"][cut_off]))
                which = torch.tensor(cut_off)
                with torch.no_grad():
                    out, _ = agent.lstm(
                        agent.encoder(last_obs)[None], (h[:, which], c[:, which])
                    )
                    last_value = agent.critic(out[0]).flatten()
                rewards[step, which] += args.gamma * last_value
            for i in range(args.num_envs):
                if terminated[i] or truncated[i]:
                    episode = infos["final_info"]["episode"]
                    print(
                        f"global_step={global_step}, "
                        f"episodic_return={episode['r'][i]}, "
                        f"episodic_length={episode['l'][i]}"
                    )
            next_obs = torch.Tensor(next_obs)
            next_done = torch.Tensor(np.logical_or(terminated, truncated))

        # One more step of the LSTM, for the observation after the rollout. The next
        # rollout will do it again, so h and c stay as they are.
        with torch.no_grad():
            next_h = h * (1.0 - next_done).view(1, -1, 1)
            next_c = c * (1.0 - next_done).view(1, -1, 1)
            out, _ = agent.lstm(agent.encoder(next_obs)[None], (next_h, next_c))
            hiddens[args.num_steps] = out[0]
            # The values of the rollout are computed at once, from the outputs of the
            # LSTM that the actions were drawn from. One by one they would differ in
            # their last bits.
            all_values = agent.critic(hiddens.reshape(-1, 64))
            all_values = all_values.reshape(-1, args.num_envs)
        values = all_values[:-1]
        next_value = all_values[-1]

        advantages, returns = advantages_and_returns(
            args, rewards, dones, values, next_done, next_value
        )

        b_obs = obs.reshape(-1, obs_dim)
        b_actions = actions.reshape(-1)
        b_old = [kind.reshape(-1) for kind in (logprobs, advantages, returns, values)]
        env_inds = np.arange(args.num_envs)
        for _ in range(args.update_epochs):
            np.random.shuffle(env_inds)
            for mb_envs in np.array_split(env_inds, args.num_minibatches):
                mb_inds = np.array(
                    [
                        step * args.num_envs + env
                        for step in range(args.num_steps)
                        for env in mb_envs
                    ]
                )

                # The states anew, with the parameters of now.
                encoded = agent.encoder(b_obs[mb_inds])
                encoded = encoded.reshape(args.num_steps, len(mb_envs), 64)
                mb_dones = dones[:, mb_envs]
                begins = [
                    step
                    for step in range(args.num_steps)
                    if step == 0 or not whole_sequences or mb_dones[step].any()
                ]
                mb_h = first_h[:, mb_envs]
                mb_c = first_c[:, mb_envs]
                outs = []
                for begin, end in zip(
                    begins, [*begins[1:], args.num_steps], strict=True
                ):
                    mb_h = mb_h * (1.0 - mb_dones[begin]).view(1, -1, 1)
                    mb_c = mb_c * (1.0 - mb_dones[begin]).view(1, -1, 1)
                    out, (mb_h, mb_c) = agent.lstm(encoded[begin:end], (mb_h, mb_c))
                    outs.append(out)
                hidden = torch.cat(outs).reshape(-1, 64)

                policy = Categorical(logits=agent.actor(hidden))
                newlogprob = policy.log_prob(b_actions[mb_inds])
                entropy = policy.entropy()
                newvalue = agent.critic(hidden).view(-1)

                new = newlogprob, entropy, newvalue
                old = [kind[mb_inds] for kind in b_old]
                approx_kl = gradient_step(args, agent, optimizer, new, old)

            if args.target_kl is not None and approx_kl > args.target_kl:
                break

    envs.close()
    return agent


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--whole-sequences", action=argparse.BooleanOptionalAction, default=True
    )
    own, others = parser.parse_known_args()
    train(ppo.parse_args(others, **DEFAULTS), own.whole_sequences)
