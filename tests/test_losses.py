"""The loss equals the published formulas, its gradient plain autograd's, and each flag touches only its own term."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import ppo

DEFAULTS = {"norm_adv": True, "clip_coef": 0.2, "clip_vloss": True, "ent_coef": 0.01, "vf_coef": 0.5}


def minibatch(size=64, num_actions=3):
    """Inputs whose ratios and values lie on all sides of the clip range."""
    generator = torch.Generator().manual_seed(0)
    old_logits = torch.randn(size, num_actions, generator=generator)
    logits = (old_logits + 0.5 * torch.randn(size, num_actions, generator=generator)).requires_grad_()
    actions = torch.randint(num_actions, (size,), generator=generator)
    values = torch.randn(size, generator=generator)
    newvalue = (values + 0.4 * torch.randn(size, generator=generator)).requires_grad_()
    advantages, returns = torch.randn(2, size, generator=generator)
    return SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("generator", "size", "num_actions")})


def loss_of(m, **changes):
    policy, old = Categorical(logits=m.logits), Categorical(logits=m.old_logits)
    args = SimpleNamespace(**(DEFAULTS | changes))
    return ppo.ppo_loss(
        policy.log_prob(m.actions), policy.entropy(), m.newvalue, old.log_prob(m.actions), m.advantages, m.returns,
        m.values, args,
    )  # fmt: skip


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_loss_and_gradient_equal_a_sample_by_sample_computation(norm_adv, clip_vloss):
    m = minibatch()
    loss, stats = loss_of(m, norm_adv=norm_adv, clip_vloss=clip_vloss)
    gradients = torch.autograd.grad(loss, (m.logits, m.newvalue))

    advantages = m.advantages
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (torch.tensor(np.std(advantages.numpy(), ddof=1)) + 1e-8)
    pg, v, entropy = [], [], []
    for i in range(len(advantages)):
        probs, old_probs = torch.softmax(m.logits[i], 0), torch.softmax(m.old_logits[i], 0)
        ratio = probs[m.actions[i]] / old_probs[m.actions[i]]
        objective = ratio * advantages[i]
        if advantages[i] > 0 and ratio > 1.2:
            objective = torch.tensor(1.2) * advantages[i]
        if advantages[i] < 0 and ratio < 0.8:
            objective = torch.tensor(0.8) * advantages[i]
        pg.append(-objective)
        error = (m.newvalue[i] - m.returns[i]) ** 2
        step = m.newvalue[i] - m.values[i]
        clipped_error = (m.values[i] + min(max(step, torch.tensor(-0.2)), torch.tensor(0.2)) - m.returns[i]) ** 2
        v.append(0.5 * (max(error, clipped_error) if clip_vloss else error))
        entropy.append(-(probs * probs.log()).sum())
    pg, v, entropy = (torch.stack(x).mean() for x in (pg, v, entropy))
    expected = pg - 0.01 * entropy + 0.5 * v

    torch.testing.assert_close(loss, expected)
    for name, value in (("policy_loss", pg), ("value_loss", v), ("entropy", entropy)):
        torch.testing.assert_close(stats[name], value)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (m.logits, m.newvalue)), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_clipfrac_counts_ratios_outside_and_kl_estimates_agree_with_the_exact_divergence():
    generator = torch.Generator().manual_seed(1)
    old_logits, size = torch.randn(1, 4, generator=generator).expand(200_000, 4), 200_000
    logits = old_logits + torch.tensor([0.3, -0.2, 0.1, 0.0])
    old, new = Categorical(logits=old_logits), Categorical(logits=logits)
    actions = torch.multinomial(old.probs[:1].flatten(), size, replacement=True, generator=generator)
    zeros = torch.zeros(size)
    inputs = (new.log_prob(actions), zeros, zeros, old.log_prob(actions), torch.randn(size), zeros, zeros)
    _, stats = ppo.ppo_loss(*inputs, SimpleNamespace(**DEFAULTS))
    exact = float(kl_divergence(old, new)[0])
    assert float(stats["old_approx_kl"]) == pytest.approx(exact, rel=0.05)
    assert float(stats["approx_kl"]) == pytest.approx(exact, rel=0.05)
    ratio = (inputs[0] - inputs[3]).exp()
    assert float(stats["clipfrac"]) == pytest.approx(float(((ratio < 0.8) | (ratio > 1.2)).float().mean()), abs=1e-6)
    assert 0 < float(stats["clipfrac"]) < 1


@pytest.mark.parametrize(
    "change, changed",
    [
        ({"norm_adv": False}, {"loss", "policy_loss"}),
        ({"clip_coef": 0.3}, {"loss", "policy_loss", "value_loss", "clipfrac"}),
        ({"clip_coef": 0.3, "clip_vloss": False}, {"loss", "policy_loss", "value_loss", "clipfrac"}),
        ({"clip_vloss": False}, {"loss", "value_loss"}),
        ({"ent_coef": 0.02}, {"loss"}),
        ({"vf_coef": 1.0}, {"loss"}),
    ],
)
def test_each_coefficient_changes_its_own_terms_and_no_other(change, changed):
    m = minibatch()
    terms = [{"loss": loss, **stats} for loss, stats in (loss_of(m), loss_of(m, **change))]
    assert {name for name in terms[0] if not terms[0][name].equal(terms[1][name])} == changed


def test_clip_coef_leaves_the_value_loss_alone_when_it_is_not_clipped():
    m = minibatch()
    values = [loss_of(m, clip_coef=c, clip_vloss=False)[1]["value_loss"] for c in (0.1, 0.3)]
    assert values[0].equal(values[1])


def test_diagnostics_carry_no_gradient():
    stats = loss_of(minibatch())[1]
    assert not any(stats[name].requires_grad for name in ("old_approx_kl", "approx_kl", "clipfrac"))
