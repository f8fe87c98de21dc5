"""Watch a trained agent play: python evaluate.py [runs/<run_name>] [--episodes 10] [--deterministic] [--capture-video]

Without a folder, the newest run plays. Prints the return of each episode, then their mean and standard deviation
(ddof 0). Videos go to videos/<run_name>/evaluation. Running statistics, if an agent has any, are frozen.
"""

import argparse
import importlib
from pathlib import Path

import numpy as np
import torch

import ppo

# A checkpoint may be a stranger's: it may choose a program from this list, and no other. (The module that its
# environment's id names, my_module:MyEnv-v0, is imported, as without it there is no environment.)
PROGRAMS = {"continuous_action": "variants.continuous_action", "atari": "variants.atari"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Play the agent of a run and print its returns.", allow_abbrev=False)
    parser.error = ppo.fail
    parser.add_argument(
        "run", nargs="?", default="runs/*", help="runs/<run_name>, its checkpoint.pt, or the newest run"
    )
    parser.add_argument("--episodes", type=int, default=10, help="how many to play")
    parser.add_argument("--max-steps", type=int, default=100_000, help="in all; some episodes never end")
    parser.add_argument("--seed", type=int, default=1000, help="of the environment and of drawing actions")
    parser.add_argument(
        "--deterministic", action="store_true", help="always the likeliest action; else draw, as trained"
    )
    parser.add_argument("--capture-video", action="store_true", help="record every episode")
    parser.add_argument("--render", action="store_true", help="show it in a window, where there is a screen")
    args = parser.parse_args(argv)
    if min(args.episodes, args.max_steps) < 1 or not 0 <= args.seed < 2**63 or (args.render and args.capture_video):
        ppo.fail("--episodes and --max-steps must be 1 or more, --seed 0 or more, and a window cannot be recorded")
    return args


def best_action(agent, obs):
    """The likeliest action: an agent whose actor does not give logits has a method that knows it."""
    return agent.get_best_action(obs) if hasattr(agent, "get_best_action") else agent.actor(obs.float()).argmax(-1)


def play(args, envs, agent):
    """Play episodes in the one environment of ``envs``, print their returns, and return them."""
    returns, (obs, _) = [], envs.reset(seed=args.seed)
    for _ in range(args.max_steps):
        with torch.inference_mode():
            obs = torch.from_numpy(obs)
            action = best_action(agent, obs) if args.deterministic else agent.get_action_and_value(obs)[0]
        obs, _, _, _, infos = envs.step(action.numpy().astype(envs.action_space.dtype))
        if "episode_statistics" in infos:
            returns.append(infos["episode_statistics"]["r"][0])
            print(f"episode={len(returns) - 1}, episodic_return={returns[-1]}", flush=True)
        if len(returns) == args.episodes:
            return returns
    print(f"note: episode {len(returns)} had not ended when --max-steps {args.max_steps} were over")
    return returns


def main(argv=None):
    args = parse_args(argv)
    folder, checkpoint = ppo.load_checkpoint(args.run)
    program = importlib.import_module(PROGRAMS.get(checkpoint["program"], "ppo"))
    trained = argparse.Namespace(**checkpoint["args"])
    trained.num_envs, trained.capture_video = 1, args.capture_video
    if trained.vectorization_mode == "async" or program is ppo:
        trained.vectorization_mode = "sync"
    video_folder, video = Path("videos", Path(folder).resolve().name, "evaluation"), None
    if args.capture_video:
        video = {"video_folder": video_folder, "episode_trigger": lambda episode: episode < args.episodes}
    ppo.seed_generators(args.seed)
    torch.set_num_threads(trained.num_threads)
    try:
        envs = program.make_envs(trained, 1, args.seed, video, "human" if args.render else None)
        agent = program.Agent(envs)
        try:
            agent.load_state_dict(checkpoint["agent"])
        except RuntimeError as error:
            ppo.fail(f"{trained.env_id} has changed, so that the agent does not fit it: {error}")
        if hasattr(envs.unwrapped, "call") and any(envs.unwrapped.call("has_wrapper_attr", "obs_rms")):
            print("note: this environment normalizes observations by running statistics of its own, which begin anew")
        returns = play(args, envs, agent.eval())
        envs.close()  # finishes the last video
    except KeyboardInterrupt:
        ppo.fail("interrupted", 130)
    except (Exception, SystemExit) as error:
        ppo.explain(error, trained, 0, began=False)
        raise
    if not returns:
        ppo.fail(f"no episode ended within --max-steps {args.max_steps}", 1)
    videos = f", videos: {video_folder}" if args.capture_video else ""
    print(f"mean={np.mean(returns):.2f}, std={np.std(returns):.2f}{videos}")


if __name__ == "__main__":
    main()
