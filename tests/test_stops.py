"""Ctrl-C and other stop signals end a run in good order: saved, closed, able to go on; a second one ends it at once."""

import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path

import imageio_ffmpeg
import pytest
from conftest import (
    finish,
    forked,
    frames,
    parse_episodes,
    progress,
    read_events,
    same_parameters,
    scalars,
    start,
    wandb_records,
)
from gymnasium.envs.classic_control import CartPoleEnv

import ppo

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}


def check_stopped(code, out, err, number):
    """All that a stopped run promises; returns its folder."""
    assert code == SIGNALS[number] and "Traceback" not in err, err
    stop, results = [line for line in out.splitlines() if line.startswith(("stopped", "results"))]
    how, folder = stop.split("; to go on: ")[1].split(" --resume ")
    assert how == "the same command with" and results.split()[1] == folder
    step = progress(folder)[1]
    assert f"stopped at step {step} of " in stop
    assert read_events(folder).Scalars("losses/entropy")[-1].step == step
    return Path(folder)


@pytest.fixture
def signalled(monkeypatch):
    """signalled(3, f) calls f in the middle of the third update."""

    def signalled(update, send):
        calls, compute = itertools.count(1), ppo.compute_advantages

        def compute_advantages(*args):
            if next(calls) == update:
                send()
            return compute(*args)

        monkeypatch.setattr(ppo, "compute_advantages", compute_advantages)

    return signalled


@pytest.fixture
def stops(capsys):
    """stops("--seed 2") runs main, which must exit: the exit code, standard output and standard error."""

    def stops(flags):
        with pytest.raises(SystemExit) as exit_info:
            ppo.main(flags.split())
        return exit_info.value.code, *capsys.readouterr()

    return stops


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_middle_of_an_update_finishes_it_and_the_resumed_run_equals_an_undisturbed_one(
    number, run, signalled, stops
):
    flags, handler = "--total-timesteps 2048", signal.getsignal(number)
    whole = run(flags)
    signalled(2, lambda: os.kill(os.getpid(), number))
    code, out, err = stops(flags)
    folder = check_stopped(code, out, err, number)
    assert err == "" and progress(folder) == (2, 1024) and signal.getsignal(number) == handler
    resumed = run(f"{flags} --resume {folder}")
    assert parse_episodes(out) + resumed.episodes == whole.episodes and scalars(folder) == scalars(whole.folder)
    assert same_parameters(folder, whole.agent)


@pytest.mark.parametrize("number", SIGNALS)
def test_worker_processes_leave_a_signal_to_their_whole_group_to_the_main_process(number, workdir, signalled):
    signalled(2, lambda: os.killpg(0, number))
    code, out, err = forked("--vectorization-mode async --total-timesteps 2048", os.setsid)
    check_stopped(code, out, err, number)
    assert err == ""


def test_a_signal_in_the_last_update_leaves_a_complete_run(signalled, stops):
    signalled(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, *_ = stops("--total-timesteps 512")
    (folder,) = Path("runs").iterdir()
    assert code == 130 and progress(folder) == (1, 512)


def test_without_checkpoints_a_stop_does_not_promise_to_go_on(signalled, stops):
    signalled(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, out, err = stops("--checkpoint-interval 0")
    assert (code, err) == (143, "") and "--resume" not in out and out.splitlines()[-1].startswith("results: runs/")


def test_a_signal_that_was_ignored_before_stays_ignored(run, signalled):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signalled(1, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert progress(run("--total-timesteps 1024").folder) == (2, 1024)
    assert signal.signal(signal.SIGHUP, handler) == signal.SIG_IGN


def test_a_second_signal_ends_even_a_stuck_run_by_the_handler_of_before(workdir, monkeypatch):
    monkeypatch.setattr(CartPoleEnv, "step", lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        ppo.main([])
    monkeypatch.setattr(CartPoleEnv, "step", lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    assert forked("")[0] == -signal.SIGTERM


def test_ctrl_c_that_also_hits_the_video_encoder_ends_without_a_traceback(workdir, monkeypatch):
    """A terminal sends SIGINT to the whole process group: to ppo.py and to the ffmpeg that it has started."""
    ffmpeg = Path("ffmpeg")  # one that presses Ctrl-C when the first video is written
    ffmpeg.write_text(
        '#!/bin/sh\ncase "$*" in *rawvideo*) [ -e pressed ] || { touch pressed; kill -s INT -- -$PPID; };; esac\n'
        f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n'
    )
    ffmpeg.chmod(0o755)
    monkeypatch.setattr("moviepy.video.io.ffmpeg_writer.FFMPEG_BINARY", str(ffmpeg.resolve()))
    code, out, err = forked("--capture-video --num-steps 16 --total-timesteps 6400", os.setsid)
    assert Path("pressed").exists()
    assert code == 1 and "Traceback" not in err  # the encoder is gone, so the step cannot be finished
    assert [line for line in err.splitlines() if "broke in global_step" in line]


def test_in_a_thread_it_trains_without_handlers(workdir):
    agents = []
    thread = threading.Thread(target=lambda: agents.append(ppo.main(["--total-timesteps", "512"])))
    thread.start()
    thread.join()
    (folder,) = Path("runs").iterdir()
    assert same_parameters(folder, agents[0])


# Real processes


def stopped(flags, number, lines, delay=0.0, group=False):
    """The exit code, standard output and standard error of a run that got the signal after it had printed lines."""
    process = start(flags, start_new_session=group)
    head = "".join(process.stdout.readline() for _ in range(lines))
    time.sleep(delay)
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = finish(process)
    return process.returncode, head + out, err


def test_a_real_process_stops_after_its_first_line_without_a_word_on_standard_error(workdir):
    code, out, err = stopped("--vectorization-mode async", signal.SIGTERM, 1, group=True)
    check_stopped(code, out, err, signal.SIGTERM)
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_at_random_moments_again_and_again_a_run_ends_as_if_undisturbed(number, run):
    rng = random.Random(int(number))
    whole = run("--total-timesteps 40960")
    flags, episodes = "--total-timesteps 40960", []
    for _ in range(8):
        code, out, err = stopped(flags, number, rng.randint(28, 60), 0.1 * rng.random(), group=rng.random() < 0.5)
        episodes += parse_episodes(out)
        folder = check_stopped(code, out, err, number)
        assert err == ""
        flags = f"--resume {folder}"
    resumed = run(flags)
    assert episodes + resumed.episodes == whole.episodes and scalars(folder) == scalars(whole.folder)
    assert same_parameters(folder, whole.agent)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
