"""What the tests share: they train here or start processes, and read the results."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo

ROOT = Path(__file__).parent.parent


# What a run leaves behind


def parse_episodes(stdout):
    """[(global_step, return, length), ...] of the printed episodes, in their order."""
    pattern = r"^global_step=(\d+), episodic_return=(\S+), episodic_length=(\d+)$"
    found = re.findall(pattern, stdout, re.MULTILINE)
    return [(int(step), float(r), int(length)) for step, r, length in found]


def read_events(folder):
    """All that is logged for TensorBoard in a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(folder):
    """{tag: [(step, value), ...]} of all curves of TensorBoard except the speed."""
    events = read_events(folder)
    curves = {}
    for tag in events.Tags()["scalars"]:
        if tag != "charts/SPS":
            curves[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return curves


def saved_step(folder):
    """The global_step of a run's checkpoint."""
    return ppo.load_checkpoint(folder)["global_step"]


def same_parameters(folder, agent):
    """Whether a run's checkpoint holds exactly the parameters of this agent."""
    saved = ppo.load_checkpoint(folder)["agent"]
    parameters = agent.state_dict()
    assert saved.keys() == parameters.keys()
    return all(saved[name].equal(parameters[name]) for name in saved)


def assert_same_results(run, whole, after_step=0):
    """Check that a run has the results of another one, with episodes from a step on."""
    assert same_parameters(run.folder, whole.agent)
    assert scalars(run.folder) == scalars(whole.folder)
    expected = [episode for episode in whole.episodes if episode[0] > after_step]
    assert run.episodes == expected != []


def frames(path):
    """The pictures of a video, (height, width, 3) each."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]


def wandb_records(folder):
    """All records of an offline W&B run as dicts, printed by W&B's own reader.

    ``folder`` is wandb/offline-run-... Each record has a "type", such as "run",
    "history" or "exit", and its content under the name of its type.
    """
    inspect = start("-m", "wandb", "leet", "inspect", "--json", Path(folder).resolve())
    result = finish(inspect)
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def wandb_history(folder):
    """What an offline W&B run has logged, one dict for each row."""
    records = wandb_records(folder)
    rows = [record["history"] for record in records if record["type"] == "history"]
    return [row["item"] for row in rows]


# Runs in this process


class Clock:
    """Lets each run begin in a second of its own, without waiting for it.

    A run's name and the order of TensorBoard's files depend on the second.
    """

    real_time = staticmethod(time.time)
    latest = 0.0

    @contextlib.contextmanager
    def next_second(self):
        now = self.real_time()
        ahead = max(0.0, int(self.latest) + 1 - now)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: self.real_time() + ahead)
            try:
                yield
            finally:
                self.latest = time.time()

    def catch_up(self):
        """Wait until the clock that other processes read has come this far."""
        time.sleep(max(0.0, int(self.latest) + 1 - self.real_time()))


CLOCK = Clock()


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """Run every test in an empty folder, without W&B's network, and clean up after it.

    It also fails where a run has not given the handlers of signals back.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    # Where nohup runs the tests, or a script in the background, some are ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = {number: signal.getsignal(number) for number in ppo.STOP_SIGNALS}
    CLOCK.latest = 0.0

    yield tmp_path

    CLOCK.latest = 0.0  # the next test has a folder of its own
    while STARTED:
        process = STARTED.pop()
        for pid in left_behind(process, patience=0):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr_path.unlink()
    assert handlers == {number: signal.getsignal(number) for number in handlers}


@pytest.fixture
def run(capsys, workdir):
    """run(flags) trains in this process; returns .agent, .out, .episodes, .folder.

    Other arguments are those of ppo.main: make_envs, Agent, and defaults of flags.
    """

    def run(flags="", make_envs=ppo.make_envs, Agent=ppo.Agent, **defaults):
        with CLOCK.next_second(), new_folder() as folder:
            args = ppo.parse_args(flags.split(), **defaults)
            agent = ppo.train(args, make_envs, Agent)
        out = capsys.readouterr().out
        return SimpleNamespace(
            agent=agent,
            out=out,
            episodes=parse_episodes(out),
            folder=Path(args.resume) if args.resume else folder.path,
        )

    return run


@contextlib.contextmanager
def new_folder():
    """Yields an object whose .path is, at the end, the only new folder of runs/."""
    folder = SimpleNamespace(path=None)
    before = set(Path("runs").glob("*"))
    try:
        yield folder
    finally:
        new = set(Path("runs").glob("*")) - before
        if len(new) == 1:
            folder.path = new.pop()


@pytest.fixture
def exits(capsys, workdir):
    """exits(flags) runs main, which must exit; returns .code, .out, .err, .episodes.

    Other arguments are those of main.
    """

    def exits(flags, main=ppo.main, **kwargs):
        capsys.readouterr()
        with CLOCK.next_second(), pytest.raises(SystemExit) as exit_info:
            main(flags.split(), **kwargs)
        out, err = capsys.readouterr()
        code = exit_info.value.code
        return SimpleNamespace(
            code=code, out=out, err=err, episodes=parse_episodes(out)
        )

    return exits


@pytest.fixture
def fails(exits, workdir):
    """fails(flags) runs main, which must end with one line and without a traceback.

    Returns the exit code and that line. Wrong input, code 2, leaves no file behind,
    unless leaves_files says that it may.
    """

    def fails(flags, main=ppo.main, leaves_files=False, **kwargs):
        before = sorted(workdir.rglob("*"))
        result = exits(flags, main, **kwargs)
        errors = re.findall(r"^error: .*$", result.err, re.MULTILINE)
        assert len(errors) == 1, result.err
        assert "Traceback" not in result.err, result.err
        if result.code == 2 and not leaves_files:
            assert sorted(workdir.rglob("*")) == before
        return result.code, errors[0]

    return fails


def agent_that_calls(function, update, num_steps=128, Agent=ppo.Agent):
    """A class of agents that call function() once, in the middle of this update.

    Updates are counted from 1, or from where the run was resumed.
    """
    steps_played = 0

    class CallingAgent(Agent):
        __module__ = Agent.__module__  # or a checkpoint would name another program

        def get_action(self, obs):
            nonlocal steps_played
            steps_played += 1
            return super().get_action(obs)

        def evaluate_actions(self, obs, action):
            nonlocal steps_played
            if steps_played == update * num_steps:
                steps_played += 1  # so it does not happen again
                function()
            return super().evaluate_actions(obs, action)

    return CallingAgent


class Crash(Exception):
    """What breaks a run off on purpose."""


@pytest.fixture
def crash(run, capsys):
    """crash(flags, update=3) breaks a run off in its third update; returns its folder.

    Updates are counted as by agent_that_calls. Other arguments are those of run.
    """

    def crash(flags, update, Agent=ppo.Agent, **kwargs):
        def break_off():
            raise Crash

        defaults = {name: kwargs[name] for name in kwargs if name != "make_envs"}
        args = ppo.parse_args(flags.split(), **defaults)
        CrashingAgent = agent_that_calls(break_off, update, args.num_steps, Agent)
        with new_folder() as folder, pytest.raises(Crash):
            run(flags, Agent=CrashingAgent, **kwargs)
        capsys.readouterr()
        return Path(args.resume) if args.resume else folder.path

    return crash


# Processes

STARTED = []


def start(*command, cwd=None, **env):
    """Start Python with these arguments, and return the process.

    Its lines can be read from process.stdout while it runs. ``env`` are environment
    variables. It leads a process group of its own, as a terminal's job does.
    """
    CLOCK.catch_up()
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "STARTED_BY_TEST": str(time.monotonic_ns()),  # how left_behind() knows it
        **env,
    }
    with tempfile.NamedTemporaryFile(delete=False) as stderr_file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr_file,
            text=True,
            cwd=cwd,
            env=variables,
            start_new_session=True,
        )
    process.stderr_path = Path(stderr_file.name)
    process.mark = f"STARTED_BY_TEST={variables['STARTED_BY_TEST']}"
    STARTED.append(process)
    return process


def finish(process, timeout=120):
    """Wait for a started process; returns .code, .err, and what is left of .out.

    It also waits for the processes that this one has started, as long as they hold its
    standard output.
    """
    parts = []
    reader = threading.Thread(
        target=lambda: parts.append(process.stdout.read()), daemon=True
    )
    reader.start()
    reader.join(timeout)
    err = process.stderr_path.read_text()
    assert parts, f"still running after {timeout} seconds: {err}"
    code = process.wait(timeout)
    CLOCK.latest = max(CLOCK.latest, CLOCK.real_time())
    (out,) = parts
    return SimpleNamespace(code=code, out=out, err=err, episodes=parse_episodes(out))


def left_behind(process, patience=10):
    """The ids of what a started process leaves behind after some seconds (on Linux)."""
    for _ in range(patience * 10 + 1):
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if process.mark.encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        if not found:
            break
        time.sleep(0.1)
    return found


def torchrun(flags, processes=2, script=ROOT / "ppo.py", **options):
    """Start a script in several processes, as torchrun does. Options: see start."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", processes]
    return start(*launcher, script, *flags.split(), **options)
