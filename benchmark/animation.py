"""An animation of the agent of a run, for the README.

    python ppo.py --total-timesteps 500000 --bootstrap-truncation
    python -m benchmark.animation runs/<run_name>

Plays one episode with the likeliest actions and writes every other frame of its first seconds to results/cartpole.gif.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

import ppo

_, checkpoint = ppo.load_checkpoint(sys.argv[1])
envs = ppo.make_envs(argparse.Namespace(**checkpoint["args"]), 1, seed=3, render_mode="rgb_array")
agent = ppo.Agent(envs)
agent.load_state_dict(checkpoint["agent"])
obs, _ = envs.reset(seed=3)
frames = []
for step in range(240):
    obs, *_ = envs.step(agent.actor(torch.from_numpy(obs)).argmax(-1).numpy())
    if step % 2 == 0:
        frame = Image.fromarray(envs.unwrapped.render()[0]).crop((100, 130, 500, 330)).resize((300, 150))
        frames.append(frame.convert("P", palette=Image.Palette.ADAPTIVE, colors=16))
path = Path(__file__).parent / "results" / "cartpole.gif"
frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0, optimize=True)
print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
