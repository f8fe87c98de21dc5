"""What a run leaves behind: a record on standard output, and curves in a folder."""

import io
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, finish, read_events, start

import ppo

CURVES_OF_UPDATES = {
    "charts/learning_rate",
    "charts/SPS",
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/old_approx_kl",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
}
CURVES_OF_EPISODES = {"charts/episodic_return", "charts/episodic_length"}


def test_tensorboard_has_all_curves_of_updates_at_the_step_of_each_update(run):
    events = read_events(run("--total-timesteps 4096 --num-envs 8").folder)
    assert set(events.Tags()["scalars"]) == CURVES_OF_UPDATES | CURVES_OF_EPISODES
    for tag in CURVES_OF_UPDATES:
        points = events.Scalars(tag)
        assert [point.step for point in points] == [1024, 2048, 3072, 4096], tag
        assert all(np.isfinite(point.value) for point in points), tag


def test_tensorboard_has_the_mean_of_the_episodes_that_end_in_the_same_step(run):
    result = run("--total-timesteps 4096 --num-envs 8")
    returns = defaultdict(list)
    lengths = defaultdict(list)
    for step, episodic_return, length in result.episodes:
        returns[step].append(episodic_return)
        lengths[step].append(length)
    assert max(len(together) for together in returns.values()) > 1

    events = read_events(result.folder)
    for name, numbers in (("return", returns), ("length", lengths)):
        points = events.Scalars(f"charts/episodic_{name}")
        assert [point.step for point in points] == sorted(numbers)
        expected = [np.mean(numbers[point.step]) for point in points]
        assert [point.value for point in points] == pytest.approx(expected)


def test_tensorboard_has_a_table_of_the_flags(run):
    events = read_events(run("--total-timesteps 512 --gamma 0.9").folder)
    (text,) = events.Tensors("hyperparameters/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[:2] == ["|flag|value|", "|-|-|"]
    assert "|gamma|0.9|" in lines
    assert "|action_space|Discrete(2)|" in lines


def test_standard_output_has_one_fact_per_line_in_the_stated_order(run):
    result = run("--total-timesteps 1024")
    lines = result.out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("global_step="))
    settings, episodes, last = lines[:first], lines[first:-1], lines[-1]

    assert all(re.fullmatch(r"[a-z_]+=\S.*", line) for line in settings)
    assert "env_id=CartPole-v1" in settings
    assert "num_updates=2" in settings
    assert "action_space=Discrete(2)" in settings
    assert any(line.startswith("observation_space=Box(") for line in settings)
    assert len(episodes) == len(result.episodes)
    assert last == f"results: {result.folder}"


def test_two_runs_of_one_name_in_the_same_second_are_refused(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    args = ppo.parse_args(["--total-timesteps", "512"])
    ppo.train(args)
    before = sorted(Path("runs").rglob("*"))
    with pytest.raises(ppo.RunEnded, match="runs/CartPole-v1__ppo__1__1700000000"):
        ppo.train(args)
    assert sorted(Path("runs").rglob("*")) == before


@pytest.mark.parametrize("name", ["../../a", "a:b c", r"..\a"])
def test_odd_names_stay_inside_runs(name, run):
    folder = run("--total-timesteps 512", exp_name=name).folder
    assert re.fullmatch(r"CartPole-v1__[-.abc]+__1__\d+", folder.name)
    assert list(Path().iterdir()) == [Path("runs")]
    assert list(Path("runs").iterdir()) == [folder]


def test_the_progress_bar_is_shown_on_a_terminal_alone(run, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    quiet = run("--total-timesteps 1024")
    assert shown.getvalue() == ""

    shown.isatty = lambda: True
    assert run("--total-timesteps 1024").episodes == quiet.episodes
    for part in ("1024/1024", "step/s", "mean_return="):
        assert part in shown.getvalue()


IMPORT_QUIETLY = """
import os, random, sys, numpy, torch

def state():
    generators = random.getstate(), numpy.random.get_state()[1].tolist()
    return *generators, torch.get_rng_state().tolist(), torch.get_num_threads()

before = state()
import ppo
assert state() == before
assert os.listdir() == []
assert "pygame" not in sys.modules

ppo.main(["--total-timesteps", "512"])
assert not {"wandb", "moviepy"} & set(sys.modules)
"""


def test_importing_changes_nothing_and_a_plain_run_needs_no_wandb_or_moviepy():
    result = finish(start("-c", IMPORT_QUIETLY))
    assert (result.code, result.err) == (0, "")


def test_the_file_runs_alone_under_any_name_and_is_silent_on_standard_error():
    Path("my_ppo.py").write_text((ROOT / "ppo.py").read_text())
    result = finish(start("my_ppo.py", "--total-timesteps", 512))
    assert (result.code, result.err) == (0, "")
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("CartPole-v1__my_ppo__1__")
