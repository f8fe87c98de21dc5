"""PPO for continuous actions: what differs from ppo.py, which does the rest. Run it from the repository's folder.

    pip install "gymnasium[mujoco]"                                         # the robots
    python -m variants.continuous_action                                    # Hopper-v5, 1,000,000 steps
    MUJOCO_GL=egl python -m variants.continuous_action --capture-video      # flags as in ppo.py; egl: without a screen

Nine details (search for "Detail C5", say). The policy: C1 a normal distribution, C2 its state-independent deviation, C3
independent components, C4 separate networks. The environments: C5 clipped actions, C6 normalized and C7 clipped
observations, C8 scaled and C9 clipped rewards. Printed and logged returns are the environment's own. Sources as in
ppo.py, and [VecNormalize], a file of [baselines]: common/vec_env/vec_normalize.py.
"""

import functools

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.wrappers import vector as wrappers

import ppo


def make_envs(args, num_envs, seed, video=None, render_mode=None):
    """As in ppo.py, but for actions that are vectors of real numbers."""
    thunks = [ppo.make_env(args, seed, video, render_mode), *(ppo.make_env(args, seed + i) for i in range(1, num_envs))]
    if args.vectorization_mode == "sync":  # in NEXT_STEP mode, the only one that NormalizeObservation can do
        envs = gym.vector.SyncVectorEnv(thunks, copy=False)
    elif args.vectorization_mode == "async":
        envs = gym.vector.AsyncVectorEnv(thunks, copy=False, worker=functools.partial(ppo.worker, seed))
    else:
        raise ValueError("continuous actions need --vectorization-mode sync or async")
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"its actions are {space}, not a Box of real numbers in one row (Discrete: python ppo.py)")
    envs = wrappers.RecordEpisodeStatistics(envs, stats_key="episode_statistics")  # first, so of the raw rewards

    # Detail C5: a normal distribution reaches beyond any range. The environment gets the clipped action; the learner
    # keeps the one that was drawn, as it is this one whose probability it knows. ([Huang]; [baselines] does the same)
    unbounded = gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32)
    envs = wrappers.TransformAction(envs, lambda x: np.clip(x, space.low, space.high), single_action_space=unbounded)
    # Detail C6: positions, angles and speeds have scales of their own; networks learn best from mean 0 and deviation 1,
    # here of all observations so far, of all environments (under torchrun those of a process; the first one's are
    # saved). ([VecNormalize]; [What matters]: always do it)
    envs = wrappers.NormalizeObservation(envs)
    # Detail C8: a critic has trouble with returns in the thousands. Rewards are divided by the deviation of their
    # discounted sum so far. Their mean is not subtracted: it would pay to end episodes early or late.
    # ([VecNormalize]; arXiv:2005.12729 found the scaling to matter much)
    envs = wrappers.NormalizeReward(envs, gamma=args.gamma)
    # Detail C7, Detail C9: outliers, common while the statistics are young, must not upset networks. ([VecNormalize])
    envs = wrappers.TransformObservation(envs, lambda obs: np.clip(obs, -10, 10))
    return wrappers.TransformReward(envs, lambda rewards: np.clip(rewards, -10, 10))


class Agent(nn.Module):
    """As in ppo.py, but the actor gives the mean of a normal distribution. Running statistics are part of its state."""

    def __init__(self, envs):
        super().__init__()
        self.envs, obs_dim, action_dim = envs, envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
        # Detail C4: separate networks, as in ppo.py: what helps the critic cannot harm the policy. ([PPO] section 6.1)
        self.critic, self.actor = ppo.mlp(obs_dim, 1, std=1.0), ppo.mlp(obs_dim, action_dim, std=0.01)
        # Detail C2: how widely to try is learned, but alike in all states, so that luck in one cannot end the search
        # there. The logarithm needs no bounds; at first the deviation is exp(0) = 1. ([PPO] section 6.1; [baselines])
        self.actor_logstd = nn.Parameter(torch.zeros(action_dim))

    def get_value(self, obs):
        return self.critic(obs.float()).squeeze(-1)

    def get_action_and_value(self, obs, action=None):
        """action: (batch, action_dim). Returns it, drawn unless given, log pi(a|s), the entropy, V(s): (batch,)."""
        # Detail C1: real numbers cannot have a logit each; good ones pull the mean towards them. A density takes the
        # place of a probability: it may be over 1, and so the entropy may be negative. ([PPO] section 6.1)
        mean = self.actor(obs.float())
        policy = torch.distributions.Normal(mean, self.actor_logstd.exp(), validate_args=False)
        action = policy.sample() if action is None else action
        # Detail C3: components are drawn independently ([baselines]): densities multiply, logarithms, entropies add up.
        return action, policy.log_prob(action).sum(-1), policy.entropy().sum(-1), self.get_value(obs)

    def get_best_action(self, obs):
        return self.actor(obs.float())  # the mean

    def normalizers(self):  # looked up each time, as --resume replaces them
        env = self.envs
        while not isinstance(env, wrappers.NormalizeReward):
            env = env.env
        return env.env, env

    def train(self, mode=True):
        for wrapper in self.normalizers():
            wrapper.update_running_mean = mode  # eval(), which evaluate.py calls, freezes the statistics
        return super().train(mode)

    def statistics(self):
        obs, rewards = self.normalizers()
        return obs.obs_rms, rewards.return_rms

    def get_extra_state(self):  # becomes a part of state_dict(), and so of the checkpoint
        return [(torch.as_tensor(rms.mean), torch.as_tensor(rms.var), float(rms.count)) for rms in self.statistics()]

    def set_extra_state(self, state):
        for rms, (mean, var, count) in zip(self.statistics(), state, strict=True):
            rms.mean, rms.var, rms.count = mean.cpu().numpy(), var.cpu().numpy(), count


DEFAULTS = {"env_id": "Hopper-v5", "exp_name": "continuous_action", "total_timesteps": 1000000, "learning_rate": 3e-4}
DEFAULTS |= {"num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "ent_coef": 0.0}

if __name__ == "__main__":
    ppo.main(make_envs=make_envs, Agent=Agent, **DEFAULTS)
