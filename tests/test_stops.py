"""Ctrl-C and other stop signals end a run in good order: saved, closed, able to go on.

A second signal ends it at once.
"""

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import imageio_ffmpeg
import pytest
from conftest import (
    ROOT,
    agent_that_calls,
    finish,
    frames,
    left_behind,
    parse_episodes,
    read_events,
    same_parameters,
    saved_step,
    scalars,
    start,
    wandb_records,
)

import ppo

EXIT_CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGHUP: 129,
    signal.SIGUSR1: 138,
}


def assert_stopped(result, number):
    """Check all that a stopped run promises, and return its folder."""
    assert result.code == EXIT_CODES[number], result.err
    assert "Traceback" not in result.err
    lines = result.out.splitlines()
    (line,) = [line for line in lines if line.startswith("stopped")]
    stop, folder = line.split("; to go on: the same command with --resume ")
    step = saved_step(folder)
    assert stop.startswith(f"stopped at step {step} of ")
    assert read_events(folder).Scalars("losses/entropy")[-1].step == step
    return Path(folder)


def send(number):
    """A function that sends this signal to this process and to all its workers."""

    def function():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
        os.kill(os.getpid(), number)

    return function


# In this process


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_signal_lets_an_update_end_and_the_resumed_run_equals_an_undisturbed_one(
    number, mode, run, exits
):
    flags = f"--total-timesteps 1024 --vectorization-mode {mode}"
    handler = signal.getsignal(number)
    stopped = exits(flags, Agent=agent_that_calls(send(number), update=1))
    folder = assert_stopped(stopped, number)
    assert stopped.err == ""
    assert saved_step(folder) == 512
    assert signal.getsignal(number) == handler
    assert not multiprocessing.active_children()
    resumed = run(f"--resume {folder}")
    if mode == "sync":  # worker processes cannot be kept, so new episodes begin
        whole = run(flags)
        assert stopped.episodes + resumed.episodes == whole.episodes
        assert scalars(folder) == scalars(whole.folder)
        assert same_parameters(folder, whole.agent)


@pytest.mark.slow
def test_spawned_workers_leave_a_signal_to_the_main_process(exits):
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)  # nothing is copied to them
    flags = "--num-envs 2 --total-timesteps 1024 --vectorization-mode async"
    Agent = agent_that_calls(send(signal.SIGTERM), update=1)
    try:
        stopped = exits(flags, Agent=Agent)
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert_stopped(stopped, signal.SIGTERM)


def test_a_signal_in_the_last_update_leaves_a_complete_run(run, exits):
    flags = "--total-timesteps 1024"
    Agent = agent_that_calls(send(signal.SIGINT), update=2)
    stopped = exits(flags, Agent=Agent)
    folder = assert_stopped(stopped, signal.SIGINT)
    whole = run(flags)
    assert stopped.episodes == whole.episodes
    assert same_parameters(folder, whole.agent)


def test_without_checkpoints_a_stop_does_not_promise_to_go_on(exits):
    Agent = agent_that_calls(send(signal.SIGTERM), update=1)
    result = exits("--checkpoint-interval 0", Agent=Agent)
    assert result.code == 143
    assert "stopped at step 512 of 25000; it has no checkpoint" in result.out
    assert "--resume" not in result.out + result.err
    (folder,) = Path("runs").iterdir()
    assert not (folder / "checkpoint.pt").exists()


def test_a_signal_that_was_ignored_before_stays_ignored(run):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    Agent = agent_that_calls(send(signal.SIGHUP), update=1)
    try:
        folder = run("--total-timesteps 1024", Agent=Agent).folder
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert saved_step(folder) == 1024


class EndedByHandler(Exception):
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_even_a_stuck_run_by_the_handler_of_before(
    number, run, monkeypatch
):
    seconds = 0.0
    survived = False
    monkeypatch.setattr("time.monotonic", lambda: seconds)

    def handler(number, frame):
        raise EndedByHandler

    def be_stuck():
        nonlocal seconds, survived
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the same one, if torchrun passes it on
        survived = True
        seconds += 2
        os.kill(os.getpid(), number)
        time.sleep(60)

    old_handler = signal.signal(number, handler)
    try:
        with pytest.raises(EndedByHandler):
            run(Agent=agent_that_calls(be_stuck, update=1))
    finally:
        signal.signal(number, old_handler)
    assert survived


def test_in_a_thread_it_trains_without_handlers(workdir):
    agents = []
    thread = threading.Thread(
        target=lambda: agents.append(ppo.main(["--total-timesteps", "512"]))
    )
    thread.start()
    thread.join()
    (folder,) = Path("runs").iterdir()
    assert same_parameters(folder, agents[0])


# As a user starts it


def stopped_after(flags, number, lines, delay=0.0, whole_group=False):
    """Start a run, send a signal after so many lines, and wait for its end.

    Returns what finish() returns, with all that was printed.
    """
    process = start(ROOT / "ppo.py", *flags.split())
    head = [process.stdout.readline() for _ in range(lines)]
    time.sleep(delay)
    if whole_group:  # as a terminal does for Ctrl-C
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    result = finish(process)
    result.out = "".join(head) + result.out
    result.episodes = parse_episodes(result.out)
    assert not left_behind(process)
    return result


def test_ctrl_c_right_after_the_first_line_ends_without_a_word_on_standard_error(
    workdir,
):
    flags = "--vectorization-mode async"
    result = stopped_after(flags, signal.SIGINT, lines=1, whole_group=True)
    assert_stopped(result, signal.SIGINT)
    assert result.err == ""


# An ffmpeg that presses Ctrl-C when the first video is written.
FFMPEG = """#!/bin/sh
case "$*" in
    *rawvideo*) [ -e pressed ] || { touch pressed; kill -s INT -- -$PPID; };;
esac
exec FFMPEG "$@"
"""


def test_ctrl_c_that_also_ends_the_video_encoder_breaks_the_run(workdir):
    ffmpeg = Path("ffmpeg")
    ffmpeg.write_text(FFMPEG.replace("FFMPEG", imageio_ffmpeg.get_ffmpeg_exe()))
    ffmpeg.chmod(0o755)
    flags = "--capture-video --num-steps 16 --total-timesteps 6400"
    result = finish(
        start(ROOT / "ppo.py", *flags.split(), FFMPEG_BINARY=str(ffmpeg.resolve()))
    )
    assert Path("pressed").exists()
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("The run broke in step ")


@pytest.mark.slow
def test_stopped_at_random_moments_a_run_ends_as_if_undisturbed(run):
    rng = random.Random(1)
    flags = "--total-timesteps 12288"
    whole = run(flags)
    episodes = []
    for number in EXIT_CODES:
        lines = rng.randint(40, 80)
        delay = 0.1 * rng.random()
        result = stopped_after(flags, number, lines, delay, rng.random() < 0.5)
        folder = assert_stopped(result, number)
        assert result.err == ""
        episodes += result.episodes
        flags = f"--resume {folder}"
    resumed = run(flags)
    assert episodes + resumed.episodes == whole.episodes
    assert scalars(folder) == scalars(whole.folder)
    assert same_parameters(folder, whole.agent)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_with_videos_and_wandb_all_that_was_recorded_can_be_read(
    number, workdir
):
    rng = random.Random(int(number))
    flags = "--track --capture-video --num-steps 16 --total-timesteps 6400"
    lines = rng.randint(40, 80)
    result = stopped_after(flags, number, lines, delay=0.1 * rng.random())
    folder = assert_stopped(result, number)

    videos = list(Path("videos", folder.name).glob("*.mp4"))
    assert videos
    assert all(len(frames(path)) > 1 for path in videos)
    (run_folder,) = Path("wandb").glob("offline-run-*")
    kinds = [record["type"] for record in wandb_records(run_folder)]
    assert "history" in kinds
    assert kinds[-1] == "exit"

    resumed = finish(start(ROOT / "ppo.py", "--resume", folder))
    assert resumed.code == 0, resumed.err
    assert "note: " in resumed.out
    assert read_events(folder).Scalars("losses/entropy")[-1].step == 6400
