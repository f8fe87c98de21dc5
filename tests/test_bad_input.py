"""How runs end that cannot begin, that go wrong, or whose environment breaks.

Wrong input ends in one line with exit code 2, and leaves nothing behind, which the
fixture fails() looks after. A run that goes wrong ends in one line with exit code 1. An
error of an environment keeps its traceback, and one line follows.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, finish, start
from environments import Corridor

import ppo

# Wrong input

LIMITS = {
    "between 1 and": (
        "total-timesteps num-envs num-steps num-minibatches update-epochs num-threads"
    ),
    "between 0 and 1,": "gamma gae-lambda",
    "between 0 and 1e+30,": (
        "learning-rate clip-coef ent-coef vf-coef max-grad-norm target-kl "
        "checkpoint-interval"
    ),
    "between 0 and 4294967295,": "seed",
}

FLAGS = [
    ("--total-timesteps 511", ["--total-timesteps 511 is less than", "512 steps"]),
    ("--num-minibatches 3", ["512", "--num-minibatches 3", "equal parts"]),
    ("--num-minibatches 512", ["512", "parts of 2 steps or more"]),
    ("--num-steps 1.5", ["--num-steps", "whole number", "1.5"]),
    ("--seed None", ["--seed", "None"]),  # only where None is the default
    ("--track=maybe", ["--track", "True or False", "maybe"]),
    ("--resume", ["runs/", "checkpoint.pt"]),  # there is none
    ("--resume=", ["checkpoint.pt"]),  # not taken for a new run
    ("--no-such-flag", ["--no-such-flag"]),
    ("--total-time 1000", ["--total-time"]),  # an abbreviation
]

ENVIRONMENTS = [
    ("CartPol-v1", ["CartPol", "Did you mean: `CartPole`"]),
    ("CartPole-v7", ["v7", "`v1`"]),
    ("Pendulum-v1", ["Box(-2.0, 2.0, (1,), float32)", "ppo_continuous_action.py"]),
    ("environments:MultiDiscrete-v0", ["MultiDiscrete([2 3])", "not Discrete"]),
    ("environments:FromOne-v0", ["Discrete(2, start=1)", "from 0"]),
    ("environments:NoFixedSize-v0", ["Sequence", "not a flat Box"]),
    ("environments:Mission-v0", ["Mission", "no fixed size"]),
    ("environments:Uninstalled-v0", ["gymnasium[box2d]"]),
    ("nomodule:X-v0", ["nomodule", "PYTHONPATH"]),
]


@pytest.mark.parametrize("limits", LIMITS)
def test_a_number_that_is_too_small_or_large_is_named(limits):
    for name in LIMITS[limits].split():
        for value in ("-1", "1e31", "nan"):
            with pytest.raises(ppo.RunEnded) as ended:
                ppo.parse_args([f"--{name}={value}"])
            line = str(ended.value)
            assert ended.value.exit_code == 2
            assert line.startswith(f"argument --{name}: expected a number {limits}")
            assert line.endswith(f"got {value}")


@pytest.mark.parametrize("flags, words", FLAGS)
def test_a_wrong_flag_is_named(flags, words, fails):
    code, line = fails(flags)
    assert code == 2
    for word in words:
        assert word in line


@pytest.mark.parametrize("env_id, words", ENVIRONMENTS)
def test_an_environment_that_does_not_suit_is_named(env_id, words, fails):
    code, line = fails(f"--env-id {env_id}")
    assert code == 2
    for word in [env_id.split(":")[-1], *words]:
        assert word in line


def test_only_an_empty_folder_of_videos_may_be_left(fails, workdir):
    code, line = fails("--env-id Pendulum-v1 --capture-video", leaves_files=True)
    assert code == 2
    assert "not Discrete" in line
    assert not Path("runs").exists()
    assert not [path for path in workdir.rglob("*") if path.is_file()]


def test_a_user_sees_one_line_and_the_exit_code(workdir):
    result = finish(start(ROOT / "ppo.py", "--env-id", "Pendulum-v1"))
    assert result.code == 2
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert not list(workdir.iterdir())


def test_tracking_without_an_account_says_what_to_do(workdir, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    home = {"HOME": str(workdir / "home"), "NETRC": str(workdir / "netrc")}
    result = finish(start(ROOT / "ppo.py", "--track", **home))
    assert result.code == 2
    assert "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("error: --track: ")
    assert "wandb login" in last
    assert "WANDB_MODE=offline" in last
    assert not Path("runs").exists()


# Runs that go wrong


@pytest.mark.parametrize(
    "flags", ["--env-id environments:Exploding-v0", "--learning-rate 1e30"]
)
def test_an_update_that_diverges_ends_the_run(flags, fails):
    code, line = fails(f"{flags} --total-timesteps 4096")
    assert code == 1
    assert "the update at step 512 diverged" in line


def register(entry_point):
    """Make it the environment Odd-v0 of a test."""
    gym.registry.pop("Odd-v0", None)
    gym.register("Odd-v0", entry_point)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("bad_step", [0, 7, 16])
def test_an_observation_that_is_not_finite_is_blamed(bad_step, value, fails):
    """Whether a reset gives it, a step in the middle, or the last step of a rollout."""

    class Failing(Corridor):
        def reset(self, **options):
            obs, info = super().reset(**options)
            return self.spoil(obs), info

        def step(self, action):
            obs, *rest = super().step(action)
            return self.spoil(obs), *rest

        def spoil(self, obs):
            if self.position == bad_step:
                obs[:] = value
            return obs

    register(Failing)
    code, line = fails("--env-id Odd-v0 --num-steps 16 --total-timesteps 64")
    assert code == 1
    assert "Odd-v0 gave an observation that is not finite" in line


# Environments that break


def test_an_environment_that_calls_sys_exit_breaks_the_run(exits):
    result = exits("--env-id environments:Exits0-v0")
    assert result.code == 1
    assert "in break_now" in result.err  # where it happened
    assert "SystemExit" in result.err
    # It breaks in the 150th step of each of four environments.
    assert result.err.splitlines()[-1] == "The run broke in step 600."


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("exception", [RuntimeError, SystemExit])
def test_an_environment_that_cannot_be_made(mode, exception, exits, workdir):
    class Unmakable(Corridor):
        def __init__(self, render_mode=None):
            raise exception("the licence is in use")

    register(Unmakable)
    result = exits(f"--env-id Odd-v0 --vectorization-mode {mode}")
    assert result.code == 1
    assert f"{exception.__name__}: the licence is in use" in result.err
    assert result.err.splitlines()[-1].startswith("The run broke before its first")
    assert not list(workdir.iterdir())


def test_environments_are_closed_when_a_first_reset_fails(exits):
    closed = []

    class Offline(Corridor):
        def reset(self, **options):
            raise ConnectionRefusedError("no simulator answers")

        def close(self):
            closed.append(self)

    register(Offline)
    result = exits("--env-id Odd-v0")
    assert result.code == 1
    assert "ConnectionRefusedError: no simulator answers" in result.err
    assert result.err.splitlines()[-1] == "The run broke in step 4."
    assert len(set(closed)) == 4


def test_frames_that_cannot_be_encoded_are_an_error(exits):
    class Filmed(Corridor):
        def render(self):
            size = 16 * self.position + 16  # which must not change
            return np.zeros((size, size, 3), np.uint8)

    register(lambda render_mode=None: Filmed(end=3, render_mode=render_mode))
    result = exits("--env-id Odd-v0 --capture-video")
    assert result.code == 1
    assert "requires all images to be the same size" in result.err
    assert result.err.splitlines()[-1] == "The run broke in step 12."


def test_a_folder_that_cannot_be_written_to_is_named(fails):
    Path("runs").write_text("a file where the folder should be")
    code, line = fails("--total-timesteps 512")
    assert code == 2
    assert "runs/CartPole-v1__ppo__1__" in line
