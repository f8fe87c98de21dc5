"""Proximal Policy Optimization (PPO) in one file, to be read from top to bottom.

    python ppo.py                                                        # CartPole-v1, 25,000 steps
    python ppo.py --env-id Acrobot-v1 --total-timesteps 500000 --track   # logged to Weights & Biases too
    tensorboard --logdir runs                                            # the curves, in a browser

PPO repeats two phases. Rollout: the current policy plays num_steps steps in num_envs environments. Update: these data
serve several epochs of minibatch gradient steps; clipping makes sure that straying far from that policy gains nothing.
Details, some from the paper and some known only from its code, make up PPO as it is used. Each is explained where it
happens (search for "Detail 5", say); the loop that ties them together is train():

    1. vectorized environments        5. generalized advantage estimation     9. clipped value loss
    2. orthogonal initialization      6. minibatches                         10. overall loss with an entropy bonus
    3. Adam's epsilon                 7. advantage normalization             11. global gradient clipping
    4. learning rate annealing        8. clipped policy objective            Bonus: early stopping by the KL divergence

Sources: [PPO] Schulman et al. 2017, arXiv:1707.06347; [GAE] Schulman et al. 2016, arXiv:1506.02438; [A3C] Mnih et al.
2016, arXiv:1602.01783; [Pardo] Pardo et al. 2018, arXiv:1712.00378; [baselines] the original code, folder ppo2 of
github.com/openai/baselines; [Huang] The 37 Implementation Details of PPO, ICLR Blog Track 2022.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def fail(message, exit_code=2):
    """Exit with one line on standard error. Exit code 2: the input was wrong; 1: the run broke."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(exit_code)


def parse_args(argv=None):
    """The checked flags, an argparse.Namespace, with batch_size and minibatch_size (in steps) and num_updates added."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail  # argparse's own prints the usage too, in which the one line that matters is lost

    def boolean(text):
        return ("false", "true").index(text.lower()) == 1  # any other text: ValueError, which argparse reports

    def add_bool(group, name, **kwargs):  # --name, --no-name, --name False and, as sweep tools write it, --name=false
        group.add_argument(f"--{name}", type=boolean, nargs="?", const=True, metavar="BOOL", **kwargs)
        group.add_argument(f"--no-{name}", dest=name.replace("-", "_"), action="store_false", help=argparse.SUPPRESS)

    run, data, update = map(parser.add_argument_group, ("the run", "the data", "the update"))
    run.add_argument("--exp-name", default=Path(__file__).stem, help="name of the experiment")
    run.add_argument("--env-id", "--gym-id", default="CartPole-v1", help="Gymnasium id; module:Id imports module first")
    run.add_argument("--resume", metavar="FOLDER", help="go on with the run of this folder, runs/..., and its flags")
    run.add_argument("--checkpoint-interval", type=int, default=10, help="updates between checkpoints; 0: none")
    run.add_argument("--total-timesteps", type=int, default=25000, help="of all environments, in whole batches")
    run.add_argument("--seed", type=int, default=1, help="of random, numpy, torch and the environments")
    add_bool(run, "torch-deterministic", default=True, help="deterministic algorithms where torch has them")
    add_bool(run, "cuda", default=True, help="use a GPU if there is one")
    run.add_argument("--num-threads", type=int, default=1, help="torch CPU threads; 1: same numbers on any core count")
    add_bool(run, "track", default=False, help="log to Weights & Biases too")
    run.add_argument("--wandb-project-name", default="cleanrl", help="W&B project")
    run.add_argument("--wandb-entity", default=None, help="W&B user or team; None is your own")
    add_bool(run, "capture-video", default=False, help="record videos of the first environment to videos/<run_name>")
    data.add_argument("--num-envs", type=int, default=4, help="N, environments that are stepped together")
    modes = ("sync", "async", "vector_entry_point")  # Gymnasium's names
    data.add_argument("--vectorization-mode", default="sync", choices=modes, help="in turn, in processes, as one batch")
    data.add_argument("--num-steps", type=int, default=128, help="T, steps per environment and rollout")
    add_bool(data, "gae", default=True, help="generalized advantage estimation; off: discounted returns minus values")
    data.add_argument("--gamma", type=float, default=0.99, help="discount per step, 0 to 1")
    data.add_argument("--gae-lambda", type=float, default=0.95, help="0: least noise, most bias; 1: the opposite")
    add_bool(data, "bootstrap-truncation", default=False, help="value what a time limit cut off")
    update.add_argument("--learning-rate", type=float, default=2.5e-4, help="Adam's step size")
    add_bool(update, "anneal-lr", default=True, help="lower the learning rate linearly towards 0")
    update.add_argument("--num-minibatches", type=int, default=4, help="equal parts that a batch is split into")
    update.add_argument("--update-epochs", type=int, default=4, help="K, passes over each batch")
    add_bool(update, "norm-adv", default=True, help="normalize the advantages of each minibatch")
    update.add_argument("--clip-coef", type=float, default=0.2, help="no gain from a ratio beyond 1 +- this")
    add_bool(update, "clip-vloss", default=True, help="clip the value loss too")
    update.add_argument("--ent-coef", type=float, default=0.01, help="c2, weight of the entropy bonus")
    update.add_argument("--vf-coef", type=float, default=0.5, help="c1, weight of the value loss")
    update.add_argument("--max-grad-norm", type=float, default=0.5, help="largest norm of all gradients together")
    update.add_argument("--target-kl", type=float, default=None, help="end an update beyond this KL; 0.015 is usual")
    args = parser.parse_args(argv)
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes, which torchrun says
    if args.resume is not None:  # that run's flags take the place of the defaults, and none may be given another value
        saved = load_checkpoint(args.resume)["args"]
        args = parser.parse_args(argv, argparse.Namespace(**saved | {"world_size": args.world_size}))
        changed = {name: was for name, was in saved.items() if name != "resume" and getattr(args, name) != was}
        if changed and (args.total_timesteps <= saved["total_timesteps"] or len(changed) > 1):
            fail(f"--resume keeps the flags of its run, of which only total_timesteps may grow. Before: {changed}")
        if changed and args.anneal_lr:
            print(f"note: annealed over {args.total_timesteps} steps now, the learning rate goes on higher than it was")
    ranges = {"seed": (0, 2**32 - 1), "checkpoint_interval": (0, 2**53), "num_threads": (1, 1024)}
    ranges |= {"gamma": (0, 1), "gae_lambda": (0, 1)}
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1, 2**53) if type(value) is int else (0, 1e30))  # float32 overflows at 3e38
        if type(value) in (int, float) and not low <= value <= high:  # not "value < low or ...": NaN must fail too
            fail(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}")
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_updates = args.total_timesteps // args.batch_size
    batch = f"a batch of --num-envs {args.num_envs} * --num-steps {args.num_steps} = {args.batch_size} steps"
    smallest = 2 * args.world_size if args.norm_adv else 1  # the standard deviation of one number is NaN
    if args.batch_size % args.num_minibatches or args.minibatch_size < smallest:
        fail(f"{batch} cannot be split into --num-minibatches {args.num_minibatches} equal parts of 2 steps or more")
    if args.num_envs % args.world_size:
        fail(f"--num-envs {args.num_envs} cannot be split evenly over the {args.world_size} processes of torchrun")
    if args.capture_video and args.vectorization_mode == "vector_entry_point":
        fail("--capture-video needs --vectorization-mode sync or async")
    if args.num_updates < 1:
        fail(f"--total-timesteps {args.total_timesteps} is less than {batch}")
    return args


def make_env(env_id, seed, render_mode=None, video_folder=None, copy_obs=False):
    """Return a function that makes one environment with flat observations, as vectorized environments want it. Episodes
    0, 1, 8, 27, ... become mp4 files in ``video_folder``, if there is one. ValueError: a space is not supported."""

    def thunk():
        if multiprocessing.parent_process():  # Ctrl-C reaches workers too, but the main process must end them
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))  # not all accept this argument
        if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
            env = gym.wrappers.FlattenObservation(env)  # Discrete becomes one-hot, Dict and Tuple one long vector
        if copy_obs:  # some environments write each one into the same array, but final_obs must outlive reset
            env = gym.wrappers.TransformObservation(env, np.copy, env.observation_space)
        if video_folder is not None:
            env = gym.wrappers.RecordVideo(env, video_folder, disable_logger=True)
        env.action_space.seed(seed)
        env.observation_space.seed(seed)
        return env

    return thunk


def make_envs(args, mode, num_envs, seed, video_folder=None):
    """``num_envs`` environments as one; sub-environment i has ``seed`` + i. ValueError: a space is not supported."""
    first = {"render_mode": "rgb_array", "video_folder": video_folder} if args.capture_video else {}
    options = [first] + [{}] * (num_envs - 1)
    thunks = [make_env(args.env_id, seed + i, copy_obs=args.bootstrap_truncation, **o) for i, o in enumerate(options)]
    if mode == "vector_entry_point":
        envs = gym.make_vec(args.env_id, num_envs, vectorization_mode=mode)
    else:  # SAME_STEP: the step that ends an episode also resets; obs[step + 1] is of the next episode
        make = gym.vector.SyncVectorEnv if mode == "sync" else gym.vector.AsyncVectorEnv
        envs = make(thunks, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    if mode == "async":
        envs.step_wait = lambda timeout=60, wait=envs.step_wait: wait(timeout)  # seconds; no answer by then: it hangs
    action_space, obs_space = envs.single_action_space, envs.single_observation_space
    if not isinstance(action_space, gym.spaces.Discrete) or action_space.start != 0:
        raise ValueError(f"its action space is {action_space}, but only Discrete (from 0) is supported")
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        raise ValueError(f"its observation space {obs_space} has no fixed size, or is not flat in vector_entry_point")
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


def layer_init(layer, gain=2**0.5, bias=0.0):
    """Fill ``layer.weight`` with orthogonal rows (or columns) of length ``gain`` and ``layer.bias`` with a constant."""
    # Detail 2: an orthogonal matrix stretches all directions alike, so that neither signals nor gradients vanish or
    # explode in a fresh network. These gains are the original code's. (baselines; Saxe et al. 2014, arXiv:1312.6120)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.constant_(layer.bias, bias)
    return layer


class MLP(nn.ModuleList):
    """in_features -> 64 -> tanh -> 64 -> tanh -> out_features; ``gain`` is that of the last layer."""

    def __init__(self, in_features, out_features, gain):
        hidden = [layer_init(nn.Linear(in_features, 64)), layer_init(nn.Linear(64, 64))]
        super().__init__([*hidden, layer_init(nn.Linear(64, out_features), gain)])
        self.weights = list(self.parameters())  # nn.Sequential, which calls modules, takes 1.3 to 1.8 times as long

    def forward(self, x):
        w1, b1, w2, b2, w3, b3 = self.weights
        return F.linear(F.linear(F.linear(x, w1, b1).tanh(), w2, b2).tanh(), w3, b3)


class Agent(nn.Module):
    """Two networks: the critic estimates V(s), the expected discounted return; the actor gives pi(a|s) as logits."""

    def __init__(self, obs_dim, num_actions):
        super().__init__()
        self.critic = MLP(obs_dim, 1, gain=1.0)
        self.actor = MLP(obs_dim, num_actions, gain=0.01)  # all actions start about equally likely

    def get_value(self, obs):
        """obs: (..., obs_dim). Returns V(s): (...)."""
        return self.critic(obs).squeeze(-1)

    def get_action(self, obs):
        """obs: (batch, obs_dim). Returns actions drawn from the policy and their log-probabilities: (batch,) each."""
        logits = self.actor(obs).cpu()  # drawn there on every device: one generator to seed and to save
        logprobs = logits - logits.logsumexp(-1, keepdim=True)  # log pi(.|s): (batch, num_actions)
        probs = logprobs.softmax(-1)
        # The argmax of p / Exp(1) is a draw from p: what torch.multinomial does, without its checks, 7 % of all time.
        action = (probs / torch.empty_like(probs).exponential_(1)).argmax(-1)
        return action, logprobs.gather(-1, action[:, None]).squeeze(-1)

    def get_action_and_value(self, obs, action=None):
        """Returns the action, drawn unless it is given, log pi(a|s), the policy's entropy in nats, V(s): (batch,)."""
        logits = self.actor(obs)
        logprobs = logits - logits.logsumexp(-1, keepdim=True)
        if action is None:
            action = torch.multinomial(logprobs.softmax(-1), 1).squeeze(-1)
        logprob = logprobs.gather(-1, action[:, None]).squeeze(-1)  # first: the order decides how backward() rounds
        entropy = -(logprobs * logprobs.softmax(-1)).sum(-1)
        return action, logprob, entropy, self.get_value(obs)


def compute_advantages(rewards, values, dones, gamma, gae_lambda, gae=True):
    """Advantages, how much better each action turned out than the critic expected, and returns, the critic's targets:
    (num_steps, num_envs) each, as are the rewards. values, dones: (num_steps + 1, num_envs); dones[t] is 1 where the
    step before obs[t] ended an episode. values[-1] stands for what follows the rollout (bootstrapping)."""
    continues = 1.0 - dones[1:]  # 0 where step t ended an episode: nothing that follows counts
    if not gae:  # R_t = r_t + gamma * R_{t+1}; A_t = R_t - V(s_t): what lambda = 1 gives too, up to rounding
        returns, next_return = np.zeros_like(rewards), values[-1]
        for t in reversed(range(len(rewards))):
            returns[t] = next_return = rewards[t] + gamma * continues[t] * next_return
        return returns - values[:-1], returns
    # Detail 5: the TD error delta_t = r_t + gamma * V(s_{t+1}) - V(s_t) estimates A_t with little noise, but with the
    # critic's bias. In the sum of all later ones, discounted by gamma, the V's in between cancel: no bias, much noise.
    # gamma * lambda lies between: A_t = delta_t + gamma * lambda * A_{t+1}. ([GAE] equations 11 to 16)
    deltas = rewards + gamma * values[1:] * continues - values[:-1]
    advantages, next_advantage = np.zeros_like(rewards), 0
    for t in reversed(range(len(rewards))):
        advantages[t] = next_advantage = deltas[t] + gamma * gae_lambda * continues[t] * next_advantage
    return advantages, advantages + values[:-1]


def ppo_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args):
    """The loss of a minibatch, and a dict of what to log. Arguments: (minibatch_size,) each, except for args; names
    with "new", and the entropy, are of the current agent, the others of the rollout."""
    logratio = newlogprob - logprobs
    ratio = logratio.exp()  # pi_new(a|s) / pi_old(a|s); 1, up to rounding, until the policy has changed
    # Detail 7: with mean 0 and deviation 1 the scale of the rewards drops out of the policy loss, and about half of the
    # actions are encouraged, half discouraged. (baselines)
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    # Detail 8: the gradient of -A * ratio makes actions with A > 0 likelier, the others rarer. Where that has brought
    # the ratio beyond 1 +- clip_coef, the clipped loss is flat and pushes no further. Taking the worse of the two still
    # pulls back a ratio that went the other way. ([PPO] equation 7, there a min, as it is maximized)
    clipped_ratio = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()
    # Detail 9: to move a value beyond clip_coef (in units of return!) from the rollout's gains nothing. Not in the
    # paper, and later found useless (arXiv:2005.12729) or harmful (arXiv:2006.05990). (baselines, as is the 0.5)
    v_loss = (newvalue - returns) ** 2
    if args.clip_vloss:
        clipped_value = values + torch.clamp(newvalue - values, -args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (clipped_value - returns) ** 2)
    v_loss = 0.5 * v_loss.mean()
    # Detail 10: one loss, so one step, for both networks. Entropy is highest where all actions are equally likely; its
    # bonus keeps the policy from settling before it has tried enough. ([PPO] equation 9; [A3C])
    mean_entropy = entropy.mean()
    loss = pg_loss - args.ent_coef * mean_entropy + args.vf_coef * v_loss
    # Debug variables: two estimates of KL(pi_old || pi_new) in nats (k1 and k3, less noisy and never negative, of
    # joschu.net/blog/kl-approx.html), and the fraction of samples whose ratio left the clip range.
    stats = {"value_loss": v_loss, "policy_loss": pg_loss, "entropy": mean_entropy}
    with torch.no_grad():
        stats |= {"old_approx_kl": (-logratio).mean(), "approx_kl": (ratio - 1 - logratio).mean()}
        stats["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, stats


def train(args, stop_signals=()):
    """Train an agent and return it; print episodes, log to runs/<run_name>. ``stop_signals``, once not empty, stops it
    after the update. Exit code 2: the environment or W&B cannot be used (runs/ is untouched); 1: the run broke."""
    rank = int(os.environ.get("RANK", 0))  # which process of torchrun this is: the first one, 0, alone writes anything
    if rank > 0:
        args.track, args.capture_video, sys.stdout = False, False, open(os.devnull, "w")
    # What can be wrong with the environment or the account should show before anything is written to runs/.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # its greeting does not belong on standard output
    mode, T, N = args.vectorization_mode, args.num_steps, args.num_envs // args.world_size  # N: those of this process
    seed = args.seed + rank * N
    try:
        probe = make_envs(args, "sync" if mode == "async" else mode, 1, seed)
        probe.reset(seed=seed)
        if args.capture_video and not isinstance(probe.render()[0], np.ndarray):
            raise ValueError("it does not render images")
        spec = getattr(probe.unwrapped, "envs", [probe.unwrapped])[0].spec
        probe.close()
    except Exception as error:  # environments raise anything; their users need the reason, not our traceback
        hint = " Do --vectorization-mode sync and async work?" * (mode == "vector_entry_point")
        fail(f"--env-id {args.env_id}{' --capture-video' * args.capture_video}: {str(error) or repr(error)}{hint}")
    saved = None if args.resume is None else load_checkpoint(args.resume)
    last_update, global_step, wandb_id = saved["progress"] if saved else (0, 0, None)
    if args.track:
        import wandb  # takes a second, so only when it is asked for

        options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "config": vars(args)}
        options |= {"sync_tensorboard": True, "save_code": True, "id": wandb_id, "resume": "allow"}
        try:  # wandb must see the SummaryWriter being made
            wandb_id = wandb.init(**options).id
        except wandb.errors.CommError as error:
            print(f"note: W&B cannot be reached and logs to the disk, for wandb sync later: {error}")
            wandb_id = wandb.init(**options, mode="offline").id
        except Exception as error:
            fail(f"--track: {error} (Or set WANDB_MODE=offline to do without an account.)")
    folder = Path("runs" if args.resume is None else args.resume)
    folder.mkdir(exist_ok=True)
    for second in range(int(time.time()), 0 if saved or rank > 0 else 2**63):  # the first one that no run has taken
        folder = Path("runs", re.sub(r"[/\\:\s]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{second}"))
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    run_name = folder.resolve().name
    video_folder = Path("videos", run_name, f"from-step-{global_step}" if saved else "")
    if args.track:
        wandb.run.name = run_name
    facts = {name: getattr(probe, f"single_{name}") for name in ("observation_space", "action_space")}
    for name, value in (vars(args) | facts | {"max_episode_steps": spec and spec.max_episode_steps}).items():
        print(f"{name}={' '.join(str(value).split())}")
    purge_step = global_step + 1 if saved else None  # hides what a resumed run does again
    writer = SummaryWriter(folder, purge_step=purge_step) if rank == 0 else Mock(add_scalar=lambda *args: None)
    writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))

    # Seeds: from here on, only the algorithm draws from these generators.
    random.seed(args.seed + rank)
    np.random.seed((args.seed + rank) % 2**32)
    torch.manual_seed(args.seed + rank)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA's matrix products need to be deterministic
    torch.set_deterministic_debug_mode("warn" if args.torch_deterministic else "default")
    torch.set_num_threads(args.num_threads)
    use_cuda = torch.cuda.is_available() and args.cuda
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if args.world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")

    # Detail 1: N environments are stepped together: one forward pass serves them all, and a batch holds N independent
    # stretches of play, less alike than one long stretch. ([A3C]; [PPO] Algorithm 1: N actors)
    envs = make_envs(args, mode, N, seed, video_folder)
    # In NEXT_STEP mode the step that ends an episode gives its last observation; the next step, of any action, resets.
    next_step = envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.SAME_STEP
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space.n).to(device)
    # Detail 3: eps 1e-5, not PyTorch's 1e-8, keeps steps small where gradients are tiny, mostly noise. (baselines)
    # adam is what torch.optim.Adam calls; an object of that class takes a second of imports. The agent's parameters and
    # gradients become views of two long vectors: updates take a fifth less time.
    fixed = {"eps": 1e-5, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0, "amsgrad": False, "maximize": False}
    params = nn.utils.parameters_to_vector(agent.parameters()).detach()
    nn.utils.vector_to_parameters(params, agent.parameters())
    params.grad, exp_avg, exp_avg_sq = torch.zeros((3, len(params)), device=device)
    adam_steps, grads = torch.tensor(0.0), params.grad.split([p.numel() for p in agent.parameters()])
    for p, grad in zip(agent.parameters(), grads, strict=True):
        p.grad = grad.view_as(p)
    if dist.is_initialized():
        dist.broadcast(params, 0)  # all processes start from the same parameters
    # obs[t + 1], dones[t + 1] follow from actions[t]: (num_steps + 1, num_envs, ...); the rest: (num_steps, num_envs)
    obs, dones = np.zeros((T + 1, *envs.observation_space.shape), np.float32), np.zeros((T + 1, N), np.float32)
    logprobs, rewards = np.zeros((2, T, N), np.float32)
    actions = np.zeros((T, N), np.int64)
    if saved:
        agent.load_state_dict(saved["agent"])
        exp_avg[:], exp_avg_sq[:], adam_steps[...] = saved["adam"]
    if saved and (thawed := thaw(saved["processes"][rank])):
        envs, obs[-1], dones[-1] = thawed
    else:
        obs[-1], _ = envs.reset(seed=seed + global_step)  # + ...: a resumed run plays new ones
    start_step, start_time, logged_videos = global_step, time.perf_counter(), set()
    hidden = rank > 0 or None  # None: unless standard error is a terminal
    bar = tqdm(total=args.num_updates * args.batch_size, initial=global_step, unit="step", disable=hidden)
    try:
        for update in range(last_update + 1, args.num_updates + 1):
            # Detail 4: large steps while there is much to learn, ever smaller ones to settle on what was found: linear
            # from learning_rate in the first update to learning_rate / num_updates in the last. ([PPO] table 5)
            learning_rate = args.learning_rate * (1 - (update - 1) / args.num_updates if args.anneal_lr else 1)

            # Rollout
            obs[0], dones[0] = obs[-1], dones[-1]  # start where the last rollout stopped, the first one at the reset
            for step in range(args.num_steps):
                global_step += args.num_envs
                with torch.inference_mode():
                    action, logprob = agent.get_action(torch.as_tensor(obs[step], device=device))
                actions[step], logprobs[step] = action.numpy(), logprob.numpy()
                try:
                    obs[step + 1], rewards[step], terminations, truncations, infos = envs.step(actions[step])
                except Exception as error:
                    fail(f"{args.env_id}{broken_workers(envs, error)} broke in global_step {global_step}: {error!r}", 1)
                dones[step + 1] = terminations | truncations

                # By default a time limit ends an episode as a termination does: nothing follows. In truth it would have
                # gone on: --bootstrap-truncation adds the lost gamma * V(final observation) to the reward. ([Pardo])
                cut = np.flatnonzero(truncations & ~terminations)
                if args.bootstrap_truncation and len(cut):
                    final_obs = obs[step + 1][cut] if next_step else np.stack(infos["final_obs"][cut])
                    final_obs = torch.as_tensor(final_obs, dtype=torch.float32, device=device)
                    rewards[step, cut] += args.gamma * agent.get_value(final_obs).numpy(force=True)
                if "episode" in infos:
                    finished = infos["_episode"]  # a mask: (num_envs,); below, one entry for each finished episode
                    episode_returns, lengths = infos["episode"]["r"][finished], infos["episode"]["l"][finished]
                    for r, length in zip(episode_returns, lengths, strict=True):
                        bar.write(f"global_step={global_step}, episodic_return={r}, episodic_length={length}")
                    # Episodes that end in the same step share one point, their mean.
                    writer.add_scalar("charts/episodic_return", episode_returns.mean(), global_step)
                    writer.add_scalar("charts/episodic_length", lengths.mean(), global_step)

            # Advantages. Values were not needed to act: one call gives all of them, (num_steps + 1, num_envs).
            values = agent.get_value(torch.as_tensor(obs, device=device)).numpy(force=True)
            advantages, returns = compute_advantages(rewards, values, dones, args.gamma, args.gae_lambda, args.gae)
            # The batch: time and environments become one dimension. (batch_size, obs_dim), then (batch_size,) each
            batch = (obs[:-1], actions, logprobs, advantages, returns, values[:-1])
            batch = [torch.as_tensor(x.reshape(T * N, *x.shape[2:]), device=device) for x in batch]
            # Update
            b_inds, clipfracs = np.arange(T * N), []
            if (
                next_step
            ):  # steps that only reset teach nothing; some others repeat, if too few are left to fill minibatches
                b_inds = np.flatnonzero(dones[:-1] == 0)
                b_inds = np.resize(b_inds, max(len(b_inds), 2 * args.num_minibatches))
            for _ in range(args.update_epochs):
                # Detail 6: every epoch deals the batch into new random minibatches (mb_): many noisy steps learn faster
                # than one on the whole batch, and each sample is used once per epoch. ([PPO] Algorithm 1; baselines)
                np.random.shuffle(b_inds)
                minibatches = zip(*(x[b_inds].tensor_split(args.num_minibatches) for x in batch), strict=True)
                for mb_obs, mb_actions, *mb_rest in minibatches:  # mb_rest: in the order of ppo_loss
                    _, newlogprob, entropy, newvalue = agent.get_action_and_value(mb_obs, mb_actions)
                    loss, stats = ppo_loss(newlogprob, entropy, newvalue, *mb_rest, args)
                    clipfracs.append(stats["clipfrac"].item())
                    params.grad.zero_()
                    loss.backward()
                    mean_over_ranks(params.grad)
                    # Detail 11: if the gradient of all parameters, actor's and critic's together, is longer than this,
                    # it is shortened to it: one odd minibatch cannot wreck the policy. (baselines; arXiv:1211.5063)
                    grad_norm = nn.utils.get_total_norm(grads)
                    params.grad *= torch.clamp(args.max_grad_norm / (grad_norm + 1e-6), max=1.0)
                    adam([params], [params.grad], [exp_avg], [exp_avg_sq], [], [adam_steps], lr=learning_rate, **fixed)
                # Bonus: clipping does not bound how far many steps lead. If the last minibatch's KL is over target_kl,
                # these data are too old for another epoch. (OpenAI Spinning Up, at every step; [Huang] as here)
                if args.target_kl is not None and mean_over_ranks(stats["approx_kl"]) > args.target_kl:
                    break
            if not all(x.isfinite().all() for x in (loss, grad_norm, params)):
                fail(f"update {update} (step {global_step}) diverged: lower --learning-rate, or look at the rewards", 1)
            if dist.is_initialized() and len(set(gather_from_ranks(params.cpu().numpy().tobytes()))) > 1:
                fail(f"update {update}: the parameters of the processes differ", 1)
            # Logging: stats are those of the last minibatch, except for clipfrac, the mean of all. Explained variance
            # is 1 for a critic right up to a constant, 0 for one no better than a constant, below 0 for a worse one.
            stats["clipfrac"] = np.mean(clipfracs)
            b_returns, b_values = returns.flat[b_inds], values.flat[b_inds]
            stats["explained_variance"] = 1 - (b_returns - b_values).var() / (b_returns.var() + 1e-8)
            sps = int((global_step - start_step) / (time.perf_counter() - start_time))
            scalars = {f"losses/{name}": value for name, value in stats.items()}
            for name, value in {"charts/SPS": sps, "charts/learning_rate": learning_rate, **scalars}.items():
                writer.add_scalar(name, value, global_step)
            bar.set_postfix(SPS=sps, mean_return=np.mean(envs.return_queue or [np.nan]), refresh=False)
            bar.update(args.batch_size)
            sys.stdout.flush()  # redirected output is complete up to this update
            if args.track and args.capture_video:  # wandb's own monitor_gym breaks with Gymnasium 1.0 and later
                for path in sorted(set(video_folder.glob("*.mp4")) - logged_videos):
                    wandb.log({"video": wandb.Video(str(path), format="mp4"), "global_step": global_step})
                    logged_videos.add(path)
            last = update == args.num_updates or mean_over_ranks(torch.tensor(float(bool(stop_signals)))) > 0
            if args.checkpoint_interval and (last or update % args.checkpoint_interval == 0):
                writer.flush()  # what is in TensorBoard is never behind the checkpoint
                state = {"agent": agent.state_dict(), "adam": (exp_avg, exp_avg_sq, adam_steps), "args": vars(args)}
                state |= {"progress": (update, global_step, wandb_id)}
                state |= {"processes": gather_from_ranks(freeze(envs, obs[-1], dones[-1]))}
                if rank == 0:
                    save_checkpoint(folder, state)
            if last:
                break
    finally:
        failed = sys.exc_info()[0] is not None
        bar.close()
        writer.close()
        with contextlib.suppress(Exception) if failed else contextlib.nullcontext():  # one error is enough
            if failed and mode == "async":  # do not wait for workers that are dead or hang
                envs.unwrapped.step_wait = Mock(side_effect=multiprocessing.TimeoutError)
                envs.close(terminate=True)
            envs.close()  # finishes a video, too
        if args.track:
            wandb.finish(exit_code=int(failed))
    if dist.is_initialized():
        dist.destroy_process_group()
    if stop_signals:
        how = f"to go on: python ppo.py --resume {folder}" if args.checkpoint_interval else "there is no checkpoint"
        print(f"stopped at step {global_step} of {args.total_timesteps}; {how}")
    print(f"results: {folder}" + f" and {video_folder}" * args.capture_video)
    return agent


def broken_workers(envs, error):
    """Which workers of an AsyncVectorEnv raised, died or, if the time is out, have not answered, as text."""
    workers = zip(getattr(envs.unwrapped, "processes", ()), getattr(envs.unwrapped, "parent_pipes", ()), strict=True)
    late = isinstance(error, multiprocessing.TimeoutError)
    time.sleep(1)  # until then a process that has just died may seem alive
    broken = [i for i, (p, pipe) in enumerate(workers) if not pipe or not p.is_alive() or late and not pipe.poll()]
    return f", sub-environment {broken}," * bool(broken)


def mean_over_ranks(x):
    """Average the tensor, in place, over the processes of torchrun."""
    if dist.is_initialized():
        dist.all_reduce(x.div_(dist.get_world_size()))
    return x


def gather_from_ranks(x):
    """The x of each process of torchrun."""
    xs = [x]
    if dist.is_initialized():
        dist.all_gather_object(xs := xs * dist.get_world_size(), x)
    return xs


def freeze(*environments):
    """What this process needs to go on to the bit: its random number generators, and the environments, pickled."""
    try:
        frozen = cloudpickle.dumps(environments)  # pickle alone refuses the functions in some wrappers
    except Exception:  # simulators written in C, windows and other processes cannot be pickled
        frozen = b""
    # Gymnasium's EzPickle only seems to work: it saves how an environment was made, not where it stands.
    frozen = torch.tensor(np.frombuffer(b"" if b"_ezpickle_args" in frozen else frozen, np.uint8))
    name, keys, *rest = np.random.get_state()
    generators = {"random": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    return generators | {"envs": frozen}


def thaw(frozen):
    """Set the generators as ``freeze`` found them and return its environments, or None where it could not save them."""
    random.setstate(frozen["random"])
    np.random.set_state(frozen["numpy"])
    torch.set_rng_state(frozen["torch"])
    try:
        return pickle.loads(frozen["envs"].numpy().tobytes())  # this could run a stranger's code: see README
    except Exception:
        print("note: these environments could not be saved or restored, so new episodes start")


def save_checkpoint(folder, checkpoint):
    """Write it to folder/checkpoint.pt, whole or not at all. Exit code 1: it cannot be written."""
    torch.save(checkpoint, buffer := io.BytesIO())
    try:
        with open(folder / "checkpoint.tmp", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file)  # down to the disk, before it takes the place of the last one
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
    except OSError as error:
        fail(f"cannot save {folder}/checkpoint.pt (one saved before is still whole): {error}", 1)


def load_checkpoint(folder):
    """Read what save_checkpoint wrote, without running code that a stranger may have put there. Exit code 2: cannot."""
    try:
        checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        _, (_, _, _) = checkpoint["args"]["env_id"], checkpoint["progress"]
        return {key: checkpoint[key] for key in "args agent adam progress processes".split()}
    except Exception as error:  # a file can be wrong in many ways
        damaged = f"{folder}/checkpoint.pt is not a whole checkpoint of ppo.py: {type(error).__name__}"
        fail(error if getattr(error, "filename", None) else damaged)


def main(argv=None):
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it was closed
    args, stop_signals = parse_args(argv), []

    def stop(number, frame):  # after this update; a second signal finds the default handlers and stops at once
        stop_signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    # TensorBoard writes in a thread: what goes wrong there add_scalar raises, too, so it need not be printed twice.
    threading.excepthook = lambda hook: isinstance(hook.exc_value, OSError) or threading.__excepthook__(hook)
    try:
        train(args, stop_signals)
    except (OSError, MemoryError, UnicodeError) as error:  # such as a full disk, or a batch of a billion steps
        fail(str(error) or repr(error), 2 if isinstance(error, UnicodeError) else 1)
    if stop_signals:
        sys.exit(128 + stop_signals[0])  # the exit code that shells give to a death by this signal


if __name__ == "__main__":
    main()
