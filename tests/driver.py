"""Runs ppo.py as torchrun does, but keeps what each process computes: rank<i>.pt in the folder of DUMP, if it is set;
or, where DIES is set, process 1 ends without a word in its tenth gradient step."""

import os

import torch

import ppo

kept = {"params": [], "grads": [], "batches": [], "approx_kl": []}  # of each gradient step
ppo_loss, flat = ppo.ppo_loss, torch.nn.utils.parameters_to_vector


class KeepingAdam(torch.optim.Adam):
    def step(self):
        params = self.param_groups[0]["params"]
        kept["params"].append(flat(params).detach())
        kept["grads"].append(flat([p.grad for p in params]))
        super().step()
        if "DIES" in os.environ and os.environ["RANK"] == "1" and len(kept["params"]) == 10:
            os._exit(7)


class KeepingAgent(ppo.Agent):
    def get_action_and_value(self, obs, action=None):
        if action is not None:
            kept["batches"].append([obs, action])
        return super().get_action_and_value(obs, action)


def keeping_loss(newlogprob, entropy, newvalue, *batch):
    kept["batches"][-1] += batch[:-1]
    loss, stats = ppo_loss(newlogprob, entropy, newvalue, *batch)
    kept["approx_kl"].append(stats["approx_kl"])
    return loss, stats


if __name__ == "__main__":
    torch.optim.Adam, ppo.ppo_loss = KeepingAdam, keeping_loss
    agent = ppo.train(ppo.parse_args(), Agent=KeepingAgent)
    kept["params"].append(flat(agent.parameters()).detach())
    if "DUMP" in os.environ:
        torch.save(kept, os.path.join(os.environ["DUMP"], f"rank{os.environ['RANK']}.pt"))
