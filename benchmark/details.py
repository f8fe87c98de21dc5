"""Train as ppo.py does, but with one detail switched off, or a bonus switched on.

    python -m benchmark.details no_gae --env-id Acrobot-v1

All flags of ppo.py may follow the name of the detail. Most details are switched off by
a flag. What no flag can express stands below: another agent, another epsilon of Adam,
and an update without policy clipping. At last it prints from how many minibatches each
update has learned.
"""

import contextlib
import sys
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ppo


@dataclass
class Detail:
    """What is switched: how it is called in tables, and the flags that do it."""

    label: str
    flags: str = ""


DETAILS = {
    "default": Detail("default"),
    "no_vectorization": Detail(
        "1 one environment, 512 steps", "--num-envs 1 --num-steps 512"
    ),
    "torch_init": Detail("2 PyTorch's initialization"),
    "adam_eps_1e-8": Detail("3 Adam's epsilon 1e-8"),
    "no_anneal_lr": Detail("4 constant learning rate", "--no-anneal-lr"),
    "no_gae": Detail("5 no GAE", "--no-gae"),
    "one_minibatch": Detail("6 one minibatch", "--num-minibatches 1"),
    "no_norm_adv": Detail("7 no advantage normalization", "--no-norm-adv"),
    "no_policy_clipping": Detail("8 no policy clipping"),
    "no_clip_vloss": Detail("9 no value clipping", "--no-clip-vloss"),
    "no_entropy_bonus": Detail("10 no entropy bonus", "--ent-coef 0"),
    "no_gradient_clipping": Detail("11 no gradient clipping", "--max-grad-norm 1e30"),
    "target_kl": Detail("bonus: target KL 0.015", "--target-kl 0.015"),
    "bootstrap_truncation": Detail(
        "bonus: bootstrap truncation", "--bootstrap-truncation"
    ),
}


# From how many minibatches each update of this process has learned. They are few where
# --target-kl ends an update early.
MINIBATCHES = []


class Agent(ppo.Agent):
    """Counts the minibatches of each update."""

    is_playing = True

    def get_action(self, obs):
        self.is_playing = True
        return super().get_action(obs)

    def evaluate_actions(self, obs, action):
        if self.is_playing:  # so this is the first minibatch of an update
            self.is_playing = False
            MINIBATCHES.append(0)
        MINIBATCHES[-1] += 1
        return super().evaluate_actions(obs, action)


class TorchInitAgent(Agent):
    """Detail 2 switched off: the layers are as PyTorch makes them."""

    def __init__(self, envs):
        nn.Module.__init__(self)  # not ppo.Agent's networks
        obs_dim = envs.single_observation_space.shape[0]
        num_actions = envs.single_action_space.n
        self.critic = nn.Sequential(
            nn.Linear(obs_dim, 64),
            nn.Tanh(),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, 1),
        )
        self.actor = nn.Sequential(
            nn.Linear(obs_dim, 64),
            nn.Tanh(),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, num_actions),
        )


@contextlib.contextmanager
def adam_with_eps_1e_8():
    """Detail 3 switched off: PyTorch calls this before each step of an optimizer."""

    def set_eps(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            group["eps"] = 1e-8

    hook = register_optimizer_step_pre_hook(set_eps)
    try:
        yield
    finally:
        hook.remove()


def update_without_policy_clipping(
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
    """Detail 8 switched off: ppo.update, but the policy loss is just -A * ratio.

    No flag does that, as --clip-coef is the range of the values, too. They are clipped
    as before, and clipfrac tells how many ratios would have been.
    """
    clipfracs = []
    for _ in range(args.update_epochs):
        np.random.shuffle(b_inds)
        minibatches = torch.as_tensor(b_inds, device=b_obs.device)
        for mb_inds in minibatches.tensor_split(args.num_minibatches):
            newlogprob, entropy, newvalue = agent.evaluate_actions(
                b_obs[mb_inds], b_actions[mb_inds]
            )
            logratio = newlogprob - b_logprobs[mb_inds]
            ratio = logratio.exp()

            mb_advantages = b_advantages[mb_inds]
            if args.norm_adv:
                mean = mb_advantages.mean()
                std = mb_advantages.std()
                mb_advantages = (mb_advantages - mean) / (std + 1e-8)

            pg_loss = (-mb_advantages * ratio).mean()  # this is the difference

            mb_returns = b_returns[mb_inds]
            v_loss = (newvalue - mb_returns) ** 2
            if args.clip_vloss:
                mb_values = b_values[mb_inds]
                v_clipped = mb_values + torch.clamp(
                    newvalue - mb_values, -args.clip_coef, args.clip_coef
                )
                v_loss_clipped = (v_clipped - mb_returns) ** 2
                v_loss = torch.max(v_loss, v_loss_clipped)
            v_loss = 0.5 * v_loss.mean()

            mean_entropy = entropy.mean()
            loss = pg_loss - args.ent_coef * mean_entropy + args.vf_coef * v_loss

            with torch.no_grad():
                old_approx_kl = (-logratio).mean()
                approx_kl = ((ratio - 1) - logratio).mean()
                clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                clipfracs.append(clipfrac)

            optimizer.zero_grad()
            loss.backward()
            ppo.average_gradients(agent)
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()

        if args.target_kl is not None:
            if ppo.mean_over_processes(approx_kl.item()) > args.target_kl:
                break

    y_pred = b_values[b_inds]
    y_true = b_returns[b_inds]
    var_y = y_true.var().item()
    explained_var = np.nan
    if var_y > 0:
        explained_var = 1 - (y_true - y_pred).var().item() / var_y

    stats = {
        "value_loss": v_loss.item(),
        "policy_loss": pg_loss.item(),
        "entropy": mean_entropy.item(),
        "old_approx_kl": old_approx_kl.item(),
        "approx_kl": approx_kl.item(),
        "clipfrac": torch.stack(clipfracs).mean().item(),
        "explained_variance": explained_var,
    }
    return {name: ppo.mean_over_processes(number) for name, number in stats.items()}


def without_policy_clipping():
    """Let train() call the update above, until this context ends."""
    return mock.patch.object(ppo, "update", update_without_policy_clipping)


def main(argv=None):
    """Train with the detail that the first argument names, and return the agent."""
    name, *flags = sys.argv[1:] if argv is None else argv
    if name not in DETAILS:
        sys.exit(f"there is no detail {name}, only: {', '.join(DETAILS)}")
    flags += DETAILS[name].flags.split()
    MINIBATCHES.clear()

    with contextlib.ExitStack() as stack:
        if name == "adam_eps_1e-8":
            stack.enter_context(adam_with_eps_1e_8())
        if name == "no_policy_clipping":
            stack.enter_context(without_policy_clipping())
        try:
            agent_class = TorchInitAgent if name == "torch_init" else Agent
            return ppo.main(flags, Agent=agent_class)
        finally:
            print("minibatches:", *MINIBATCHES)


if __name__ == "__main__":
    main()
