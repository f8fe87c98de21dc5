"""Videos can be played, and W&B's offline runs hold what online ones would send."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (
    ROOT,
    finish,
    frames,
    saved_step,
    start,
    wandb_history,
    wandb_records,
)

import ppo

# One process runs all tests of this file, so that they share this run.
pytestmark = pytest.mark.xdist_group("tracked")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """One run with --track --capture-video, as a user would start it offline."""
    folder = tmp_path_factory.mktemp("tracked")
    # W&B stores the program if it lies below the folder in which it is started.
    shutil.copy(ROOT / "ppo.py", folder)
    flags = "--track --capture-video --num-steps 16 --total-timesteps 832"
    command = [*flags.split(), "--wandb-project-name", "lessons"]
    process = start(folder / "ppo.py", *command, cwd=folder, WANDB_MODE="offline")
    result = finish(process)
    assert result.code == 0, result.err
    (run_folder,) = (folder / "runs").iterdir()
    (wandb_folder,) = (folder / "wandb").glob("offline-run-*")
    return SimpleNamespace(
        folder=folder,
        out=result.out,
        episodes=result.episodes,
        name=run_folder.name,
        wandb=wandb_folder,
    )


def test_videos_decode_and_have_a_frame_per_step(tracked):
    videos = tracked.folder / "videos" / tracked.name
    names = sorted(path.name for path in videos.iterdir())
    assert names == [f"rl-video-episode-{i}.mp4" for i in (0, 1, 8)]

    # In the reference run, the first environment's first episode ends first.
    pictures = frames(videos / names[0])
    assert tracked.episodes[0] == (60, 15.0, 15)
    assert 15 <= len(pictures) <= 17
    assert pictures[0].shape == (400, 600, 3)
    assert pictures[0].min() < 100  # something is drawn
    assert (pictures[0] != pictures[-1]).any()  # and it moves


def test_standard_output_stays_clean(tracked):
    *lines, last = tracked.out.splitlines()
    assert last == f"results: runs/{tracked.name} and videos/{tracked.name}"
    for line in lines:
        assert line.split("=")[0].isidentifier(), line


def test_wandb_gets_the_name_the_flags_the_code_and_the_packages(tracked):
    files = tracked.wandb / "files"
    assert (files / "code/ppo.py").read_text() == (ROOT / "ppo.py").read_text()
    assert "torch==" in (files / "requirements.txt").read_text()
    records = wandb_records(tracked.wandb)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert run["project"] == "lessons"
    assert run["display_name"] == tracked.name
    config = run["config"]["update"]
    assert config["learning_rate"] == 0.00025
    assert config["num_envs"] == 4
    assert config["capture_video"] is True


def test_wandb_gets_curves_and_videos_at_their_steps(tracked):
    rows = wandb_history(tracked.wandb)
    losses = [row for row in rows if "losses/policy_loss" in row]
    assert [row["global_step"] for row in losses] == list(range(64, 833, 64))

    returns = [row for row in rows if "charts/episodic_return" in row]
    assert returns[0]["global_step"] == 60
    assert returns[0]["charts/episodic_return"] == 15
    ends = {step for step, _, _ in tracked.episodes}
    assert {row["global_step"] for row in returns} == ends

    # Episodes 0 and 1 of the first environment end in steps 60 and 120. The run ends
    # in the middle of its episode 8.
    assert {60, 120} <= ends
    assert 832 not in ends
    videos = [row for row in rows if "video.path" in row]
    assert [row["global_step"] for row in videos] == [64, 128]
    for row in videos:
        assert len(frames(tracked.wandb / "files" / row["video.path"])) > 1


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_wandb_run(tracked, workdir):
    folder = shutil.copytree(tracked.folder, workdir / "copy")
    run_folder = f"runs/{tracked.name}"
    command = ["--resume", run_folder, "--total-timesteps", 1600]
    result = finish(start(folder / "ppo.py", *command, cwd=folder))
    assert result.code == 0, result.err
    assert saved_step(folder / run_folder) == 1600

    first, second = sorted((folder / "wandb").glob("offline-run-*"))
    wandb_id = ppo.load_checkpoint(folder / run_folder)["wandb_id"]
    assert first.name.endswith(f"-{wandb_id}")
    assert second.name.endswith(f"-{wandb_id}")
    rows = wandb_history(second)
    losses = [row for row in rows if "losses/policy_loss" in row]
    assert [row["global_step"] for row in losses] == list(range(896, 1601, 64))
    assert [row for row in rows if "video.path" in row]


def test_videos_of_a_resumed_run_go_to_a_folder_of_their_own(run, crash):
    flags = "--capture-video --num-steps 16 --total-timesteps 512"
    folder = crash(f"{flags} --checkpoint-interval 1e-9", update=6)
    videos = Path("videos", folder.name)
    before = {path: path.read_bytes() for path in videos.glob("*.mp4")}
    assert before

    crash(f"--resume {folder}", update=1)
    resumed = run(f"--resume {folder}")  # from the same step
    first, second = sorted(videos.glob("from-step-320__*"))
    assert (first / "rl-video-episode-0.mp4").exists()
    assert len(frames(second / "rl-video-episode-0.mp4")) > 1
    assert "note: the environments begin new episodes" in resumed.out
    assert resumed.out.endswith(f"results: {folder} and {second}\n")
    assert before == {path: path.read_bytes() for path in videos.glob("*.mp4")}


def test_without_the_flags_there_are_no_such_folders(run):
    run("--total-timesteps 512")
    assert [path.name for path in Path().iterdir()] == ["runs"]
