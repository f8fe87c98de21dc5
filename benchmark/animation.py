"""Draw the animation of the README, an agent that balances a pole.

    python ppo.py --total-timesteps 500000 --bootstrap-truncation
    python -m benchmark.animation runs/<run name>

It plays one episode with the likeliest actions. Every other frame of the first seconds
goes to results/cartpole.gif.
"""

import argparse

import torch
from PIL import Image

import ppo
from benchmark.runs import RESULTS

STEPS = 240


def play(run_folder):
    """Return every other frame of an episode that the agent of this run plays."""
    checkpoint = ppo.load_checkpoint(run_folder)
    args = argparse.Namespace(**checkpoint["args"])
    args.local_num_envs = 1
    envs = ppo.make_envs(args, seed=3, render_mode="rgb_array")
    agent = ppo.Agent(envs)
    agent.load_state_dict(checkpoint["agent"])

    frames = []
    obs, _ = envs.reset(seed=3)
    for step in range(STEPS):
        action = agent.get_policy(torch.as_tensor(obs)).mode
        obs, _, _, _, _ = envs.step(action.numpy())
        if step % 2 == 0:
            (frame,) = envs.unwrapped.render()
            frames.append(frame)
    envs.close()
    return frames


def shrink(frame):
    """Keep the middle of a frame, at a smaller size and with few colors."""
    middle = Image.fromarray(frame).crop((100, 130, 500, 330))
    small = middle.resize((300, 150))
    return small.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)


def main():
    """Draw the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="runs/<run name>")
    images = [shrink(frame) for frame in play(parser.parse_args().run)]

    path = RESULTS / "cartpole.gif"
    first, *others = images
    first.save(
        path, save_all=True, append_images=others, duration=40, loop=0, optimize=True
    )
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
