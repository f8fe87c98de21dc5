"""What the plain programs of the variants share: advantages, and a gradient step.

tests/reference/plain.py has both for itself, so that it can be read as a whole.
"""

import torch
import torch.nn as nn


def advantages_and_returns(args, rewards, dones, values, next_done, next_value):
    """Both as (num_steps, num_envs), from step to step backwards in time."""
    gae_lambda = args.gae_lambda if args.gae else 1.0
    advantages = torch.zeros_like(rewards)
    last = 0
    for t in reversed(range(args.num_steps)):
        if t == args.num_steps - 1:
            nonterminal = 1.0 - next_done
            following = next_value
        else:
            nonterminal = 1.0 - dones[t + 1]
            following = values[t + 1]
        delta = rewards[t] + args.gamma * following * nonterminal - values[t]
        last = delta + args.gamma * gae_lambda * nonterminal * last
        advantages[t] = last
    return advantages, advantages + values


def gradient_step(args, agent, optimizer, new, old):
    """Take one step of Adam, and return the KL divergence from the old policy.

    ``new`` are log-probabilities, entropies and values of a minibatch by the agent of
    now. ``old`` are the log-probabilities, advantages, returns and values of before.
    """
    newlogprob, entropy, newvalue = new
    oldlogprob, advantages, returns, oldvalue = old
    logratio = newlogprob - oldlogprob
    ratio = logratio.exp()
    with torch.no_grad():
        approx_kl = ((ratio - 1) - logratio).mean()

    if args.norm_adv:
        deviation = advantages.std()
        advantages = advantages - advantages.mean()
        advantages = advantages / (deviation + 1e-8)

    loss1 = -advantages * ratio
    loss2 = -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(loss1, loss2).mean()

    newvalue = newvalue.view(-1)
    v_loss = (newvalue - returns) ** 2
    if args.clip_vloss:
        change = (newvalue - oldvalue).clamp(-args.clip_coef, args.clip_coef)
        clipped = (oldvalue + change - returns) ** 2
        v_loss = torch.max(v_loss, clipped)
    v_loss = 0.5 * v_loss.mean()

    loss = pg_loss - args.ent_coef * entropy.mean() + v_loss * args.vf_coef
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    return approx_kl
