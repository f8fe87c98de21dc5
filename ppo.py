"""Proximal Policy Optimization (PPO) in one file, to be read from top to bottom.

    python ppo.py                                                        # CartPole-v1, 25,000 steps
    python ppo.py --env-id Acrobot-v1 --total-timesteps 500000 --track   # logged to Weights & Biases too
    tensorboard --logdir runs                                            # the curves, in a browser

PPO alternates between two phases. Rollout: the current policy plays num_steps steps in num_envs environments. Update:
several epochs of minibatch steps on these data, as playing is costly, clipped so that straying far from that policy
gains nothing; then they are thrown away. Part one is the algorithm, part two the run. Search for "Detail 5", say:

    1. vectorized environments        5. generalized advantage estimation     9. clipped value loss
    2. orthogonal initialization      6. minibatches                         10. overall loss with an entropy bonus
    3. Adam's epsilon                 7. advantage normalization             11. global gradient clipping
    4. learning rate annealing        8. clipped policy objective            Bonus: early stopping by the KL divergence

Sources: [PPO] Schulman et al. 2017, arXiv:1707.06347; [GAE] Schulman et al. 2016, arXiv:1506.02438; [A3C] Mnih et al.
2016, arXiv:1602.01783; [Pardo] Pardo et al., arXiv:1712.00378; [baselines] the authors' code, openai/baselines, ppo2;
[Huang] 37 Implementation Details of PPO; [What matters] arXiv:2006.05990. "Found": our measurements, docs/details.md.
"""

import argparse
import contextlib
import functools
import glob
import io
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from traceback import extract_tb

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector.async_vector_env import _async_worker
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Part one: the algorithm ----------------------------------------------------------------------------------------------


def parse_args(argv=None, **defaults):
    """The flags; ``defaults`` replace those below. check_args adds: batch_size = num_envs * num_steps, minibatch_size =
    batch_size / num_minibatches, num_updates; for torchrun, of each process: world_size, rank, local_num_envs."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = {"action": argparse.BooleanOptionalAction}  # --gae or --no-gae; part two translates --gae False, too
    add = parser.add_argument_group("the run").add_argument
    add("--exp-name", default=Path(__file__).stem, help="name of the experiment")
    add("--env-id", "--gym-id", default="CartPole-v1", help="Gymnasium id; module:Id imports module first")
    add("--total-timesteps", type=integer, default=25000, help="of all environments, in whole batches")
    add("--seed", type=integer, default=1, help="of random, numpy, torch and the environments")
    add("--torch-deterministic", **switch, default=True, help="deterministic algorithms where torch has them")
    add("--cuda", **switch, default=True, help="use a GPU if there is one")
    add("--num-threads", type=integer, default=1, help="torch CPU threads; 1: same numbers on any core count")
    add("--track", **switch, default=False, help="log to Weights & Biases too")
    add("--wandb-project-name", default="cleanrl", help="W&B project")
    add("--wandb-entity", default=None, help="W&B user or team; None is your own")
    add("--capture-video", **switch, default=False, help="record videos of the first environment to videos/")
    add("--checkpoint-interval", type=float, default=60.0, help="seconds between checkpoints; 0: none")
    add("--resume", nargs="?", const="runs/*", metavar="FOLDER", help="go on with this run, or the newest, of runs/")
    add = parser.add_argument_group("the data").add_argument
    add("--num-envs", type=integer, default=4, help="N, environments that are stepped together")
    modes = ["sync", "async", "vector_entry_point"]  # in turn, in processes, as one batch
    add("--vectorization-mode", default="sync", choices=modes, help="how Gymnasium steps them")
    add("--num-steps", type=integer, default=128, help="T, steps per environment and rollout")
    add("--gamma", type=float, default=0.99, help="discount per step, 0 to 1")
    add("--gae", **switch, default=True, help="generalized advantage estimation; off: returns minus values")
    add("--gae-lambda", type=float, default=0.95, help="0: least noise, most bias; 1: the opposite")
    add("--bootstrap-truncation", **switch, default=False, help="a time limit is no end: add gamma * V")
    add = parser.add_argument_group("the update").add_argument
    add("--learning-rate", type=float, default=2.5e-4, help="Adam's step size")
    add("--anneal-lr", **switch, default=True, help="lower the learning rate linearly towards 0")
    add("--update-epochs", type=integer, default=4, help="K, passes over each batch")
    add("--num-minibatches", type=integer, default=4, help="equal parts that a batch is split into")
    add("--norm-adv", **switch, default=True, help="normalize the advantages of each minibatch")
    add("--clip-coef", type=float, default=0.2, help="epsilon; a ratio beyond 1 +- this gains nothing")
    add("--clip-vloss", **switch, default=True, help="clip the value loss too")
    add("--ent-coef", type=float, default=0.01, help="c2, weight of the entropy bonus")
    add("--vf-coef", type=float, default=0.5, help="c1, weight of the value loss")
    add("--max-grad-norm", type=float, default=0.5, help="largest norm of all gradients together")
    add("--target-kl", type=float, default=None, help="end an update beyond this KL, in nats; 0.015 is usual")
    parser.set_defaults(**defaults)
    return check_args(parser, argv)


def make_env(args, seed, video=None, render_mode=None):
    """Return a function that makes one environment with flat observations, as vectorized environments want it.
    ``video``: arguments of RecordVideo, such as its video_folder, if there is to be a video."""

    def thunk():
        mode = "rgb_array" if video else render_mode
        env = gym.make(args.env_id, disable_env_checker=True, **({"render_mode": mode} if mode else {}))
        if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
            env = gym.wrappers.FlattenObservation(env)  # Discrete becomes one-hot, Dict and Tuple one long vector
        if args.bootstrap_truncation:  # it needs last observations, which some environments overwrite at the reset
            env = gym.wrappers.TransformObservation(env, np.copy, env.observation_space)
        if video:
            env = gym.wrappers.RecordVideo(env, **video)
        env.action_space.seed(seed)
        env.observation_space.seed(seed)
        return env

    return thunk


def make_envs(args, num_envs, seed, video=None, render_mode=None):
    """``num_envs`` environments as one, of which the first may be recorded. ValueError: a space is not supported.
    Infos hold the return ("r") and the length ("l") of episodes that ended, under "episode_statistics"."""
    # Detail 1: N environments are stepped together. One forward pass serves all of them, and N independent stretches
    # are more varied than one N times as long. ([A3C]; [PPO] Algorithm 1) Found: faster; at low rates, one long one
    # teaches more. After an episode comes a new one. SAME_STEP: the step that ends one also resets, returns the new
    # one's first observation and puts the last one into infos["final_obs"]. NEXT_STEP, all that some batched
    # environments can do: the step that ends one returns its last observation; the next only resets, to be left out.
    thunks = [make_env(args, seed, video, render_mode), *(make_env(args, seed + i) for i in range(1, num_envs))]
    options = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "copy": False}  # train copies observations
    if video and args.vectorization_mode == "vector_entry_point":
        raise ValueError("--capture-video needs --vectorization-mode sync or async")
    if args.vectorization_mode == "sync":
        envs = gym.vector.SyncVectorEnv(thunks, **options)
    elif args.vectorization_mode == "async":
        envs = gym.vector.AsyncVectorEnv(thunks, worker=functools.partial(worker, seed), **options)
    else:
        envs = gym.make_vec(args.env_id, num_envs, vectorization_mode="vector_entry_point")  # without make_env
    actions, observations = envs.single_action_space, envs.single_observation_space
    if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        raise ValueError(f"its actions are {actions}, not Discrete from 0 (Box: python -m variants.continuous_action)")
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        raise ValueError(f"its observations are {observations}, not a flat Box")
    return gym.wrappers.vector.RecordEpisodeStatistics(envs, stats_key="episode_statistics")


def resets_in_same_step(envs):
    return envs.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.SAME_STEP


def layer_init(layer, std=2**0.5, bias_const=0.0):
    # Detail 2: a square orthogonal matrix keeps all lengths, so signals and gradients neither vanish nor explode at
    # first (Saxe et al. 2014, arXiv:1312.6120). A gain of sqrt(2) makes up for the half of the squared length that a
    # ReLU cuts off (He et al. 2015, arXiv:1502.01852); for tanh it is a habit, from [baselines]. Found: mixed.
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


def mlp(num_inputs, num_outputs, std):
    layers = [layer_init(nn.Linear(num_inputs, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
    return nn.Sequential(*layers, layer_init(nn.Linear(64, num_outputs), std))


class Agent(nn.Module):
    """Two networks: the critic estimates V(s), the expected discounted return; the actor gives pi(a|s) as logits."""

    def __init__(self, envs):
        super().__init__()
        obs_dim, num_actions = envs.single_observation_space.shape[0], envs.single_action_space.n
        self.critic = mlp(obs_dim, 1, std=1.0)  # gain 1: nothing follows that cuts off ([baselines])
        self.actor = mlp(obs_dim, num_actions, std=0.01)  # no action is favored at first ([What matters])

    def get_value(self, obs):
        """obs: (batch, obs_dim). Returns V(s): (batch,)."""
        return self.critic(obs.float()).squeeze(-1)

    def get_action_and_value(self, obs, action=None):
        """Returns the action, drawn unless it is given, log pi(a|s), the policy's entropy in nats, V(s): (batch,)."""
        # What torch's Categorical and multinomial do, less their costly checks: argmax p / Exp(1) is a draw from p.
        logits = self.actor(obs.float())
        logprobs = logits - logits.logsumexp(-1, keepdim=True)  # log pi(.|s): (batch, num_actions)
        if action is None:
            probs = logprobs.softmax(-1)
            action = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
        logprob = logprobs.gather(-1, action.long().unsqueeze(-1)).squeeze(-1)
        entropy = -(logprobs * logprobs.softmax(-1)).sum(-1)
        return action, logprob, entropy, self.get_value(obs)


def compute_advantages(rewards, values, dones, gamma, gae_lambda, gae=True):
    """Advantages, how much better each action turned out than the critic expected, and returns, the critic's targets:
    (num_steps, num_envs) each, as are the rewards. values, dones: (num_steps + 1, num_envs); dones[t] is 1 where the
    step before obs[t] ended an episode. Their last row belongs to the observation that follows the rollout."""
    # Detail 5: delta_t = r_t + gamma * V(s_{t+1}) - V(s_t) compares what V foretold with what a step shows.
    # GAE sums this and later ones: A_t = delta_t + (gamma * lambda) * delta_{t+1} + (gamma * lambda)^2 * delta_{t+2}...
    # lambda = 0: delta_t alone; little noise, but all the critic's errors (bias). lambda = 1: the V's in between cancel
    # and leave the rewards; much noise, no bias but that of the V at the rollout's end. ([GAE] equations 16 to 18) An
    # episode's end ends the sum: V is 0 there, and later rewards are the next episode's. At the rollout's end
    # V(s_{t+1}) stands for all that is still to come (bootstrapping). Found: GAE helps Acrobot.
    continues = 1.0 - dones[1:]  # 0 where step t ended an episode
    if gae:
        deltas = rewards + gamma * values[1:] * continues - values[:-1]
        advantages, next_advantage = np.zeros_like(rewards), 0
        for t in reversed(range(len(rewards))):
            advantages[t] = next_advantage = deltas[t] + gamma * gae_lambda * continues[t] * next_advantage
        return advantages, advantages + values[:-1]  # expected + surprise, the "lambda-return" ([baselines])
    returns, next_return = np.zeros_like(rewards), values[-1]  # --no-gae: what lambda = 1 gives, up to rounding
    for t in reversed(range(len(rewards))):
        returns[t] = next_return = rewards[t] + gamma * continues[t] * next_return
    return returns - values[:-1], returns


def value_cut_off(agent, envs, next_obs, terminations, truncations, infos):
    """V of the last observation where a time limit cut an episode off in this step, 0 elsewhere: (num_envs,)."""
    # Such an episode would have gone on. By default, as in [baselines], it counts as over; gamma * V, what was lost,
    # may be added to its last reward: this works because nothing after an end counts in compute_advantages. ([Pardo])
    values, cut = np.zeros(len(truncations), np.float32), truncations & ~terminations
    if cut.any():
        last_obs = np.stack(infos["final_obs"][cut]) if resets_in_same_step(envs) else next_obs[cut]
        with torch.inference_mode():
            values[cut] = agent.get_value(torch.from_numpy(last_obs).to(next(agent.parameters()).device)).cpu().numpy()
    return values


def ppo_loss(newlogprob, entropy, newvalue, mb_logprobs, mb_advantages, mb_returns, mb_values, args):
    """The loss of a minibatch, and a dict of what to log. (minibatch_size,) each; mb_: as the rollout left it."""
    logratio = newlogprob - mb_logprobs
    ratio = logratio.exp()  # pi_new(a|s) / pi_old(a|s); 1, up to rounding, until the policy has changed
    # Detail 7: with mean 0 and standard deviation 1 the scale of the rewards drops out of the policy loss, and each
    # minibatch encourages some of its actions, discourages others. ([baselines]) Found: helps at 30 x the default.
    if args.norm_adv:
        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
    # Detail 8: the loss makes good actions (A > 0) likelier. Why a ratio: the old policy drew them, and one that is now
    # twice as likely must count twice. Far from that policy its advantages mislead; a ruined policy collects the next
    # batch: so the loss is flat once a good action's ratio is above 1 + clip_coef, a bad one's below 1 - clip_coef. A
    # good one's, fallen to 0.5, keeps its slope (max). ([PPO] eq. 7: min, of -loss) Found: vital at 10 x the default.
    pg_loss1 = -mb_advantages * ratio
    pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    # Detail 9: meant to make the critic's training steadier ([baselines]; not in [PPO]): V stays near its old self,
    # as moving a value further than clip_coef gains nothing: in units of return, so wide for 1, tight for 100. Later
    # studies: useless (arXiv:2005.12729), harmful ([What matters]). Found: slows at 1 x, helps Acrobot at 10 x.
    v_loss = (newvalue - mb_returns) ** 2
    if args.clip_vloss:
        v_clipped = mb_values + torch.clamp(newvalue - mb_values, -args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - mb_returns) ** 2)
    v_loss = 0.5 * v_loss.mean()  # 0.5: [baselines]
    # Detail 10: entropy is highest where all actions are equally likely: the bonus keeps the policy from settling early
    # ([A3C]; [PPO] equation 9). Found: nothing clear. vf_coef (c1 there) matters if actor and critic share layers. Here
    # they do not: Adam's m / sqrt(v) (detail 3) cancels a loss's scale, so it acts only through the norm of detail 11.
    entropy_loss = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
    # Debug variables. KL(pi_old || pi_new), how far the policy has moved, in nats: k1 (old_approx_kl) is noisy, may be
    # negative; k3 (approx_kl) is less noisy, never negative (joschu.net/blog/kl-approx.html). clipfrac ([baselines]):
    # the share of samples beyond the clip range. Our rule: near 0 early: stuck; KL > 0.02, clipfrac > 0.2: too fast.
    with torch.no_grad():  # these are for looking; what is to be learned belongs into the loss
        stats = {"value_loss": v_loss, "policy_loss": pg_loss, "entropy": entropy_loss}
        stats["old_approx_kl"] = (-logratio).mean()
        stats["approx_kl"] = ((ratio - 1) - logratio).mean()
        stats["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, stats


def train(args, make_envs=make_envs, Agent=Agent):
    """Train an agent and return it; print episodes, log and save to runs/<run_name>. For exit codes see Run."""
    with Run(args) as run:  # part two: it seeds the generators, logs, saves, stops on signals
        device, T, N = run.device, args.num_steps, args.local_num_envs
        envs = run.make(make_envs)  # make_envs for this process's share of the environments
        agent = Agent(envs).to(device)
        # Detail 3: the step is lr * m / (sqrt(v) + eps); m, v: means of the gradient and its square. Where v is tiny,
        # eps = 1e-5 ([baselines]; PyTorch: 1e-8) keeps the step small: mostly noise, we think. Found: little effect.
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

        # The rollout, in numpy as environments speak it. A row more of values and dones is for what follows it.
        obs = np.zeros((T, *envs.observation_space.shape), envs.observation_space.dtype)  # (T, N, ...)
        actions = np.zeros((T, *envs.action_space.shape), envs.action_space.dtype)  # (T, N, ...)
        logprobs, rewards = np.zeros((2, T, N), np.float32)
        values, dones = np.zeros((2, T + 1, N), np.float32)
        next_obs, next_done = envs.reset(seed=run.seed)[0], np.zeros(N, bool)
        global_step, next_obs, next_done = run.start(agent, optimizer, next_obs, next_done)  # not 0 if it is resumed

        for update in range(global_step // args.batch_size + 1, args.num_updates + 1):
            # Detail 4: large steps first, ever smaller ones to settle: linear, from learning_rate to learning_rate /
            # num_updates. ([PPO] table 5) Found: slower at the default rate, a steadier end at 30 times it.
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (update - 1) / args.num_updates) * args.learning_rate
            # Rollout
            for step in range(T):
                global_step += args.num_envs  # of all processes
                obs[step], dones[step] = next_obs, next_done
                with torch.inference_mode():
                    action, logprob, _, value = agent.get_action_and_value(torch.from_numpy(next_obs).to(device))
                actions[step], logprobs[step], values[step] = (x.cpu().numpy() for x in (action, logprob, value))
                next_obs, rewards[step], terminations, truncations, infos = envs.step(actions[step])
                next_done = terminations | truncations
                if args.bootstrap_truncation:
                    rewards[step] += args.gamma * value_cut_off(agent, envs, next_obs, terminations, truncations, infos)
                run.log_episodes(infos, global_step)

            # Advantages
            with torch.inference_mode():
                values[T], dones[T] = agent.get_value(torch.from_numpy(next_obs).to(device)).cpu().numpy(), next_done
            advantages, returns = compute_advantages(rewards, values, dones, args.gamma, args.gae_lambda, args.gae)
            # The batch: time and environments become one dimension, (T, N, ...) -> (T * N, ...)
            b_obs, b_actions, b_logprobs, b_advantages, b_returns, b_values = (
                torch.from_numpy(x).to(device).flatten(0, 1)
                for x in (obs, actions, logprobs, advantages, returns, values[:T])
            )
            # Update, by all steps but those that only reset
            b_inds = np.arange(T * N) if resets_in_same_step(envs) else np.flatnonzero(dones[:T] == 0)
            clipfracs = []
            for _ in range(args.update_epochs):
                # Detail 6: every epoch deals the batch into new random minibatches (mb_): many noisy steps learn faster
                # than an exact one; each sample counts once per epoch. ([PPO] Algorithm 1) Found: helps CartPole.
                np.random.shuffle(b_inds)
                for mb_inds in torch.from_numpy(b_inds).to(device).tensor_split(args.num_minibatches):
                    _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
                    mb_logprobs, mb_advantages = b_logprobs[mb_inds], b_advantages[mb_inds]
                    mb_returns, mb_values = b_returns[mb_inds], b_values[mb_inds]
                    loss, stats = ppo_loss(
                        newlogprob, entropy, newvalue, mb_logprobs, mb_advantages, mb_returns, mb_values, args
                    )
                    clipfracs.append(stats["clipfrac"])
                    optimizer.zero_grad()
                    loss.backward()
                    run.average_gradients(agent)  # over the processes of torchrun, if there are several
                    # Detail 11: all gradients, as one vector, keep their direction, but are at most max_grad_norm long:
                    # an outlier lingers in Adam's means. (arXiv:1211.5063) Found: slows at 1 x, helps Acrobot at 10 x.
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    optimizer.step()
                # Bonus: clipping only flattens the loss of samples beyond the range; the others, the entropy bonus and
                # Adam's momentum still move the policy. If the KL (k3) of an epoch's last minibatch is over target_kl,
                # the data are too old for another epoch. ([Huang]) Found: little; acts at high rates.
                if args.target_kl is not None and run.mean(stats["approx_kl"]) > args.target_kl:
                    break
            # Debug variables are of the last minibatch; clipfrac is the mean of all. Explained variance ([baselines]):
            # the share of the variance of the batch's returns that the rollout's critic foresaw. 1: all; 0 or less:
            # a constant does as well; NaN: equal returns. Healthy: it rises, until a solved task leaves little to tell.
            stats["clipfrac"] = torch.stack(clipfracs).mean()
            y_pred, y_true = b_values[b_inds], b_returns[b_inds]
            varies = y_true.std() > 1e-6 * (y_true.abs().max() + y_pred.abs().max())
            stats["explained_variance"] = torch.where(varies, 1 - (y_true - y_pred).var() / y_true.var(), torch.nan)
            run.log_update(update, optimizer, loss, stats, obs, next_obs, rewards)
            if run.save_or_stop(update, agent, optimizer, next_obs, next_done):
                break
    return agent


# Part two: the run ----------------------------------------------------------------------------------------------------
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = ["torch>=2.6,<3", "gymnasium[classic-control]>=1.4,<2", "numpy>=1.26,<3", "cloudpickle>=3,<4",
#     "tensorboard>=2.18,<3", "wandb>=0.31,<1", "moviepy>=2.1,<3", "tqdm>=4.66,<5"]
# ///
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def fail(message, exit_code=2):  # exit codes: 2, the input was wrong; 1, the run broke
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(exit_code)


def integer(text):  # 1e6 counts, too
    if not float(text).is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text}")
    return int(float(text))


def check_args(parser, argv):  # exit code 2: a flag is wrong
    parser.error = fail  # argparse prints the usage, too, in which the one line that matters is lost
    # Other spellings: dashes or underscores; --gae=False or --gae False for --no-gae; None, where it is the default.
    text = "\0".join(["", *(sys.argv[1:] if argv is None else argv), ""])
    text = re.sub(r"\0--[^=\0]+", lambda flag: flag[0].replace("_", "-"), text)
    text = re.sub(r"\0--(target-kl|wandb-entity|resume)[=\0]None(?=\0)", "", text)
    text = re.sub(r"\0--([^=\0]+)[=\0]false(?=\0)", r"\0--no-\1", text, flags=re.IGNORECASE)
    argv = re.sub(r"(\0--[^=\0]+)[=\0]true(?=\0)", r"\1", text, flags=re.IGNORECASE).split("\0")[1:-1]
    args = parser.parse_args(argv)
    if args.resume is not None:  # that run's flags take the place of the defaults, and none may be given another value
        folder, checkpoint = load_checkpoint(args.resume)
        saved = {name: value for name, value in checkpoint["args"].items() if name != "resume" and name in args}
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        args.resume, changed = folder, {name: was for name, was in saved.items() if getattr(args, name) != was}
        if changed and (list(changed) != ["total_timesteps"] or args.total_timesteps < saved["total_timesteps"]):
            fail(f"--resume keeps the flags of its run, of which only total_timesteps may grow. Before: {changed}")
        if changed and args.anneal_lr:
            print(f"note: annealed over {args.total_timesteps} steps now, the learning rate goes on higher than it was")
    ranges = {"seed": (0, 2**32 - 1), "num_threads": (1, 1024), "gamma": (0, 1), "gae_lambda": (0, 1)}
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1, 2**53) if type(value) is int else (0, 1e30))  # float32 overflows at 3e38
        if value == [] or type(value) in (int, float) and not low <= value <= high:  # NaN fails, too; []: --flag=--
            fail(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}")
    world_size = os.environ.get("WORLD_SIZE") or "1"  # some schedulers set it, or the rank alone
    if world_size != "1" and not torch.distributed.is_torchelastic_launched():
        fail(f"WORLD_SIZE={world_size} in the environment asks for several processes: use torchrun, or unset it")
    args.world_size, args.rank = int(world_size), int(os.environ["RANK"]) if world_size != "1" else 0
    if args.resume and len(checkpoint["processes"]) != args.world_size:
        fail(f"--resume needs as many processes as its run had, {len(checkpoint['processes'])}, not {args.world_size}")
    args.local_num_envs = args.num_envs // args.world_size
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_updates = args.total_timesteps // args.batch_size
    batch = f"a batch of --num-envs {args.num_envs} * --num-steps {args.num_steps} = {args.batch_size} steps"
    if args.num_envs % args.world_size:
        fail(f"--num-envs {args.num_envs} cannot be split evenly over the {args.world_size} processes of torchrun")
    if args.batch_size % args.num_minibatches or args.minibatch_size < args.world_size * (1 + args.norm_adv):
        fail(f"{batch} cannot be split into --num-minibatches {args.num_minibatches} equal parts of 2 steps or more")
    if args.num_updates < 1:
        fail(f"--total-timesteps {args.total_timesteps} is less than {batch}")
    return args


def seed_generators(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def worker(seed, index, thunk, pipe, parent_pipe, memory, errors, *options):
    """A process of AsyncVectorEnv, with generators of its own, else all draw the same; signals are left to the main."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    seed_generators(seed + index)
    put = errors.put  # not all errors can be sent to the main process, which would wait for ever; their text can
    errors.put = lambda x: put((index, RuntimeError, f"{x[1].__name__} in sub-environment {index}: {x[2]}", x[3]))
    try:
        _async_worker(index, thunk, pipe, parent_pipe, memory, errors, *options)
    except Exception as error:  # those of steps are reported, so the environment could not be made
        pipe.recv()  # the first question of the main process
        errors.put((index, type(error), error, ""))
        pipe.send((None, False))


class Run:  # exit codes: 2, it could not begin, nothing was written; 1, it broke; 128 + n, signal n stopped it
    def __init__(self, args):
        self.args, self.handlers, self.returns, self.logged_videos = args, contextlib.ExitStack(), [], set()
        self.stop_signal = self.envs = self.folder = self.writer = self.bar = self.wandb = None
        self.say = tqdm.write if args.rank == 0 else str  # print, but without tearing the progress bar; or nothing
        self.checkpoint = load_checkpoint(args.resume)[1] if args.resume else {"update": 0, "wandb_id": None}
        self.first_step = self.global_step = self.checkpoint["update"] * args.batch_size
        self.seed = args.seed + args.rank * args.local_num_envs + self.first_step  # a resumed run plays new episodes
        if args.rank == 0:
            self.folder = Path(args.resume) if args.resume else new_folder(args)
            resumed = f"from-step-{self.first_step}__{int(time.time())}" if args.resume else ""
            self.videos = Path("videos", self.folder.resolve().name, resumed)
        gpu = f"cuda:{os.environ['LOCAL_RANK'] if args.world_size > 1 else 0}"
        self.device = torch.device(gpu if args.cuda and torch.cuda.is_available() else "cpu")

    def __enter__(self):
        for number in STOP_SIGNALS:
            with contextlib.suppress(ValueError):  # Python allows it in the main thread alone
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup, for one, asks to ignore
                    self.handlers.callback(signal.signal, number, signal.signal(number, self.stop))  # puts the old back
        seed_generators(self.args.seed + self.args.rank)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
        torch.use_deterministic_algorithms(self.args.torch_deterministic, warn_only=True)
        torch.set_num_threads(self.args.num_threads)
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # its greeting does not belong on standard output
        return self

    def stop(self, number, frame):
        self.stop_signal = number
        self.handlers.close()  # a second signal stops at once

    def make(self, make_envs):
        args = self.args
        video = {"video_folder": self.videos} if args.capture_video and args.rank == 0 else None
        self.envs = make_envs(args, args.local_num_envs, self.seed, video)
        usable = args.num_steps // 2 * args.num_envs  # every other step may only reset
        if not resets_in_same_step(self.envs) and usable < 2 * args.num_minibatches * args.world_size:
            fail(f"--num-steps {args.num_steps}: the steps that only reset may leave too few for --num-minibatches")
        return self.envs

    def start(self, agent, optimizer, next_obs, next_done):  # or go on as the checkpoint says, if a run is resumed
        if self.args.resume:
            agent.load_state_dict(self.checkpoint["agent"])
            optimizer.load_state_dict(self.checkpoint["optimizer"])
            generators, envs = (x.numpy().tobytes() for x in self.checkpoint["processes"][self.args.rank])
            generators = cloudpickle.loads(generators)
            random.setstate(generators["random"])
            np.random.set_state(generators["numpy"])
            torch.set_rng_state(generators["torch"])
            torch.cuda.set_rng_state_all(generators["cuda"])
            try:
                envs, next_obs, next_done = cloudpickle.loads(envs)  # this runs code: resume no stranger's run
                self.envs.__dict__.update(envs.__dict__)  # in place, as the agent may refer to them
            except Exception:
                next_obs, _ = self.envs.reset(seed=self.seed)  # once more, as the agent's statistics see it now
                self.say("note: these environments could not be saved or restored, so new episodes start")
        if self.args.rank == 0:
            self.open_logs()
        if self.args.world_size > 1:
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            for parameter in agent.parameters():  # all processes start from the same ones
                torch.distributed.broadcast(parameter.data, 0)
        steps = {"total": self.args.num_updates * self.args.batch_size, "initial": self.first_step}
        self.bar = tqdm(**steps, unit="step", disable=self.args.rank > 0 or not sys.stderr.isatty())
        self.start_time = self.saved_time = time.perf_counter()
        return self.first_step, next_obs, next_done

    def open_logs(self):
        args, spaces = self.args, {x: getattr(self.envs, f"single_{x}") for x in ("observation_space", "action_space")}
        facts = {name: " ".join(str(value).split()) for name, value in (vars(args) | spaces).items()}
        if args.track:
            import wandb  # takes a second, so only when it is asked for

            self.wandb, options = wandb, {"project": args.wandb_project_name, "entity": args.wandb_entity}
            options |= {"name": self.folder.resolve().name, "id": self.checkpoint["wandb_id"], "resume": "allow"}
            options |= {"config": vars(args), "save_code": True, "sync_tensorboard": True}
            try:  # before the SummaryWriter is made, for wandb to see that
                wandb.init(**options)
            except wandb.errors.CommError as error:
                self.say(f"note: W&B cannot be reached and logs to the disk, for wandb sync later: {error}")
                wandb.init(**options, mode="offline")
            except Exception as error:
                fail(f"--track: {error} (Or set WANDB_MODE=offline to do without an account.)")
        self.writer = SummaryWriter(self.folder, purge_step=self.first_step + 1)  # hides what is done again
        table = "\n".join(f"|{name}|{value}|" for name, value in facts.items())
        self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{table}")
        self.say("\n".join(f"{name}={value}" for name, value in facts.items()))

    def log_episodes(self, infos, global_step):
        """Print each finished episode; TensorBoard gets one point for those that end in the same step, their mean."""
        self.global_step = global_step
        if "episode_statistics" in infos and self.writer:
            finished = infos["_episode_statistics"]  # a mask: (num_envs,); below, one entry for each finished episode
            returns, lengths = (infos["episode_statistics"][key][finished] for key in ("r", "l"))
            for r, length in zip(returns, lengths, strict=True):
                self.say(f"global_step={global_step}, episodic_return={r}, episodic_length={length}")
            self.returns = [*self.returns, *returns][-100:]
            self.writer.add_scalar("charts/episodic_return", returns.mean(), global_step)
            self.writer.add_scalar("charts/episodic_length", lengths.mean(), global_step)

    def log_update(self, update, optimizer, loss, stats, obs, next_obs, rewards):
        """Log stats, averaged over the processes of torchrun. Exit code 1: something is not finite any more."""
        for name, x in (("an observation", obs), ("an observation", next_obs), ("a reward", rewards)):
            if not np.isfinite(x).all():
                fail(f"{self.args.env_id} gave {name} that is not finite, by global_step {self.global_step}", 1)
        if not all(x.isfinite().all() for x in (loss, *optimizer.param_groups[0]["params"])):
            fail(f"update {update} (step {self.global_step}) diverged: lower --learning-rate, or scale the rewards", 1)
        sps = int((self.global_step - self.first_step) / (time.perf_counter() - self.start_time))
        means = self.mean([value.item() for value in stats.values()])
        scalars = {f"losses/{name}": mean for name, mean in zip(stats, means, strict=True)}
        scalars |= {"charts/SPS": sps, "charts/learning_rate": optimizer.param_groups[0]["lr"]}
        for tag, value in scalars.items() if self.writer else ():
            self.writer.add_scalar(tag, value, self.global_step)
        self.bar.set_postfix(SPS=sps, mean_return=np.mean(self.returns or [np.nan]), refresh=False)
        self.bar.update(self.args.batch_size)
        sys.stdout.flush()  # redirected output is complete up to this update
        if self.wandb and self.args.capture_video:  # wandb's own monitor_gym breaks with Gymnasium 1.0 and later
            for path in sorted(set(self.videos.glob("*.mp4")) - self.logged_videos):
                self.wandb.log({"video": self.wandb.Video(str(path), format="mp4"), "global_step": self.global_step})
                self.logged_videos.add(path)

    def average_gradients(self, agent):
        for parameter in agent.parameters() if self.args.world_size > 1 else []:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.args.world_size

    def mean(self, x):
        x = torch.as_tensor(x, dtype=torch.float64).cpu()  # a number or a list of them, to be averaged over torchrun's
        if self.args.world_size > 1:
            torch.distributed.all_reduce(x)
        return x.numpy() / self.args.world_size

    def save_or_stop(self, update, agent, optimizer, next_obs, next_done):
        """Save when it is time to. Returns whether to end now. All processes of torchrun do so in the same update."""
        args, due = self.args, time.perf_counter() - self.saved_time >= self.args.checkpoint_interval
        stop, due = self.mean([bool(self.stop_signal), due]) > 0
        if args.checkpoint_interval and (due or stop or update == args.num_updates):
            generators = {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
            generators["cuda"] = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
            envs = b""  # where they stand now; simulators written in C, windows and processes cannot be pickled
            if not args.capture_video:  # nor should a video's frames
                with contextlib.suppress(Exception):
                    envs = cloudpickle.dumps((self.envs, next_obs, next_done))  # pickle refuses functions in wrappers
            if b"_ezpickle_args" in envs:  # Gymnasium's EzPickle saves how one was made, not where it stands
                envs = b""
            process = [torch.tensor(np.frombuffer(x, np.uint8)) for x in (cloudpickle.dumps(generators), envs)]
            processes = [process] * args.world_size
            if args.world_size > 1:
                torch.distributed.all_gather_object(processes, process)
            if args.rank == 0:
                program = Path(getattr(sys.modules[type(agent).__module__], "__file__", "ppo.py")).stem
                checkpoint = {"args": vars(args), "program": program, "update": update, "processes": processes}
                checkpoint |= {"wandb_id": self.wandb and self.wandb.run.id}
                checkpoint |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
                self.writer.flush()  # what is in TensorBoard is never behind the checkpoint
                save_checkpoint(self.folder, checkpoint)
            self.saved_time = time.perf_counter()
        return stop

    def __exit__(self, kind, error, traceback):
        for process in multiprocessing.active_children() if error else []:
            if process.name.startswith("Worker<"):  # Gymnasium's; they may hang, so they are not asked to end
                process.kill()
        for opened in filter(None, (self.bar, self.writer, self.envs)):  # the last one finishes a video, too
            try:
                opened.close()
            except Exception as error_in_closing:
                error, opened.closed = error or error_in_closing, True  # one error is enough, and one try
        self.handlers.close()
        if self.wandb:
            self.wandb.finish(exit_code=int(error is not None))
        if self.folder and not self.writer:  # nothing stays of a run that could not begin
            for path in (*self.videos.glob("*"), self.videos, *self.videos.parents, self.folder, Path("runs")):
                with contextlib.suppress(OSError):  # not empty, or not there
                    path.unlink() if path.is_file() else path.rmdir()
        if error:
            explain(error, self.args, self.global_step, began=self.writer is not None)
            raise error
        if self.args.world_size > 1:
            torch.distributed.destroy_process_group()
        if not self.returns:
            self.say("note: not one episode ended, so there is no return to show")
        if self.stop_signal:
            how = f"the same command with --resume {self.folder}" if self.args.checkpoint_interval else "no checkpoint"
            self.say(f"stopped at step {self.global_step} of {self.args.total_timesteps}; to go on: {how}")
        self.say(f"results: {self.folder}" + (f" and {self.videos}" if self.args.capture_video else ""))
        if self.stop_signal:
            sys.exit(128 + self.stop_signal)  # the exit code that shells give to a death by this signal


def explain(error, args, global_step, began):  # if it is an environment's error, fail with one line for when and why
    frames = extract_tb(error.__traceback__)
    theirs = any(x.filename.startswith(gym.__path__[0]) or x.name in ("make_envs", "load_state_dict") for x in frames)
    if isinstance(error, KeyboardInterrupt) or frames[-1].name == "fail" or not theirs:
        return
    reason = f"{type(error).__name__}: {error} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
    if args.vectorization_mode == "async" and isinstance(error, (EOFError, ConnectionError)):
        reason = "one of its processes died"
    elif isinstance(error, NotImplementedError):
        reason = "a part of its observations, such as a text, has no fixed size that Gymnasium knows"
    elif isinstance(error, ModuleNotFoundError):
        reason += f" (searched: {sys.path[0] or os.getcwd()}, the folders of PYTHONPATH, installed packages)"
    flags = f"--vectorization-mode {args.vectorization_mode}, --capture-video {args.capture_video}"
    when = f"broke in global_step {global_step + args.num_envs}" if began else "cannot be used"
    fail(f"--env-id {args.env_id} ({flags}) {when}: {reason}", 1 if began else 2)


def new_folder(args):  # its name ends in the first second, from now on, that no other run has taken
    name, second = re.sub(r"[/\\:\s]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}"), int(time.time())
    Path("runs").mkdir(exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):
            Path("runs", f"{name}__{second}").mkdir()
            return Path("runs", f"{name}__{second}")
        second += 1


def save_checkpoint(folder, checkpoint):  # whole or not at all; exit code 1: it cannot be written
    torch.save(checkpoint, buffer := io.BytesIO())  # not to the file, as torch would not say that a disk is full
    try:
        with open(folder / "checkpoint.tmp", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file)  # down to the disk, before it takes the place of the last one
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
    except OSError as error:
        fail(f"cannot save {folder}/checkpoint.pt (one saved before is still whole): {error}", 1)


def load_checkpoint(folder):
    """The folder and what save_checkpoint wrote to it, read without running code that a stranger may have put there; of
    the newest one, where a pattern fits several. Exit code 2: it cannot be read."""
    pattern = os.path.join(folder.removesuffix("checkpoint.pt"), "checkpoint.pt")
    path = max(glob.glob(pattern), key=os.path.getmtime, default=pattern)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["args"]["env_id"]
        keys = "args program update wandb_id agent optimizer processes"
        return os.path.dirname(path) or ".", {key: checkpoint[key] for key in keys.split()}
    except Exception as error:  # a file can be wrong in many ways
        fail(f"{path} is not a whole checkpoint of ppo.py: {type(error).__name__}")


def main(argv=None, make_envs=make_envs, Agent=Agent, **defaults):
    """Train as the flags say; a variant gives its own environments, agent and defaults of the flags."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None: closed
    args = parse_args(argv, **defaults)
    try:
        return train(args, make_envs, Agent)
    except (OSError, MemoryError, UnicodeError) as error:  # such as a full disk, or a batch of a billion steps
        fail(str(error) or repr(error), 2 if isinstance(error, UnicodeError) else 1)


if __name__ == "__main__":
    main()
