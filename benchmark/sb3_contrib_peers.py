"""sb3-contrib's PPO with a memory, and that with masks, with the settings of ours.

    python -m benchmark.sb3_contrib_peers recurrent
    python -m benchmark.sb3_contrib_peers maskable --seed 2

RecurrentPPO plays what ppo_memory.py does by default, and MaskablePPO what
ppo_multi_discrete.py does. All flags of ppo.py may follow. The environments, settings,
threads and logging are the same, and episodes are printed in the same way.

What no setting changes stays as it is in these programs. They count the value of what
would have followed after a time limit. Where values are clipped, they take the clipped
loss and not the larger one. RecurrentPPO has an LSTM of 64 units each for actor and
critic, which see the observations at once, and behind each of them two more layers.
"""

import sys

import gymnasium as gym
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

import ppo
import ppo_memory
import ppo_multi_discrete
from benchmark import stable_baselines3


class ActionMasks(gym.Wrapper):
    """Has the method by which MaskablePPO asks for the mask of Sorting-v0."""

    def action_masks(self):
        return self.unwrapped.action_mask().astype(bool)


class PrintEpisodes(BaseCallback):
    """Prints each finished episode as ppo.py does."""

    def _on_step(self):
        for info in self.locals["infos"]:
            if "episode" in info:
                episode = info["episode"]
                print(
                    f"global_step={self.num_timesteps}, "
                    f"episodic_return={episode['r']}, episodic_length={episode['l']}"
                )
        return True


def make_recurrent(args, **settings):
    envs = make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
    size = {"lstm_hidden_size": ppo_memory.LSTM_SIZE}
    return RecurrentPPO("MlpLstmPolicy", envs, policy_kwargs=size, **settings)


def make_maskable(args, **settings):
    envs = make_vec_env(
        args.env_id, n_envs=args.num_envs, seed=args.seed, wrapper_class=ActionMasks
    )
    return MaskablePPO("MlpPolicy", envs, **settings)


PEERS = {
    "recurrent": (make_recurrent, ppo_memory.DEFAULTS),
    "maskable": (make_maskable, ppo_multi_discrete.DEFAULTS),
}


def main(argv=None):
    """Train the program that the first argument names."""
    name, *flags = sys.argv[1:] if argv is None else argv
    if name not in PEERS:
        sys.exit(f"there is no program {name}, only: {', '.join(PEERS)}")
    make_model, defaults = PEERS[name]
    args = ppo.parse_args(flags, **defaults)
    stable_baselines3.train(args, make_model, PrintEpisodes())


if __name__ == "__main__":
    main()
