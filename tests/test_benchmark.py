"""The benchmarks measure what they say, and what they saved is complete and makes the saved tables."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from test_exactness import REFERENCE

import ppo
from benchmark import learning


def test_last_100_takes_the_last_100_episodes():
    returns = np.array([1000.0] * 5 + [1.0] * 50 + [3.0] * 50)
    assert learning.last_100(np.arange(105), returns, 500) == 2
    assert learning.last_100(np.arange(5), returns[:5], 500) == 1000  # fewer: all of them


def test_curve_gives_equal_parts_of_a_run_equal_weight(monkeypatch):
    monkeypatch.setattr(learning, "WINDOWS", 4)
    steps, returns = np.array([1.0, 25, 26, 50, 100]), np.array([1.0, 3, 10, 20, 7])
    np.testing.assert_array_equal(learning.curve(steps, returns, 100), [2, 15, np.nan, 7])
    assert learning.curve_mean(steps, returns, 100) == 8


def test_interval_is_that_of_the_mean():
    """Of a hundred coins, fifty heads: the resamples' heads are binomial (100, 1/2), with quantiles 40 and 60."""
    np.testing.assert_allclose(learning.interval([0] * 50 + [1] * 50), [0.4, 0.6])
    np.testing.assert_allclose(learning.interval([[0, 7]] * 50 + [[1, 7]] * 50), [[0.4, 7], [0.6, 7]])


@pytest.mark.parametrize(
    "variant, changed",
    [
        ("default", {}),
        ("no_vectorization", {"num_envs": 1, "num_steps": 512}),
        ("torch_init", {}),
        ("adam_eps_1e-8", {}),
        ("no_anneal_lr", {"anneal_lr": False}),
        ("no_gae", {"gae": False}),
        ("one_minibatch", {"num_minibatches": 1, "minibatch_size": 512}),
        ("no_norm_adv", {"norm_adv": False}),
        ("no_policy_clipping", {}),
        ("no_clip_vloss", {"clip_vloss": False}),
        ("no_entropy_bonus", {"ent_coef": 0}),
        ("no_gradient_clipping", {"max_grad_norm": 1e30}),
        ("target_kl", {"target_kl": 0.015}),
        ("bootstrap_truncation", {"bootstrap_truncation": True}),
    ],
)
def test_variant_changes_the_flags_that_it_names_and_no_others(variant, changed, monkeypatch):
    functions = ("layer_init", "adam", "ppo_loss", "compute_advantages")
    given, original = {}, {name: getattr(ppo, name) for name in functions}
    monkeypatch.setattr(ppo, "train", lambda args: given.update(vars(args) | {n: getattr(ppo, n) for n in functions}))
    learning.run("CartPole-v1", variant, 3, 25000)
    expected = vars(ppo.parse_args(["--seed=3", "--no-cuda"])) | original | learning.VARIANTS[variant][2] | changed
    assert given == expected
    assert {name: getattr(ppo, name) for name in functions} == original  # and puts back what it replaced


def test_torch_init_is_pytorch_s_default(monkeypatch):
    torch.manual_seed(5)
    sizes = [(4, 64), (64, 64), (64, 1), (4, 64), (64, 64), (64, 2)]
    expected = [p for size in sizes for p in torch.nn.Linear(*size).parameters()]
    monkeypatch.setattr(ppo, "layer_init", learning.VARIANTS["torch_init"][2]["layer_init"])
    torch.manual_seed(5)
    for p, q in zip(ppo.Agent(4, 2).parameters(), expected, strict=True):
        assert p.equal(q)


def test_adam_eps_changes_only_the_epsilon():
    given = []
    adam = learning.VARIANTS["adam_eps_1e-8"][2]["adam"]
    adam("params", "grads", adam=lambda *state, **options: given.append((state, options)), lr=0.1, eps=1e-5)
    assert given == [(("params", "grads"), {"lr": 0.1, "eps": 1e-8})]


def test_no_policy_clipping_unclips_the_policy_loss_and_leaves_the_rest():
    args, generator = ppo.parse_args([]), torch.Generator().manual_seed(1)
    logprobs, advantages, returns, values = torch.randn((4, 64), generator=generator)
    new = (*torch.randn((3, 64), generator=generator).requires_grad_(),)  # log-probabilities, entropies and values
    loss, stats = learning.loss_without_policy_clipping(*new, logprobs, advantages, returns, values, args)
    clipped_loss, clipped = ppo.ppo_loss(*new, logprobs, advantages, returns, values, args)
    assert clipped["clipfrac"] > 0.5
    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = -(normalized * (new[0] - logprobs).exp()).mean()
    torch.testing.assert_close(stats.pop("policy_loss"), policy_loss)
    torch.testing.assert_close(loss, clipped_loss - clipped.pop("policy_loss") + policy_loss)
    assert stats == clipped
    grads = [torch.autograd.grad(x, new, retain_graph=True) for x in (loss, clipped_loss)]
    torch.testing.assert_close(grads[0][0], torch.autograd.grad(policy_loss, new[0], retain_graph=True)[0])
    assert not torch.allclose(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1:], grads[1][1:])


def test_default_run_is_the_reference_and_a_replacement_changes_it():
    rows = [(int(r["global_step"]), float(r["episodic_return"])) for r in csv.DictReader(REFERENCE.open())]
    assert learning.run("CartPole-v1", "default", 1, 25000) == (rows, "")
    for variant in ("torch_init", "adam_eps_1e-8"):
        episodes, error = learning.run("CartPole-v1", variant, 1, 2048)
        assert episodes and not error and episodes != rows[: len(episodes)]


def test_a_run_that_diverges_is_an_error_not_the_end(monkeypatch):
    monkeypatch.setitem(learning.VARIANTS, "default", ("", "--learning-rate 1e30 --no-norm-adv", {}))
    episodes, error = learning.run("CartPole-v1", "default", 1, 2048)
    assert re.match(r"error: update \d+ .* diverged", error)


def test_runs_are_saved_and_not_repeated_and_failures_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "STUDIES", {"learning": (1024, ("CartPole-v1", "Nope-v0"), ("default",))})
    monkeypatch.setattr(learning, "machine", lambda: "a machine")
    nope = [("learning", "Nope-v0", "default", seed) for seed in (1, 2)]
    assert len(learning.run_all(tmp_path, seeds=2, workers=1, divisor=1)) == 4
    runs = learning.read_runs(tmp_path, "learning", "CartPole-v1", "default")
    for seed in (1, 2):
        steps, returns = runs[seed]
        assert list(zip(steps, returns, strict=True)) == learning.run("CartPole-v1", "default", seed, 1024)[0]
    (saved,) = tmp_path.glob("learning/*")
    before = saved.read_bytes()
    assert learning.run_all(tmp_path, seeds=2, workers=1, divisor=1) == nope
    assert saved.read_bytes() == before
    facts = json.loads((tmp_path / "learning_facts.json").read_text())
    assert sorted(facts["failed"]) == [" ".join(map(str, job)) for job in nope]
    assert all("Nope" in error for error in facts["failed"].values())


def test_returns_are_saved_to_two_decimals_and_come_back(tmp_path):
    job = (tmp_path, "learning", "LunarLander-v3", "default")
    learning.save_run(*job, 2, [(7, -1234.57), (1_000_001, 2.0)])
    learning.save_run(*job, 1, [(9, 0.25)])
    runs = learning.read_runs(*job)
    assert {s: np.transpose(x).tolist() for s, x in runs.items()} == {
        1: [[9, 0.25]],
        2: [[7, -1234.57], [1_000_001, 2]],
    }
    other = (tmp_path / "other", *job[1:])
    learning.save_run(*other, 1, [(9, 0.25)])
    learning.save_run(*other, 2, [(7, -1234.57), (1_000_001, 2.0)])
    assert learning.path_of(*job).read_bytes() == learning.path_of(*other).read_bytes()


def test_what_is_saved_is_complete_and_makes_the_saved_tables(tmp_path):
    for study, (_, env_ids, variants) in learning.STUDIES.items():
        for env_id in env_ids:
            for variant in variants:
                assert list(learning.read_runs(learning.RESULTS, study, env_id, variant)) == list(range(1, 11))
    shutil.copytree(learning.RESULTS, tmp_path / "results")
    learning.write_tables(tmp_path / "results")
    for name in ("learning.md", "ablations.md"):
        assert (tmp_path / "results" / name).read_text() == (learning.RESULTS / name).read_text()
