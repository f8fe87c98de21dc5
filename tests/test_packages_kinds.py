"""Small environments of the kinds that published packages bring."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from environments import Corridor, Mission, Toy

import ppo_multi_discrete


def register(entry_point):
    gym.registry.pop("Kind-v0", None)
    gym.register("Kind-v0", entry_point)


def test_a_text_beside_a_picture_gets_one_line_that_names_two_ways(exits):
    picture = gym.spaces.Box(0, 255, (7, 7, 3), np.uint8)
    space = gym.spaces.Dict({"image": picture, "mission": Mission()})
    register(lambda render_mode=None: Toy(observation_space=space))

    result = exits("--env-id Kind-v0")

    assert result.code == 2
    assert "gym.wrappers.FilterObservation" in result.err
    assert "python ppo_pixels.py" in result.err
    assert "flattened" not in result.out  # nothing was


@pytest.mark.parametrize("end, is_noted", [(10**9, True), (5, False)])
def test_a_run_in_which_no_episode_ends_says_so(end, is_noted, run):
    register(lambda render_mode=None: Corridor(end, render_mode))
    result = run("--env-id Kind-v0 --num-steps 16 --total-timesteps 64")
    assert ("no episode has ended" in result.out) == is_noted


def test_an_error_while_an_environment_is_made_is_said_to_be_one(exits):
    class WrongVersion(Corridor):
        def __init__(self, render_mode=None):
            raise AssertionError

    register(WrongVersion)
    result = exits("--env-id Kind-v0")
    assert result.code == 1
    assert result.err.splitlines()[-1].endswith("Kind-v0 was being made.")


NUMBER = gym.spaces.Discrete(3)
REAL = gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    "actions, advice",
    [
        (REAL, "ppo_continuous_action.py"),
        (gym.spaces.Tuple((NUMBER, NUMBER)), "ppo_multi_discrete.py"),
        (gym.spaces.Tuple((NUMBER, REAL)), "TransformAction"),
        (gym.spaces.Dict(a=NUMBER), "TransformAction"),
    ],
)
def test_other_actions_get_advice_that_holds(actions, advice, fails):
    register(lambda render_mode=None: Toy(action_space=actions))
    code, line = fails("--env-id Kind-v0")
    assert code == 2
    assert advice in line
    assert line.count("ppo_") == advice.count("ppo_")


def test_limits_of_float32_are_joined_to_the_mask_without_a_warning(recwarn):
    space = gym.spaces.Box(-0.1, 0.1, (2,), np.float32)
    ppo_multi_discrete.PartsAndMask(Toy(observation_space=space), use_masks=True)
    assert not [warning for warning in recwarn if "precision" in str(warning.message)]


@pytest.mark.parametrize(
    "lines, words",
    [
        ("import no_such_engine", "'no_such_engine', which its_game imports (Python"),
        (None, "pip show -f"),
    ],
)
def test_a_module_is_missing_or_one_that_it_imports(
    lines, words, fails, workdir, monkeypatch
):
    monkeypatch.syspath_prepend(workdir)
    if lines:
        (workdir / "its_game.py").write_text(lines)
    code, line = fails("--env-id its_game:Game-v0", leaves_files=True)
    assert code == 2
    assert words in line


@pytest.mark.parametrize("program", ["ppo", "ppo_memory", "evaluate"])
def test_a_gymnasium_before_version_1_gets_one_line(program):
    code = (
        "import gymnasium as gym; gym.__version__ = '0.29.1'; "
        f"del gym.vector.VectorWrapper; import {program}"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: Gymnasium 0.29.1 is installed, and 1.4 or later")
