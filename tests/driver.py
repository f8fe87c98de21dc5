"""Trains as ppo.py does, and keeps what this process of torchrun has computed.

The file is rank0.pt, or rank1.pt, in the working folder. With a file batch.pt there, it
learns from its part of that batch only, instead of training.
"""

from pathlib import Path

import torch

import ppo


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class KeepingAgent(ppo.Agent):
    """Keeps the parameters before each gradient step, and what the step is made of."""

    def __init__(self, envs):
        super().__init__(envs)
        self.kept = {"parameters": [], "obs": [], "entropy": []}

    def evaluate_actions(self, obs, action):
        logprob, entropy, value = super().evaluate_actions(obs, action)
        self.kept["parameters"].append(flat(self.parameters()))
        self.kept["obs"].append(obs)
        self.kept["entropy"].append(entropy.mean().item())
        return logprob, entropy, value


def learn_from_part_of(batch, args):
    """One update, in which a step is the gradient times the learning rate."""
    agent = batch.pop("agent")
    optimizer = torch.optim.SGD(agent.parameters(), args.learning_rate)
    part = {
        name: samples.chunk(args.world_size)[args.rank]
        for name, samples in batch.items()
    }
    indices = torch.arange(len(part["b_obs"])).numpy()
    with ppo.process_group(args, torch.device("cpu")):
        ppo.update(args, agent, optimizer, b_inds=indices, **part)
    return agent


if __name__ == "__main__":
    args = ppo.parse_args()
    if Path("batch.pt").exists():
        batch = torch.load("batch.pt", weights_only=False)
        agent = learn_from_part_of(batch, args)
        kept = {}
    else:
        agent = ppo.train(args, Agent=KeepingAgent)
        kept = agent.kept
    kept["end"] = flat(agent.parameters())
    torch.save(kept, f"rank{args.rank}.pt")
