"""Ctrl-C and SIGTERM end a run in good order: saved, closed, and able to go on; a second one ends it at once."""

import itertools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import imageio_ffmpeg
import pytest
from conftest import (
    finish,
    frames,
    parse_episodes,
    progress,
    read_events,
    same_parameters,
    scalars,
    start,
    wandb_records,
)

import ppo

FLAGS = "--total-timesteps 40960 --checkpoint-interval 7"
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def stopped(flags, number, lines, delay=0.0, group=False):
    """The exit code, standard output and standard error of a run that got the signal after it had printed lines."""
    process = start(flags, start_new_session=group)
    head = "".join(process.stdout.readline() for _ in range(lines))
    time.sleep(delay)
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = finish(process)
    return process.returncode, head + out, err


def check_stopped(code, out, err, number):
    """All that a stopped run promises; returns its folder."""
    assert code == SIGNALS[number] and "Traceback" not in err, err
    stop, results = [line for line in out.splitlines() if line.startswith(("stopped", "results"))]
    command = stop.split("to go on: ")[1]
    assert command.startswith("python ppo.py --resume runs/")
    folder = Path(command.split()[-1])
    assert results.startswith(f"results: {folder}")
    step = progress(folder)[1]
    assert f"stopped at step {step} of " in stop
    assert read_events(folder).Scalars("losses/entropy")[-1].step == step
    return folder


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_middle_of_an_update_finishes_it_and_the_resumed_run_equals_an_undisturbed_one(
    number, run, monkeypatch, capsys
):
    whole = run("--total-timesteps 4096")
    calls, compute = itertools.count(), ppo.compute_advantages

    def signalled(*args):
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        return compute(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(ppo, "compute_advantages", signalled)
        ppo.main("--total-timesteps 4096".split())
    out, err = capsys.readouterr()
    folder = check_stopped(exit_info.value.code, out, err, number)
    assert progress(folder) == (3, 1536)
    resumed = run(f"--resume {folder}")
    assert parse_episodes(out) + resumed.episodes == whole.episodes and scalars(folder) == scalars(whole.folder)
    assert same_parameters(folder, whole.agent)


def test_a_signal_in_the_last_update_leaves_a_complete_run(run, monkeypatch, capsys):
    compute = ppo.compute_advantages

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return compute(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(ppo, "compute_advantages", signalled)
        ppo.main("--total-timesteps 512".split())
    (folder,) = Path("runs").iterdir()
    assert exit_info.value.code == 130 and progress(folder) == (1, 512)


def test_without_checkpoints_a_stop_does_not_promise_to_go_on():
    code, out, err = stopped("--total-timesteps 40960 --checkpoint-interval 0", signal.SIGINT, 40)
    assert code == 130 and err == "" and "resume runs" not in out and out.splitlines()[-1].startswith("results: runs/")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_real_process_stops_after_its_first_line_without_a_word_on_standard_error(number, workdir):
    code, out, err = stopped(FLAGS, number, 1)
    check_stopped(code, out, err, number)
    assert err == ""


STUCK = """
import signal, sys, time
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Stuck(CartPoleEnv):
    def step(self, action):
        print("stuck", flush=True)
        for _ in range(1000):
            if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
                break
            time.sleep(0.01)
        print("first signal seen", flush=True)
        while True:
            time.sleep(0.01)

gym.register("Stuck-v0", Stuck, disable_env_checker=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once_even_a_run_that_is_stuck(number, workdir):
    Path("stuck.py").write_text(STUCK)
    process = start("--env-id stuck:Stuck-v0")
    while process.stdout.readline() != "stuck\n":
        pass
    process.send_signal(number)
    assert process.stdout.readline() == "first signal seen\n"
    process.send_signal(number)
    try:
        process.communicate(timeout=20)  # stuck for ever, if the signal is not heard
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.returncode == -number


def test_ctrl_c_that_also_hits_the_video_encoder_ends_without_a_traceback(workdir, monkeypatch):
    """A terminal sends SIGINT to the whole process group: to ppo.py and to the ffmpeg that it has started."""
    ffmpeg = Path("ffmpeg")  # one that presses Ctrl-C when the first video is written
    ffmpeg.write_text(
        '#!/bin/sh\ncase "$*" in *rawvideo*) [ -e pressed ] || { touch pressed; kill -s INT -- -$PPID; };; esac\n'
        f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n'
    )
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg.resolve()))
    process = start("--capture-video --num-steps 16 --total-timesteps 6400", start_new_session=True)
    out, err = finish(process)
    assert Path("pressed").exists()
    assert process.returncode == 1 and "Traceback" not in err  # the encoder is gone, so the step cannot be finished
    assert [line for line in err.splitlines() if "broke in global_step" in line]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_at_random_moments_again_and_again_a_run_ends_as_if_undisturbed(number, run):
    rng = random.Random(int(number))
    whole = run(FLAGS)
    flags, episodes, stops = FLAGS, [], 0
    while stops < 8:
        code, out, err = stopped(flags, number, rng.randint(28, 60), 0.1 * rng.random(), group=rng.random() < 0.5)
        episodes += parse_episodes(out)
        stops += 1
        folder = check_stopped(code, out, err, number)
        assert err == ""
        flags = f"--resume {folder}"
    resumed = run(flags)
    assert episodes + resumed.episodes == whole.episodes and scalars(folder) == scalars(whole.folder)
    assert same_parameters(folder, whole.agent)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_with_videos_and_wandb_all_that_was_recorded_can_be_read(number, workdir):
    rng = random.Random(int(number))
    flags = "--track --capture-video --num-steps 16 --total-timesteps 6400"
    code, out, err = stopped(flags, number, rng.randint(40, 80), 0.1 * rng.random())
    folder = check_stopped(code, out, err, number)
    videos = list(Path("videos", folder.name).glob("*.mp4"))
    assert videos and all(len(frames(path)) > 1 for path in videos)
    (run_folder,) = Path("wandb").glob("offline-run-*")
    kinds = [record.WhichOneof("record_type") for record in wandb_records(run_folder)]
    assert "history" in kinds and kinds[-1] == "exit"
    process = start(f"--resume {folder}")
    out, err = finish(process)
    assert process.returncode == 0 and "note: " in out, err
    assert read_events(folder).Scalars("losses/entropy")[-1].step == 6400
