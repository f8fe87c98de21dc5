"""Proximal Policy Optimization (PPO) in one file, to be read from top to bottom.

    python ppo.py                                                        # CartPole-v1, 25,000 steps
    python ppo.py --env-id Acrobot-v1 --total-timesteps 500000 --track   # logged to Weights & Biases too
    tensorboard --logdir runs                                            # the curves, in a browser

PPO repeats two phases. Rollout: the current policy plays num_steps steps in num_envs environments. Update: these data
serve several epochs of minibatch gradient steps, while a clipped objective keeps the policy near the one that collected
them. Details, some from the paper and some known only from its code, make up PPO as it is used.

Sources, by the names that the comments use:
    [PPO]        Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [baselines]  the original implementation: github.com/openai/baselines, folder baselines/ppo2
    [Huang]      Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, ICLR Blog Track
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter


def fail(message, exit_code=2):
    """Exit with one line on standard error. Exit code 2: the input was wrong; 1: the run broke."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(exit_code)


def parse_args(argv=None):
    """Read and check the command line; ``argv`` is a list of strings, None means ``sys.argv[1:]``.

    Returns an ``argparse.Namespace`` with one attribute per flag. Bad input exits with code 2 and one line.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail  # argparse's own prints the usage too, in which the one line that matters is lost

    def boolean(text):
        return ("false", "true").index(text.lower()) == 1  # any other text: ValueError, which argparse reports

    def add_bool(group, name, **kwargs):
        """--name, --no-name, --name False and --name=false: sweep tools write the last form."""
        group.add_argument(f"--{name}", type=boolean, nargs="?", const=True, metavar="BOOL", **kwargs)
        group.add_argument(f"--no-{name}", dest=name.replace("-", "_"), action="store_false", help=argparse.SUPPRESS)

    run = parser.add_argument_group("the run")
    run.add_argument("--exp-name", default=Path(__file__).stem, help="name of the experiment")
    run.add_argument("--env-id", "--gym-id", default="CartPole-v1", help="Gymnasium id; module:Id imports module first")
    run.add_argument("--total-timesteps", type=int, default=25000, help="of all environments together")
    run.add_argument("--seed", type=int, default=1, help="of random, numpy, torch and the environments")
    add_bool(run, "torch-deterministic", default=True, help="deterministic algorithms where torch has them")
    add_bool(run, "cuda", default=True, help="use a GPU if there is one")
    run.add_argument("--num-threads", type=int, default=1, help="torch CPU threads; 1: same numbers on any core count")
    add_bool(run, "track", default=False, help="log to Weights & Biases too")
    run.add_argument("--wandb-project-name", default="cleanrl", help="W&B project")
    run.add_argument("--wandb-entity", default=None, help="W&B user or team; None is your own")
    args = parser.parse_args(argv)

    def check(names, holds, rule):
        for name in names.split():
            value = getattr(args, name)
            if not holds(value):  # NaN fails every comparison, so it never holds
                fail(f"--{name.replace('_', '-')} must be {rule}, got {value}")

    check("total_timesteps", lambda x: x >= 1, "at least 1")
    check("num_threads", lambda x: 1 <= x <= 1024, "between 1 and 1024")
    check("seed", lambda x: 0 <= x < 2**32, "between 0 and 4294967295, as numpy wants it")
    return args


def train(args):
    """Log what ``args`` from :func:`parse_args` say to runs/<run_name>."""
    if args.track:
        try:
            import wandb  # takes a second, so only when it is asked for

            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
                raise RuntimeError("run `wandb login` first, or set WANDB_MODE=offline to do without an account")
            # Before the SummaryWriter: sync_tensorboard sends what TensorBoard gets, at its global_step.
            project, entity = args.wandb_project_name, args.wandb_entity
            wandb.init(project=project, entity=entity, config=vars(args), sync_tensorboard=True, save_code=True)
        except Exception as error:
            fail(f"--track: {error}")

    # A run's name is its own: if another run took it in the same second, this one takes the next second.
    Path("runs").mkdir(exist_ok=True)
    for second in itertools.count(int(time.time())):
        run_name = re.sub(r"[/\\:\s]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{second}")
        with contextlib.suppress(FileExistsError):
            Path("runs", run_name).mkdir()
            break
    if args.track:
        wandb.run.name = run_name
    for name, value in vars(args).items():
        print(f"{name}={' '.join(str(value).split())}")
    writer = SummaryWriter(f"runs/{run_name}")
    writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in vars(args).items()))

    writer.close()
    if args.track:
        wandb.finish()

    # Seeds: from here on, only the algorithm draws from these generators.
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA's matrix products need to be deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    print(f"device={device}")
    print(f"results: runs/{run_name}")


def main(argv=None):
    try:
        train(parse_args(argv))
    except OSError as error:  # a full disk, or a folder that may not be written to
        fail(error, exit_code=1)


if __name__ == "__main__":
    main()
