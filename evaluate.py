"""Watch a trained agent play: python evaluate.py runs/<run_name> [--episodes 10] [--deterministic] [--capture-video]

Prints the return of each episode, then their mean and standard deviation. Videos go to videos/<run_name>/evaluation.
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from ppo import Agent, fail, load_checkpoint, make_env


def main(argv=None):
    parser = argparse.ArgumentParser(description="Play the agent of a run and print its returns.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("run", help="the folder of the run, runs/<run_name>")
    parser.add_argument("--episodes", type=int, default=10, help="how many to play")
    parser.add_argument("--seed", type=int, default=1000, help="of the first episode's start and of drawing actions")
    parser.add_argument(
        "--deterministic", action="store_true", help="always the likeliest action; else draw, as trained"
    )
    parser.add_argument("--capture-video", action="store_true", help="record every episode")
    parser.add_argument("--render", action="store_true", help="show it in a window, where there is a screen")
    args = parser.parse_args(argv)
    if args.episodes < 1 or not 0 <= args.seed < 2**63 or (args.render and args.capture_video):
        fail("--episodes must be 1 or more, --seed between 0 and 2**63, and a window (--render) cannot be recorded")
    checkpoint = load_checkpoint(args.run)
    env_id = checkpoint["args"]["env_id"]
    render_mode = "human" if args.render else "rgb_array" if args.capture_video else None
    video_folder = Path("videos", Path(args.run).resolve().name, "evaluation")
    torch.manual_seed(args.seed)
    returns = []
    try:
        env = make_env(env_id, args.seed, render_mode)()
        if args.capture_video:
            env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: True, disable_logger=True)
        agent = Agent(env.observation_space.shape[0], env.action_space.n)
        agent.load_state_dict(checkpoint["agent"])
        for episode in range(args.episodes):
            obs, _ = env.reset(seed=args.seed if episode == 0 else None)
            episodic_return, done = 0.0, False
            while not done:
                with torch.inference_mode():
                    batch = torch.as_tensor(obs, dtype=torch.float32)[None]
                    action = agent.actor(batch).argmax(-1) if args.deterministic else agent.get_action(batch)[0]
                obs, reward, terminated, truncated, _ = env.step(action.item())
                episodic_return, done = episodic_return + float(reward), terminated or truncated
            returns.append(episodic_return)
            print(f"episode={episode}, episodic_return={episodic_return}", flush=True)
        env.close()  # finishes the last video
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:  # an environment that is missing here, has changed, or cannot show itself
        fail(f"{env_id}: {str(error) or repr(error)}")
    print(f"mean={np.mean(returns):.2f}, std={np.std(returns):.2f}" + f", videos: {video_folder}" * args.capture_video)


if __name__ == "__main__":
    main()
