"""Shared tools: run ppo.py in a folder of its own, in this process or as a user would, and read what it printed."""

import contextlib
import io
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo

ROOT = Path(__file__).parent.parent


def parse_episodes(stdout):
    """[(global_step, return, length), ...] of the printed episodes, in order."""
    pattern = r"^global_step=(\d+), episodic_return=(\S+), episodic_length=(\d+)$"
    return [(int(step), float(r), int(n)) for step, r, n in re.findall(pattern, stdout, re.MULTILINE)]


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(folder):
    """{tag: [(step, value), ...]} of all that TensorBoard shows, but for the speed."""
    events = read_events(folder)
    tags = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def progress(folder):
    """(update, global_step) of the folder's checkpoint."""
    _, checkpoint = ppo.load_checkpoint(str(folder))
    return checkpoint["update"], checkpoint["update"] * checkpoint["args"]["batch_size"]


def same_parameters(folder, agent):
    saved = ppo.load_checkpoint(str(folder))[1]["agent"]
    return all(saved[name].equal(value) for name, value in agent.state_dict().items())


def frames(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def wandb_records(folder):
    """The records of an offline run's .wandb file: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = next(folder.glob("*.wandb")).read_bytes()
    position, part = 7, b""  # behind the file's own header
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(part)
            part = b""


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """Every test runs in an empty folder, without network for W&B and without an account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where nohup runs the tests it would be ignored, by processes too,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and so would this one in the background of a script
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    while STARTED:
        for pid in left_behind(STARTED.pop(), patience=0):  # of a test that failed
            os.kill(pid, signal.SIGKILL)
    assert handlers == {number: signal.getsignal(number) for number in handlers}  # a run restores them


@pytest.fixture
def run(capsys, workdir):
    """run("--seed 2") trains in this process: what was printed, the episodes, the run's folder and the agent."""

    def run(flags="", **kwargs):
        before = set(Path("runs").glob("*"))
        args = ppo.parse_args(flags.split())
        if args.resume:  # TensorBoard reads event files in the order of their names: second, process, number
            time.sleep(1 - time.time() % 1)
        agent = ppo.train(args, **kwargs)
        out = capsys.readouterr().out
        (folder,) = {Path(args.resume)} if args.resume else set(Path("runs").glob("*")) - before
        return SimpleNamespace(agent=agent, out=out, episodes=parse_episodes(out), folder=folder)

    return run


@pytest.fixture
def fails(capsys, workdir):
    """fails("--seed -1") runs main, which must exit; returns the exit code and the single line of standard error."""

    def fails(flags, files_allowed=False):
        with pytest.raises(SystemExit) as exit_info:
            ppo.main(flags.split())
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if "Warning" not in line and "logger." not in line and "XDG_" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        if not files_allowed:
            assert not any(workdir.iterdir()), "bad input left files behind"
        return exit_info.value.code, lines[0]

    return fails


@pytest.fixture
def crash(run, monkeypatch, capsys):
    """crash("--seed 2", update=3) breaks a run off in the middle of that update; returns its folder."""

    def crash(flags, update):
        calls, compute = iter(range(1, update)), ppo.compute_advantages

        def broken(*args):
            if next(calls, None) is None:
                raise KeyError("a bug")
            return compute(*args)

        before = set(Path("runs").glob("*"))
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(ppo, "compute_advantages", broken)
            run(flags)
        capsys.readouterr()
        resumed = re.search(r"--resume (\S+)", flags)
        (folder,) = {Path(resumed[1])} if resumed else set(Path("runs").glob("*")) - before
        return folder

    return crash


def start(flags="", code=None, **kwargs):
    """Start ppo.py, or code that imports it, in a process whose output can be read while it runs."""
    command = ["-c", code] if code else [str(ROOT / "ppo.py")]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), "."])}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command, *flags.split()], text=True, env=env, **pipes, **kwargs)


def finish(process):
    """The rest of a started process's standard output, and its standard error."""
    out, err = process.stdout.read(), process.stderr.read()  # communicate() forgets what readline() has buffered
    process.wait(timeout=60)
    return out, err


def forked(flags, prepare=lambda: None):
    """ppo.main in a copy of this process: its exit code, and what it printed before it ended, unless it was killed."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    out, err = io.StringIO(), io.StringIO()

    def main():
        prepare()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                ppo.main(flags.split())
        finally:
            sender.send((out.getvalue(), err.getvalue()))

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    sender.close()
    try:
        out, err = receiver.recv()
    except EOFError:
        out = err = ""
    process.join(60)
    return process.exitcode, out, err


def spawn(flags="", script="ppo.py", **kwargs):
    """Run the script in a fresh process, as a user would."""
    command = [sys.executable, str(ROOT / script), *flags.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, **kwargs)


def python(code):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


STARTED = []


def launch(*command, cwd=None, **env):
    """Start a command; returns the process, which left_behind() recognizes, with what it starts, by a variable."""
    mark = f"PPO_TEST={time.monotonic_ns()}"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | env | dict([mark.split("=")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    options = {"cwd": cwd, "env": env, "text": True, "start_new_session": True} | pipes
    process = subprocess.Popen([sys.executable, "-W", "ignore", *map(str, command)], **options)
    process.mark = mark
    STARTED.append(process)
    return process


def result_of(process, timeout=120):
    """Wait for a started process; returns its exit code, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, out=out, err=err, episodes=parse_episodes(out))


def left_behind(process, patience=10):
    """The ids of processes that a started one leaves behind, after some seconds in which they may end (Linux only)."""
    for _ in range(patience * 10 + 1):
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it ended, or is another user's
                if process.mark.encode() in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        if not found:
            break
        time.sleep(0.1)
    return found


def torchrun(flags, processes=2, script=ROOT / "ppo.py", **env):
    """Start the script in so many processes, as torchrun does."""
    options = ("--standalone", "--nproc-per-node", processes)
    return launch("-m", "torch.distributed.run", *options, script, *flags.split(), **env)
