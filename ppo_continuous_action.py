"""PPO for continuous actions: only what differs from ppo.py, which does the rest.

    pip install "gymnasium[mujoco]"
    python ppo_continuous_action.py --env-id Hopper-v5
    MUJOCO_GL=egl python ppo_continuous_action.py --capture-video

The last line records videos on a machine without a screen. All flags are those of
ppo.py, some with other defaults. Returns that are printed and logged are the
environment's own. Nine more implementation details belong to continuous actions. Search
for "Detail C5", for example:

    C1. normal distribution            C6. normalized observations
    C2. state-independent deviation    C7. clipped observations
    C3. independent components         C8. scaled rewards
    C4. separate networks              C9. clipped rewards
    C5. clipped actions

Sources are named as in ppo.py. [VecNormalize] is a file of [baselines],
common/vec_env/vec_normalize.py.
"""

# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "torch>=2.6,<3",
#     "gymnasium[classic-control,mujoco]>=1.4,<2",
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
from torch.distributions import Independent, Normal

import ppo
from ppo import layer_init


def make_envs(args, seed, video=None, render_mode=None):
    """As in ppo.py, but for actions that are vectors of real numbers."""
    if args.vectorization_mode == "vector_entry_point":
        raise ppo.RunEnded("continuous actions need --vectorization-mode sync or async")
    # NormalizeObservation knows only this mode.
    mode = gym.vector.AutoresetMode.NEXT_STEP
    envs = ppo.vectorize(ppo.make_env, args, seed, mode, video, render_mode)
    check_actions(args, envs.single_action_space)
    wrappers = gym.wrappers.vector

    # This comes first, so it counts the environment's own rewards.
    envs = wrappers.RecordEpisodeStatistics(envs, stats_key=ppo.STATISTICS)

    # Detail C5: clipped actions. A normal distribution reaches beyond any range, so the
    # environment gets the action clipped to its range. The learner keeps the action as
    # it was drawn, because this is the one whose probability it knows. ([Huang];
    # [baselines] does the same.)
    #
    # The deviation is 1 at first, which suits ranges like -1 to 1. If a range is far
    # from that, the action is scaled, so that -1 to 1 means the whole range. (This is
    # ours. The robots need no scale.)
    low, high = envs.single_action_space.low, envs.single_action_space.high
    middle, scale = scale_of_actions(low, high)
    unbounded = gym.spaces.Box(-np.inf, np.inf, low.shape, np.float32)
    envs = wrappers.TransformAction(
        envs,
        lambda action: np.clip(middle + scale * action, low, high).astype(low.dtype),
        single_action_space=unbounded,
    )

    # Detail C6: normalized observations. Positions, angles and speeds have scales of
    # their own, but networks learn best from inputs with mean 0 and deviation 1. Both
    # are taken over all observations so far. ([VecNormalize]; [Study] recommends it.)
    # Under torchrun each process has statistics of its own. Those of the first one are
    # saved, and with them all processes of a resumed run go on.
    envs = wrappers.NormalizeObservation(envs)
    obs_statistics = Statistics(envs.obs_rms)
    envs.obs_rms = obs_statistics  # which the wrapper updates from now on

    return_statistics = Statistics(gym.wrappers.utils.RunningMeanStd())
    envs = ScaleRewards(envs, return_statistics, args.gamma)

    # Detail C7: clipped observations, and Detail C9: clipped rewards. Outliers are
    # common while the statistics are young, and must not upset the networks.
    # ([VecNormalize])
    envs = wrappers.TransformObservation(envs, lambda obs: np.clip(obs, -10, 10))
    envs = wrappers.TransformReward(envs, lambda rewards: np.clip(rewards, -10, 10))

    # Agent takes them from here.
    envs.statistics = nn.ModuleList([obs_statistics, return_statistics])
    return envs


def check_actions(args, space):
    """Raise RunEnded unless actions are vectors of real numbers."""
    is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    if not is_vector or not np.issubdtype(space.dtype, np.floating):
        raise ppo.RunEnded(
            f"--env-id {args.env_id}: its actions are {space}, not a Box of real "
            "numbers in one row (for Discrete: python ppo.py; a Box of integers or of "
            "more dimensions needs a wrapper: gym.wrappers.TransformAction)"
        )


def scale_of_actions(low, high):
    """Return middle and scale, so that middle + scale * action suits the range.

    low, high: (action_dim,), the range of each component. The results have the same
    shape. They are 0 and 1 where the range is without bounds, or where draws from a
    normal distribution with mean 0 and deviation 1 cover it well enough as it is.
    """
    dtype = low.dtype
    low = low.astype(np.float64)
    high = high.astype(np.float64)
    is_bounded = (low > -1e30) & (high < 1e30)
    low = np.where(is_bounded, low, -1.0)
    high = np.where(is_bounded, high, 1.0)
    is_large = np.maximum(-low, high) > 5
    is_small = high - low < 0.2
    is_elsewhere = (low > 0.5) | (high < -0.5)
    is_far = is_large | is_small | is_elsewhere
    middle = np.where(is_far, (low + high) / 2, 0.0)
    scale = np.where(is_far, (high - low) / 2, 1.0)
    return middle.astype(dtype), scale.astype(dtype)


class ScaleRewards(gym.vector.VectorWrapper):
    """Divides the rewards, so that returns have a standard deviation of about 1.

    ``statistics`` are those of the sums in detail C8. Gymnasium has a wrapper for this,
    too, NormalizeReward. But in NEXT_STEP mode it does not clear the sum between
    episodes: after a time limit all of it goes on, and after a termination the last
    reward.
    """

    def __init__(self, envs, statistics, gamma):
        super().__init__(envs)
        self.gamma = gamma
        self.statistics = statistics

    def reset(self, *, seed=None, options=None):
        self.sums = np.zeros(self.num_envs)
        self.was_done = np.zeros(self.num_envs, bool)
        return self.env.reset(seed=seed, options=options)

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = self.env.step(actions)

        # Detail C8: scaled rewards. A critic has trouble with returns in the thousands,
        # so rewards are divided by a running standard deviation. It is that of a sum in
        # which older rewards of the episode count less, which stands in for the return.
        # The mean is not subtracted. That would add the same amount to every step, and
        # so reward or punish staying alive. ([VecNormalize]; Engstrom et al. 2020,
        # arXiv:2005.12729, found that it matters.)
        self.sums = self.gamma * self.sums + rewards
        has_played = ~self.was_done  # the others have only been reset
        if has_played.any():
            self.statistics.update(self.sums[has_played])
        self.was_done = terminations | truncations
        self.sums[self.was_done] = 0.0

        rewards = rewards / np.sqrt(self.statistics.var + 1e-8)
        return obs, rewards, terminations, truncations, infos


class Statistics(nn.Module):
    """Running mean and variance, of which both the environments and the agent know.

    It keeps them in a RunningMeanStd of Gymnasium, ``rms``. As a part of the agent it
    is saved with it, and eval() freezes it.
    """

    def __init__(self, rms):
        super().__init__()
        self.rms = rms

    @property
    def mean(self):
        return self.rms.mean

    @property
    def var(self):
        return self.rms.var

    def update(self, batch):
        if self.training:
            self.rms.update(batch)

    def get_extra_state(self):  # this becomes a part of state_dict()
        return {
            "mean": torch.as_tensor(self.rms.mean),
            "var": torch.as_tensor(self.rms.var),
            "count": float(self.rms.count),
        }

    def set_extra_state(self, state):
        self.rms.mean = state["mean"].cpu().numpy()
        self.rms.var = state["var"].cpu().numpy()
        self.rms.count = state["count"]


class Agent(ppo.Agent):
    """As in ppo.py, but the actor gives the mean of a normal distribution.

    The statistics of the environments' wrappers are a part of it, so that a trained
    agent sees observations as it did in training.
    """

    def __init__(self, envs):
        nn.Module.__init__(self)  # not ppo.Agent's networks
        obs_dim = envs.single_observation_space.shape[0]
        action_dim = envs.single_action_space.shape[0]

        # Detail C4: separate networks, as in ppo.py. What helps the critic cannot harm
        # the policy. ([PPO] section 6.1)
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
            layer_init(nn.Linear(64, action_dim), std=0.01),
        )

        # Detail C2: state-independent deviation. How widely to try is learned, but it
        # is the same in all states, so a lucky action in one of them cannot end the
        # search there. It is kept as a logarithm, which needs no bounds. At first the
        # deviation is exp(0) = 1. ([PPO] section 6.1; [baselines])
        self.actor_logstd = nn.Parameter(torch.zeros(action_dim))

        self.statistics = envs.statistics

    def get_policy(self, obs):
        # Detail C1: normal distribution. There are infinitely many real numbers, so
        # none can have a logit of its own. Instead, good actions pull the mean towards
        # them. Densities take the place of probabilities. They may be greater than 1,
        # and so the entropy may be negative. ([PPO] section 6.1)
        mean = self.actor(obs.float())
        normal = Normal(mean, self.actor_logstd.exp(), validate_args=False)

        # Detail C3: independent components. The components of an action are drawn
        # independently. So their densities multiply, and the logarithms of these, like
        # the entropies, add up. ([baselines])
        return Independent(normal, 1, validate_args=False)


DEFAULTS = {
    "exp_name": "ppo_continuous_action",
    "env_id": "Hopper-v5",
    "total_timesteps": 1000000,
    "learning_rate": 3e-4,
    "num_envs": 1,
    "num_steps": 2048,
    "num_minibatches": 32,
    "update_epochs": 10,
    "ent_coef": 0.0,
}

if __name__ == "__main__":
    ppo.main(make_envs=make_envs, Agent=Agent, **DEFAULTS)
