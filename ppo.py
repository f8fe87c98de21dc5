"""Proximal Policy Optimization (PPO) in one file, to be read from top to bottom.

    python ppo.py --env-id CartPole-v1
    python ppo.py --env-id Acrobot-v1 --total-timesteps 500000 --track
    tensorboard --logdir runs

An agent plays, and learns from the outcome. Its actor is the policy pi(a|s), which
gives the probability of action a in state s. Its critic is the value function V(s),
which estimates the discounted return from s onward: the sum of the rewards to come,
each multiplied by gamma for every step of delay. The advantage A says how much better
an action turned out than V(s).

The policy gradient is the mean of A * grad log pi(a|s) over the steps played. Following
it makes good actions more likely and bad ones less likely, and so the return grows
(Williams 1992; Sutton et al. 2000). But it holds only for data from the current policy.
After one gradient step the data are, strictly speaking, out of date.

Playing is costly, so PPO uses its data several times. It repeats two phases. In the
rollout, the current policy plays num_steps steps in each of num_envs environments. In
the update, the agent learns from these steps. The loss takes into account how much more
likely each action has become since it was played, and it is clipped, so that nothing is
gained by moving far away from the policy that played. Then the steps are thrown away,
and the updated policy plays new ones.

Part one of this file is the algorithm, for actions that are numbered. First come the
flags, which you may skip at first, the environments and the agent. Then train() tells
the whole story, and the three functions below it are its parts. Any other function or
class that is not imported is in part two, which is the run: the types of flags, worker
processes, signals, torchrun, logs and checkpoints. You may stop before it.

Eleven implementation details belong to PPO as most people use it. Some of them are the
algorithm (1, 5, 6, 8, 10), and the others are choices of its original code. There are
two more: 12 shows what happens, and 13 keeps it simple. Each is explained where it
happens, with its source. Search for "Detail 5:", for example.

    1. vectorized environments            8. clipped policy objective
    2. orthogonal initialization          9. clipped value loss
    3. Adam's epsilon                    10. overall loss with an entropy bonus
    4. learning rate annealing           11. global gradient clipping
    5. generalized advantage estimation  12. debug variables
    6. minibatches                       13. separate networks
    7. advantage normalization           Bonus: early stopping

Sources, by the names that the comments use:

    [PPO]        Schulman et al. 2017, arXiv:1707.06347
    [GAE]        Schulman et al. 2016, arXiv:1506.02438
    [A3C]        Mnih et al. 2016, arXiv:1602.01783
    [baselines]  the code of PPO's authors, github.com/openai/baselines, folder ppo2
    [Huang]      Huang et al. 2022, The 37 Implementation Details of PPO
    [Study]      Andrychowicz et al. 2020, What Matters In On-Policy Reinforcement
                 Learning?, arXiv:2006.05990
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

import argparse
import collections
import contextlib
import errno
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

PROGRAM = Path(globals().get("__file__", "ppo.py"))  # a notebook has no __file__

# Part one: the algorithm


def parse_args(argv=None, add_flags=None, **defaults):
    """Read the flags. Programs that import this one may override the ``defaults``.

    ``add_flags``, a function that is given the parser, may add more of them.
    Values that follow from the flags are added, such as batch_size = num_envs *
    num_steps and num_updates = total_timesteps // batch_size. Raises RunEnded if a flag
    is wrong.
    """
    parser = ArgumentParser()

    add = parser.add_argument_group("the rollout").add_argument
    add(
        "--env-id",
        "--gym-id",
        default="CartPole-v1",
        help="Gymnasium id, module:Id, or module:name of a class or function",
    )
    add("--env-kwargs", type=json_object, default={}, help="its arguments, as JSON")
    add(
        "--total-timesteps",
        type=positive_int,
        default=25000,
        help="steps of all environments together",
    )
    add("--num-envs", type=positive_int, default=4, help="number of environments")
    add("--num-steps", type=positive_int, default=128, help="steps per environment")
    add("--gamma", type=fraction, default=0.99, help="discount per step")
    add("--gae-lambda", type=fraction, default=0.95, help="of Detail 5, from 0 to 1")
    add("--gae", action=Switch, default=True, help="--no-gae is --gae-lambda 1")
    add(
        "--bootstrap-truncation",
        action=Switch,
        default=False,
        help="after a time limit, count the value of what would have followed",
    )

    add = parser.add_argument_group("the update").add_argument
    add("--learning-rate", type=amount, default=2.5e-4, help="step size of Adam")
    add("--anneal-lr", action=Switch, default=True, help="lower it linearly towards 0")
    add("--update-epochs", type=positive_int, default=4, help="passes over each batch")
    add("--num-minibatches", type=positive_int, default=4, help="parts of each batch")
    add("--norm-adv", action=Switch, default=True, help="normalize advantages")
    add("--clip-coef", type=amount, default=0.2, help="epsilon of the clipped losses")
    add("--clip-vloss", action=Switch, default=True, help="clip the value loss, too")
    add("--ent-coef", type=amount, default=0.01, help="weight of the entropy bonus")
    add("--vf-coef", type=amount, default=0.5, help="weight of the value loss")
    add("--max-grad-norm", type=amount, default=0.5, help="limit of the gradient norm")
    add("--target-kl", type=optional(amount), default=None, help="KL to stop early at")

    add = parser.add_argument_group("the run").add_argument
    add("--exp-name", default=PROGRAM.stem, help="name of the experiment")
    add("--seed", type=whole_number, default=1, help="seed of all random numbers")
    add("--torch-deterministic", action=Switch, default=True, help="where torch can")
    add("--cuda", action=Switch, default=True, help="use a GPU if there is one")
    add("--num-threads", type=positive_int, default=1, help="threads of torch on a CPU")
    add(
        "--vectorization-mode",
        choices=["sync", "async", "vector_entry_point"],
        default="sync",
        help="one after another, in processes, or by the environment's own batch",
    )
    add("--track", action=Switch, default=False, help="log to Weights & Biases, too")
    add("--wandb-project-name", default="cleanrl", help="project in Weights & Biases")
    add("--wandb-entity", type=optional(str), default=None, help="user or team there")
    add("--capture-video", action=Switch, default=False, help="record to videos/")
    add("--checkpoint-interval", type=amount, default=60, help="seconds, or 0 for none")
    add(
        "--resume",
        nargs="?",
        const="newest",
        help="folder of a run to go on with, or none for the newest, or auto for the "
        "newest with this env-id, exp-name and seed, if there is one",
    )

    if add_flags:
        add_flags(parser)
    parser.set_defaults(**defaults)
    return finish_parsing(parser, argv)


def make_env(args, render_mode=None):
    """Make one environment, whose observations are flat vectors of numbers."""
    return flatten_observations(make_raw_env(args, render_mode))


def make_envs(args, seed, video=None, render_mode=None):
    """Make the environments of this process, all of them if torchrun is not used.

    ``video`` holds options of RecordVideo if the first environment is to be recorded.
    When an episode has ended, infos[STATISTICS] holds "r", the sum of its rewards, and
    "l", its length. Raises RunEnded if there is no such environment, or if its actions
    or observations do not suit this program.
    """
    # Detail 1: vectorized environments. All environments take a step before the agent
    # chooses the next actions, so one pass through the network serves all of them. The
    # data become more varied, too: consecutive steps of one environment are much alike,
    # and steps of independent environments are not. Whenever an episode ends, the next
    # one begins by itself. ([PPO] algorithm 1; [A3C] had many at once, too.)
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = vectorize(make_env, args, seed, same_step, video, render_mode)
    check_actions(args, envs)
    check_flat(args, envs)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs, stats_key=STATISTICS)


def layer_init(layer, std=2**0.5, bias_const=0.0):
    """Initialize a layer in place, and return it."""
    # Detail 2: orthogonal initialization. A matrix whose columns are orthogonal and of
    # length 1 keeps the length of what it multiplies. So at first signals and gradients
    # neither vanish nor explode on their way through the hidden layers (Saxe et al.
    # 2014, arXiv:1312.6120). The gain sqrt(2) makes up for a ReLU, which cuts off half
    # of the squared length (He et al. 2015, arXiv:1502.01852). Keeping it with tanh is
    # a habit. ([baselines])
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """Two networks, the critic and the actor.

    The critic estimates V(s). The actor gives the policy pi(a|s), as one logit for each
    action.
    """

    # An agent that remembers earlier steps has to learn from whole sequences of steps.
    # This one does not.
    has_memory = False

    def __init__(self, envs):
        super().__init__()
        obs_dim = envs.single_observation_space.shape[0]
        num_actions = envs.single_action_space.n

        # Detail 13: separate networks. Actor and critic share no layers, so neither can
        # spoil what the other has learned. Where inputs are pictures, sharing saves so
        # much work that people do it. ([PPO] section 6.1; [Huang] found it better.)
        #
        # The last layer of the critic has gain 1, as no activation follows it.
        # ([baselines])
        self.critic = nn.Sequential(
            layer_init(nn.Linear(obs_dim, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 1), std=1.0),
        )

        # The last layer of the actor has gain 0.01. All logits begin near 0, so all
        # actions are about equally likely, and none is favored by chance. ([baselines];
        # [Study] found that it helps a lot.)
        self.actor = nn.Sequential(
            layer_init(nn.Linear(obs_dim, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, 64)),
            nn.Tanh(),
            layer_init(nn.Linear(64, num_actions), std=0.01),
        )

    def get_value(self, obs):
        """obs: (batch, obs_dim). Returns V(s): (batch,)."""
        return self.critic(obs.float()).squeeze(-1)

    def get_policy(self, obs):
        """obs: (batch, obs_dim). Returns the distribution pi(.|s)."""
        logits = self.actor(obs.float())
        return Categorical(logits=logits, validate_args=False)  # checks cost time

    def get_action(self, obs, deterministic=False):
        """Draw actions, for the rollout, or take the likeliest ones.

        obs: (batch, obs_dim). Returns the actions and log pi(a|s): (batch,) each.
        """
        policy = self.get_policy(obs)
        action = policy.mode if deterministic else policy.sample()
        return action, policy.log_prob(action)

    def evaluate_actions(self, obs, action):
        """Score actions that were taken, for the update.

        obs: (batch, obs_dim), action: (batch,). Returns log pi(a|s), the entropy of
        pi(.|s) in nats, and V(s): (batch,) each.
        """
        policy = self.get_policy(obs)
        return policy.log_prob(action), policy.entropy(), self.get_value(obs)


def train(args, make_envs=make_envs, Agent=Agent):
    """Train an agent as the flags say, and return it.

    Finished episodes are printed. Curves and checkpoints go to runs/<run name>. Raises
    RunEnded if the run cannot begin, if it diverges, or if a signal stops it. Errors of
    an environment are not caught.
    """
    device = set_up(args)
    checkpoint = checkpoint_to_resume(args, Agent)
    run_folder, video_folder = choose_folders(args)

    # The next four are in part two. They notice signals that ask the run to stop, open
    # the environments and close them at the end, connect the processes of torchrun if
    # there are several, and write the logs.
    with (
        StopSignals() as stop,
        open_envs(args, make_envs, video_folder, checkpoint) as (envs, restored_step),
        process_group(args, device),
        Logger(args, envs, run_folder, video_folder, checkpoint) as log,
    ):
        agent = Agent(envs).to(device)

        # Detail 3: Adam's epsilon. A step of Adam is lr * m / (sqrt(v) + eps), where m
        # and v are running means of a parameter's gradient and of its square. So eps
        # makes steps smaller where gradients are tiny, around eps or below. PyTorch's
        # default is 1e-8. [baselines] has 1e-5 and gives no reason; our guess is that
        # gradients so tiny are mostly noise.
        optimizer = torch.optim.Adam(
            agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True
        )

        # This resets the environments, or restores what the checkpoint of a resumed run
        # holds. (If you add a state of your own, make it a buffer of the agent, and it
        # is saved and restored, too.)
        next_obs, next_done = restore_or_reset(
            args, envs, agent, optimizer, checkpoint, restored_step
        )
        global_step = args.first_step  # 0, unless the run is resumed
        checkpoints = Checkpoints(args, run_folder)
        stop_signal = 0

        # The data of a rollout of T steps in N environments. The extra row T is for the
        # observation that the last step leads to:
        #
        #     obs[0]  actions[0]  obs[1]  ...  obs[T-1]  actions[T-1]  obs[T]
        #     dones[0]            dones[1]     dones[T-1]              dones[T]
        #     values[0]           values[1]    values[T-1]             values[T]
        #             logprobs[0]                        logprobs[T-1]
        #             rewards[0]                         rewards[T-1]
        #
        # dones[t] is 1 if the step that led to obs[t] ended an episode. Then obs[t] is
        # already the first observation of the next one. values are computed afterwards.
        T = args.num_steps
        N = args.local_num_envs  # of this process: all of them, without torchrun
        obs_shape = envs.single_observation_space.shape
        obs_dtype = type_of_observations(envs, next_obs)
        action_shape = envs.single_action_space.shape

        obs = torch.zeros((T + 1, N, *obs_shape), dtype=obs_dtype, device=device)
        dones = torch.zeros((T + 1, N), device=device)
        actions = torch.zeros((T, N, *action_shape), device=device)
        logprobs = torch.zeros((T, N), device=device)
        rewards = torch.zeros((T, N), device=device)

        first_iteration = global_step // args.batch_size + 1
        for iteration in range(first_iteration, args.num_updates + 1):
            # Detail 4: learning rate annealing. Large steps come first, for fast
            # progress. The rate falls linearly towards 0, so that in the end the policy
            # settles. ([PPO] table 5)
            # For another schedule, change frac. (A number of NumPy's in the optimizer
            # would make checkpoints unreadable, hence float.)
            if args.anneal_lr:
                frac = 1 - (iteration - 1) / args.num_updates
                optimizer.param_groups[0]["lr"] = float(frac * args.learning_rate)

            # The rollout. The environments reuse the array next_obs; obs keeps a copy.
            for step in range(T):
                global_step += args.num_envs
                check_observations(args, envs, next_obs)
                obs[step] = torch.as_tensor(next_obs)
                dones[step] = torch.as_tensor(next_done)

                with torch.no_grad():
                    action, logprob = agent.get_action(obs[step])
                actions[step] = action
                logprobs[step] = logprob  # for the ratio in Detail 8

                # A termination is a real end: the pole fell. A truncation is a time
                # limit: the pole still stood.
                next_obs, reward, terminations, truncations, infos = envs.step(
                    action.cpu().numpy().astype(envs.single_action_space.dtype)
                )
                next_done = terminations | truncations
                rewards[step] = torch.as_tensor(reward)
                if args.bootstrap_truncation:  # off by default, as in [baselines]
                    cut_off = truncations & ~terminations
                    last_value = value_cut_off(agent, envs, next_obs, cut_off, infos)
                    rewards[step] += args.gamma * last_value
                log.episodes(infos, global_step)

            check_observations(args, envs, next_obs)
            obs[T] = torch.as_tensor(next_obs)
            dones[T] = torch.as_tensor(next_done)

            # Choosing actions needs no critic, so the critic rates the whole rollout
            # afterwards, in one call. V of obs[T] stands for all that comes after it.
            with torch.no_grad():
                values = agent.get_value(obs.flatten(0, 1)).view(T + 1, N)
            gae_lambda = args.gae_lambda if args.gae else 1.0
            advantages, returns = compute_advantages(
                rewards, values, dones, args.gamma, gae_lambda
            )

            # Learn from all steps. (Some batched environments reset one step later.
            # Then obs[t] is still the last observation of the old episode where
            # dones[t] is 1, and step t only resets, so there is nothing to learn from
            # it.)
            b_inds = np.arange(T * N)
            if agent.has_memory:
                b_inds = b_inds.reshape(T, N)  # a column for each environment
            if not resets_in_same_step(envs):
                b_inds = b_inds[dones[:T].flatten().cpu().numpy() == 0]

            # The batch (b_): time and environments become one dimension of T * N steps.
            stats = update(
                args,
                agent,
                optimizer,
                b_inds=b_inds,
                b_obs=obs[:T].flatten(0, 1),
                b_actions=actions.flatten(0, 1),
                b_logprobs=logprobs.flatten(0, 1),
                b_advantages=advantages.flatten(0, 1),
                b_returns=returns.flatten(0, 1),
                b_values=values[:T].flatten(0, 1),
            )
            check_for_divergence(args, global_step, rewards, stats, agent)
            log.update(optimizer, stats)

            # Save now and then, at the end, and before a stop.
            stop_signal = max_over_processes(stop.received)
            is_last = iteration == args.num_updates or stop_signal > 0 or log.failed()
            if checkpoints.due(is_last):
                checkpoints.save(
                    agent=agent,
                    optimizer=optimizer,
                    global_step=global_step,
                    environments=(envs, next_obs, next_done),
                    wandb_id=log.wandb_id,
                )
            log.end_if_failed()
            if stop_signal:
                log.say_stopped()
                break

    if stop_signal:
        raise RunEnded(f"stopped by signal {stop_signal}", exit_code=128 + stop_signal)
    return agent


def value_cut_off(agent, envs, next_obs, cut_off, infos):
    """V of the last observation where a time limit cut an episode off, elsewhere 0.

    cut_off: a mask of shape (num_envs,). The result has the same shape.
    """
    # An episode that a time limit cuts off would have gone on and brought more reward.
    # By default it still counts as ended, as in [baselines]. --bootstrap-truncation
    # adds gamma * V(last observation), the part that was cut off, to the last reward.
    # That is enough, because compute_advantages() ignores everything that comes after
    # an end. (Pardo et al. 2018, arXiv:1712.00378)
    device = next(agent.parameters()).device
    values = torch.zeros(len(cut_off), device=device)
    if cut_off.any():
        if resets_in_same_step(envs):
            last_obs = final_observations(envs, infos, cut_off)
        else:
            last_obs = next_obs[cut_off]
        with torch.no_grad():
            last_values = agent.get_value(torch.as_tensor(last_obs, device=device))
        values[torch.as_tensor(cut_off)] = last_values
    return values


def compute_advantages(rewards, values, dones, gamma, gae_lambda):
    """Compute advantages and returns.

    rewards: (num_steps, num_envs). values and dones: (num_steps + 1, num_envs), where
    the last row belongs to the observation after the rollout. Returns the advantages
    and the returns, which are the critic's targets: (num_steps, num_envs) each.
    """
    # Detail 5: generalized advantage estimation. After step t, r_t + gamma * V(s_{t+1})
    # is a better estimate of the return than V(s_t) was before it. Their difference,
    # delta_t, is a first estimate of the advantage. GAE adds the deltas of all later
    # steps, with shrinking weights:
    #
    #     delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
    #     A_t = delta_t + (gamma * lambda) * delta_{t+1} + (gamma * lambda)^2 * ...
    #
    # With lambda = 0, only delta_t counts. One step has little randomness (low
    # variance), but the error in V(s_{t+1}) counts almost in full (bias). With
    # lambda = 1, the values in between cancel. Three steps show it, with g for gamma:
    #
    #     A_0 =       (r_0 + g * V_1 - V_0)
    #           + g * (r_1 + g * V_2 - V_1)
    #         + g^2 * (r_2 + g * V_3 - V_2)
    #         = r_0 + g * r_1 + g^2 * r_2 + g^3 * V_3 - V_0
    #
    # Now all the randomness of the rewards counts, but the only error of the critic
    # that is left is the one in V_3, at the end of the rollout. The further step t is
    # from that end, the less it weighs. Values of lambda in between mix both. ([GAE]
    # equations 16 to 18)
    #
    # V_0 brings no bias. It is the same for all actions, so on average it does not
    # change the policy gradient, and only makes it less noisy.
    #
    # The sum stops at the end of an episode, where V counts as 0, because what follows
    # belongs to another episode. It also stops at the end of the rollout, but there V
    # stands for all that is still to come.
    continues = 1.0 - dones[1:]  # 0 where the step ended an episode
    deltas = rewards + gamma * values[1:] * continues - values[:-1]

    # A_t is delta_t + gamma * lambda * A_{t+1}, so the loop runs backward.
    advantages = torch.zeros_like(rewards)
    advantage = 0.0  # of the step after t, then of step t
    for t in reversed(range(len(rewards))):
        advantage = deltas[t] + gamma * gae_lambda * continues[t] * advantage
        advantages[t] = advantage

    # The critic's target is its old value plus the advantage. This sum is known as the
    # lambda-return. ([baselines])
    returns = advantages + values[:-1]
    return advantages, returns


def update(
    args,
    agent,
    optimizer,
    b_inds,
    b_obs,
    b_actions,
    b_logprobs,
    b_advantages,
    b_returns,
    b_values,
):
    """Let the agent learn from one batch.

    b_inds: indices of the samples to learn from, a numpy array that is shuffled in
    place. If its shape is (num_steps, num_envs), whole columns are shuffled and dealt
    into the minibatches. The others: (batch_size, ...), as they were after the rollout.
    Returns numbers to log, {name: number}; they are of the last minibatch, unless
    noted.
    """
    clipfracs = []
    for _ in range(args.update_epochs):
        # Detail 6: minibatches. In each epoch the batch is dealt into new random
        # minibatches (mb_), and each makes one gradient step. Many noisy steps get
        # further than one that is less noisy. ([PPO] algorithm 1)
        np.random.shuffle(b_inds.T)  # .T matters only for an agent with a memory
        minibatches = torch.as_tensor(b_inds, device=b_obs.device)
        for mb_inds in minibatches.tensor_split(args.num_minibatches, dim=-1):
            newlogprob, entropy, newvalue = agent.evaluate_actions(
                b_obs[mb_inds], b_actions[mb_inds]
            )

            # Detail 7: advantage normalization. The mean becomes 0 and the standard
            # deviation 1, so the policy gradient has about the same size whatever the
            # scale of the rewards. That keeps its balance with the entropy bonus below,
            # whose size is fixed. Subtracting the mean hardly changes the policy
            # gradient on average, as with V_0 in Detail 5. Doing it per minibatch is
            # just a habit. ([baselines])
            mb_advantages = b_advantages[mb_inds]
            if args.norm_adv:
                mean = mb_advantages.mean()
                std = mb_advantages.std()
                mb_advantages = (mb_advantages - mean) / (std + 1e-8)

            # Detail 8: clipped policy objective. The ratio pi_new(a|s) / pi_old(a|s) is
            # 1 until the policy changes. The old policy drew the actions, so an action
            # that is now twice as likely has to count twice. (This is known as
            # importance sampling.)
            logratio = newlogprob - b_logprobs[mb_inds]
            ratio = logratio.exp()

            # pg_loss1 falls when good actions become more likely and bad ones less.
            # Where the ratio is 1, its gradient is -A * grad log pi(a|s): the policy
            # gradient, negated because a loss is minimized.
            #
            # But the advantages were measured under the old policy. The further the new
            # one moves away, the more they mislead. If an update ruins the policy, the
            # ruined policy collects the next batch, and may not recover. So pg_loss2 is
            # constant where the ratio has left 1 +- clip_coef, and the larger one of
            # the two counts. If clip_coef is 0.2, the gradient does this:
            #
            #     A > 0, ratio up to 1.2:  makes the action more likely
            #     A > 0, ratio above 1.2:  nothing (it is likely enough)
            #     A < 0, ratio above 0.8:  makes the action less likely
            #     A < 0, ratio below 0.8:  nothing (it is unlikely enough)
            #
            # The larger loss is the pessimistic choice: clipping may take away a gain,
            # but it never hides a loss. Let A be 2 and the ratio 0.5, as a good action
            # has become less likely. The losses are -1 and -1.6. The unclipped one, -1,
            # is larger, and its gradient pulls the action back up. ([PPO] equation 7;
            # the paper maximizes a min, and here a max is minimized.)
            pg_loss1 = -mb_advantages * ratio
            pg_loss2 = -mb_advantages * torch.clamp(
                ratio, 1 - args.clip_coef, 1 + args.clip_coef
            )
            pg_loss = torch.max(pg_loss1, pg_loss2).mean()

            # Detail 9: clipped value loss. It is meant to do the same for the critic:
            # moving a value further than clip_coef away from the old one gains nothing,
            # and the larger loss counts. The range is in units of return. It is
            # generous if returns are around 1. It is tight for CartPole's discounted
            # returns, which go up to 1 / (1 - gamma) = 100.
            #
            # It is on because [baselines] has it; [PPO] does not. One later study found
            # no benefit in it (Engstrom et al. 2020, arXiv:2005.12729), and another
            # found harm ([Study]). --no-clip-vloss switches it off.
            mb_returns = b_returns[mb_inds]
            v_loss = (newvalue - mb_returns) ** 2
            if args.clip_vloss:
                mb_values = b_values[mb_inds]
                v_clipped = mb_values + torch.clamp(
                    newvalue - mb_values, -args.clip_coef, args.clip_coef
                )
                v_loss_clipped = (v_clipped - mb_returns) ** 2
                v_loss = torch.max(v_loss, v_loss_clipped)
            v_loss = 0.5 * v_loss.mean()  # as in [baselines], and vf_coef comes on top

            # Detail 10: overall loss with an entropy bonus. Entropy is highest where
            # all actions are equally likely, so the bonus keeps the policy from
            # settling on one too early. ([A3C]; [PPO] equation 9)
            #
            # vf_coef, c1 in that equation, weighs the critic against the actor. It
            # matters most where they share layers. Here they do not, and a constant
            # factor is in both m and sqrt(v) of Detail 3, so Adam nearly cancels it.
            # What remains is small: if the critic's gradient is large, Detail 11
            # shrinks the actor's along with it.
            mean_entropy = entropy.mean()
            loss = pg_loss - args.ent_coef * mean_entropy + args.vf_coef * v_loss

            # Detail 12: debug variables. They carry no gradient; what is to have one
            # belongs above. ([baselines])
            with torch.no_grad():
                # KL(pi_old || pi_new) tells how far the policy has moved, before the
                # step on this minibatch. It is the mean of -log ratio under the old
                # policy, and old_approx_kl is just that over the samples. It is noisy,
                # and may come out negative. approx_kl adds ratio - 1, whose mean is 0,
                # as all probabilities of the new policy add up to 1. It varies less,
                # and no sample of it is negative. (Schulman 2020,
                # joschu.net/blog/kl-approx.html)
                old_approx_kl = (-logratio).mean()
                approx_kl = ((ratio - 1) - logratio).mean()

                # clipfrac is the share of samples beyond the clip range. ([baselines])
                # A rule of thumb from our runs: if approx_kl and clipfrac are near 0
                # early in a run, the policy hardly moves. If approx_kl is above 0.02,
                # or clipfrac above 0.2, it moves too fast.
                clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                clipfracs.append(clipfrac)

            optimizer.zero_grad()
            loss.backward()
            average_gradients(agent)  # over the processes of torchrun, if there are any

            # Detail 11: global gradient clipping. The gradients of all parameters count
            # as one long vector. If it is longer than max_grad_norm, it is shortened
            # and keeps its direction. Without this limit, an outlier would cause a step
            # that is too large, and linger in Adam's running means. ([baselines]; the
            # idea is from Pascanu et al. 2013, arXiv:1211.5063)
            #
            # In the default run on CartPole, we found 98 percent of the gradients
            # longer than 0.5, because of the critic. There it works less as a guard
            # against outliers than as a normalization: nearly all gradients get length
            # 0.5.
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()

        # Bonus: early stopping. Clipping only takes away the gradient of some samples
        # beyond the range. The others still move the policy, as do the entropy bonus
        # and Adam's running means. If approx_kl of an epoch's last minibatch is above
        # target_kl, the data are too old for another epoch. 0.015 is a common choice.
        # ([Huang]; the idea is from OpenAI's Spinning Up.)
        if args.target_kl is not None:
            if mean_over_processes(approx_kl.item()) > args.target_kl:
                break

    # Explained variance: the share of the variance of the batch's returns that the
    # critic had predicted before the update. 1 is perfect, 0 is as good as a constant,
    # and negative is worse. It should rise at first. Later it may fall, where returns
    # are very similar and little is left to predict. ([baselines])
    y_pred = b_values[b_inds]
    y_true = b_returns[b_inds]
    var_y = y_true.var().item()
    explained_var = np.nan
    if var_y > 0:
        explained_var = 1 - (y_true - y_pred).var().item() / var_y

    # policy_loss is no measure of progress. In each update the ratio starts at 1 and
    # normalized advantages have mean 0, so it starts at 0, however good the policy is.
    # The number logged only shows how far this update has moved from there.
    stats = {
        "value_loss": v_loss.item(),
        "policy_loss": pg_loss.item(),
        "entropy": mean_entropy.item(),
        "old_approx_kl": old_approx_kl.item(),
        "approx_kl": approx_kl.item(),
        "clipfrac": torch.stack(clipfracs).mean().item(),  # of all minibatches
        "explained_variance": explained_var,
    }
    return {name: mean_over_processes(number) for name, number in stats.items()}


# Part two: the run
#
# Each section can be read on its own, and train() and main() put them together:
# settings, environments, stop signals, processes, the logger, and checkpoints.


class RunEnded(Exception):
    """A run ended, or could not begin, for a reason that is no bug.

    The exit code is main's: 2 if the input was wrong, 1 if the run broke, and 128 + n,
    as is usual in shells, if signal n stopped it.
    """

    def __init__(self, message, exit_code=2):
        super().__init__(" ".join(str(message).split()))
        # Gymnasium makes a new one from one that comes out of a worker process.
        self.exit_code = getattr(message, "exit_code", exit_code)


def note(text):
    """Print a remark, in the first process only."""
    if number_from_torchrun("RANK", 0) == 0:
        print(f"note: {text}")


NOTED = set()  # what note_once() has printed


def note_once(text):
    """Print a remark, unless this process has printed it before."""
    if text not in NOTED:
        NOTED.add(text)
        note(text)


# Settings


class ArgumentParser(argparse.ArgumentParser):
    """Takes --learning_rate for --learning-rate, too, and raises RunEnded."""

    def __init__(self):
        # Abbreviations would break as soon as another flag begins alike.
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter)

    def parse_args(self, argv):
        return super().parse_args([with_dashes(argument) for argument in argv])

    def error(self, message):
        raise RunEnded(message)


def with_dashes(argument):
    """Turn --learning_rate=0.1 into --learning-rate=0.1."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


class Switch(argparse.BooleanOptionalAction):
    """A flag that is written --gae or --no-gae, and --gae False by some tools."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, **options)
        self.nargs = "?"
        self.metavar = "BOOL"

    def __call__(self, parser, namespace, value, option_string):
        text = str(value).lower()
        if value is not None and text not in ("true", "false"):
            raise argparse.ArgumentError(self, f"expected True or False, got {value}")
        switched_on = text != "false"
        if option_string.startswith("--no-"):
            switched_on = not switched_on
        setattr(namespace, self.dest, switched_on)


def number_between(text, low, high):
    """Return the text as a number, or raise ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:  # which is also false for NaN
        message = f"expected a number between {low} and {high}, got {text}"
        raise argparse.ArgumentTypeError(message)
    return value


def whole_number(text, low=0, high=2**32 - 1):
    """A whole number; by default one that may seed all generators."""
    value = number_between(text, low, high)  # so 1e6 counts, too
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text}")
    return int(value)


def positive_int(text):
    """A whole number that is not 0."""
    return whole_number(text, low=1, high=2**53)


def fraction(text):
    """A number between 0 and 1."""
    return number_between(text, 0, 1)


def amount(text):
    """A number that is not negative."""
    return number_between(text, 0, 1e30)  # float32 overflows at 3e38


def json_object(text):
    """Names and values, such as {"is_slippery": false}."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        message = f'expected JSON such as {{"is_slippery": false}}, got {text}'
        raise argparse.ArgumentTypeError(message)
    return value


def optional(type_of_flag):
    """The same type, but the word None means that there is no value."""

    def none_or_value(text):
        return None if text == "None" else type_of_flag(text)

    return none_or_value


def finish_parsing(parser, argv):
    """Read the flags, check those that depend on each other, and add what follows."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    checkpoint = None
    if args.resume == "auto":
        args.resume = newest_run(
            begin_of_run_name(args),
            env_id=args.env_id,
            exp_name=args.exp_name,
            seed=args.seed,
        )
    elif args.resume is not None:  # an empty name is no new run
        args.resume = find_run(args.resume)
    if args.resume:
        checkpoint = load_checkpoint(args.resume)
        args = parse_args_of_resumed_run(parser, argv, args.resume, checkpoint["args"])
    args.first_step = checkpoint["global_step"] if checkpoint else 0
    add_processes(args, checkpoint)
    add_sizes(args)

    # Environment i of all gets the seed env_seed + i. A resumed run whose environments
    # could not be kept plays new episodes, instead of repeating its first ones.
    args.env_seed = args.seed + args.rank * args.local_num_envs + args.first_step
    return args


# Flags that are no part of the learning, so a resumed run may change them.
MAY_CHANGE = [
    "track",
    "wandb_project_name",
    "wandb_entity",
    "capture_video",
    "checkpoint_interval",
    "cuda",
    "num_threads",
]


def parse_args_of_resumed_run(parser, argv, folder, saved):
    """Read the flags again, with those of the run in this folder as defaults.

    Raises RunEnded if one has changed, unless it is one of MAY_CHANGE, or
    total_timesteps has grown.
    """
    was = vars(parser.parse_args([]))
    for name in was:
        if name in saved:
            was[name] = saved[name]
        else:
            note(f"{name}={was[name]} is new since this run was saved")
    parser.set_defaults(**was)
    args = parser.parse_args(argv)
    args.resume = was["resume"] = folder

    changed = {name: was[name] for name in was if getattr(args, name) != was[name]}
    if "cuda" in changed or "num_threads" in changed:
        note("on another device, or with other threads, numbers may round differently")
    for name in MAY_CHANGE:
        changed.pop(name, None)
    if args.total_timesteps > was["total_timesteps"]:
        changed.pop("total_timesteps")
        if args.anneal_lr:
            note(
                f"annealed over {args.total_timesteps} steps now, the learning rate "
                "goes on higher than it was"
            )
    if changed:
        raise RunEnded(
            f"--resume keeps the flags of its run. total_timesteps may grow, and "
            f"{', '.join(MAY_CHANGE)} may change, but these were different: {changed}"
        )
    return args


def number_from_torchrun(name, default):
    """What torchrun has written into the environment of this process."""
    # Some schedulers set WORLD_SIZE, too, but start each process as a run of its own.
    if torch.distributed.is_torchelastic_launched():
        return int(os.environ[name])
    return default


def add_processes(args, checkpoint):
    """Add what torchrun says: how many processes there are, and which one is ours."""
    args.world_size = number_from_torchrun("WORLD_SIZE", 1)
    args.rank = number_from_torchrun("RANK", 0)
    args.local_num_envs = args.num_envs // args.world_size
    if args.num_envs % args.world_size:
        raise RunEnded(
            f"--num-envs {args.num_envs} cannot be split evenly over the "
            f"{args.world_size} processes of torchrun"
        )
    before = checkpoint["args"]["world_size"] if checkpoint else args.world_size
    if before != args.world_size:
        raise RunEnded(
            f"--resume needs as many processes as its run had, {before}, not "
            f"{args.world_size}"
        )


def add_sizes(args):
    """Add the sizes that follow from the flags. Raises RunEnded if they do not fit."""
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_updates = args.total_timesteps // args.batch_size

    batch = (
        f"a batch of --num-envs {args.num_envs} * --num-steps {args.num_steps} = "
        f"{args.batch_size} steps"
    )
    if args.num_updates < 1:
        raise RunEnded(f"--total-timesteps {args.total_timesteps} is less than {batch}")
    smallest = args.world_size
    if args.norm_adv:
        smallest *= 2  # a single sample has no standard deviation
    if args.batch_size % args.num_minibatches or args.minibatch_size < smallest:
        raise RunEnded(
            f"{batch} cannot be split into --num-minibatches {args.num_minibatches} "
            f"equal parts of {smallest} steps or more"
        )


def check_gymnasium():
    """Raise RunEnded if Gymnasium is too old: other packages may have asked for that.

    Before 1.4 it counts all episodes but the first one step and one reward short.
    """
    major, minor = re.findall(r"\d+", gym.__version__)[:2]
    if (int(major), int(minor)) < (1, 4):
        raise RunEnded(
            f"Gymnasium {gym.__version__} is installed, and 1.4 or later is needed: "
            'pip install "gymnasium>=1.4"'
        )


# Before Gymnasium 1.0, not even the classes below could be defined.
if not hasattr(gym.vector, "VectorWrapper"):
    try:
        check_gymnasium()
    except RunEnded as ended:
        print(f"error: {ended}", file=sys.stderr)
        sys.exit(ended.exit_code)


def set_up(args):
    """Seed all random generators, set up torch, and return the device to use."""
    check_gymnasium()
    seed_generators(args.seed + args.rank)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic CUDA
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.set_num_threads(args.num_threads)
    if args.cuda and torch.cuda.is_available():
        device = torch.device("cuda", number_from_torchrun("LOCAL_RANK", 0))
        torch.cuda.set_device(device)  # its random state belongs into checkpoints
        return device
    return torch.device("cpu")


def seed_generators(seed):
    """Seed the generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_folders(args):
    """Return the folder of the run and the folder of its videos.

    The paths are absolute, as some environments change the working folder.
    """
    now = int(time.time())
    if args.resume:
        run_folder = Path(args.resume)
        name = run_folder.resolve().name
        video_folder = Path("videos", name, f"from-step-{args.first_step}__{now}")
    else:
        name = f"{begin_of_run_name(args)}{now}"
        run_folder = Path("runs", name)
        video_folder = Path("videos", name)
    return run_folder.absolute(), video_folder.absolute()


def begin_of_run_name(args):
    """The name of a run, as far as it follows from the flags."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__"
    return re.sub(r"[/\\:\s]", "-", name)


def shown(path):
    """A path as it is printed: short, if it is in runs/ or videos/ of this folder.

    An environment may have gone to another folder, or have removed this one.
    """
    try:
        short = path.relative_to(Path.cwd())
    except (ValueError, OSError):
        return path
    is_ours = short.is_relative_to("runs") or short.is_relative_to("videos")
    return short if is_ours else path


# Environments


def vectorize(make_env, args, seed, autoreset_mode, video=None, render_mode=None):
    """Make args.local_num_envs environments with make_env(args, render_mode), as one.

    The first one is recorded if there are options for RecordVideo in ``video``. With
    --vectorization-mode vector_entry_point, the environment's own batch is taken as it
    is, without make_env and in the autoreset mode that it has. Otherwise observations
    are not copied: the next step overwrites them.
    """
    thunks = []
    for index in range(args.local_num_envs):
        recorded = video if index == 0 else None
        thunk = make_thunk(make_env, args, seed, index, recorded, render_mode)
        thunks.append(thunk)

    mode = args.vectorization_mode
    classes = {"sync": gym.vector.SyncVectorEnv, "async": gym.vector.AsyncVectorEnv}
    try:
        if mode in classes:
            return classes[mode](thunks, copy=False, autoreset_mode=autoreset_mode)
        if video:
            raise RunEnded("--capture-video needs --vectorization-mode sync or async")
        envs = gym.make_vec(
            find_env(args.env_id),
            args.local_num_envs,
            vectorization_mode=mode,
            **args.env_kwargs,
        )
    except ModuleNotFoundError as error:
        raise RunEnded(
            f"--env-id {args.env_id}: {missing_module(args, error)}"
        ) from error
    except gym.error.UnregisteredEnv as error:
        raise RunEnded(f"--env-id {args.env_id}: {unknown_id(args, error)}") from error
    except gym.error.Error as error:
        raise RunEnded(f"--env-id {args.env_id}: {error}") from error

    batch_mode = envs.metadata.get("autoreset_mode")
    modes = gym.vector.AutoresetMode
    if batch_mode not in (modes.NEXT_STEP, modes.SAME_STEP):
        raise RunEnded(
            f"--env-id {args.env_id}: its metadata has autoreset_mode {batch_mode}, "
            "not NEXT_STEP or SAME_STEP, in which episodes follow each other"
        )
    return PlainArrays(envs)


class PlainArrays(gym.vector.VectorWrapper):
    """Turns what a batch returns into arrays that PyTorch can read.

    Some batches return lists or tensors, or arrays with negative strides.
    """

    def reset(self, *, seed=None, options=None):
        obs, infos = self.env.reset(seed=seed, options=options)
        return np.ascontiguousarray(obs), infos

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        obs = np.ascontiguousarray(obs)
        rewards = np.ascontiguousarray(rewards)
        terminations = np.ascontiguousarray(terminations, dtype=bool)
        truncations = np.ascontiguousarray(truncations, dtype=bool)
        if rewards.shape != (self.num_envs,):
            raise RunEnded(
                f"{self.spec.id}: its rewards have the shape {rewards.shape}, not "
                f"({self.num_envs},). PPO needs one number for each environment."
            )
        return obs, rewards, terminations, truncations, infos


def missing_module(args, error):
    """Say which module is missing, and where Python has looked for it."""
    name = args.env_id.partition(":")[0].split(".")[0]
    places = (
        "Python looks beside the program, in the folders of PYTHONPATH, and among the "
        "installed packages."
    )
    if str(error.name).split(".")[0] != name:
        return f"{error}, which {name} imports ({places})"
    return (
        f"{error} ({places} Those may have modules of other names, which pip show -f "
        "lists.)"
    )


def unknown_id(args, error):
    """Say what is wrong with an id that Gymnasium does not know."""
    module_name, colon, name = args.env_id.partition(":")
    if not colon:
        return (
            f"{error} (If a package brings it, name the module that registers it: "
            f"module:{args.env_id})"
        )
    package = module_name.split(".")[0]
    known = [id for id, spec in gym.registry.items() if package_of(spec) == package]
    registered = ", ".join(sorted(known)[:10]) or "no ids"
    if len(known) > 10:
        registered += f" and {len(known) - 10} more"
    return (
        f"{module_name} was imported. It has registered {registered}, and it has no "
        f"class or function {name}. Name one of these ids, or the module that "
        "registers another one, or a class or a function that makes the environment."
    )


def package_of(spec):
    """The package that the class or function of a registered environment is from."""
    entry_point = spec.entry_point or spec.vector_entry_point
    if not isinstance(entry_point, str):
        entry_point = entry_point.__module__
    return re.split("[.:]", entry_point)[0]


def resets_in_same_step(envs):
    """Tell how the environments begin the next episode: True if in SAME_STEP mode.

    SAME_STEP: the step that ends an episode also resets. It returns the first
    observation of the next episode, and infos["final_obs"] holds the last one of the
    old episode. NEXT_STEP, the only mode of some batched environments: the step that
    ends an episode returns its last observation. The next step ignores the action, and
    only resets.
    """
    return envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP


def final_observations(envs, infos, which):
    """The last observations of the episodes that ended, where this mask is True.

    Raises RunEnded if a batch in SAME_STEP mode does not give them.
    """
    final_obs = infos.get("final_obs")
    if final_obs is None or any(obs is None for obs in final_obs[which]):
        raise RunEnded(
            "--bootstrap-truncation needs the last observation of each episode, which "
            f'this batch in SAME_STEP mode does not give in infos["final_obs"]: {envs}',
            exit_code=1,
        )
    return np.stack(final_obs[which])


def make_thunk(make_env, args, seed, index, video, render_mode):
    """Return a function that makes one environment, maybe in a worker process."""
    main_process = os.getpid()

    def thunk():
        in_worker = os.getpid() != main_process
        if in_worker:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # the main process will stop us
            seed_generators(seed + index)  # or all would draw the same numbers

        if video:
            # Both of these look for folders, so they come before an environment that
            # may remove the one it is made in. Without the first, SDL, which draws,
            # prints a line that looks like our errors. The second loads what writes
            # videos.
            os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
            importlib.import_module("gymnasium.utils.save_video")
        try:
            env = make_env(args, "rgb_array" if video else render_mode)
        except Exception as error:
            error.hint = hint_for_constructor(args, index, error)
            raise
        env = FirstStep(env)
        if args.bootstrap_truncation:
            # Some environments overwrite the last observation when they are reset.
            env = gym.wrappers.TransformObservation(env, np.copy, env.observation_space)
        if video:
            check_render_mode(env)
            env = gym.wrappers.RecordVideo(env, **video)
        if in_worker:
            env = ErrorsAsText(env)
        return env

    return thunk


def hint_for_constructor(args, index, error):
    """What may help if an environment cannot be made; main() prints it."""
    if index > 0:
        return (
            "The first environment could be made. If only one is allowed in a process, "
            "--vectorization-mode async gives each a process of its own."
        )
    if isinstance(error, TypeError):
        return (
            f"{args.env_id} got the arguments {args.env_kwargs}. If it needs others: "
            "--env-kwargs"
        )
    return f"It broke while {args.env_id} was being made."


def check_render_mode(env):
    """Raise RunEnded if the environment cannot give the pictures of a video."""
    if env.render_mode != "rgb_array":
        modes = env.metadata.get("render_modes", [])
        raise RunEnded(
            f"--capture-video needs the render mode rgb_array, and {env.spec.id} has "
            f"{modes or 'none'}"
        )


class FirstStep(gym.Wrapper):
    """Looks at the first step of an environment, and at what its resets change."""

    def reset(self, **options):
        result = self.env.reset(**options)
        reset_torch()
        return result

    def step(self, action):
        try:
            result = self.env.step(action)
        except Exception as error:
            if isinstance(action, np.integer):
                error.hint = (
                    f"It broke in its first step, with an action of {type(action)}. If "
                    "it wants Python's int: gym.wrappers.TransformAction(env, int, "
                    "env.action_space)"
                )
            raise
        reward = result[1]
        if np.size(reward) != 1:
            raise RunEnded(
                f"{self.spec.id}: its reward is {reward}. PPO needs one number, such "
                "as a weighted sum, which a wrapper can make."
            )
        self.step = self.env.step  # from now on, this wrapper costs no time
        return result


class ErrorsAsText(gym.Wrapper):
    """Lets a worker process send its errors as text, with their traceback.

    Not every error can be pickled, and the main process would wait for ever for one
    that cannot.
    """

    def reset(self, **options):
        return self.call(self.env.reset, **options)

    def step(self, action):
        return self.call(self.env.step, action)

    def call(self, function, *args, **options):
        try:
            return function(*args, **options)
        except RunEnded:
            raise  # its message is all there is to say
        except Exception as error:
            # Gymnasium takes a % in it for the place of a number, so it is doubled.
            text = traceback.format_exc().replace("%", "%%")
            hint = getattr(error, "hint", "")
            raise WorkerError(f"in a worker process:\n{text}", hint) from None


class WorkerError(RuntimeError):
    """An error in a worker process, as text.

    In the main process, Gymnasium puts it into another one, which shows each % once.
    """

    def __init__(self, content, hint=""):
        super().__init__(content)
        self.hint = getattr(content, "hint", hint)

    def __str__(self):
        (content,) = self.args
        if isinstance(content, WorkerError):
            return str(content).replace("%%", "%")
        return content


def find_env(env_id):
    """What gym.make() needs for this id, for a class or for a function."""
    module_name, colon, name = env_id.partition(":")
    if not colon:
        return env_id
    module = importlib.import_module(module_name)  # this may register ids
    factory = getattr(module, name, None)
    if name in gym.registry or factory is None:
        return name
    return gym.envs.registration.EnvSpec(name, entry_point=factory)


def make_raw_env(args, render_mode=None):
    """Make one environment with the observations that it has."""
    options = dict(args.env_kwargs)
    if render_mode:
        options["render_mode"] = render_mode
    env = gym.make(find_env(args.env_id), disable_env_checker=True, **options)
    space = env.observation_space
    if not has_integers(space):
        return env
    return gym.wrappers.TransformObservation(
        env, lambda obs: check_type(obs, space, env.spec.id), space
    )


def flatten_observations(env):
    """Discrete becomes one-hot; Dict, Tuple and images become one long vector."""
    space = env.observation_space
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return env
    try:
        flat = gym.wrappers.FlattenObservation(env)
    except NotImplementedError as error:
        raise RunEnded(
            f"{env.spec.id}: its observations are {space}, and a part of that, such as "
            "a text, has no fixed size that Gymnasium knows "
            "(gym.wrappers.FilterObservation leaves it out; python ppo_pixels.py takes "
            "only the picture, if there is one)"
        ) from error
    if has_image(space):
        note_once(
            f"{env.spec.id} shows pictures, which are flattened here; "
            "python ppo_pixels.py looks at them as pictures"
        )
    return flat


def has_image(space):
    """Whether the space is a picture, or a Dict with a picture in it."""
    if isinstance(space, gym.spaces.Dict):
        return any(has_image(part) for part in space.values())
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 3


def has_integers(space):
    """Whether a part of the space promises whole numbers, or yes and no."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        parts = space.values() if isinstance(space, gym.spaces.Dict) else space
        return any(has_integers(part) for part in parts)
    return np.dtype(space.dtype).kind in "iub"


def check_type(obs, space, env_id):
    """Return the observation in the promised type. Raises RunEnded if it does not fit.

    Fractions would be cut off where a space promises bytes, and the agent would see 0.
    """
    if isinstance(space, gym.spaces.Dict):
        return {name: check_type(obs[name], space[name], env_id) for name in space}
    if isinstance(space, gym.spaces.Tuple):
        pairs = zip(obs, space, strict=True)
        return tuple(check_type(value, part, env_id) for value, part in pairs)
    if not has_integers(space):
        return obs

    array = np.asarray(obs)
    with np.errstate(invalid="ignore"):
        as_promised = array.astype(space.dtype, copy=False)
    fits = as_promised is array or (as_promised == array).all()
    # The one-hot vector of -1 would be that of the last number.
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        fits = fits and space.contains(as_promised.reshape(space.shape))
    if not fits:
        raise RunEnded(
            f"{env_id}: an observation holds {array.dtype} values that do not fit into "
            f"its space {space}: {array}",
            exit_code=1,
        )
    return as_promised


def check_actions(args, envs):
    """Raise RunEnded unless the actions are numbered from 0."""
    actions = envs.single_action_space
    if isinstance(actions, gym.spaces.Discrete) and actions.start == 0:
        return
    advice = "a wrapper has to turn them into numbers: gym.wrappers.TransformAction"
    if isinstance(actions, gym.spaces.Box):
        if len(actions.shape) == 1 and not has_integers(actions):
            advice = "for these there is ppo_continuous_action.py"
    elif has_numbered_parts(actions):
        advice = "for these there is ppo_multi_discrete.py"
    raise RunEnded(
        f"--env-id {args.env_id}: its actions are {actions}, not Discrete from 0 "
        f"({advice})"
    )


def has_numbered_parts(actions):
    """Whether ppo_multi_discrete.py knows such actions."""
    spaces = gym.spaces
    if isinstance(actions, spaces.Tuple):
        return all(isinstance(part, spaces.Discrete) for part in actions)
    numbered = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    return isinstance(actions, numbered)


def check_flat(args, envs):
    """Raise RunEnded unless the observations are flat."""
    observations = envs.single_observation_space
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        raise RunEnded(
            f"--env-id {args.env_id}: its observations are {observations}, not a flat "
            "Box"
        )


@contextlib.contextmanager
def open_envs(args, make_envs, video_folder, checkpoint):
    """Open the environments, and close them at the end.

    Yields them with what their last step returned, (next_obs, next_done), or with None
    if they are new and have to be reset.
    """
    video = None
    if args.capture_video and args.rank == 0:
        video = {"video_folder": str(video_folder)}
    older_processes = multiprocessing.active_children()
    envs = restored_step = None
    if checkpoint:
        envs, restored_step = restore_envs(args, checkpoint)
    try:
        if envs is None:
            envs = make_envs(args, args.env_seed, video)
        reset_torch()
        yield envs, restored_step
    except BaseException:
        # Workers may hang, and they ignore the signal with which Gymnasium ends them.
        for worker in multiprocessing.active_children():
            if worker not in older_processes:
                worker.kill()
        if envs is not None:
            with contextlib.suppress(Exception):  # the first error is the one to show
                envs.close()
            envs.unwrapped.closed = True  # or its __del__ would try again
        raise
    envs.close()


def reset_torch():
    """Undo what an environment may have changed for the whole process."""
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def restore_envs(args, checkpoint):
    """Return the environments as they stood, and their last step, or None and None."""
    reason = "they could not be saved"
    pickled = checkpoint["environments"][args.rank]
    if args.capture_video:
        reason = "those of the checkpoint cannot be recorded"
    elif pickled and checkpoint["python"] != list(sys.version_info[:2]):
        reason = "another version of Python saved them"  # that may crash silently
    elif pickled:
        try:
            # The array of observations is shared by both, so both are in one pickle.
            # Unpickling runs code: resume only runs that you trust.
            envs, *last_step = cloudpickle.loads(pickled)
            return envs, last_step
        except Exception as error:  # the program or a library has changed
            reason = repr(error)
    note(f"the environments begin new episodes, as {reason}")
    return None, None


def type_of_observations(envs, next_obs):
    """The type that holds both the first observations and what the space promises.

    Some batches begin with whole numbers, and fractions come later.
    """
    dtype = np.result_type(next_obs.dtype, envs.single_observation_space.dtype)
    return torch.as_tensor(np.zeros(1, dtype)).dtype


def check_observations(args, envs, next_obs):
    """Raise RunEnded if one is NaN or infinite: no action can be drawn from it.

    Nor may a batch give fractions where its space promises whole numbers.
    """
    if not np.isfinite(next_obs).all():
        message = f"{args.env_id} gave an observation that is not finite"
        raise RunEnded(message, exit_code=1)
    if next_obs.dtype != envs.single_observation_space.dtype:
        check_type(next_obs, envs.single_observation_space, args.env_id)


def check_for_divergence(args, global_step, rewards, stats, agent):
    """Raise RunEnded if a reward, a loss or a parameter is NaN or infinite."""
    if not rewards.isfinite().all():
        message = (
            f"{args.env_id} gave a reward that is not finite by step {global_step}"
        )
        raise RunEnded(message, exit_code=1)
    # An infinite loss need not show in the parameters: clipping makes its gradient 0.
    losses = [stats["policy_loss"], stats["value_loss"]]
    parameters_are_finite = all(p.isfinite().all() for p in agent.parameters())
    if not np.isfinite(losses).all() or not parameters_are_finite:
        raise RunEnded(
            f"the update at step {global_step} diverged: lower --learning-rate, or "
            "scale the rewards, or use fewer --num-minibatches",
            exit_code=1,
        )


# Stop signals

STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has only the first two
]


class StopSignals:
    """Remembers a stop signal. train() looks at it after each update, saves and stops.

    ``received`` is the number of the signal, or 0. A second one stops at once, as it
    would have done without this.
    """

    def __init__(self):
        self.received = 0
        self.received_at = 0.0
        self.old_handlers = {}

    def __enter__(self):
        # Python allows signal handlers only in the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup asks to ignore
                    self.old_handlers[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        if not self.received:
            self.received = int(number)
            self.received_at = time.monotonic()
        # A signal to a whole group comes twice if torchrun passes it on. So only one
        # that comes more than a second later is a second one.
        elif time.monotonic() > self.received_at + 1:
            self.restore()
            signal.raise_signal(number)

    def restore(self):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        self.old_handlers.clear()

    def __exit__(self, *error):
        self.restore()


# Processes of torchrun. Without torchrun, these functions do nothing.


@contextlib.contextmanager
def process_group(args, device):
    """Connect the processes of torchrun."""
    if args.world_size == 1:
        yield
        return
    gpu = device.type == "cuda"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    yield
    # After an error this is left out, as the other processes might never answer.
    torch.distributed.destroy_process_group()


def distributed():
    """Whether torchrun has started several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def copy_to_all_processes(agent):
    """Let all processes start from the parameters of the first one."""
    if distributed():
        for parameter in agent.parameters():
            torch.distributed.broadcast(parameter.data, src=0)


def average_gradients(agent):
    """Average the gradients of all processes, as one vector in one message."""
    if distributed():
        gradients = [p.grad for p in agent.parameters() if p.grad is not None]
        vector = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(vector)
        vector /= torch.distributed.get_world_size()
        parts = vector.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))


def mean_over_processes(number):
    """The mean of the processes' numbers."""
    if not distributed():
        return number
    total = torch.tensor(number, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def max_over_processes(number):
    """The largest of the processes' numbers, so that all decide alike."""
    if not distributed():
        return number
    largest = torch.tensor(number)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest.item()


def gather_from_processes(item):
    """A list of what each process has."""
    if not distributed():
        return [item]
    items = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


# The logger

STATISTICS = "episode_statistics"  # not Gymnasium's "episode", which some games use


class Logger:
    """Standard output, TensorBoard, Weights & Biases and the progress bar.

    All are silent in all processes but the first. To add another logger, begin it in
    __enter__, give it the numbers in add_scalar, and end it in __exit__.
    """

    def __init__(self, args, envs, run_folder, video_folder, checkpoint):
        self.args = args
        self.envs = envs
        self.run_folder = run_folder
        self.video_folder = video_folder
        self.is_silent = args.rank > 0
        self.global_step = args.first_step  # of the last step that has ended
        self.wandb = None
        self.wandb_id = checkpoint["wandb_id"] if checkpoint else None
        self.logged_videos = set()
        self.last_returns = collections.deque(maxlen=100)
        self.lock = None
        self.error = None  # why a log can no longer be written
        self.old_excepthook = threading.excepthook

    def __enter__(self):
        self.start_time = time.perf_counter()
        if self.is_silent:
            return self
        try:
            self.open()
        except BaseException:
            self.unlock()
            threading.excepthook = self.old_excepthook
            raise
        return self

    def open(self):
        if self.args.resume:
            self.lock = lock_folder(self.run_folder)
            date_back_logs(self.run_folder)
        if self.args.track:
            self.start_wandb()  # before SummaryWriter, whose output it copies
        if not self.args.resume:
            self.make_run_folder()
            self.lock = lock_folder(self.run_folder)
        threads = threading.enumerate()
        # purge_step hides what a killed run has logged after its checkpoint.
        self.writer = SummaryWriter(
            self.run_folder, purge_step=self.args.first_step + 1
        )
        self.threads = [t for t in threading.enumerate() if t not in threads]
        threading.excepthook = self.error_in_thread
        self.bar = tqdm(
            total=self.args.num_updates * self.args.batch_size,
            initial=self.args.first_step,
            unit="step",
            disable=not sys.stderr.isatty(),
        )
        self.write_settings()

    def make_run_folder(self):
        try:
            self.run_folder.mkdir(parents=True)
        except OSError as error:  # such as another run that began in the same second
            raise RunEnded(f"cannot make the folder of the run: {error}") from error

    def start_wandb(self):
        import wandb  # takes a second, so only when it is asked for

        # An environment may have gone to another folder meanwhile.
        folder = self.run_folder.resolve()
        try:
            run = wandb.init(
                dir=os.environ.get("WANDB_DIR", folder.parent.parent),
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity,
                name=folder.name,
                id=self.wandb_id,
                resume="allow",
                config=vars(self.args),
                save_code=True,
                sync_tensorboard=True,
            )
        except wandb.errors.Error as error:
            raise RunEnded(
                f"--track: {error} (WANDB_MODE=offline does without an account and "
                "without a connection.)"
            ) from error
        self.wandb = wandb
        self.wandb_id = run.id
        if self.args.resume:  # no sweep does that
            return
        try:
            check_config(self.args, run.config)
        except RunEnded:
            run.finish(exit_code=2)
            raise

    def say(self, line):
        if self.is_silent:
            return
        with self.keep_error("to standard output"):
            tqdm.write(line)  # print, without tearing the progress bar

    def write_settings(self):
        """Print and log the flags, and the spaces of the environments."""
        settings = dict(vars(self.args))
        spaces = self.envs.unwrapped  # the environment's own, not those of wrappers
        settings["observation_space"] = spaces.single_observation_space
        settings["action_space"] = spaces.single_action_space
        rows = ["|flag|value|", "|-|-|"]
        for name, value in settings.items():
            value = " ".join(str(value).split())  # spaces may take several lines
            self.say(f"{name}={value}")
            rows.append(f"|{name}|{value}|")
        with self.keep_error(f"the log in {shown(self.run_folder)}"):
            self.writer.add_text("hyperparameters", "\n".join(rows))

    def add_scalar(self, tag, value):
        if self.is_silent:
            return
        with self.keep_error(f"the log in {shown(self.run_folder)}"):
            self.writer.add_scalar(tag, value, self.global_step)

    @contextlib.contextmanager
    def keep_error(self, place):
        """Keep the error if this cannot be written; train() saves before it ends."""
        try:
            yield
        except OSError as error:  # the disk is full, or the folder or terminal is gone
            self.error = f"cannot write {place}: {error}"

    def error_in_thread(self, details):
        """Keep quiet about what TensorBoard's thread also tells keep_error()."""
        is_told = isinstance(details.exc_value, OSError)
        if not is_told or details.thread not in self.threads:
            self.old_excepthook(details)

    def failed(self):
        """Whether a log can no longer be written."""
        return self.error is not None

    def end_if_failed(self):
        """Raise RunEnded if a log can no longer be written."""
        if self.failed():
            raise RunEnded(self.error, exit_code=1)

    def episodes(self, infos, global_step):
        """Print each finished episode; the curve gets the mean of those of one step."""
        self.global_step = global_step
        if self.is_silent or STATISTICS not in infos:
            return
        finished = infos[f"_{STATISTICS}"]  # a mask: (num_envs,)
        returns = infos[STATISTICS]["r"][finished]
        lengths = infos[STATISTICS]["l"][finished]
        for episodic_return, length in zip(returns, lengths, strict=True):
            self.say(
                f"global_step={global_step}, episodic_return={episodic_return}, "
                f"episodic_length={length}"
            )
        self.last_returns.extend(returns)
        self.add_scalar("charts/episodic_return", returns.mean())
        self.add_scalar("charts/episodic_length", lengths.mean())

    def update(self, optimizer, stats):
        """Log what the update returned, its speed, and the learning rate."""
        if self.is_silent:
            return
        for name, number in stats.items():
            self.add_scalar(f"losses/{name}", number)
        seconds = time.perf_counter() - self.start_time
        steps_per_second = int((self.global_step - self.args.first_step) / seconds)
        self.add_scalar("charts/SPS", steps_per_second)
        self.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"])
        if self.wandb and self.args.capture_video:
            self.upload_videos()

        mean_return = np.mean(self.last_returns) if self.last_returns else np.nan
        self.bar.set_postfix(mean_return=mean_return, refresh=False)
        with self.keep_error("the progress bar"):
            self.bar.update(self.args.batch_size)
        # What is printed and logged must never be behind a checkpoint that comes now.
        with self.keep_error("to standard output"):
            sys.stdout.flush()
        with self.keep_error(f"the log in {shown(self.run_folder)}"):
            self.writer.flush()

    def upload_videos(self):
        """Upload what has been recorded. W&B's own monitor_gym breaks Gymnasium 1.0."""
        for path in sorted(self.video_folder.glob("*.mp4")):
            if path not in self.logged_videos:
                video = self.wandb.Video(str(path), format="mp4")
                self.wandb.log({"video": video, "global_step": self.global_step})
                self.logged_videos.add(path)

    def say_stopped(self):
        how = "it has no checkpoint"
        if self.args.checkpoint_interval:
            how = f"to go on: the same command with --resume {shown(self.run_folder)}"
        total = self.args.total_timesteps
        self.say(f"stopped at step {self.global_step} of {total}; {how}")

    def __exit__(self, kind, error, trace):
        if error is not None and not isinstance(error, RunEnded):
            error.how_to_go_on = self.how_to_go_on(error)  # main() prints it
        if self.is_silent:
            return
        try:
            self.close(exit_code=int(error is not None))
        except Exception:
            if error is None:
                raise
            # Otherwise the first error is the one to show.
        finally:
            threading.excepthook = self.old_excepthook
        if error is None:
            has_played = self.global_step > self.args.first_step
            if has_played and not self.last_returns:
                self.say("note: no episode has ended in these steps")
            line = f"results: {shown(self.run_folder)}"
            if self.args.capture_video:
                line += f" and {shown(self.video_folder)}"
            self.say(line)

    def close(self, exit_code):
        self.bar.close()
        self.unlock()
        self.writer.close()
        if self.wandb:
            self.wandb.finish(exit_code=exit_code)

    def unlock(self):
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def how_to_go_on(self, error):
        line = f"The run broke in step {self.global_step + self.args.num_envs}."
        has_workers = self.args.vectorization_mode == "async"
        if has_workers and isinstance(error, (EOFError, ConnectionError)):
            line += " A worker process is gone, maybe because memory ran out."
        films_mujoco = self.args.capture_video and "mujoco" in sys.modules
        if films_mujoco and "MUJOCO_GL" not in os.environ:
            line += " Without a screen, MuJoCo draws only with MUJOCO_GL=egl."
        if (self.run_folder / CHECKPOINT_FILE).exists():
            folder = shown(self.run_folder)
            line += f" To go on from its last checkpoint: --resume {folder}"
        return line


def check_config(args, config):
    """Raise RunEnded if W&B's table would show other flags than those of the run.

    A sweep writes its values into this table. The program gets them only if the sweep's
    command passes them on.
    """
    flags = vars(args)
    for key, in_table in config.items():
        name = key.replace("-", "_")
        if name in flags and not same_setting(in_table, flags[name]):
            raise RunEnded(
                f"W&B shows {name}={in_table}, but the run has {flags[name]}. In a "
                "sweep, the command must end in ${args}, and not in "
                "${args_no_boolean_flags}."
            )


def same_setting(one, other):
    """Whether both mean the same: a sweep's file may hold 1e-3 or True as a text."""
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one).lower() == str(other).lower()


def lock_folder(folder):
    """Keep other runs out of this folder.

    Returns a file descriptor. The folder is locked until this is closed, or until the
    process is gone. Raises RunEnded if another process has locked it. Does nothing
    where the system has no such locks.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunEnded(f"the run in {shown(folder)} is still running") from error
    except OSError:  # some network file systems
        pass
    return descriptor


def date_back_logs(folder):
    """Rename TensorBoard's files in this folder that are not older than this second.

    TensorBoard reads them in the order of the times in their names. So where the clock
    of this machine is behind, it would read those of the resumed run first, and drop
    what they hold.
    """
    limit = int(time.time())
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        parts = path.name.split(".")
        limit = min(limit - 1, int(parts[3]))
        parts[3] = f"{limit:010d}"
        path.rename(path.with_name(".".join(parts)))


# Checkpoints

CHECKPOINT_FILE = "checkpoint.pt"
CHECKPOINT_VERSION = 2  # to be raised when older checkpoints can no longer be read


class Checkpoints:
    """Saves a run to its folder every --checkpoint-interval seconds."""

    def __init__(self, args, run_folder):
        self.args = args
        self.path = run_folder / CHECKPOINT_FILE
        self.saved_at = time.perf_counter()

    def due(self, is_last):
        if self.args.checkpoint_interval == 0:
            return False
        seconds = time.perf_counter() - self.saved_at
        is_due = is_last or seconds >= self.args.checkpoint_interval
        return max_over_processes(int(is_due)) == 1

    def save(self, agent, optimizer, global_step, environments, wandb_id):
        random_states = gather_from_processes(get_random_states())
        environments = gather_from_processes(self.pickle(environments))
        if self.args.rank == 0:
            checkpoint = {
                "version": CHECKPOINT_VERSION,
                "saved_at": time.time(),
                "python": list(sys.version_info[:2]),
                "program": files_of_program(type(agent))[0].stem,
                "program_hash": hash_of_program(type(agent)),
                "args": vars(self.args),
                "global_step": global_step,
                "wandb_id": wandb_id,
                "agent": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random_states": random_states,
                "environments": environments,
            }
            self.write(checkpoint)
        self.saved_at = time.perf_counter()

    def pickle(self, environments):
        """The environments as bytes, or None if they cannot be kept as they stand."""
        if self.args.capture_video:
            return None  # a video that has begun cannot go on
        try:
            pickled = cloudpickle.dumps(environments)  # pickle refuses local functions
        except Exception:  # simulators written in C, open windows, worker processes
            return None
        # Gymnasium's EzPickle keeps how an environment was made, not how it stands.
        if b"_ezpickle_args" in pickled:
            return None
        return pickled

    def write(self, checkpoint):
        """Write the file whole or not at all, even if the machine dies meanwhile."""
        buffer = io.BytesIO()  # torch would not say that a disk is full
        torch.save(checkpoint, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except pickle.UnpicklingError:
            places = "; ".join(find_foreign(checkpoint, "checkpoint"))
            raise TypeError(f"this could not be read back: {places}") from None
        temporary = self.path.with_suffix(".tmp")
        try:
            # If somebody has renamed the folder meanwhile, the work is not lost.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                sync_to_disk(file)
            os.replace(temporary, self.path)
        except OSError as error:
            raise RunEnded(
                f"cannot save {shown(self.path)} (if it was there before, it is still "
                f"whole): {error}",
                exit_code=1,
            ) from error


def find_foreign(item, place):
    """Say where in a checkpoint there is something that load_checkpoint() refuses."""
    if isinstance(item, dict):
        parts = item.items()
    elif isinstance(item, list | tuple):
        parts = enumerate(item)
    elif type(item) in (str, int, float, bool, bytes, type(None), torch.Tensor):
        return []
    else:
        return [f"{place} is a {type(item).__module__}.{type(item).__name__}"]
    found = []
    for key, part in parts:
        found += find_foreign(key, f"the key {key!r} of {place}")
        found += find_foreign(part, f"{place}[{key!r}]")
    return found


def sync_to_disk(file):
    """Wait until the file is on the disk, where the file system can do that."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise


def files_of_program(Agent):
    """The files that define the agent and the rest; they may be the same."""
    module = sys.modules[Agent.__module__]
    return [Path(getattr(module, "__file__", PROGRAM)), PROGRAM]


def hash_of_program(Agent):
    """A hash that changes when a file of the program changes."""
    files = [path for path in files_of_program(Agent) if path.exists()]
    texts = [path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def get_random_states():
    """The states of all random generators of this process."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "random": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states):
    """Restore what get_random_states() returned."""
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def find_run(name):
    """The folder of a run, given as such, as its checkpoint.pt, or as "newest"."""
    if name == "newest":
        folder = newest_run()
        if folder is None:
            raise RunEnded(f"there is no run in runs/ that has a {CHECKPOINT_FILE}")
        return folder
    path = Path(name)
    return str(path.parent if path.name == CHECKPOINT_FILE else path)


def newest_run(begin="", **flags):
    """The folder in runs/ whose checkpoint is the newest, or None.

    Only runs with these flags count, and only folders whose names begin like this are
    looked at. The time is the one in the checkpoint, as copying changes the times of
    files.
    """
    newest = None
    latest = -1.0
    for path in sorted(Path("runs").glob(f"*/{CHECKPOINT_FILE}")):
        if not path.parent.name.startswith(begin):
            continue
        checkpoint = read_checkpoint(path)
        saved_at = checkpoint.get("saved_at") or 0.0  # older versions have none
        saved_flags = checkpoint.get("args") or {}
        is_same = all(saved_flags.get(name) == flags[name] for name in flags)
        if is_same and saved_at > latest:
            newest = str(path.parent)
            latest = saved_at
    return newest


def read_checkpoint(path):
    """Read a checkpoint of any version. Raises RunEnded if it is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint.get("version")  # so it is a dict
    except FileNotFoundError as error:
        raise RunEnded(f"there is no {path}") from error
    except Exception as error:  # a file can be wrong in many ways
        raise RunEnded(f"{path} is not a whole checkpoint: {error!r}") from error
    return checkpoint


def load_checkpoint(folder):
    """Read what was saved. This alone runs no code that a stranger may have put there.

    The environments in it stay pickled; see restore_envs().
    """
    path = Path(folder, CHECKPOINT_FILE)
    checkpoint = read_checkpoint(path)
    if checkpoint.get("version") != CHECKPOINT_VERSION:
        raise RunEnded(f"{path} was saved by another version of this program")
    return checkpoint


def checkpoint_to_resume(args, Agent):
    """The checkpoint that --resume names, or None for a new run."""
    if not args.resume:
        return None
    checkpoint = load_checkpoint(args.resume)
    program = files_of_program(Agent)[0].stem
    if checkpoint["program"] != program:
        raise RunEnded(
            f"the run in {args.resume} was made by {checkpoint['program']}.py, not by "
            f"{program}.py"
        )
    if checkpoint["program_hash"] != hash_of_program(Agent):
        note("the program has changed since this run was saved")
    if args.first_step == args.num_updates * args.batch_size:
        note("this run is complete; a larger --total-timesteps would go on")
    return checkpoint


def load_agent(agent, checkpoint):
    """Give the agent the saved parameters. Raises RunEnded if they do not fit."""
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        env_id = checkpoint["args"]["env_id"]
        message = f"{env_id} or the program has changed, and the agent does not fit"
        raise RunEnded(f"{message}: {error}") from error


def restore_or_reset(args, envs, agent, optimizer, checkpoint, restored_step):
    """Restore what the checkpoint holds, if there is one, and reset new environments.

    Returns the observations and the dones that the first step begins with.
    """
    if checkpoint:
        load_agent(agent, checkpoint)
        # The settings of the optimizer are those of the program, and its state is the
        # saved one.
        saved = checkpoint["optimizer"]
        saved["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(saved)
    copy_to_all_processes(agent)

    if restored_step:
        next_obs, next_done = restored_step
    else:
        # This has to come after the agent was restored, whose statistics may see it.
        next_obs, _ = envs.reset(seed=args.env_seed)
        reset_torch()
        next_done = np.zeros(args.local_num_envs, dtype=bool)

    # This comes last, as all of the above may have drawn random numbers.
    if checkpoint:
        set_random_states(checkpoint["random_states"][args.rank])
    return next_obs, next_done


# The program


def main(argv=None, make_envs=make_envs, Agent=Agent, add_flags=None, **defaults):
    """Train as the flags say, and return the agent.

    A variant passes its own environments and agent, and its flags and their defaults.
    """
    try:
        args = parse_args(argv, add_flags, **defaults)
    except RunEnded as ended:
        exit_with(ended)
    try:
        return train(args, make_envs, Agent)
    except RunEnded as ended:
        exit_with(ended)
    except (Exception, SystemExit) as error:
        # An error of the environment, or a bug of ours. An environment that calls
        # sys.exit() has broken the run, too, and the exit code has to tell.
        traceback.print_exc()
        before_or_after = "The run broke before its first or after its last step."
        line = getattr(error, "how_to_go_on", before_or_after)
        hint = getattr(error, "hint", "")
        print(f"{line} {hint}".strip(), file=sys.stderr)
        sys.exit(1)


def exit_with(ended):
    """Print why the run has ended, if nobody has, and exit with its code."""
    if ended.exit_code < 128:  # the logger has spoken of a stop already
        print(f"error: {ended}", file=sys.stderr)
    sys.exit(ended.exit_code)


# The cells of a notebook have no __file__. There, call main(["--seed", "2"]) yourself.
if __name__ == "__main__" and "__file__" in globals():
    main()
