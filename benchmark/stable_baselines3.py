"""Stable-Baselines3's PPO with the settings of ppo.py, to compare the speed.

    python -m benchmark.stable_baselines3 --num-envs 16

The algorithm, environments, threads and logging are the same.
"""

import time

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import ppo


def make_ppo(args, **settings):
    envs = make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
    return PPO("MlpPolicy", envs, **settings)


def train(args, make_model=make_ppo, callback=None):
    """Train as the flags say, and print the steps per second."""
    torch.set_num_threads(args.num_threads)
    model = make_model(
        args,
        learning_rate=lambda remaining: remaining * args.learning_rate,
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=0.5 * args.vf_coef,  # its value loss lacks the factor 0.5
        max_grad_norm=args.max_grad_norm,
        tensorboard_log="runs",
        device="cpu",
        seed=args.seed,
    )
    steps = args.num_updates * args.batch_size
    start = time.perf_counter()
    model.learn(steps, callback)
    print(f"SPS={steps / (time.perf_counter() - start):.0f}")


if __name__ == "__main__":
    train(ppo.parse_args())
