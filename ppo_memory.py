"""PPO with a memory, an LSTM: only what differs from ppo.py, which does the rest.

    python ppo_memory.py
    python ppo_memory.py --env-id my_module:MyEnv-v0 --track

What an agent needs to know is not always in front of it. By default this program plays
a CartPole that does not show velocities. An agent without a memory cannot tell which
way the pole is falling. All flags are those of ppo.py, some with other defaults. Five
more implementation details belong to a memory. Search for "Detail L3", for example:

    L1. initialization of the LSTM      L4. whole environments in a minibatch
    L2. a state of zeros at first       L5. states that are computed anew
    L3. reset where an episode begins

Sources are named as in ppo.py. The LSTM is from Hochreiter and Schmidhuber 1997.
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

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Categorical

import ppo
from ppo import layer_init

# An LSTM carries two vectors from step to step: c, its memory, and h, its output. Gates
# say how much of the memory to keep, to add and to show; these are numbers between 0
# and 1. In this file, "state" means h and c together, and not the s of V(s).
LSTM_SIZE = 64
STATE_SIZE = 2 * LSTM_SIZE


class PositionsOnly(gym.ObservationWrapper):
    """Shows only the positions of CartPole, divided by their ranges."""

    def __init__(self, env):
        super().__init__(env)
        self.ranges = env.observation_space.high[[0, 2]]
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def observation(self, obs):
        return obs[[0, 2]] / self.ranges


def make_cartpole_without_velocities(render_mode=None):
    """Make the environment that this program plays by default."""
    return PositionsOnly(gym.make("CartPole-v1", render_mode=render_mode))


gym.register("CartPoleWithoutVelocities-v0", make_cartpole_without_velocities)


def make_envs(args, seed, video=None, render_mode=None):
    """As in ppo.py, but the LSTM's state travels in the actions and observations."""
    if args.local_num_envs % args.num_minibatches:
        raise ppo.RunEnded(
            f"--num-minibatches {args.num_minibatches} must divide the "
            f"{args.local_num_envs} environments of a process, as a minibatch holds "
            "whole environments"
        )
    envs = ppo.make_envs(args, seed, video, render_mode)
    if not ppo.resets_in_same_step(envs):
        raise ppo.RunEnded(
            f"--env-id {args.env_id}: this batch resets in the next step, and "
            "ppo_memory.py knows only environments that reset in the same step"
        )
    return StateInObservation(envs)


class StateInObservation(gym.vector.VectorWrapper):
    """Hands on the state of the LSTM, so that train() need not know of it.

    The agent returns its new state as a part of its action. Here it becomes a part of
    the next observation. So what is kept of a step in the rollout, in a checkpoint or
    for evaluate.py includes the state, and train() needs no code for it.

    An observation holds the environment's own, the state before the step, and 1 if an
    episode begins with it, else 0: (num_envs, own_dim + STATE_SIZE + 1). An action
    holds the environment's own, and the state after the step: (num_envs, 1 +
    STATE_SIZE).
    """

    def __init__(self, envs):
        super().__init__(envs)
        obs_dim = envs.single_observation_space.shape[0] + STATE_SIZE + 1
        space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.single_observation_space = space
        self.observation_space = gym.vector.utils.batch_space(space, envs.num_envs)
        space = gym.spaces.Box(-np.inf, np.inf, (1 + STATE_SIZE,), np.float32)
        self.single_action_space = space
        self.action_space = gym.vector.utils.batch_space(space, envs.num_envs)

    def reset(self, *, seed=None, options=None):
        obs, infos = self.env.reset(seed=seed, options=options)
        # Detail L2: a state of zeros at first. There is nothing to remember yet.
        # (Detail L3 would clear any other state, too, as is_first is 1.) ([baselines],
        # common/models.py)
        state = np.zeros((self.num_envs, STATE_SIZE), np.float32)
        is_first = np.ones((self.num_envs, 1), np.float32)
        return np.concatenate([obs, state, is_first], axis=1), infos

    def step(self, actions):
        env_actions = actions[:, 0].astype(self.env.single_action_space.dtype)
        state = actions[:, 1:]
        obs, rewards, terminations, truncations, infos = self.env.step(env_actions)
        done = terminations | truncations

        # Where an episode has ended, both its last observation and the first one of the
        # next episode get the state. Only the first one gets a 1, which clears it.
        if "final_obs" in infos:
            final_obs = np.full(self.num_envs, None)
            is_first = np.zeros(1, np.float32)
            for i in np.flatnonzero(done):
                own = infos["final_obs"][i]
                final_obs[i] = np.concatenate([own, state[i], is_first])
            infos["final_obs"] = final_obs

        is_first = done[:, None].astype(np.float32)
        obs = np.concatenate([obs, state, is_first], axis=1)
        return obs, rewards, terminations, truncations, infos


class Agent(ppo.Agent):
    """As in ppo.py, but one LSTM sees the observations for both actor and critic.

    Observations and actions are those of StateInObservation.
    """

    # Detail L4: whole environments in a minibatch. Whether it was worth remembering
    # something shows only later. So the steps of an environment stay together, in their
    # order, and update() deals whole environments into the minibatches. By default
    # there is one minibatch, so each epoch is one step with the whole batch.
    # ([baselines], ppo2/ppo2.py)
    has_memory = True

    def __init__(self, envs):
        nn.Module.__init__(self)  # not ppo.Agent's networks
        self.own_dim = envs.single_observation_space.shape[0] - STATE_SIZE - 1
        num_actions = envs.unwrapped.single_action_space.n

        self.network = nn.Sequential(layer_init(nn.Linear(self.own_dim, 64)), nn.Tanh())

        # Detail L1: initialization of the LSTM. Its weights are orthogonal with gain 1,
        # which keeps the length of the vectors that come in, as in detail 2. Its biases
        # are 0, so at first the gates are near sigmoid(0) = 0.5, and about half of the
        # memory is kept in each step. How much to keep is learned. ([baselines],
        # a2c/utils.py, which gives no reason)
        self.lstm = nn.LSTM(64, LSTM_SIZE)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter, 1.0)
            else:
                nn.init.constant_(parameter, 0.0)

        self.actor = layer_init(nn.Linear(LSTM_SIZE, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(LSTM_SIZE, 1), std=1.0)

    def remember(self, obs):
        """Let the LSTM see sequences of observations.

        obs: (steps, batch, own_dim + STATE_SIZE + 1). Only the state in the first step
        of each sequence is used. Returns the LSTM's outputs, (steps, batch, LSTM_SIZE),
        and its state after the last step, (batch, STATE_SIZE).
        """
        obs = obs.float()
        own, state, is_first = obs.split([self.own_dim, STATE_SIZE, 1], dim=-1)
        features = self.network(own)

        # Detail L5: states that are computed anew. A stored state is only numbers. No
        # gradient flows through it, and once the parameters have changed, it is out of
        # date. So the update computes all states again from the first one, and the
        # gradient flows back to the beginning of the episode or of the rollout. Only
        # the first state, from before the rollout, is not computed again, and so is out
        # of date in later epochs. ([baselines], ppo2/ppo2.py)
        h, c = state[:1].split(LSTM_SIZE, dim=-1)  # (1, batch, LSTM_SIZE) each

        # One call of the LSTM handles many steps, which is much faster than a call for
        # each. It ends before the next step in which an episode begins anywhere.
        num_steps = len(obs)
        has_first = is_first.flatten(1).any(dim=1).tolist()
        cuts = [step for step in range(1, num_steps) if has_first[step]]
        starts = [0, *cuts]
        ends = [*cuts, num_steps]

        outputs = []
        for start, end in zip(starts, ends, strict=True):
            # Detail L3: reset where an episode begins. There, h and c become 0. What
            # the agent remembers of the old episode would only mislead it in the new
            # one. ([baselines], a2c/utils.py)
            h = h * (1 - is_first[start])
            c = c * (1 - is_first[start])
            output, (h, c) = self.lstm(features[start:end], (h, c))
            outputs.append(output)
        return torch.cat(outputs), torch.cat([h[0], c[0]], dim=-1)

    def get_value(self, obs):
        hidden, _ = self.remember(obs[None])  # a sequence of one step
        return self.critic(hidden[0]).squeeze(-1)

    def get_policy(self, hidden):
        """hidden: (..., LSTM_SIZE), outputs of the LSTM. Returns pi(.|s)."""
        return Categorical(logits=self.actor(hidden), validate_args=False)

    def get_action(self, obs, deterministic=False):
        """As in ppo.py; actions hold the new state, too: (batch, 1 + STATE_SIZE)."""
        hidden, state = self.remember(obs[None])
        policy = self.get_policy(hidden[0])
        action = policy.mode if deterministic else policy.sample()
        return torch.cat([action[:, None], state], dim=-1), policy.log_prob(action)

    def evaluate_actions(self, obs, action):
        """As in ppo.py, but for whole sequences.

        obs: (steps, batch, own_dim + STATE_SIZE + 1), action: (steps, batch, 1 +
        STATE_SIZE). The results have the shape (steps, batch) each.
        """
        hidden, _ = self.remember(obs)
        policy = self.get_policy(hidden)
        value = self.critic(hidden).squeeze(-1)
        return policy.log_prob(action[..., 0]), policy.entropy(), value


DEFAULTS = {
    "exp_name": "ppo_memory",
    "env_id": "CartPoleWithoutVelocities-v0",
    "total_timesteps": 100000,
    "num_envs": 8,
    "num_steps": 32,
    "num_minibatches": 1,
    "update_epochs": 20,
    "learning_rate": 1e-3,
    "gamma": 0.98,
    "gae_lambda": 0.8,
    "ent_coef": 0.0,
}

if __name__ == "__main__":
    ppo.main(make_envs=make_envs, Agent=Agent, **DEFAULTS)
