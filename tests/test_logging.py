"""What a run leaves behind: standard output as a record, TensorBoard files that read back, names never used twice."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, python, read_events, spawn

SCALARS = {
    "charts/learning_rate", "charts/episodic_return", "charts/episodic_length", "charts/SPS", "losses/value_loss",
    "losses/policy_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac",
    "losses/explained_variance",
}  # fmt: skip


def test_tensorboard_holds_every_scalar_at_increasing_steps_and_the_hyperparameters(run):
    result = run("--total-timesteps 4096 --num-envs 8 --learning-rate 0.001")
    events = read_events(result.folder)
    tags = events.Tags()
    assert set(tags["scalars"]) == SCALARS
    for tag in SCALARS:
        steps = [e.step for e in events.Scalars(tag)]
        assert all(a < b for a, b in zip(steps, steps[1:], strict=False)), tag
        if not tag.startswith("charts/episodic"):
            assert steps == [1024, 2048, 3072, 4096], tag
        assert np.isfinite([e.value for e in events.Scalars(tag)]).all(), tag
    rates = [e.value for e in events.Scalars("charts/learning_rate")]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert events.Scalars("losses/explained_variance")[-1].value < 1
    # Episodes that end in the same step share a point, their mean.
    by_step = {}
    for step, episodic_return, _ in result.episodes:
        by_step.setdefault(step, []).append(episodic_return)
    assert max(map(len, by_step.values())) > 1
    logged = {e.step: e.value for e in events.Scalars("charts/episodic_return")}
    assert logged == {step: pytest.approx(np.mean(returns)) for step, returns in by_step.items()}
    table = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table.startswith("|flag|value|\n|-|-|\n") and "|learning_rate|0.001|" in table and "|num_envs|8|" in table


def test_standard_output_is_one_fact_per_line_in_the_stated_order(run):
    result = run("--total-timesteps 1024")
    lines = result.out.splitlines()
    assert "env_id=CartPole-v1" in lines and "seed=1" in lines and "num_updates=2" in lines
    assert "observation_space=Box([-4.8 -inf -0.41887903 -inf], [4.8 inf 0.41887903 inf], (4,), float32)" in lines
    assert "action_space=Discrete(2)" in lines
    first = next(i for i, line in enumerate(lines) if line.startswith("global_step="))
    assert len(lines) - first - 1 == len(result.episodes)
    assert all(re.fullmatch(r"[a-z_]+=\S.*", line) for line in lines[:first])
    assert lines[-1] == f"results: {result.folder}"


def test_two_runs_of_the_same_second_get_folders_of_their_own(run, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    folders = {run("--total-timesteps 512").folder.name for _ in range(3)}
    assert folders == {f"CartPole-v1__ppo__1__170000000{i}" for i in range(3)}


def test_names_with_slashes_stay_inside_runs(run):
    assert run("--total-timesteps 512 --exp-name ../../a").folder.name.startswith("CartPole-v1__..-..-a__1__")


def test_importing_has_no_side_effect_and_a_plain_run_does_not_import_wandb_or_moviepy(workdir):
    code = (
        "import os, random, sys, numpy, torch;"
        "s = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state();"
        "threads = torch.get_num_threads(); import ppo;"
        "assert s[:2] == (random.getstate(), str(numpy.random.get_state())) and s[2].equal(torch.get_rng_state());"
        "assert threads == torch.get_num_threads() and not os.listdir() and 'pygame' not in sys.modules;"
        "ppo.main(['--total-timesteps', '512']); assert not {'wandb', 'moviepy'} & set(sys.modules)"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("exp_name=ppo\n")


def test_progress_bar_is_shown_on_a_terminal_only(run, monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    quiet = run("--total-timesteps 1024")
    assert shown.getvalue() == ""
    shown.isatty = lambda: True
    assert run("--total-timesteps 1024").episodes == quiet.episodes
    assert all(x in shown.getvalue() for x in ("1024/1024", "step/s", "SPS=", "mean_return="))


def test_it_runs_from_any_folder_under_any_file_name_without_a_word_on_standard_error(workdir):
    copy = Path("my_variant.py")
    copy.write_text((ROOT / "ppo.py").read_text())
    result = spawn("--total-timesteps 512", script=copy.resolve())
    assert result.returncode == 0 and result.stderr == ""
    assert next(Path("runs").iterdir()).name.startswith("CartPole-v1__my_variant__1__")
