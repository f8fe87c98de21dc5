"""Watch a trained agent play.

    python evaluate.py
    python evaluate.py runs/<run name> --deterministic --capture-video
    python evaluate.py runs/<run name> --program my_variant.py

Without a folder, the newest run plays. It prints which run that is, the return of each
episode, and at last their mean and standard deviation (ddof 0). Videos go to
videos/<run name>/evaluation. Running statistics, if the agent has any, are frozen.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

import ppo

# A checkpoint may be a stranger's, so it may only choose a program of this list. Which
# other program is imported, the user says. (The module that an environment's id names,
# as in my_module:MyEnv-v0, is imported: without it there is no environment.)
PROGRAMS = [
    "ppo",
    "ppo_continuous_action",
    "ppo_atari",
    "ppo_memory",
    "ppo_multi_discrete",
    "ppo_pixels",
]


def parse_args(argv=None):
    """Read the flags. Raises ppo.RunEnded if one is wrong."""
    parser = ppo.ArgumentParser()
    add = parser.add_argument
    add("run", nargs="?", default="newest", help="runs/<run name>")
    add("--program", type=Path, default=None, help="your own variant that trained it")
    add("--env-id", default=None, help="of the run; another one if it fits the agent")
    add("--episodes", type=ppo.positive_int, default=10, help="how many to play")
    add("--max-steps", type=ppo.positive_int, default=100_000, help="of all episodes")
    add("--seed", type=ppo.whole_number, default=1000, help="of all random numbers")
    add(
        "--deterministic",
        action="store_true",
        help="likeliest actions, drawn ones else",
    )
    add("--capture-video", action="store_true", help="record every episode")
    add("--render", action="store_true", help="show them in a window")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.render and args.capture_video:
        raise ppo.RunEnded("what --render shows in a window cannot be recorded")
    return args


def load_program(path, name):
    """Import the program at this path, or else the one of PROGRAMS with this name."""
    if path is None and name in PROGRAMS:
        return importlib.import_module(name)
    if path is None:
        message = f"this run was trained by {name}.py: name that file with --program"
        raise ppo.RunEnded(message)
    if not path.exists():
        raise ppo.RunEnded(f"--program {path}: there is no such file")
    # As with `python my_variant.py`, it may import what stands beside it.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    # A copy of ppo.py is to raise what main() catches.
    if hasattr(program, "RunEnded"):
        program.RunEnded = ppo.RunEnded
    return program


def check_env_id(env_id):
    """Raise ppo.RunEnded where this id makes any function be called.

    Together with the arguments in the checkpoint it could do anything.
    """
    spec = ppo.find_env(env_id)
    if isinstance(spec, str):  # a registered id
        return
    is_class = isinstance(spec.entry_point, type)
    if not is_class or not issubclass(spec.entry_point, gym.Env):
        raise ppo.RunEnded(
            f"{env_id} makes the environment of this run. A checkpoint may be a "
            f"stranger's, so if you know it, name it yourself: --env-id {env_id}"
        )


def play(args, envs, agent):
    """Play episodes in the one environment of ``envs``, and return their returns."""
    returns = []
    obs, _ = envs.reset(seed=args.seed)
    for _ in range(args.max_steps):
        with torch.no_grad():
            action, _ = agent.get_action(torch.as_tensor(obs), args.deterministic)
        action = action.numpy().astype(envs.single_action_space.dtype)
        obs, _, _, _, infos = envs.step(action)
        if ppo.STATISTICS in infos:
            episodic_return = infos[ppo.STATISTICS]["r"][0]
            print(f"episode={len(returns)}, episodic_return={episodic_return}")
            returns.append(episodic_return)
        if len(returns) == args.episodes:
            break
    return returns


def evaluate(args):
    """Play as the flags say, and return the returns of the episodes."""
    ppo.check_gymnasium()
    run_folder = ppo.find_run(args.run)
    checkpoint = ppo.load_checkpoint(run_folder)
    program = load_program(args.program, checkpoint["program"])
    print(f"run={run_folder}")

    trained = argparse.Namespace(**checkpoint["args"])
    if args.env_id:
        trained.env_id = args.env_id
    else:
        check_env_id(trained.env_id)
    trained.local_num_envs = 1
    trained.num_minibatches = 1  # with a memory, it must divide the environments
    if trained.vectorization_mode == "async" or program is ppo:
        trained.vectorization_mode = "sync"
    video = None
    if args.capture_video:
        run_name = Path(run_folder).resolve().name
        video_folder = Path("videos", run_name, "evaluation").absolute()
        video = {
            "video_folder": str(video_folder),
            "episode_trigger": lambda episode: episode < args.episodes,
        }

    ppo.seed_generators(args.seed)
    torch.set_num_threads(trained.num_threads)
    make_envs = getattr(program, "make_envs", ppo.make_envs)
    envs = make_envs(trained, args.seed, video, "human" if args.render else None)
    ppo.reset_torch()
    agent = getattr(program, "Agent", ppo.Agent)(envs)
    ppo.load_agent(agent, checkpoint)
    returns = play(args, envs, agent.eval())
    envs.close()  # this finishes the last video

    if len(returns) < args.episodes:
        print(
            f"note: --max-steps {args.max_steps} were over before the next episode was"
        )
    if not returns:
        raise ppo.RunEnded("no episode ended within --max-steps", exit_code=1)
    print(f"mean={np.mean(returns):.2f}, std={np.std(returns):.2f}")
    if video:
        print(f"videos: {ppo.shown(video_folder)}")
    return returns


def main(argv=None):
    """Play, print the returns, and return them."""
    try:
        return evaluate(parse_args(argv))
    except ppo.RunEnded as ended:
        ppo.exit_with(ended)


if __name__ == "__main__":
    main()
