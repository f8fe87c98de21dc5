"""The benchmarks measure what they say, and what they saved is complete and makes the saved tables."""

import csv
import json
import math
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_exactness import REFERENCE

import ppo
from benchmark import learning, study
from variants import atari, continuous_action


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
        ("no_vectorization", {"num_envs": 1, "local_num_envs": 1, "num_steps": 512}),
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
    def functions():
        return {
            "ppo.layer_init": ppo.layer_init,
            "torch.optim.Adam": torch.optim.Adam,
            "ppo.ppo_loss": ppo.ppo_loss,
            "ppo.compute_advantages": ppo.compute_advantages,
        }

    given, original = {}, functions()
    monkeypatch.setattr(ppo, "train", lambda args, *_: given.update(vars(args) | functions()))
    learning.run("CartPole-v1", variant, 3, 25000)
    expected = vars(ppo.parse_args(["--seed=3", "--no-cuda", "--checkpoint-interval=0"]))
    assert given == expected | original | learning.VARIANTS[variant][2] | changed
    assert functions() == original  # and puts back what it replaced


def test_torch_init_is_pytorch_s_default(monkeypatch):
    torch.manual_seed(5)
    sizes = [(4, 64), (64, 64), (64, 1), (4, 64), (64, 64), (64, 2)]
    expected = [p for size in sizes for p in torch.nn.Linear(*size).parameters()]
    monkeypatch.setattr(ppo, "layer_init", learning.VARIANTS["torch_init"][2]["ppo.layer_init"])
    torch.manual_seed(5)
    spaces = {"single_observation_space": SimpleNamespace(shape=(4,)), "single_action_space": SimpleNamespace(n=2)}
    for p, q in zip(ppo.Agent(SimpleNamespace(**spaces)).parameters(), expected, strict=True):
        assert p.equal(q)


def test_adam_eps_changes_only_the_epsilon():
    given = []
    adam = learning.VARIANTS["adam_eps_1e-8"][2]["torch.optim.Adam"]
    adam("params", adam=lambda *params, **options: given.append((params, options)), lr=0.1, eps=1e-5, fused=True)
    assert given == [(("params",), {"lr": 0.1, "eps": 1e-8, "fused": True})]


def test_no_policy_clipping_unclips_the_policy_loss_and_leaves_the_rest():
    args, generator = ppo.parse_args([]), torch.Generator().manual_seed(1)
    logprobs, advantages, returns, values = torch.randn((4, 64), generator=generator)
    new = (*torch.randn((3, 64), generator=generator).requires_grad_(),)  # log-probabilities, entropies and values
    loss, stats = learning.loss_without_policy_clipping(*new, logprobs, advantages, returns, values, args)
    clipped_loss, clipped = ppo.ppo_loss(*new, logprobs, advantages, returns, values, args)
    assert clipped["clipfrac"] > 0.5
    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = -(normalized * (new[0] - logprobs).exp()).mean()
    torch.testing.assert_close(stats.pop("policy_loss"), policy_loss.detach())
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


@pytest.mark.parametrize("variant, module", [("continuous_action", continuous_action), ("atari", atari)])
def test_variants_are_trained_as_their_programs_do(variant, module, monkeypatch):
    given = []
    monkeypatch.setattr(ppo, "train", lambda *args: given.append(args))
    learning.run("SomeEnv-v0", variant, 3, 50000)
    flags = "--env-id SomeEnv-v0 --seed 3 --total-timesteps 50000 --no-cuda --checkpoint-interval 0"
    assert given == [(ppo.parse_args(flags.split(), **module.DEFAULTS), module.make_envs, module.Agent)]


def test_a_run_that_diverges_is_an_error_not_the_end(monkeypatch):
    monkeypatch.setitem(learning.VARIANTS, "default", ("", "--learning-rate 1e30 --no-norm-adv", {}))
    episodes, error = learning.run("CartPole-v1", "default", 1, 2048)
    assert re.match(r"error: update \d+ .* diverged", error)


def test_runs_are_saved_and_not_repeated_and_failures_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "STUDIES", {"learning": (1024, 2, ("CartPole-v1", "Nope-v0"), ("default",))})
    monkeypatch.setattr(learning, "machine", lambda: "a machine")
    nope = [("learning", "Nope-v0", "default", seed) for seed in (1, 2)]
    assert len(learning.run_all(tmp_path, ["learning"], seeds=3, workers=1, divisor=1)) == 4  # of 2 seeds
    runs = learning.read_runs(tmp_path, "learning", "CartPole-v1", "default")
    for seed in (1, 2):
        steps, returns = runs[seed]
        assert list(zip(steps, returns, strict=True)) == learning.run("CartPole-v1", "default", seed, 1024)[0]
    (saved,) = tmp_path.glob("learning/*")
    before = saved.read_bytes()
    assert learning.run_all(tmp_path, ["learning"], seeds=2, workers=1, divisor=1) == nope
    assert saved.read_bytes() == before
    facts = json.loads((tmp_path / "learning_facts.json").read_text())
    assert sorted(facts["failed"]) == [" ".join(map(str, job)) for job in nope]
    assert all("Nope" in error for error in facts["failed"].values())


def test_an_error_ends_the_calls_that_have_not_begun(tmp_path):
    calls = {0: (-1,)} | {i: (0.1,) for i in range(1, 500)}
    start = time.perf_counter()
    with pytest.raises(ValueError):  # nobody sleeps less than no time
        list(learning.in_parallel(time.sleep, calls, 1))
    assert time.perf_counter() - start < 25


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
    for name, (_, seeds, env_ids, variants) in learning.STUDIES.items():
        for env_id in env_ids:
            for variant in variants:
                assert list(learning.read_runs(learning.RESULTS, name, env_id, variant)) == list(range(1, seeds + 1))
    shutil.copytree(learning.RESULTS, tmp_path / "results")
    learning.write_tables(tmp_path / "results")
    for name in ("learning.md", "ablations.md"):
        assert (tmp_path / "results" / name).read_text() == (learning.RESULTS / name).read_text()


def row(mean_return=0.0, error="", **values):
    return dict.fromkeys(study.MEASURES, 1.0) | {"mean_return": mean_return, "error": error} | values


def made_up(returns):
    """Rows of {variant: {rate: [return of seed 1, of seed 2, ...]}}."""
    return {
        (variant, rate, seed): row(value)
        for variant, rates in returns.items()
        for rate, values in rates.items()
        for seed, value in enumerate(values, 1)
    }


def test_study_trains_as_it_says_and_measures_what_the_run_logged(monkeypatch):
    given, train = [], ppo.train
    monkeypatch.setattr(ppo, "train", lambda args, *parts: given.append(args) or train(args, *parts))
    variants = ("default", "no_policy_clipping")
    measured = [study.run("CartPole-v1", "reuse", variant, 30, 2, 2048) for variant in variants]
    expected = "--num-envs 16 --num-steps 32 --vectorization-mode vector_entry_point --update-epochs 10 --seed 2"
    expected += " --total-timesteps 2048 --learning-rate 0.0075 --no-cuda --checkpoint-interval 0"
    assert given == [ppo.parse_args(expected.split())] * 2
    for values in measured:
        assert list(values) == list(study.MEASURES)
        assert values["error"] == "" and values["epochs"] == 10 and values["ended_early"] == 0
        assert 0 < values["kl_median"] <= values["kl_max"] and 0 < values["clipfrac"] < 1
        assert 9 < values["mean_return"] < 500 and values["explained_variance"] < 1
    assert measured[0] != measured[1] and measured[0] == study.run("CartPole-v1", "reuse", "default", 30, 2, 2048)


def test_study_reads_one_value_for_each_update(tmp_path):
    flags = "--total-timesteps 2048 --num-envs 2 --num-steps 128"
    episodes, error = learning.train(tmp_path, flags, {})
    scalars = study.read_scalars(tmp_path)
    assert len(episodes) > 0 and error == ""
    assert {len(values) for values in scalars.values()} == {8}
    assert set(scalars) > {"losses/approx_kl", "losses/clipfrac", "losses/explained_variance"}
    assert study.read_scalars(tmp_path / "nothing") == {}


def test_study_counts_epochs_that_target_kl_left_out(monkeypatch):
    monkeypatch.setitem(study.VARIANTS, "target_kl", ("", "--target-kl 0", {}))
    measured = study.run("CartPole-v1", "rates", "target_kl", 3, 1, 1024)
    assert (measured["epochs"], measured["ended_early"]) == (1, 1)


def test_study_a_diverged_run_is_a_result_and_any_other_failure_is_not(monkeypatch):
    monkeypatch.setitem(study.VARIANTS, "default", ("", "--no-norm-adv", {}))
    measured = study.run("CartPole-v1", "rates", "default", 1e33, 1, 1024)
    assert re.match(r"error: update \d+ .* diverged", measured["error"])
    assert measured["last_100"] == 20
    monkeypatch.setitem(study.VARIANTS, "default", ("", "--no-such-flag", {}))
    with pytest.raises(RuntimeError, match="no-such-flag"):
        study.run("CartPole-v1", "rates", "default", 1, 1, 1024)


def test_study_what_a_diverged_run_did_not_reach_counts_as_untrained(monkeypatch):
    monkeypatch.setattr(learning, "WINDOWS", 4)
    episodes = [(10, 30.0), (20, 50.0), (40, 100.0)]
    assert study.returns("CartPole-v1", episodes, "", 100) == {"mean_return": 70, "last_100": 60}
    assert study.returns("CartPole-v1", episodes, "diverged", 100) == {"mean_return": 45, "last_100": 20}
    assert study.returns("CartPole-v1", [], "diverged", 100) == {"mean_return": 20, "last_100": 20}


def test_study_where_no_episode_ended_those_that_ended_next_count(monkeypatch):
    monkeypatch.setattr(learning, "WINDOWS", 4)
    episodes = [(10, -50.0), (60, -20.0), (60, -10.0)]  # none from 25 to 50, none at the end
    assert study.returns("Acrobot-v1", episodes, "", 100)["mean_return"] == (-50 - 15 - 15) / 3


def test_study_rows_are_saved_and_come_back_in_any_order(tmp_path):
    (tmp_path / "other").mkdir()
    rows = {("target_kl", 1, 2): row(12.25, kl_max=math.inf), ("default", 30, 1): row(-7.5, "error: a, b")}
    for results, keys in ((tmp_path, list(rows)), (tmp_path / "other", list(rows)[::-1])):
        for key in keys:
            study.save_row(results, "Acrobot-v1", "rates", key, rows[key])
        assert study.read_rows(results, "Acrobot-v1", "rates") == rows
    paths = [study.path_of(results, "Acrobot-v1", "rates") for results in (tmp_path, tmp_path / "other")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_study_effects_are_paired_by_seed():
    rows = made_up({"default": {1: [10, 20, 30]}, "no_gae": {1: [11, 23]}})
    assert study.effect(rows, "no_gae", 1) == [1, 3]
    assert study.effect(rows, "no_gae", 3) == []
    assert study.describe([1, 3]) == "**+2 (+1 to +3)**"
    assert study.describe([-1, 3]) == "+1 (-1 to +3)"
    assert not study.excludes_zero([1]) and not study.excludes_zero([0, 0])


def test_study_best_rate_is_chosen_on_the_other_half_of_the_seeds():
    default = {1: [1, 9], 3: [4, 2]}  # seed 1 chooses rate 3, seed 2 rate 1
    ours = {1: [0, 0], 3: [7, 6]}
    rows = made_up({"default": default, "no_gae": ours})
    values, chosen = study.at_best_rate(rows, "default")
    assert (values, chosen) == ({1: 1, 2: 2}, {1: 1, 3: 1})
    assert study.effect_at_best(rows, "no_gae") == [6, 4]


def test_study_best_rate_is_the_mean_over_all_ways_to_halve_the_seeds():
    rows = made_up({"default": {1: [0, 0, 0, 12], 3: [3, 3, 3, 3]}})  # 1 is the best for halves with seed 4
    values, chosen = study.at_best_rate(rows, "default")
    assert (values, chosen) == ({1: 1, 2: 1, 3: 1, 4: 3}, {1: 3, 3: 3})


def test_study_shares_are_of_the_default_s_best_above_an_untrained_agent():
    rows = made_up({"default": {1: [50, 90], 3: [110, 130]}, "no_gae": {1: [20, 20], 3: [110, 110]}})
    assert study.shares(rows, "default", 20) == {1: 0.5, 3: 1}
    assert study.shares(rows, "no_gae", 20) == {1: 0, 3: 0.9}
    assert "| 0% | **90%** |" in study.summary_table(rows, ("default", "no_gae"), 20)


def test_study_a_run_failed_if_it_ends_like_an_untrained_agent():
    assert study.failed(row(last_100=-450), -500) and not study.failed(row(last_100=-449), -500)
    assert study.failed(row(last_100=22), 20) and not study.failed(row(last_100=23), 20)
    assert study.failed(row(last_100=500, error="error: diverged"), 20)


def test_study_runs_are_not_repeated_and_make_tables(tmp_path, monkeypatch):
    setting = (150_000, study.BATCHED, (1, 30), ("default", "target_kl"))
    monkeypatch.setattr(study, "SETTINGS", {("CartPole-v1", "rates"): setting})
    options = {"env_ids": ["CartPole-v1"], "workers": 1, "divisor": 150}
    assert len(study.run_all(tmp_path, seeds=1, **options)) == 4
    jobs = study.run_all(tmp_path, seeds=2, **options)
    assert jobs == [("CartPole-v1", "rates", v, rate, 2) for v in ("default", "target_kl") for rate in (1, 30)]
    rows = study.read_rows(tmp_path, "CartPole-v1", "rates")
    assert len(rows) == 8 and all(values["error"] == "" for values in rows.values())
    study.write_tables(tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "2 seeds, 150,000 steps, `--num-envs 16" in text
    assert re.search(r"^\| bonus: target KL 0.015 \| \d of 4 \|", text, re.MULTILINE)
    assert study.run_all(tmp_path, seeds=2, **options) == []


@pytest.mark.parametrize("benchmark", [learning, study])
def test_shortened_runs_are_not_kept_among_the_results(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--steps-divisor", "1000"])
    monkeypatch.setattr(benchmark, "run_all", lambda *args: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--results must name another folder" in capsys.readouterr().err


def test_study_that_is_saved_is_complete_and_makes_the_saved_tables(tmp_path):
    for (env_id, setting), (_, _, rates, variants) in study.SETTINGS.items():
        rows = study.read_rows(learning.RESULTS, env_id, setting)
        assert list(rows) == [(v, rate, seed) for v in variants for rate in rates for seed in range(1, 11)]
    shutil.copytree(learning.RESULTS, tmp_path / "results")
    study.write_tables(tmp_path / "results")
    assert (tmp_path / "results" / "study.md").read_text() == (learning.RESULTS / "study.md").read_text()
