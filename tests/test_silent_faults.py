"""Nothing goes wrong without a word, and nothing is lost without need.

Old libraries, odd ranges, sweeps, folders, types, clocks, locks and full disks.
"""

import contextlib
import errno
import fcntl
import io
import os
import pickle
import re
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    agent_that_calls,
    finish,
    new_folder,
    saved_step,
    scalars,
    start,
)
from environments import Counting, ThreeSteps, register

import evaluate
import ppo
import ppo_continuous_action

UPDATE = "--num-steps 16 --num-minibatches 2"  # an update of 64 steps
ODD = f"--env-id Odd-v0 {UPDATE} --total-timesteps 64"
CONTINUOUS = {
    "make_envs": ppo_continuous_action.make_envs,
    "Agent": ppo_continuous_action.Agent,
    **ppo_continuous_action.DEFAULTS,
}


def notes(run):
    return [line for line in run.out.splitlines() if line.startswith("note: ")]


# An older Gymnasium


@pytest.mark.parametrize("version", ["0.29.1", "1.0.0a2", "1.3.0"])
@pytest.mark.parametrize("options", [{}, CONTINUOUS], ids=["ppo", "continuous"])
def test_an_older_gymnasium_is_one_line_that_names_both_versions(
    options, version, fails, monkeypatch
):
    monkeypatch.setattr(gym, "__version__", version)
    code, line = fails("", **options)
    assert code == 2
    assert version in line
    assert "1.4 or later" in line
    assert fails("", main=evaluate.main) == (code, line)


@pytest.mark.parametrize("version", ["1.4.0", "1.4.0a1", "1.10.2", "2.0.0", "1.4rc1"])
def test_a_newer_gymnasium_will_do(version, monkeypatch):
    monkeypatch.setattr(gym, "__version__", version)
    ppo.check_gymnasium()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_programs_import_nothing_that_an_older_gymnasium_lacks(path):
    imports = re.findall(r"^ *(?:from|import) gymnasium.*", path.read_text(), re.M)
    assert imports in ([], ["import gymnasium as gym"])


# Ranges of continuous actions


def actions_that_arrive(space, actions):
    """What an environment gets when an agent draws these actions, one in each step."""
    arrived = []

    class Noting(ThreeSteps):
        action_space = space

        def step(self, action):
            assert self.action_space.contains(action)
            arrived.append(action.copy())
            return super().step(action)

    register(Noting)
    args = ppo.parse_args(["--env-id", "Odd-v0"], **ppo_continuous_action.DEFAULTS)
    envs = ppo_continuous_action.make_envs(args, seed=1)
    envs.reset(seed=1)
    for action in actions:
        envs.unwrapped._autoreset_envs[:] = False
        envs.step(np.full((1, *space.shape), action, np.float32))
    envs.close()
    return arrived


@pytest.mark.parametrize(
    "low, high, dtype",
    [
        (0, 512, np.float32),
        (-100, 100, np.float32),
        (-0.01, 0.01, np.float32),
        (0, 0.001, np.float32),
        (20, 21, np.float32),
        (1, 3, np.float32),
        (-3, -0.75, np.float32),
        (-1e20, 1e20, np.float32),
        (1e9, 1e9 + 1, np.float64),
        (0, 512, np.float16),
    ],
)
def test_a_range_far_from_one_is_scaled_so_that_one_means_its_ends(low, high, dtype):
    space = gym.spaces.Box(low, high, (2,), dtype)
    arrived = actions_that_arrive(space, [-1, 0, 1, 100])
    middle = (float(low) + float(high)) / 2
    expected = np.array([low, middle, high, high])[:, None].repeat(2, axis=1)
    width = float(high) - float(low)
    np.testing.assert_allclose(arrived, expected, rtol=0, atol=1e-3 * width)


@pytest.mark.parametrize(
    "low, high",
    [
        (-0.4, 0.4),
        (-1, 1),
        (-2, 2),
        (-3, 3),
        (0, 1),
        (-np.inf, np.inf),
        (0, np.inf),
        (-np.inf, 5),
        (np.finfo(np.float32).min, np.finfo(np.float32).max),
    ],
)
def test_the_ranges_of_robots_and_those_without_bounds_stay_as_they_are(low, high):
    space = gym.spaces.Box(low, high, (1,), np.float32)
    drawn = np.random.default_rng(1).normal(size=100).astype(np.float32)
    arrived = actions_that_arrive(space, drawn)
    expected = np.clip(drawn, np.float32(low), np.float32(high))
    assert np.array_equal(np.concatenate(arrived), expected)
    assert arrived[0].dtype == np.float32


def test_each_component_of_an_action_has_its_own_range():
    high = np.array([1, 512, np.inf], np.float32)
    low = np.array([-1, 0, -np.inf], np.float32)
    (arrived,) = actions_that_arrive(gym.spaces.Box(low, high), [0.5])
    assert arrived.tolist() == [0.5, 384, 0.5]


def test_the_action_space_that_is_printed_is_the_environment_s_own(run):
    class Pixels(ThreeSteps):
        action_space = gym.spaces.Box(0, 512, (2,))

    register(Pixels)
    result = run(f"{ODD} --total-timesteps 16", **CONTINUOUS)
    assert "\naction_space=Box(0.0, 512.0, (2,), float32)\n" in result.out


# Sweeps of Weights & Biases


@pytest.mark.parametrize(
    "table",
    [
        {"learning_rate": 0.1},
        {"learning-rate": 0.1},  # as the flag is written
        {"learning_rate": "1e-1"},
        {"gae": False},
        {"anneal_lr": "false"},
        {"target_kl": 0.01},
        {"seed": 2},
        {"env_id": "Acrobot-v1"},
        {"batch_size": 1024},
    ],
    ids=str,
)
def test_a_value_that_does_not_arrive_ends_the_run(table):
    ((name, value),) = table.items()
    with pytest.raises(ppo.RunEnded) as ended:
        ppo.check_config(ppo.parse_args([]), table)
    assert ended.value.exit_code == 2
    assert f"{name.replace('-', '_')}={value}" in str(ended.value)
    assert "${args}" in str(ended.value)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"learning_rate": "2.5e-4", "seed": "1", "total_timesteps": 25000.0},
        {"gae": "True", "track": False, "anneal_lr": "true", "norm_adv": 1},
        {"target_kl": None, "wandb_entity": "None", "capture_video": "False"},
        {"notes_of_mine": "a config-defaults.yaml may hold more"},
    ],
    ids=str,
)
def test_a_value_that_means_the_same_is_no_difference(table):
    ppo.check_config(ppo.parse_args([]), table)
    ppo.check_config(ppo.parse_args([]), vars(ppo.parse_args([])) | table)


def test_a_sweep_whose_command_drops_the_values_leaves_no_run_behind(workdir):
    """As `wandb agent` starts it, but without ${args}."""
    Path("sweep.yaml").write_text("wandb_version: 1\nlearning-rate: {value: 0.1}\n")
    process = start(
        ROOT / "ppo.py",
        "--track",
        WANDB_SWEEP_ID="s1",
        WANDB_SWEEP_PARAM_PATH="sweep.yaml",
    )
    result = finish(process)
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert last.startswith("error: W&B shows learning_rate=0.1")
    assert not Path("runs").exists()


# Environments that change the working folder


WALKS = {
    "elsewhere": lambda: os.chdir("/"),
    "one up": lambda: os.chdir(".."),
    "to a folder that is gone": lambda: [
        Path("gone").mkdir(),
        os.chdir("gone"),
        Path("../gone").rmdir(),
    ],
}


@pytest.mark.parametrize("how", WALKS)
@pytest.mark.parametrize("when", ["constructor", "reset", "step"])
def test_all_files_stay_where_the_run_was_started(when, how, workdir, capsys):
    walked = []

    class Walking(ThreeSteps):
        def __init__(self, render_mode=None):
            super().__init__(render_mode)
            self.walk("constructor")

        def reset(self, **options):
            self.walk("reset")
            return super().reset(**options)

        def step(self, action):
            self.walk("step")
            return super().step(action)

        def walk(self, now):
            if now == when and not walked:
                walked.append(now)
                WALKS[how]()

    def printed(begin):
        """The paths that are printed there, as a user takes them."""
        (line,) = re.findall(f"^{begin}: (.*)$", capsys.readouterr().out, re.MULTILINE)
        return [workdir / path for path in line.split(" and ")]

    register(Walking)
    ppo.main([*ODD.split(), "--capture-video"])
    os.chdir(workdir)
    (folder,) = workdir.glob("runs/*")
    videos = workdir / "videos" / folder.name
    assert printed("results") == [folder, videos]
    assert saved_step(folder) == 64
    assert scalars(folder)["losses/entropy"]
    assert (videos / "rl-video-episode-0.mp4").exists()

    walked.clear()
    evaluate.main(["--episodes=1", "--capture-video"])
    os.chdir(workdir)
    assert printed("videos") == [videos / "evaluation"]
    assert (videos / "evaluation/rl-video-episode-0.mp4").exists()
    assert {path.name for path in workdir.iterdir()} == {"runs", "videos"}


# Observations of another type than their space promises

BYTES = gym.spaces.Box(0, 255, (2,), np.uint8)
IMAGE = gym.spaces.Box(0, 255, (2, 2, 3), np.uint8)
SWITCH = gym.spaces.Box(0, 1, (2,), np.bool_)


class Giving(ThreeSteps):
    """Its observations are of this space, and this value is in them."""

    def __init__(self, space, value, render_mode=None):
        super().__init__(render_mode)
        self.observation_space = space
        self.obs = self.make_obs(space, value)

    def make_obs(self, space, value):
        if isinstance(space, gym.spaces.Dict):
            return {name: self.make_obs(space[name], value) for name in space}
        if isinstance(space, gym.spaces.Tuple):
            return tuple(self.make_obs(part, value) for part in space)
        return np.full(space.shape, value)

    def reset(self, **options):
        super().reset(**options)
        return self.obs, {}

    def step(self, action):
        return self.obs, *super().step(action)[1:]


SPACES = {
    "Box": BYTES,
    "image": IMAGE,
    "Dict": gym.spaces.Dict(image=IMAGE, speed=gym.spaces.Box(-1, 1000, (1,))),
    "Tuple": gym.spaces.Tuple([gym.spaces.Box(-1, 1000, (1,)), BYTES]),
    "nested": gym.spaces.Dict(a=gym.spaces.Tuple([gym.spaces.Dict(b=BYTES)])),
}


@pytest.mark.parametrize("value", [0.5, 300, 300.0, -1, -1.0, np.nan])
@pytest.mark.parametrize("kind", SPACES)
def test_an_observation_that_does_not_fit_its_space_is_one_line(
    kind, value, fails, recwarn
):
    register(Giving, kwargs={"space": SPACES[kind], "value": value})
    code, line = fails(ODD)
    assert code == 1
    assert "Odd-v0: an observation holds" in line
    assert "uint8" in line
    assert str(np.float64(value) if isinstance(value, float) else value)[:3] in line
    assert not [warning for warning in recwarn if "cast" in str(warning.message)]


@pytest.mark.parametrize(
    "space, value",
    [
        (gym.spaces.Discrete(3), -1),
        (gym.spaces.Discrete(3, start=1), 0),
        (gym.spaces.Discrete(3), 0.5),
        (gym.spaces.MultiDiscrete([3, 4]), -1),
        (gym.spaces.MultiDiscrete([3, 4]), 3),
        (gym.spaces.MultiBinary(3), 0.5),
        (SWITCH, 0.5),
    ],
    ids=str,
)
def test_a_number_that_another_one_would_be_taken_for_is_one_line(space, value, fails):
    register(Giving, kwargs={"space": space, "value": value})
    code, line = fails(ODD)
    assert code == 1
    assert "do not fit into its space" in line


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_tell_of_a_wrong_type_in_one_line_too(mode, exits):
    register(Giving, kwargs={"space": BYTES, "value": 0.5})
    result = exits(f"{ODD} --num-envs 2 --vectorization-mode {mode}")
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert line.startswith("error: Odd-v0: an observation holds float64 values")


@pytest.mark.parametrize("value", [7, 255, 7.0, np.int32(7), np.uint16(7)], ids=repr)
@pytest.mark.parametrize("kind", SPACES)
def test_numbers_that_fit_go_through_in_another_type(kind, value):
    register(Giving, kwargs={"space": SPACES[kind], "value": value})
    envs = ppo.make_envs(ppo.parse_args(ODD.split()), seed=1)
    obs, _ = envs.reset(seed=1)
    assert (obs == value).all()
    obs, *_ = envs.step(np.zeros(4, int))
    assert (obs == value).all()
    envs.close()


# Batches


class CountingSameStep(Counting):
    def __init__(self, num_envs):
        super().__init__(num_envs, gym.vector.AutoresetMode.SAME_STEP)


@pytest.mark.parametrize("lacks", ["all of them", "one of them"])
def test_a_batch_without_last_observations_cannot_bootstrap(lacks, run, fails):
    class Forgetful(CountingSameStep):
        def step(self, actions):
            *step, infos = super().step(actions)
            infos["final_obs"][-1] = None
            if lacks == "all of them":
                infos = {}
            return *step, infos

    register(None, vector_entry_point=Forgetful)
    flags = f"{ODD} --vectorization-mode vector_entry_point"
    code, line = fails(f"{flags} --bootstrap-truncation")
    assert code == 1
    assert "SAME_STEP" in line
    assert "final_obs" in line
    run(flags)  # nothing else needs them


def test_a_batch_that_begins_with_whole_numbers_keeps_later_fractions(run):
    seen = []

    class Halves(CountingSameStep):
        def reset(self, **options):
            obs, infos = super().reset(**options)
            return obs.astype(int), infos

        def observe(self):
            return super().observe() + np.float32(0.5)

    class SeeingAgent(ppo.Agent):
        def get_action(self, obs):
            seen.append(obs.clone())
            return super().get_action(obs)

    register(None, vector_entry_point=Halves)
    flags = f"{ODD} --vectorization-mode vector_entry_point"
    run(flags, Agent=SeeingAgent)
    assert (torch.stack(seen[1:]) % 1 == 0.5).all()


def test_a_batch_that_promises_bytes_may_not_give_fractions(fails):
    class Bytes(CountingSameStep):
        def __init__(self, num_envs):
            super().__init__(num_envs)
            self.single_observation_space = gym.spaces.Box(0, 255, (4,), np.uint8)

        def reset(self, **options):
            obs, infos = super().reset(**options)
            return obs.astype(np.uint8), infos

        def observe(self):
            return super().observe() / 2

    register(None, vector_entry_point=Bytes)
    code, line = fails(f"{ODD} --vectorization-mode vector_entry_point")
    assert code == 1
    assert "do not fit into its space" in line


# The newest run


def test_the_newest_run_is_the_one_that_was_saved_last(run, capsys):
    """Dates of files and order of names say nothing: copying changes the dates."""
    first = run("--total-timesteps 512 --seed 1").folder
    last = run("--total-timesteps 512 --seed 2").folder
    os.utime(last / "checkpoint.pt", (0, 0))
    assert ppo.find_run("newest") == str(last)

    run(f"--resume {first} --total-timesteps 1024")
    os.utime(first / "checkpoint.pt", (0, 0))
    evaluate.main(["--episodes", "1"])
    assert capsys.readouterr().out.splitlines()[0] == f"run={first}"
    run("--resume --total-timesteps 1536")
    assert saved_step(first) == 1536
    assert saved_step(last) == 512


def test_checkpoints_of_older_versions_are_older(run):
    folder = run("--total-timesteps 512").folder
    Path("runs/a").mkdir()
    torch.save({"version": 1, "args": None}, "runs/a/checkpoint.pt")
    torch.save({"saved_at": None}, Path("runs/a/checkpoint.pt"))
    assert ppo.find_run("newest") == str(folder)


# Runs that are still running


def test_a_run_that_is_still_running_cannot_be_resumed(run, fails):
    folder = run("--total-timesteps 512").folder
    more = f"--resume {folder} --total-timesteps 1024"
    lock = ppo.lock_folder(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, line = fails(more)
    assert code == 2
    assert f"the run in {folder} is still running" in line
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    os.close(lock)
    run(more)
    assert saved_step(folder) == 1024


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_locks_its_folder_as_long_as_it_lasts(resumed, run):
    seen = []

    def look():
        (folder,) = Path("runs").iterdir()
        with pytest.raises(ppo.RunEnded, match="still running"):
            ppo.lock_folder(folder)
        seen.append(folder)

    flags = f"{UPDATE} --total-timesteps"
    if resumed:
        flags = f"--resume {run(f'{flags} 64').folder} --total-timesteps"
    run(f"{flags} 128", Agent=agent_that_calls(look, update=1, num_steps=16))
    os.close(ppo.lock_folder(seen[0]))


def test_where_there_are_no_locks_runs_go_on_without(run, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = run("--total-timesteps 512").folder
    run(f"--resume {folder} --total-timesteps 1024")
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    run(f"--resume {folder} --total-timesteps 1536")
    assert saved_step(folder) == 1536


STUCK_MODULE = """
import pathlib, time, gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Stuck(CartPoleEnv):
    def step(self, action):
        while pathlib.Path("stuck").exists():
            time.sleep(0.1)
        return super().step(action)

gymnasium.register("Stuck-v0", Stuck)
"""


def test_a_killed_run_can_be_resumed_though_its_workers_live_on(
    run, fails, workdir, monkeypatch
):
    Path("stuck_module.py").write_text(STUCK_MODULE)
    monkeypatch.syspath_prepend(workdir)
    flags = f"--env-id stuck_module:Stuck-v0 {UPDATE} --vectorization-mode async"
    folder = run(f"{flags} --total-timesteps 64").folder

    Path("stuck").touch()
    more = f"--resume {folder} --total-timesteps 128"
    path = os.pathsep.join([str(ROOT), str(workdir)])
    process = start(ROOT / "ppo.py", *more.split(), PYTHONPATH=path)
    while "env_id" not in process.stdout.readline():
        assert process.poll() is None
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    code, line = fails(more)
    assert (code, "is still running" in line) == (2, True)

    process.kill()
    process.wait()
    living = [pid for pid in workers.split() if Path(f"/proc/{pid}").exists()]
    assert len(living) >= 4
    Path("stuck").unlink()
    run(more)
    assert saved_step(folder) == 128


# Clocks


@pytest.mark.parametrize("seconds", [-3600, 0, 3600])
def test_tensorboard_shows_all_steps_wherever_the_clock_is(
    seconds, workdir, monkeypatch
):
    """Each run of the three begins so much later than the one before."""
    now = time.time()

    def train(flags):
        monkeypatch.setattr(time, "time", lambda: now)
        ppo.train(ppo.parse_args([*UPDATE.split(), "--no-anneal-lr", *flags.split()]))

    train("--total-timesteps 64")
    (folder,) = Path("runs").iterdir()
    for total in (128, 192):
        # Within a second, files are read in the order of the ids of processes.
        for path in folder.glob("events.*"):
            path.rename(str(path).replace(f".{os.getpid()}.", ".99999999."))
        now += seconds
        train(f"--resume {folder} --total-timesteps {total}")
    steps = [step for step, _ in scalars(folder)["losses/entropy"]]
    assert steps == [64, 128, 192]
    assert len(list(folder.glob("events.*"))) == 3


# Numbers of NumPy's in a checkpoint


def test_a_checkpoint_that_cannot_be_read_back_does_not_replace_a_good_one(run):
    folder = run("--total-timesteps 512").folder
    before = (folder / "checkpoint.pt").read_bytes()
    args = ppo.parse_args([])
    for place, spoil in (
        (
            "checkpoint['optimizer']['param_groups'][0]['lr'] is a numpy.float64",
            lambda it: it["optimizer"]["param_groups"][0].update(lr=np.float64(0.1)),
        ),
        (
            "of checkpoint['args'] is a numpy.int64",
            lambda it: it["args"].update({np.int64(3): 4}),
        ),
    ):
        checkpoint = ppo.load_checkpoint(folder)
        spoil(checkpoint)
        with pytest.raises(TypeError) as error:
            ppo.Checkpoints(args, folder).write(checkpoint)
        assert place in str(error.value)
        assert (folder / "checkpoint.pt").read_bytes() == before
        assert not (folder / "checkpoint.tmp").exists()


def test_a_run_that_cannot_be_saved_says_where_the_number_is(exits):
    result = exits("--total-timesteps 512", ent_coef=np.float32(0.01))
    assert result.code == 1
    assert "checkpoint['args']['ent_coef'] is a numpy.float32" in result.err


def test_the_learning_rate_in_the_optimizer_is_a_number_of_python(run, monkeypatch):
    optimizers = []

    class KeptAdam(torch.optim.Adam):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "Adam", KeptAdam)
    flags = "--total-timesteps 512 --checkpoint-interval 0"
    run(flags, learning_rate=np.float64(0.001))
    assert type(optimizers[0].param_groups[0]["lr"]) is float


# Another Python


class Payload:
    """Makes a file as soon as it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize("minor", [-1, 0, 1])
def test_environments_of_another_python_are_not_unpickled(minor, run):
    folder = run("--total-timesteps 512 --no-anneal-lr").folder
    checkpoint = ppo.load_checkpoint(folder)
    checkpoint["environments"] = [pickle.dumps(Payload())]
    checkpoint["python"][1] += minor
    torch.save(checkpoint, folder / "checkpoint.pt")
    resumed = run(f"--resume {folder} --total-timesteps 1024")
    (note,) = notes(resumed)
    assert "begin new episodes" in note
    assert ("another version of Python" in note) == (minor != 0)
    assert Path("unpickled").exists() == (minor == 0)
    assert resumed.episodes


# Disks


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EIO])
def test_only_a_disk_that_cannot_wait_may_refuse_to(number, run, fails, monkeypatch):
    def refuse(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        code, line = fails("--total-timesteps 512")
        assert code == 1
        assert "cannot save runs/" in line
        assert os.strerror(number) in line
    else:
        assert saved_step(run("--total-timesteps 512").folder) == 512


def rename(folder):
    folder.rename("elsewhere")


def fill(folder):
    """Nothing more can be written to the log."""
    (log,) = folder.glob("events.*")
    full = folder / "full"
    full.symlink_to("/dev/full")
    full.replace(log)  # at once, as the log's thread may write at any time


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "spoil, word", [(rename, "No such file"), (fill, "No space left")]
)
def test_a_log_that_cannot_be_written_is_one_line_after_all_is_saved(
    spoil, word, run, fails
):
    folders = []

    def function():
        folders.extend(Path("runs").iterdir())
        spoil(folders[0])

    agent = agent_that_calls(function, update=2, num_steps=16)
    code, line = fails(f"{UPDATE} --total-timesteps 1024", Agent=agent)
    assert code == 1
    assert f"cannot write the log in {folders[0]}: " in line
    assert word in line
    assert threading.excepthook.__module__ != ppo.__name__
    assert saved_step(folders[0]) == 128

    if spoil is fill:
        next(folders[0].glob("events.*")).unlink()
    run(f"--resume {folders[0]}")
    assert saved_step(folders[0]) == 1024


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_that_cannot_begin_gives_the_hook_of_threads_back(run, monkeypatch):
    def fail(log):
        raise ZeroDivisionError

    before = threading.excepthook
    monkeypatch.setattr(ppo.Logger, "write_settings", fail)
    with pytest.raises(ZeroDivisionError):
        run("--total-timesteps 512")
    assert threading.excepthook == before
    (folder,) = Path("runs").iterdir()
    os.close(ppo.lock_folder(folder))


def test_standard_output_that_cannot_be_written_is_one_line_after_all_is_saved(fails):
    """The disk is full to which it is redirected, or the terminal is gone."""
    with contextlib.redirect_stdout(FullDisk()):
        code, line = fails(f"{UPDATE} --total-timesteps 1024")
    assert code == 1
    assert "cannot write to standard output: " in line
    (folder,) = Path("runs").iterdir()
    assert saved_step(folder) == 64


def test_an_error_in_a_thread_of_an_environment_is_still_told(run, monkeypatch):
    class Connected(ThreeSteps):
        def reset(self, **options):
            thread = threading.Thread(target=self.listen)
            thread.start()
            thread.join()
            return super().reset(**options)

        def listen(self):
            raise ConnectionResetError("the simulator is gone")

    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    register(Connected)
    run(f"{ODD} --num-envs 1 --total-timesteps 16")
    assert {str(details.exc_value) for details in told} == {"the simulator is gone"}


# Jobs that are queued again


def test_resume_auto_starts_a_run_and_goes_on_with_it(run):
    flags = f"{UPDATE} --seed 3 --exp-name job --no-anneal-lr --resume auto"
    first = run(f"{flags} --total-timesteps 128")
    second = run(f"{flags} --total-timesteps 256")
    third = run(f"{flags} --total-timesteps 256")
    assert first.folder == second.folder == third.folder
    assert saved_step(first.folder) == 256
    assert third.episodes == []
    (note,) = notes(third)
    assert note == (
        "note: this run is complete; a larger --total-timesteps would go on"
    )


def test_resume_auto_finds_its_own_run_among_many(run):
    mine = run(f"{UPDATE} --total-timesteps 128 --checkpoint-interval 1e-9").folder
    checkpoint = ppo.load_checkpoint(mine)
    args = checkpoint["args"]
    others = [{"seed": seed} for seed in (0, *range(2, 52), 100, 11, 111)]
    others += [
        {"exp_name": "ppo__1", "seed": 7},  # CartPole-v1__ppo__1__7__...
        {"exp_name": "ppo2"},
        {"exp_name": "pp"},
        {"env_id": "CartPole-v1__ppo", "exp_name": "1", "seed": 5},
        {"env_id": "CartPole-v0"},
    ]
    for i, changed in enumerate(others):
        their_args = {**args, **changed}
        name = ppo.begin_of_run_name(ppo.argparse.Namespace(**their_args))
        folder = Path("runs", f"{name}{4_000_000_000 + i}")
        folder.mkdir()
        theirs = {**checkpoint, "args": their_args, "saved_at": 4e9 + i}
        torch.save(theirs, folder / "checkpoint.pt")
    assert ppo.parse_args(["--resume=auto", *UPDATE.split()]).resume == str(mine)
    assert ppo.parse_args(["--resume=auto", "--seed=1234"]).resume is None

    # Of several runs with these settings it is the one that was saved last.
    again = Path("runs", "CartPole-v1__ppo__1__1")
    shutil.copytree(mine, again)
    checkpoint["saved_at"] += 1
    torch.save(checkpoint, again / "checkpoint.pt")
    assert ppo.parse_args(["--resume=auto", *UPDATE.split()]).resume == str(again)


def test_resume_auto_with_other_flags_is_refused(run, fails):
    run(f"{UPDATE} --total-timesteps 64")
    code, line = fails(f"{UPDATE} --total-timesteps 64 --gamma 0.9 --resume auto")
    assert code == 2
    assert "--resume keeps the flags" in line


def test_a_run_of_another_program_is_refused(run, fails):
    folder = run("--total-timesteps 512").folder
    checkpoint = ppo.load_checkpoint(folder)
    checkpoint["program"] = "ppo_cnn"
    torch.save(checkpoint, folder / "checkpoint.pt")
    for flags in (f"--resume {folder}", "--resume", "--resume auto"):
        code, line = fails(f"{flags} --total-timesteps 1024 --seed 1")
        assert code == 2
        assert line == (
            f"error: the run in {folder} was made by ppo_cnn.py, not by ppo.py"
        )


def test_where_there_is_no_run_that_is_what_is_said(fails, workdir):
    line = "error: there is no run in runs/ that has a checkpoint.pt"
    assert fails("--resume") == (2, line)
    Path("runs/empty").mkdir(parents=True)
    assert fails("--resume") == (2, line)
    assert fails("", main=evaluate.main) == (2, line)


def test_the_line_for_job_scripts_starts_a_run_and_goes_on_with_it(run):
    """The one in docs/operations.md, for two jobs of an array."""
    text = (ROOT / "docs" / "operations.md").read_text()
    (line,) = re.findall(r"^srun python ppo\.py (.* --resume auto)$", text, re.M)
    folders = []
    for total in (512, 1024):
        for seed in ("1", "11"):
            flags = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", seed))
            flags += ["--total-timesteps", str(total)]
            with new_folder():
                folders.append(run(" ".join(flags)).folder)
    assert folders[:2] == folders[2:]
    assert folders[0] != folders[1]
    assert [saved_step(folder) for folder in folders] == [1024] * 4
