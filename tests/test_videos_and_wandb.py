"""Videos can be played, and an offline Weights & Biases run holds what an online one would send."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, frames, parse_episodes, spawn, wandb_records


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """One run with --track --capture-video, as a user would start it offline."""
    folder = tmp_path_factory.mktemp("tracked")
    shutil.copy(ROOT / "ppo.py", folder)  # W&B stores the program if it lies below the folder where it is started
    flags = "--track --capture-video --num-steps 16 --total-timesteps 832 --wandb-project-name lessons"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        result = spawn(flags, script=folder / "ppo.py", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_videos_of_the_first_environment_decode_and_have_a_frame_per_step(tracked):
    folder, result = tracked
    name = next((folder / "runs").iterdir()).name
    videos = {path.name: path for path in (folder / "videos" / name).iterdir()}
    assert set(videos) == {f"rl-video-episode-{i}.mp4" for i in (0, 1, 8)}
    pictures = frames(videos["rl-video-episode-0.mp4"])
    assert pictures[0].shape == (400, 600, 3)
    length = 15  # of the reference run's first episode of sub-environment 0, which ends first, at step 60
    assert parse_episodes(result.stdout)[0] == (60, 15.0, 15)
    assert length <= len(pictures) <= length + 2
    assert pictures[0].min() < 100 and (pictures[0] != pictures[-1]).any()  # something is drawn, and it moves


def test_standard_output_stays_clean_with_videos_and_tracking(tracked):
    folder, result = tracked
    lines = result.stdout.splitlines()
    assert all("=" in line or line.startswith("results: runs/") for line in lines), result.stdout
    name = next((folder / "runs").iterdir()).name
    assert lines[-1] == f"results: runs/{name} and videos/{name}"


def test_offline_wandb_run_has_name_config_metrics_code_requirements_and_videos_at_their_step(tracked):
    folder, result = tracked
    (run_folder,) = (folder / "wandb").glob("offline-run-*")
    assert "def compute_advantages" in (run_folder / "files/code/ppo.py").read_text()
    assert "torch==" in (run_folder / "files/requirements.txt").read_text()
    records = list(wandb_records(run_folder))
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert run.project == "lessons" and run.display_name == next((folder / "runs").iterdir()).name
    config = {item.key: item.value_json for item in run.config.update}
    assert config["learning_rate"] == "0.00025" and config["num_envs"] == "4"
    rows = [
        {item.key or "/".join(item.nested_key): item.value_json for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    videos = [row for row in rows if "video/path" in row]
    assert len(videos) == 2  # those of the episodes that were finished; the third was cut off when the run ended
    for row in videos:
        assert (run_folder / "files" / row["video/path"].strip('"')).stat().st_size > 1000
    ends = {step for step, _, _ in parse_episodes(result.stdout)}
    # Episodes 0 and 1 of the first sub-environment end here; the run ends in the middle of episode 8.
    assert [row["global_step"] for row in videos] == ["64", "128"] and {60, 120} <= ends and 832 not in ends
    losses = [row for row in rows if "losses/policy_loss" in row]
    assert [int(row["global_step"]) for row in losses] == list(range(64, 833, 64))
    points = [row for row in rows if "charts/episodic_return" in row]
    assert {int(row["global_step"]) for row in points} == ends
    assert (points[0]["global_step"], points[0]["charts/episodic_return"]) == ("60", "15")


def test_no_video_folder_without_the_flag(run):
    run("--total-timesteps 512")
    assert not Path("videos").exists() and not Path("wandb").exists()


def test_videos_of_a_resumed_run_go_to_a_folder_of_their_own(run, crash):
    flags = "--capture-video --num-steps 16 --total-timesteps 512 --checkpoint-interval 1e-9"
    folder = crash(flags, update=6)
    videos = Path("videos", folder.name)
    before = {path: path.read_bytes() for path in videos.glob("*.mp4")}
    crash(f"--resume {folder}", update=1)
    resumed = run(f"--resume {folder}")  # from the same step
    first, second = sorted(map(str, videos.glob("from-step-320__*")))
    assert "note: these environments" in resumed.out and f"results: {folder} and {second}\n" in resumed.out
    assert all((Path(path) / "rl-video-episode-0.mp4").exists() for path in (first, second))
    assert before == {path: path.read_bytes() for path in videos.glob("*.mp4")} != {}
