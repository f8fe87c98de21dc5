"""update() does what the formulas say: losses, gradients and debug variables.

With plain gradient descent at a learning rate of 1, the change of a parameter is its
gradient. The agent here has one of each kind for each sample, so that the gradients
are seen sample by sample.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import ppo

ONE_STEP = "--num-minibatches 1 --update-epochs 1 --max-grad-norm 1000 "


class Table(torch.nn.Module):
    """Looks log-probabilities, entropies and values up. Observation i is sample i."""

    def __init__(self, batch):
        super().__init__()
        self.logprobs = torch.nn.Parameter(torch.tensor(batch.newlogprobs))
        self.entropies = torch.nn.Parameter(torch.tensor(batch.entropies))
        self.values = torch.nn.Parameter(torch.tensor(batch.newvalues))
        self.minibatches = []

    def evaluate_actions(self, obs, action):
        self.minibatches.append(obs.tolist())
        return self.logprobs[obs], self.entropies[obs], self.values[obs]


def random_batch(size=64):
    """A batch whose ratios and values lie on all sides of the clip range."""
    normal = np.random.default_rng(0).normal
    logprobs = normal(size=size)
    values = normal(size=size)
    return SimpleNamespace(
        logprobs=logprobs,
        newlogprobs=logprobs + normal(0, 0.4, size),
        values=values,
        newvalues=values + normal(0, 0.4, size),
        advantages=normal(size=size),
        returns=normal(size=size),
        entropies=normal(size=size),
    )


def batch_of(advantage=0.0, logratio=0.0, newvalue=0.0, returns=0.0, size=2):
    """A batch of equal samples, whose old values are 0."""
    zeros = np.zeros(size)
    return SimpleNamespace(
        logprobs=zeros - 1,
        newlogprobs=zeros - 1 + logratio,
        values=zeros,
        newvalues=zeros + newvalue,
        advantages=zeros + advantage,
        returns=zeros + returns,
        entropies=zeros,
    )


def part_of(batch, inds):
    return SimpleNamespace(**{name: x[inds] for name, x in vars(batch).items()})


def learn(batch, flags, learning_rate=1.0, inds=None, Agent=Table):
    """Let update() learn from the batch; returns the agent and update()'s numbers."""
    agent = Agent(batch)
    size = len(batch.logprobs)
    stats = ppo.update(
        ppo.parse_args(flags.split()),
        agent,
        torch.optim.SGD(agent.parameters(), lr=learning_rate),
        b_inds=np.arange(size) if inds is None else inds.copy(),
        b_obs=torch.arange(size),
        b_actions=torch.zeros(size),
        b_logprobs=torch.tensor(batch.logprobs),
        b_advantages=torch.tensor(batch.advantages),
        b_returns=torch.tensor(batch.returns),
        b_values=torch.tensor(batch.values),
    )
    return agent, stats


def gradients(batch, flags, **options):
    """The gradients by log-probabilities, entropies and values; update()'s numbers."""
    agent, stats = learn(batch, flags, **options)
    return (
        batch.newlogprobs - agent.logprobs.detach().numpy(),
        batch.entropies - agent.entropies.detach().numpy(),
        batch.newvalues - agent.values.detach().numpy(),
        stats,
    )


def expected_update(batch, flags):
    """The formulas, written with numpy: the same as gradients() returns."""
    args = ppo.parse_args(flags.split())
    size = len(batch.logprobs)

    advantages = batch.advantages
    if args.norm_adv:
        advantages = advantages - np.mean(advantages)
        advantages = advantages / (np.std(advantages, ddof=1) + 1e-8)
    ratios = np.exp(batch.newlogprobs - batch.logprobs)
    above = ratios > 1 + args.clip_coef
    below = ratios < 1 - args.clip_coef
    likely_enough = above & (advantages > 0)
    rare_enough = below & (advantages < 0)
    objectives = ratios * advantages
    slopes = -objectives / size
    objectives[likely_enough] = (1 + args.clip_coef) * advantages[likely_enough]
    objectives[rare_enough] = (1 - args.clip_coef) * advantages[rare_enough]
    slopes[likely_enough | rare_enough] = 0

    errors = batch.newvalues - batch.returns
    value_slopes = args.vf_coef * errors / size
    if args.clip_vloss:
        low = batch.values - args.clip_coef
        high = batch.values + args.clip_coef
        clipped_errors = np.clip(batch.newvalues, low, high) - batch.returns
        flat = np.abs(clipped_errors) > np.abs(errors)
        errors = np.where(flat, clipped_errors, errors)
        value_slopes[flat] = 0

    unforeseen = np.var(batch.returns - batch.values)
    stats = {
        "policy_loss": -np.mean(objectives),
        "value_loss": np.mean(errors**2) / 2,
        "entropy": np.mean(batch.entropies),
        "old_approx_kl": -np.mean(np.log(ratios)),
        "approx_kl": np.mean(ratios - 1 - np.log(ratios)),
        "clipfrac": np.mean(above | below),
        "explained_variance": 1 - unforeseen / np.var(batch.returns),
    }
    return slopes, np.full(size, -args.ent_coef / size), value_slopes, stats


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--no-norm-adv",
        "--no-clip-vloss",
        "--no-clip-vloss --clip-coef 0.4",
        "--clip-coef 0.1 --no-norm-adv",
        "--ent-coef 0.3 --vf-coef 0.7",
        "--ent-coef 0 --vf-coef 0",
    ],
)
def test_losses_and_gradients_equal_the_formulas_for_each_sample(flags):
    batch = random_batch()
    *found, stats = gradients(batch, ONE_STEP + flags)
    *expected, expected_stats = expected_update(batch, flags)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert stats == pytest.approx(expected_stats, rel=1e-5)


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (2, 1.0, -2.0, -2.0),  # the policy gradient: A * grad log pi
        (2, 1.1, -2.2, -2.2),
        (2, 1.5, -2.4, 0.0),  # likely enough
        (2, 0.5, -1.0, -1.0),  # pulled back up
        (-2, 1.0, 2.0, 2.0),
        (-2, 0.9, 1.8, 1.8),
        (-2, 0.5, 1.6, 0.0),  # rare enough
        (-2, 1.5, 3.0, 3.0),  # pushed back down
    ],
)
def test_the_policy_loss_is_flat_only_beyond_the_range_on_the_good_side(
    advantage, ratio, loss, slope
):
    batch = batch_of(advantage, logratio=math.log(ratio))
    by_logprob, _, _, stats = gradients(batch, ONE_STEP + "--no-norm-adv")
    assert stats["policy_loss"] == pytest.approx(loss)
    assert by_logprob.sum() == pytest.approx(slope)


@pytest.mark.parametrize(
    "newvalue, loss, slope",
    [
        (0.1, 0.81, -0.9),
        (0.5, 0.64, 0.0),  # further than 0.2 towards the return of 1 gains nothing
        (-0.5, 2.25, -1.5),  # away from it is not clipped
        (2.5, 2.25, 1.5),  # too far beyond it is not, either
    ],
)
def test_the_value_loss_is_flat_only_beyond_the_range_and_nearer_to_the_return(
    newvalue, loss, slope
):
    batch = batch_of(newvalue=newvalue, returns=1.0)
    _, _, by_value, stats = gradients(batch, ONE_STEP + "--vf-coef 1")
    assert stats["value_loss"] == pytest.approx(0.5 * loss)
    assert by_value.sum() == pytest.approx(slope)


def test_equal_advantages_are_normalized_to_0():
    by_logprob, *_ = gradients(batch_of(advantage=3.0), ONE_STEP)
    assert (by_logprob == 0).all()


def test_both_kl_estimates_agree_with_the_divergence_from_old_to_new():
    torch.manual_seed(1)
    old = Categorical(logits=torch.tensor([0.5, -1.0, 2.0, 0.0]).double())
    new = Categorical(logits=old.logits + torch.tensor([0.0, 3.0, 0.0, 0.5]))
    forwards = kl_divergence(old, new).item()
    backwards = kl_divergence(new, old).item()
    assert abs(forwards / backwards - 1) > 0.2  # else the test could not tell

    actions = old.sample((400_000,))
    batch = batch_of(size=len(actions))
    batch.logprobs = old.log_prob(actions).numpy()
    batch.newlogprobs = new.log_prob(actions).numpy()
    _, stats = learn(batch, ONE_STEP)
    assert stats["old_approx_kl"] == pytest.approx(forwards, rel=0.02)
    assert stats["approx_kl"] == pytest.approx(forwards, rel=0.02)


def test_clipfrac_is_the_mean_of_all_minibatches_and_the_others_are_the_last_one_s():
    batch = random_batch()
    flags = "--num-minibatches 4 --update-epochs 3"
    agent, stats = learn(batch, flags, learning_rate=0.0)
    *_, of_all = expected_update(batch, flags)
    *_, of_last = expected_update(part_of(batch, agent.minibatches[-1]), flags)
    assert of_last["clipfrac"] != of_all["clipfrac"]

    for name in ("clipfrac", "explained_variance"):
        of_last[name] = of_all[name]
    assert stats == pytest.approx(of_last, rel=1e-5)


def test_only_the_samples_of_b_inds_count():
    batch = random_batch()
    inds = np.arange(0, 64, 2)
    *found, stats = gradients(batch, ONE_STEP, inds=inds)
    *expected, expected_stats = expected_update(part_of(batch, inds), "")
    for numbers, half in zip(found, expected, strict=True):
        np.testing.assert_allclose(numbers[inds], half, atol=1e-12)
        assert (numbers[1::2] == 0).all()
    assert stats == pytest.approx(expected_stats, rel=1e-5)


@pytest.mark.parametrize("size", [64, 63])
def test_every_sample_is_used_once_per_epoch_in_a_new_order(size):
    np.random.seed(1)
    agent, _ = learn(random_batch(size), "--num-minibatches 4 --update-epochs 3")
    assert len(agent.minibatches) == 12
    assert {len(minibatch) for minibatch in agent.minibatches} <= {15, 16}

    epochs = np.concatenate(agent.minibatches).reshape(3, size).tolist()
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_each_minibatch_takes_a_step_along_its_own_gradient_alone():
    batch = random_batch()
    flags = "--num-minibatches 2 --update-epochs 1 --no-norm-adv --max-grad-norm 1000"
    in_two, *_ = gradients(batch, flags)
    in_one, *_ = gradients(batch, flags + " --num-minibatches 1")
    np.testing.assert_allclose(in_two, 2 * in_one, atol=1e-12)


def test_the_gradients_of_all_parameters_are_clipped_as_one_vector():
    batch = random_batch()
    free = np.concatenate(gradients(batch, ONE_STEP)[:3])
    length = np.linalg.norm(free)
    assert length > 0.05

    clipped = np.concatenate(gradients(batch, ONE_STEP + "--max-grad-norm 0.05")[:3])
    np.testing.assert_allclose(clipped, 0.05 * free / length, rtol=1e-4)

    longest = f"--max-grad-norm {1.01 * length}"
    untouched = np.concatenate(gradients(batch, ONE_STEP + longest)[:3])
    np.testing.assert_allclose(untouched, free, rtol=1e-9)


def moving(*logratios):
    """A Table whose log-probabilities are so much higher in each minibatch."""

    class Moving(Table):
        def evaluate_actions(self, obs, action):
            logratio = logratios[len(self.minibatches)]
            logprobs, entropies, values = super().evaluate_actions(obs, action)
            return logprobs + logratio, entropies, values

    return Moving


# The estimate of the KL divergence is 0.105 for 0.4, 0.070 for -0.4, 0.005 for 0.1.
@pytest.mark.parametrize(
    "logratios, target_kl, minibatches",
    [
        ((0, 0, 0, 0, 0, 0.4, 0, 0), 0.02, 6),  # after the third epoch
        ((0, 0, 0, -0.4, 0, 0, 0, 0), 0.02, 4),
        ((0.4, 0, 0.4, 0, 0.4, 0, 0.4, 0), 0.02, 8),  # never in an epoch's last one
        ((0, 0.1, 0, 0.1, 0, -0.1, 0, 0.1), 0.02, 8),  # never far enough
        ((0, 0.4, 0, 0.4, 0, 0.4, 0, 0.4), None, 8),
    ],
)
def test_early_stopping_after_an_epoch_whose_last_minibatch_is_beyond_target_kl(
    logratios, target_kl, minibatches
):
    agent, stats = learn(
        batch_of(),
        f"--num-minibatches 2 --update-epochs 4 --no-norm-adv --target-kl {target_kl}",
        learning_rate=0.0,
        Agent=moving(*logratios),
    )
    assert len(agent.minibatches) == minibatches
    last = logratios[minibatches - 1]
    assert stats["approx_kl"] == pytest.approx(math.exp(last) - 1 - last)
