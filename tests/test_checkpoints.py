"""A run that was broken off, however it was, goes on as if nothing had happened; a checkpoint is whole or not there."""

import pickle
import random
import threading
import time
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import finish, parse_episodes, progress, read_events, same_parameters, scalars, spawn, start
from gymnasium.envs.classic_control import CartPoleEnv

import evaluate
import ppo

FLAGS = "--total-timesteps 4096 --checkpoint-interval 2"
DRIVER = "import ppo, sys\n{}\nppo.main(sys.argv[1:])"


class EzPole(CartPoleEnv, gym.utils.EzPickle):
    """Pickles without complaint, and comes back as a new one, like all simulators written in C."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        gym.utils.EzPickle.__init__(self)


class LockedPole(CartPoleEnv):
    """Refuses to be pickled."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.lock = threading.Lock()


class FailingPole(CartPoleEnv):
    """Fails in the way that the test asks for in the 150th step of each sub-environment."""

    def __init__(self, render_mode=None, how="raise"):
        super().__init__(render_mode=render_mode)
        self.how, self.count = how, 0

    def step(self, action):
        self.count += 1
        obs, reward, *rest = super().step(action)
        if self.count == 150 and self.how == "nan":
            reward = float("nan")
        elif self.count == 150:
            raise ValueError("the simulator\nexploded")
        return obs, reward, *rest

    def close(self):
        if self.how == "raise twice" and self.count >= 150:
            raise ValueError("the simulator is gone")
        super().close()


for name, cls in {"EzPole": EzPole, "LockedPole": LockedPole, "FailingPole": FailingPole}.items():
    gym.register(f"{name}-v0", cls, max_episode_steps=500, disable_env_checker=True)
for how in ("nan", "raise twice"):
    env_id = f"FailingPole-{how.replace(' ', '-')}-v0"
    gym.register(env_id, FailingPole, kwargs={"how": how}, max_episode_steps=500, disable_env_checker=True)


def equal(resumed, whole, early_episodes=()):
    """The same parameters, episodes and curves, without a step that is there twice."""
    assert same_parameters(resumed.folder, whole.agent)
    assert [*early_episodes, *resumed.episodes] == whole.episodes
    curves, expected = scalars(resumed.folder), scalars(whole.folder)
    assert curves == expected
    for points in curves.values():
        assert all(a < b for (a, _), (b, _) in zip(points, points[1:], strict=False))


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--env-id Acrobot-v1 --num-envs 2 --num-steps 256 --seed 5",
        "--env-id MountainCar-v0 --bootstrap-truncation",
        "--bootstrap-truncation --target-kl 0.0005 --learning-rate 0.002 --seed 3",
        "--env-id FrozenLake-v1",
        "--env-id Blackjack-v1 --no-gae --no-norm-adv",
        "--no-torch-deterministic --num-envs 1 --num-steps 512",
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(flags, run, crash):
    whole = run(f"{FLAGS} {flags}")
    folder = crash(f"{FLAGS} {flags}", update=6)  # its fifth update is in TensorBoard, but not in the checkpoint
    update, step = progress(folder)
    assert (update, step) == (4, 2048)
    resumed = run(f"--resume {folder}")
    assert "note" not in resumed.out and len(whole.episodes) > 0
    equal(resumed, whole, [episode for episode in whole.episodes if episode[0] <= step])


def test_a_run_can_be_resumed_again_and_again(run, crash):
    whole = run(FLAGS)
    folder = crash(FLAGS, update=4)
    crash(f"--resume {folder}", update=4)
    crash(f"--resume {folder}/", update=2)
    assert progress(folder) == (4, 2048)
    equal(run(f"--resume {folder}"), whole, [episode for episode in whole.episodes if episode[0] <= 2048])


def test_more_timesteps_without_annealing_equal_a_run_that_was_longer_from_the_start(run):
    whole = run("--total-timesteps 4096 --no-anneal-lr")
    half = run("--total-timesteps 2048 --no-anneal-lr")
    resumed = run(f"--resume {half.folder} --total-timesteps 4096")
    assert "note" not in resumed.out
    equal(resumed, whole, half.episodes)


def test_more_timesteps_with_annealing_say_what_becomes_of_the_learning_rate(run):
    half = run("--total-timesteps 2048")
    resumed = run(f"--resume {half.folder} --total-timesteps 4096")
    (note,) = [line for line in resumed.out.splitlines() if line.startswith("note: ")]
    assert "4096" in note and "learning rate" in note
    rates = [value for _, value in scalars(half.folder)["charts/learning_rate"]]
    old, new = [1, 0.75, 0.5, 0.25], [0.5, 0.375, 0.25, 0.125]
    assert rates == pytest.approx([2.5e-4 * x for x in old + new])


def test_resuming_a_finished_run_changes_nothing(run):
    whole = run("--total-timesteps 1024")
    before, curves = (whole.folder / "checkpoint.pt").read_bytes(), scalars(whole.folder)
    again = run(f"--resume {whole.folder}")
    assert (whole.folder / "checkpoint.pt").read_bytes() == before and scalars(whole.folder) == curves
    assert again.episodes == [] and same_parameters(whole.folder, again.agent)


def test_the_last_update_is_always_saved_and_interval_0_saves_nothing(run):
    assert progress(run("--total-timesteps 1536").folder) == (3, 1536)
    assert progress(run("--total-timesteps 1536 --checkpoint-interval 2").folder) == (3, 1536)
    (only_events,) = run("--total-timesteps 1024 --checkpoint-interval 0").folder.iterdir()
    assert only_events.name.startswith("events.")


def test_repeating_the_flags_of_the_run_is_no_conflict(run):
    folder = run("--total-timesteps 1024 --seed 2").folder
    run(f"--resume {folder} --seed 2 --total-timesteps 1024 --gae")


@pytest.mark.parametrize(
    "flags",
    ["--seed 2", "--env-id Acrobot-v1", "--no-gae", "--total-timesteps 512", "--total-timesteps 2048 --gamma 0.9"]
    + ["--num-envs 8", "--target-kl 0.1", "--checkpoint-interval 3", "--capture-video", "--exp-name other"],
)
def test_flags_that_conflict_with_the_run_are_refused(flags, run, fails):
    folder = run("--total-timesteps 1024").folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, line = fails(f"--resume {folder} {flags}", files_allowed=True)
    assert (
        code == 2
        and flags.split()[-2 if "gamma" in flags else 0].strip("-").replace("no-", "").replace("-", "_") in line
    )
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("env_id", ["EzPole-v0", "LockedPole-v0"])
def test_environments_that_cannot_be_saved_start_new_episodes_and_say_so(env_id, run, crash):
    folder = crash(f"{FLAGS} --env-id {env_id}", update=6)
    resumed = run(f"--resume {folder}")
    (note,) = [line for line in resumed.out.splitlines() if line.startswith("note: ")]
    assert "new episodes" in note and progress(folder) == (8, 4096)
    assert [step for step, _ in scalars(folder)["losses/entropy"]] == list(range(512, 4097, 512))


def test_environments_that_cannot_be_unpickled_start_new_episodes(run, crash):
    folder = crash(FLAGS, update=4)
    checkpoint = torch.load(folder / "checkpoint.pt")
    checkpoint["processes"][0]["envs"] = torch.tensor(list(pickle.dumps(1)[:-1]), dtype=torch.uint8)  # cut off
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert (
        "note: these environments could not be saved or restored, so new episodes start"
        in run(f"--resume {folder}").out
    )


def test_videos_of_a_resumed_run_do_not_overwrite_those_of_before(run, crash):
    folder = crash(f"{FLAGS} --capture-video --num-steps 16 --total-timesteps 512", update=6)
    resumed = run(f"--resume {folder}")
    videos = Path("videos", folder.name)
    assert "note" in resumed.out and (videos / "rl-video-episode-0.mp4").exists()
    assert (videos / "from-step-256" / "rl-video-episode-0.mp4").exists()


# Kills


@pytest.mark.parametrize(
    "patch",
    [
        "def half(file): os.truncate(file.fileno(), os.fstat(file.fileno()).st_size // 2); die()\nos.fsync = half",
        "os.fsync = die",
        "os.replace = die",
    ],
    ids=["half written", "written", "on the disk"],
)
def test_killed_while_it_saves_the_checkpoint_before_is_whole(patch, run):
    whole = run(FLAGS)
    on_second_save = (
        "import os\nsave_checkpoint = ppo.save_checkpoint\ncalls = []\n"
        "def die(*args): os.kill(os.getpid(), 9)\n"
        "def saving(*args):\n calls.append(1)\n if len(calls) == 2:\n  " + patch.replace("\n", "\n  ")
        + "\n save_checkpoint(*args)\nppo.save_checkpoint = saving"
    )  # fmt: skip
    process = start(FLAGS, DRIVER.format(on_second_save))
    finish(process)
    assert process.returncode == -9
    (folder,) = set(Path("runs").iterdir()) - {whole.folder}
    assert (folder / "checkpoint.tmp").exists() and progress(folder) == (2, 1024)
    equal(run(f"--resume {folder}"), whole, [episode for episode in whole.episodes if episode[0] <= 1024])


@pytest.mark.slow
@pytest.mark.parametrize("env_id, seed", [("CartPole-v1", 1), ("Acrobot-v1", 2)])
def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(env_id, seed, run):
    rng = random.Random(seed)
    flags = f"--env-id {env_id} --total-timesteps 40960 --checkpoint-interval 1"
    whole = run(flags)
    announce = (  # kills are tied to what the process does, not to how fast it is
        "save = ppo.save_checkpoint\n"
        "def announced(*args):\n print('saving', flush=True); save(*args)\n"
        "ppo.save_checkpoint = announced"
    )
    episodes, kills, folder = [], 0, None
    while kills < 12:
        process = start(f"--resume {folder}" if folder else flags, DRIVER.format(announce))
        saves, lines = rng.randint(2, 4) if folder is None else rng.randint(1, 4), []
        while saves and (line := process.stdout.readline()):
            lines.append(line)
            saves -= line == "saving\n"
        time.sleep(rng.choice([0, 0.003 * rng.random(), 0.06 * rng.random()]))  # in saving, or in what follows
        process.kill()
        out, err = finish(process)
        assert process.returncode == -9, err
        kills += 1
        (folder,) = set(Path("runs").iterdir()) - {whole.folder}
        step = progress(folder)[1]
        episodes += [episode for episode in parse_episodes("".join(lines) + out) if episode[0] <= step]
    resumed = run(f"--resume {folder}")
    equal(resumed, whole, episodes)


# Faults


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_of_before(run, crash, fails):
    whole, folder = run(FLAGS), crash(FLAGS, update=4)
    before = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.tmp").symlink_to("/dev/full")  # all that is written to it meets a full disk
    code, line = fails(f"--resume {folder}", files_allowed=True)
    assert code == 1 and "cannot save" in line and str(folder) in line and "No space left" in line
    assert (folder / "checkpoint.pt").read_bytes() == before
    (folder / "checkpoint.tmp").unlink(missing_ok=True)
    equal(run(f"--resume {folder}"), whole, [episode for episode in whole.episodes if episode[0] <= 1024])


@pytest.mark.parametrize("kilobytes", [1, 20, 60, 100])
def test_files_that_may_not_grow_are_one_line_and_leave_the_checkpoint_of_before(kilobytes, crash):
    folder = crash(FLAGS, update=4)
    before = (folder / "checkpoint.pt").read_bytes()
    assert len(before) > 100_000
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1000},) * 2)"
    process = start(f"--resume {folder}", DRIVER.format(limit))
    _, err = finish(process)
    assert process.returncode == 1 and len(err.splitlines()) == 1 and "too large" in err, err
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("step", ["open", "replace"])
def test_a_folder_that_may_not_be_written_to_is_one_line_and_leaves_the_checkpoint_of_before(
    step, crash, fails, monkeypatch
):
    folder = crash(FLAGS, update=4)
    before = (folder / "checkpoint.pt").read_bytes()
    if step == "open":
        (folder / "checkpoint.tmp").mkdir()  # permissions would not stop root
    else:

        def refuse(source, target):
            raise PermissionError(13, "Permission denied", str(target))

        monkeypatch.setattr("os.replace", refuse)
    code, line = fails(f"--resume {folder}", files_allowed=True)
    assert code == 1 and "cannot save" in line and str(folder) in line
    assert (folder / "checkpoint.pt").read_bytes() == before and progress(folder) == (2, 1024)


def spoiled(whole, what):
    rng = random.Random(1)
    if what == "random":
        return rng.randbytes(len(whole))
    if what == "text":
        return b"not a checkpoint"
    if what == "middle":
        return whole[: len(whole) // 2] + rng.randbytes(len(whole) // 2)
    return whole[: len(whole) * what // 8]


def refused(folder, fails, capsys):
    """--resume and evaluate.py both end with one line that names the file."""
    code, line = fails(f"--resume {folder}", files_allowed=True)
    assert code == 2 and "checkpoint.pt" in line
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main([str(folder)])
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2 and out == "" and err.splitlines() == [line]


@pytest.mark.parametrize("what", [*range(8), "random", "text", "middle"])
def test_a_truncated_or_broken_checkpoint_is_refused_in_one_line(what, run, fails, capsys):
    folder = run("--total-timesteps 512").folder
    path = folder / "checkpoint.pt"
    path.write_bytes(spoiled(path.read_bytes(), what))
    refused(folder, fails, capsys)


def test_a_missing_checkpoint_or_folder_is_refused_in_one_line(workdir, fails, capsys):
    refused("runs/none", fails, capsys)
    Path("runs/empty").mkdir(parents=True)
    refused("runs/empty", fails, capsys)
    Path("runs/empty/checkpoint.pt").mkdir()
    refused("runs/empty", fails, capsys)


KEYS = "args agent adam progress envs random numpy torch".split()


@pytest.mark.parametrize(
    "data",
    [torch.zeros(3), {"model": torch.zeros(3)}, [1, 2], None, dict.fromkeys(KEYS), dict.fromkeys(KEYS, {})],
    ids=["tensor", "model", "list", "none", "all keys, no values", "all keys, empty values"],
)
def test_a_foreign_torch_file_is_refused_in_one_line(data, workdir, fails, capsys):
    folder = workdir / "runs/foreign"
    folder.mkdir(parents=True)
    torch.save(data, folder / "checkpoint.pt")
    refused(folder, fails, capsys)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("form", ["pickle", "zip", "old", "value"])
def test_code_in_a_strangers_checkpoint_is_never_executed(form, run, fails, capsys):
    folder = run("--total-timesteps 512").folder
    path = folder / "checkpoint.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif form == "value":
        torch.save(torch.load(path) | {"random": Payload()}, path)
    else:
        torch.save(Payload(), path, _use_new_zipfile_serialization=form == "zip")
    refused(folder, fails, capsys)
    assert not Path("executed").exists()


def test_code_in_the_environments_of_a_checkpoint_is_not_executed_by_evaluate(run, capsys):
    folder = run("--total-timesteps 512").folder
    frozen = torch.tensor(list(pickle.dumps(Payload())), dtype=torch.uint8)
    torch.save(torch.load(folder / "checkpoint.pt") | {"envs": frozen}, folder / "checkpoint.pt")
    evaluate.main([str(folder), "--episodes", "1"])
    assert "mean=" in capsys.readouterr().out and not Path("executed").exists()


@pytest.mark.parametrize("env_id", ["FailingPole-v0", "FailingPole-raise-twice-v0"])
def test_an_environment_that_raises_is_named_with_its_step_and_all_before_it_is_kept(env_id, fails):
    code, line = fails(f"--env-id {env_id} --checkpoint-interval 1 --total-timesteps 4096", files_allowed=True)
    assert code == 1 and f"{env_id} broke in global_step 600: " in line and "exploded" in line
    (folder,) = Path("runs").iterdir()
    assert progress(folder) == (1, 512)
    assert [step for step, _ in scalars(folder)["losses/entropy"]] == [512]
    assert max(e.step for e in read_events(folder).Scalars("charts/episodic_return")) > 512


def test_a_diverged_run_keeps_the_last_finite_checkpoint(fails):
    code, line = fails("--env-id FailingPole-nan-v0 --checkpoint-interval 1 --total-timesteps 1024", files_allowed=True)
    assert code == 1 and "update 2 (step 1024) diverged" in line
    (folder,) = Path("runs").iterdir()
    checkpoint = ppo.load_checkpoint(folder)
    assert progress(folder) == (1, 512)
    assert all(x.isfinite().all() for x in [*checkpoint["agent"].values(), *checkpoint["adam"]])


# Weights & Biases


@pytest.mark.slow
def test_without_a_connection_wandb_goes_on_offline_and_says_so(workdir):
    patch = (
        "import wandb\ninit = wandb.init\n"
        "def unreachable(**options):\n"
        " if options.get('mode') != 'offline': raise wandb.errors.CommError('no route to host')\n"
        " return init(**options)\n"
        "wandb.init = unreachable"
    )
    process = start("--track --total-timesteps 512", DRIVER.format(patch))
    out, err = finish(process)
    assert process.returncode == 0 and "Traceback" not in err, err
    (note,) = [line for line in out.splitlines() if line.startswith("note: ")]
    assert "W&B" in note and "no route to host" in note
    (run_folder,) = Path("wandb").glob("offline-run-*")
    assert next(run_folder.glob("*.wandb")).stat().st_size > 0


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_wandb_run(workdir):
    assert spawn("--track --total-timesteps 512").returncode == 0
    (folder,) = Path("runs").iterdir()
    result = spawn(f"--resume {folder} --total-timesteps 1024")
    assert result.returncode == 0, result.stderr
    first, second = Path("wandb").glob("offline-run-*")
    assert first.name.split("-")[-1] == second.name.split("-")[-1] == ppo.load_checkpoint(folder)["progress"][2]
