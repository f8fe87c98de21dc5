"""Runs ppo.py as torchrun does, but keeps what each process computes: rank<i>.pt in the folder of DUMP, if it is set;
or, where DIES is set, process 1 ends without a word in its tenth gradient step."""

import os

import torch

import ppo

rank = int(os.environ["RANK"])
kept = {"params": [], "grads": [], "batches": []}  # of each gradient step
adam, ppo_loss, get_action_and_value = ppo.adam, ppo.ppo_loss, ppo.Agent.get_action_and_value


def keeping_adam(params, grads, *args, **kwargs):
    kept["params"].append(params[0].detach().clone())
    kept["grads"].append(grads[0].clone())
    adam(params, grads, *args, **kwargs)
    if "DIES" in os.environ and rank == 1 and len(kept["params"]) == 10:
        os._exit(7)


def keeping_inputs(agent, obs, actions):
    kept["batches"].append([obs, actions])
    return get_action_and_value(agent, obs, actions)


def keeping_loss(newlogprob, entropy, newvalue, *batch):
    kept["batches"][-1] += batch[:-1]
    return ppo_loss(newlogprob, entropy, newvalue, *batch)


if __name__ == "__main__":
    ppo.adam, ppo.ppo_loss, ppo.Agent.get_action_and_value = keeping_adam, keeping_loss, keeping_inputs
    agent = ppo.train(ppo.parse_args())
    kept["params"].append(torch.nn.utils.parameters_to_vector(agent.parameters()).detach())
    if "DUMP" in os.environ:
        torch.save(kept, os.path.join(os.environ["DUMP"], f"rank{rank}.pt"))
