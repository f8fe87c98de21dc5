"""A run that was broken off, however it was, goes on as if nothing had happened; a checkpoint is whole or not there."""

import os
import pickle
import random
import resource
import threading
import time
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import finish, forked, parse_episodes, progress, read_events, same_parameters, scalars, spawn, start
from gymnasium.envs.classic_control import CartPoleEnv

import evaluate
import ppo

FLAGS = "--total-timesteps 3072 --checkpoint-interval 1e-9"  # six updates, each saved
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
    gym.register(f"{name}-v0", cls, max_episode_steps=500)
for how in ("nan", "raise twice"):
    env_id = f"FailingPole-{how.replace(' ', '-')}-v0"
    gym.register(env_id, FailingPole, kwargs={"how": how}, max_episode_steps=500)


def equal(resumed, whole, steps=0):
    """The parameters, the curves and the episodes after so many steps are the same, and no step is there twice."""
    assert same_parameters(resumed.folder, whole.agent)
    assert resumed.episodes == [episode for episode in whole.episodes if episode[0] > steps] != []
    curves, expected = scalars(resumed.folder), scalars(whole.folder)
    assert curves == expected
    for points in curves.values():
        assert all(a < b for (a, _), (b, _) in zip(points, points[1:], strict=False))


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--env-id Acrobot-v1 --num-envs 2 --num-steps 512 --total-timesteps 6144 --seed 5",
        "--env-id MountainCar-v0 --bootstrap-truncation",
        "--bootstrap-truncation --target-kl 0.0005 --learning-rate 0.002 --seed 3",
        "--env-id FrozenLake-v1",
        "--env-id Blackjack-v1 --no-gae --no-norm-adv",
        "--no-torch-deterministic --num-envs 1 --num-steps 512",
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(flags, run, crash):
    whole = run(f"{FLAGS} {flags}")
    folder = crash(f"{FLAGS} {flags}", update=4)  # episodes of its fourth update are in TensorBoard already
    update, step = progress(folder)
    assert (update, step) == (3, 3072 if "Acrobot" in flags else 1536)
    resumed = run(f"--resume {folder}")
    assert "note" not in resumed.out
    equal(resumed, whole, step)


def test_a_run_can_be_resumed_again_and_again(run, crash):
    whole = run(FLAGS)
    folder = crash(FLAGS, update=3)
    crash(f"--resume {folder}", update=2)
    crash(f"--resume {folder}/", update=1)
    assert progress(folder) == (3, 1536)
    equal(run(f"--resume {folder}/checkpoint.pt"), whole, 1536)


def test_resume_alone_goes_on_with_the_newest_run(run, workdir, monkeypatch):
    old, new = (run(f"--total-timesteps 512 --no-anneal-lr --seed {seed}").folder for seed in (1, 2))
    os.utime(old / "checkpoint.pt", (0, 0))
    ppo.main(["--resume", "--total-timesteps", "1024"])
    assert [progress(folder)[0] for folder in (old, new)] == [1, 2]
    monkeypatch.chdir(old)  # and from within the folder
    ppo.main(["--resume", "checkpoint.pt", "--total-timesteps", "1024"])
    assert progress(workdir / old)[0] == 2 and not Path("runs").exists()


def test_more_timesteps_without_annealing_equal_a_run_that_was_longer_from_the_start(run):
    whole = run("--total-timesteps 3072 --no-anneal-lr")
    half = run("--total-timesteps 1536 --no-anneal-lr")
    resumed = run(f"--resume {half.folder} --total-timesteps 3072")
    assert "note" not in resumed.out
    equal(resumed, whole, 1536)


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


@pytest.mark.parametrize("interval, saved", [(60, [3, 6, 8]), (150, [6, 8]), (1e9, [8]), (0, []), (1, [*range(1, 9)])])
def test_checkpoints_are_seconds_apart_however_long_saving_takes_and_the_last_update_is_saved(
    interval, saved, run, monkeypatch
):
    clock, updates, compute, save = [0.0], [], ppo.compute_advantages, ppo.save_checkpoint

    def slow_update(*args):
        clock[0] += 25
        return compute(*args)

    def slow_save(folder, checkpoint):
        clock[0] += 1000
        updates.append(checkpoint["update"])
        save(folder, checkpoint)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(ppo, "compute_advantages", slow_update)
    monkeypatch.setattr(ppo, "save_checkpoint", slow_save)
    folder = run(f"--num-steps 16 --total-timesteps 512 --checkpoint-interval {interval}").folder
    assert updates == saved
    assert {path.name[:10] for path in folder.iterdir()} == {"events.out", *(["checkpoint"] if saved else [])}


def test_repeating_the_flags_of_the_run_is_no_conflict(run):
    folder = run("--total-timesteps 1024 --seed 2").folder
    run(f"--resume {folder} --seed 2 --total-timesteps 1024 --gae --target-kl None")


def test_flags_that_conflict_with_the_run_are_refused(run, fails):
    folder = run("--total-timesteps 1024").folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    conflicts = "seed 2,env-id Acrobot-v1,gae False,total-timesteps 512,num-envs 8,gamma 0.9 --total-timesteps 2048,"
    for flags in f"{conflicts}target-kl 0.1,checkpoint-interval 3,capture-video,exp-name other".split(","):
        code, line = fails(f"--resume {folder} --{flags}", files_allowed=True)
        assert code == 2 and f"'{flags.split()[0].replace('-', '_')}'" in line
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("flags", ["--env-id EzPole-v0", "--env-id LockedPole-v0", "--vectorization-mode async"])
def test_environments_that_cannot_be_saved_start_new_episodes_and_say_so(flags, run, crash):
    folder = crash(f"{FLAGS} {flags}", update=4)
    resumed = run(f"--resume {folder}")
    (note,) = [line for line in resumed.out.splitlines() if line.startswith("note: ")]
    assert "new episodes" in note and progress(folder) == (6, 3072)
    assert [step for step, _ in scalars(folder)["losses/entropy"]] == list(range(512, 3073, 512))


def test_environments_that_cannot_be_unpickled_start_new_episodes(run, crash):
    folder = crash(FLAGS, update=4)
    checkpoint = torch.load(folder / "checkpoint.pt")
    checkpoint["processes"][0][1] = checkpoint["processes"][0][1][:-1]  # cut off
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert "note: these environments could not be saved or restored" in run(f"--resume {folder}").out


# Kills


def die(*args):
    os.kill(os.getpid(), 9)


def die_half_written(file):
    os.truncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
    die()


@pytest.mark.parametrize("step, how", [("fsync", die_half_written), ("fsync", die), ("replace", die)])
def test_killed_while_it_saves_the_checkpoint_before_is_whole(step, how, run, monkeypatch):
    whole, calls, original = run(FLAGS), iter(range(1)), getattr(os, step)
    with monkeypatch.context() as patch:  # the second one kills
        patch.setattr(os, step, lambda *args: how(*args) if next(calls, None) is None else original(*args))
        assert forked(FLAGS)[0] == -9
    (folder,) = set(Path("runs").iterdir()) - {whole.folder}
    assert (folder / "checkpoint.tmp").exists() and progress(folder) == (1, 512)
    equal(run(f"--resume {folder}"), whole, 512)


@pytest.mark.slow
@pytest.mark.parametrize("env_id, seed", [("CartPole-v1", 1), ("Acrobot-v1", 2)])
def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(env_id, seed, run):
    rng = random.Random(seed)
    flags = f"--env-id {env_id} --total-timesteps 40960 --checkpoint-interval 1e-9"
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
    equal(resumed, whole, step)
    assert episodes + resumed.episodes == whole.episodes


# Faults


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_of_before(run, crash, fails):
    whole, folder = run(FLAGS), crash(FLAGS, update=3)
    before = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.tmp").symlink_to("/dev/full")  # all that is written to it meets a full disk
    code, line = fails(f"--resume {folder}", files_allowed=True)
    assert code == 1 and "cannot save" in line and str(folder) in line and "No space left" in line
    assert (folder / "checkpoint.pt").read_bytes() == before
    (folder / "checkpoint.tmp").unlink(missing_ok=True)
    equal(run(f"--resume {folder}"), whole, 1024)


@pytest.mark.parametrize("kilobytes", [1, 60, 100])
def test_files_that_may_not_grow_are_one_line_and_leave_the_checkpoint_of_before(kilobytes, crash, monkeypatch):
    folder = crash(FLAGS, update=3)
    before = (folder / "checkpoint.pt").read_bytes()
    assert len(before) > 100_000

    def limited(*args, run_init=ppo.Run.__init__):
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000,) * 2)
        run_init(*args)

    monkeypatch.setattr(ppo.Run, "__init__", limited)
    code, _, err = forked(f"--resume {folder}")
    assert code == 1 and err.startswith("error: ") and "too large" in err and len(err.splitlines()) == 1
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("step", ["open", "replace"])
def test_a_folder_that_may_not_be_written_to_is_one_line_and_leaves_the_checkpoint_of_before(
    step, crash, fails, monkeypatch
):
    folder = crash(FLAGS, update=3)
    before = (folder / "checkpoint.pt").read_bytes()
    if step == "open":
        (folder / "checkpoint.tmp").mkdir()  # permissions would not stop root
    else:

        def refuse(source, target):
            raise PermissionError(13, "Permission denied", str(target))

        monkeypatch.setattr("os.replace", refuse)
    code, line = fails(f"--resume {folder}", files_allowed=True)
    assert code == 1 and "cannot save" in line and str(folder) in line
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("env_id", ["FailingPole-v0", "FailingPole-raise-twice-v0"])
def test_an_environment_that_raises_is_named_with_its_step_and_all_before_it_is_kept(env_id, fails):
    code, line = fails(f"{FLAGS} --env-id {env_id}", files_allowed=True)
    assert code == 1 and env_id in line and "broke in global_step 600: " in line and "the simulator exploded" in line
    (folder,) = Path("runs").iterdir()
    assert progress(folder) == (1, 512)
    assert [step for step, _ in scalars(folder)["losses/entropy"]] == [512]
    assert max(e.step for e in read_events(folder).Scalars("charts/episodic_return")) > 512


def test_a_diverged_run_keeps_the_last_finite_checkpoint(fails):
    code, line = fails(f"{FLAGS} --env-id FailingPole-nan-v0", files_allowed=True)
    assert code == 1 and "reward that is not finite" in line and "global_step 1024" in line
    (folder,) = Path("runs").iterdir()
    checkpoint = ppo.load_checkpoint(str(folder))[1]
    assert checkpoint["update"] == 1 and all(x.isfinite().all() for x in checkpoint["agent"].values())
    assert all(x.isfinite().all() for moments in checkpoint["optimizer"]["state"].values() for x in moments.values())


# Strange files


@pytest.fixture
def refused(fails, capsys):
    """refused(folder): --resume and evaluate.py both end with one line that names the file."""

    def refused(folder):
        code, line = fails(f"--resume {folder}", files_allowed=True)
        assert code == 2 and "checkpoint.pt" in line
        with pytest.raises(SystemExit) as exit_info:
            evaluate.main([str(folder)])
        out, err = capsys.readouterr()
        assert exit_info.value.code == 2 and out == "" and err.splitlines() == [line]

    return refused


def test_a_truncated_or_broken_checkpoint_is_refused_in_one_line(run, refused):
    folder, rng = run("--total-timesteps 512").folder, random.Random(1)
    whole = (folder / "checkpoint.pt").read_bytes()
    half = len(whole) // 2
    spoiled = [whole[: half * i // 4] for i in range(8)]
    for content in [*spoiled, rng.randbytes(len(whole)), b"not a checkpoint", whole[:half] + rng.randbytes(half)]:
        (folder / "checkpoint.pt").write_bytes(content)
        refused(folder)


def test_a_missing_checkpoint_or_folder_is_refused_in_one_line(workdir, refused):
    refused("runs/none")
    Path("runs/empty").mkdir(parents=True)
    refused("runs/empty")
    Path("runs/empty/checkpoint.pt").mkdir()
    refused("runs/empty")


def test_a_foreign_torch_file_is_refused_in_one_line(run, refused):
    folder = run("--total-timesteps 512").folder
    keys = torch.load(folder / "checkpoint.pt").keys()
    for data in (torch.zeros(3), {"model": torch.zeros(3)}, [1, 2], None, dict.fromkeys(keys), dict.fromkeys(keys, {})):
        torch.save(data, folder / "checkpoint.pt")
        refused(folder)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_code_in_a_strangers_checkpoint_is_never_executed(run, refused):
    folder = run("--total-timesteps 512").folder
    path = folder / "checkpoint.pt"
    whole = torch.load(path)
    path.write_bytes(pickle.dumps(Payload()))
    refused(folder)
    for data, zipped in ((Payload(), True), (Payload(), False), (whole | {"optimizer": Payload()}, True)):
        torch.save(data, path, _use_new_zipfile_serialization=zipped)
        refused(folder)
    assert not Path("executed").exists()


def test_code_in_the_environments_of_a_checkpoint_is_not_executed_by_evaluate(run, capsys):
    folder = run("--total-timesteps 512").folder
    frozen = torch.tensor(list(pickle.dumps(Payload())), dtype=torch.uint8)
    torch.save(torch.load(folder / "checkpoint.pt") | {"processes": [[frozen, frozen]]}, folder / "checkpoint.pt")
    evaluate.main([str(folder), "--episodes", "1"])
    assert "mean=" in capsys.readouterr().out and not Path("executed").exists()


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
    (note,) = [line for line in out.splitlines() if line.startswith("note: W&B")]
    assert "no route to host" in note
    (run_folder,) = Path("wandb").glob("offline-run-*")
    assert next(run_folder.glob("*.wandb")).stat().st_size > 0


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_wandb_run(workdir):
    assert spawn("--track --total-timesteps 512").returncode == 0
    (folder,) = Path("runs").iterdir()
    result = spawn(f"--resume {folder} --total-timesteps 1024")
    assert result.returncode == 0, result.stderr
    first, second = Path("wandb").glob("offline-run-*")
    wandb_id = ppo.load_checkpoint(str(folder))[1]["wandb_id"]
    assert first.name.split("-")[-1] == second.name.split("-")[-1] == wandb_id
