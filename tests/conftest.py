"""Shared tools: run ppo.py in a folder of its own, in this process or as a user would, and read what it printed."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ppo

ROOT = Path(__file__).parent.parent


def parse_episodes(stdout):
    """[(global_step, return, length), ...] of the printed episodes, in order."""
    pattern = r"^global_step=(\d+), episodic_return=(\S+), episodic_length=(\d+)$"
    return [(int(step), float(r), int(n)) for step, r, n in re.findall(pattern, stdout, re.MULTILINE)]


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """Every test runs in an empty folder, without network for W&B and without an account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():  # main changes them
        signal.signal(number, handler)


@pytest.fixture
def run(capsys, workdir):
    """run("--seed 2") trains in this process: what was printed, the episodes, the run's folder and the agent."""

    def run(flags=""):
        before = set(Path("runs").glob("*"))
        agent = ppo.train(ppo.parse_args(flags.split()))
        out = capsys.readouterr().out
        (folder,) = set(Path("runs").glob("*")) - before
        return SimpleNamespace(agent=agent, out=out, episodes=parse_episodes(out), folder=folder)

    return run


@pytest.fixture
def fails(capsys, workdir):
    """fails("--seed -1") runs main, which must exit; returns the exit code and the single line of standard error."""

    def fails(flags, files_allowed=False):
        with pytest.raises(SystemExit) as exit_info:
            ppo.main(flags.split())
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if "Warning" not in line and "logger." not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        if not files_allowed:
            assert not any(workdir.iterdir()), "bad input left files behind"
        return exit_info.value.code, lines[0]

    return fails


def spawn(flags="", script="ppo.py", **kwargs):
    """Run the script in a fresh process, as a user would."""
    command = [sys.executable, str(ROOT / script), *flags.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, **kwargs)
