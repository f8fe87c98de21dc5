"""A run that was broken off, however it was, goes on as if nothing had happened.

A checkpoint is whole, or it is not there.
"""

import os
import pickle
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_results,
    finish,
    parse_episodes,
    read_events,
    same_parameters,
    saved_step,
    scalars,
    start,
)

import evaluate
import ppo

# Six updates of 256 steps, each of which is saved.
FLAGS = (
    "--num-steps 64 --num-minibatches 2 --total-timesteps 1536 "
    "--checkpoint-interval 1e-9"
)


def notes(run):
    return [line for line in run.out.splitlines() if line.startswith("note: ")]


# Exact resume


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--env-id Acrobot-v1 --num-envs 2 --num-steps 256 --total-timesteps 3072",
        "--env-id MountainCar-v0 --bootstrap-truncation",
        "--bootstrap-truncation --target-kl 0.0005 --learning-rate 0.002 --seed 3",
        "--env-id FrozenLake-v1",
        "--env-id Blackjack-v1 --no-gae --no-norm-adv",
        "--no-torch-deterministic --num-envs 1 --num-steps 256",
        "--env-id environments:Counting-v0 --vectorization-mode vector_entry_point",
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(flags, run, crash):
    whole = run(f"{FLAGS} {flags}")
    # Episodes of the fourth update are in TensorBoard already when it breaks.
    folder = crash(f"{FLAGS} {flags}", update=4)
    step = saved_step(folder)
    assert step == ppo.load_checkpoint(folder)["args"]["total_timesteps"] / 2
    resumed = run(f"--resume {folder}")
    assert notes(resumed) == []
    assert_same_results(resumed, whole, after_step=step)


def test_a_run_can_be_resumed_again_and_again(run, crash):
    whole = run(FLAGS)
    folder = crash(FLAGS, update=3)
    crash(f"--resume {folder}", update=2)
    crash(f"--resume {folder}/", update=1)
    assert saved_step(folder) == 768
    resumed = run(f"--resume {folder}/checkpoint.pt")
    assert_same_results(resumed, whole, after_step=768)


def test_resume_alone_goes_on_with_the_newest_run(run, workdir, monkeypatch):
    old, new = (run(f"--total-timesteps 512 --seed {seed}").folder for seed in (1, 2))
    os.utime(old / "checkpoint.pt", (0, 0))
    run("--resume --total-timesteps 1024")
    assert saved_step(old) == 512
    assert saved_step(new) == 1024


def test_a_run_can_be_resumed_from_within_its_folder(run, workdir, monkeypatch):
    folder = run("--total-timesteps 512").folder
    monkeypatch.chdir(folder)
    run("--resume checkpoint.pt --total-timesteps 1024")
    assert saved_step(workdir / folder) == 1024
    assert not Path("runs").exists()


def test_more_timesteps_without_annealing_equal_a_run_that_was_as_long_at_once(run):
    whole = run(f"{FLAGS} --no-anneal-lr")
    half = run(f"{FLAGS} --no-anneal-lr --total-timesteps 768")
    resumed = run(f"--resume {half.folder} --total-timesteps 1536")
    assert notes(resumed) == []
    assert_same_results(resumed, whole, after_step=768)


def test_more_timesteps_with_annealing_say_what_becomes_of_the_learning_rate(run):
    half = run(f"{FLAGS} --total-timesteps 1024")
    resumed = run(f"--resume {half.folder} --total-timesteps 2048")
    (note,) = notes(resumed)
    assert "2048" in note
    assert "learning rate" in note
    rates = [value for _, value in scalars(half.folder)["charts/learning_rate"]]
    fractions = [1, 0.75, 0.5, 0.25, 0.5, 0.375, 0.25, 0.125]
    assert rates == pytest.approx([2.5e-4 * fraction for fraction in fractions])


def test_resuming_a_finished_run_changes_nothing(run):
    whole = run("--total-timesteps 1024")
    path = whole.folder / "checkpoint.pt"
    before = path.read_bytes()
    curves = scalars(whole.folder)
    again = run(f"--resume {whole.folder}")
    assert path.read_bytes() == before
    assert scalars(whole.folder) == curves
    assert again.episodes == []
    assert same_parameters(whole.folder, again.agent)


@pytest.mark.parametrize(
    "interval, saved",
    [
        ("60", [3, 6, 8]),
        ("150", [6, 8]),
        ("1e9", [8]),
        ("1", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("0", []),
    ],
)
def test_checkpoints_are_seconds_apart_however_long_saving_takes(
    interval, saved, run, monkeypatch
):
    seconds = 0.0
    steps_played = 0
    saved_updates = []
    monkeypatch.setattr("time.perf_counter", lambda: seconds)

    class SlowAgent(ppo.Agent):
        """An update takes 25 seconds, and saving takes 1000."""

        def get_action(self, obs):
            nonlocal seconds, steps_played
            steps_played += 1
            seconds += 25 / 16
            return super().get_action(obs)

        def state_dict(self):
            nonlocal seconds
            seconds += 1000
            saved_updates.append(steps_played / 16)
            return super().state_dict()

    flags = f"--num-steps 16 --total-timesteps 512 --checkpoint-interval {interval}"
    folder = run(flags, Agent=SlowAgent).folder
    assert saved_updates == saved  # eight updates, of which the last is saved always
    assert (folder / "checkpoint.pt").exists() == bool(saved)
    assert not (folder / "checkpoint.tmp").exists()


# Flags of a resumed run


def test_repeating_the_flags_of_the_run_is_no_conflict(run):
    folder = run("--total-timesteps 1024 --seed 2").folder
    flags = "--seed 2 --total-timesteps 1024 --gae --target-kl None"
    assert run(f"--resume {folder} {flags}").folder == folder


def test_flags_that_conflict_with_the_run_are_refused(run, fails):
    folder = run("--total-timesteps 1024").folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for flags in (
        "--seed 2",
        "--env-id Acrobot-v1",
        "--gae False",
        "--total-timesteps 512",
        "--num-envs 8",
        "--gamma 0.9 --total-timesteps 2048",
        "--target-kl 0.1",
        "--exp-name other",
    ):
        code, line = fails(f"--resume {folder} {flags}")
        name = flags.split()[0].removeprefix("--").replace("-", "_")
        assert code == 2
        assert f"'{name}'" in line
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


# A program that has changed


def test_a_resumed_run_says_that_its_program_has_changed(run, workdir, monkeypatch):
    folder = run("--total-timesteps 512 --no-anneal-lr").folder
    edited = workdir / "ppo.py"
    edited.write_text(Path(ppo.__file__).read_text() + "# a change")
    monkeypatch.setattr(ppo, "__file__", str(edited))
    more = f"--resume {folder} --total-timesteps 1024"
    (note,) = notes(run(more))
    assert "the program has changed" in note


def test_a_resumed_run_says_which_flags_are_new(run):
    folder = run("--total-timesteps 512 --no-anneal-lr").folder
    checkpoint = ppo.load_checkpoint(folder)
    del checkpoint["args"]["target_kl"]
    torch.save(checkpoint, folder / "checkpoint.pt")
    (note,) = notes(run(f"--resume {folder} --total-timesteps 1024"))
    assert "target_kl=None is new" in note


def test_an_agent_that_does_not_fit_is_one_line(run, fails):
    class LargerAgent(ppo.Agent):
        __module__ = ppo.Agent.__module__  # the same program, but changed

        def __init__(self, envs):
            super().__init__(envs)
            self.more = torch.nn.Linear(2, 2)

    folder = run("--total-timesteps 512").folder
    code, line = fails(f"--resume {folder}", Agent=LargerAgent, leaves_files=True)
    assert code == 2
    assert "the agent does not fit" in line


# Environments that cannot be kept


@pytest.mark.parametrize(
    "flags",
    [
        "--env-id environments:EzPole-v0",
        "--env-id environments:LockedPole-v0",
        "--vectorization-mode async",
    ],
)
def test_environments_that_cannot_be_saved_begin_new_episodes_and_say_so(
    flags, run, crash
):
    folder = crash(f"{FLAGS} {flags}", update=4)
    opened = []

    def make_envs(args, seed, video):
        opened.append(ppo.make_envs(args, seed, video))
        return opened[-1]

    resumed = run(f"--resume {folder}", make_envs=make_envs)
    (note,) = notes(resumed)
    assert "new episodes" in note
    steps = [step for step, _ in scalars(folder)["losses/entropy"]]
    assert steps == [256, 512, 768, 1024, 1280, 1536]
    # Seeds that the run had at its beginning would show it the same episodes again.
    (envs,) = opened
    if "async" not in flags:
        assert envs.unwrapped.np_random_seed == (769, 770, 771, 772)


@pytest.mark.parametrize("change", ["cut off", "saved by another Python"])
def test_environments_that_cannot_be_restored_begin_new_episodes(change, run, crash):
    folder = crash(FLAGS, update=4)
    checkpoint = ppo.load_checkpoint(folder)
    if change == "cut off":
        checkpoint["environments"][0] = checkpoint["environments"][0][:-1]
    else:
        checkpoint["python"][1] += 1
    torch.save(checkpoint, folder / "checkpoint.pt")
    resumed = run(f"--resume {folder}")
    (note,) = notes(resumed)
    assert "new episodes" in note
    assert saved_step(folder) == 1536


# Kills

# The kernel kills a process whose files grow too large, unless it ignores the signal.
KILLED_WHILE_WRITING = """
import resource, signal, ppo
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
ppo.main()
"""

KILLED_BEFORE_RENAMING = """
import os, signal, sys, ppo
def kill(event, args):
    if event == "os.rename" and str(args[1]).endswith("checkpoint.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
ppo.main()
"""


@pytest.mark.parametrize(
    "code, number",
    [
        (KILLED_WHILE_WRITING, signal.SIGXFSZ),
        (KILLED_BEFORE_RENAMING, signal.SIGKILL),
    ],
    ids=["while it writes", "before it renames"],
)
def test_killed_while_it_saves_the_checkpoint_of_before_is_whole(
    code, number, run, crash
):
    whole = run(FLAGS)
    folder = crash(FLAGS, update=3)
    before = (folder / "checkpoint.pt").read_bytes()
    result = finish(start("-c", code, "--resume", folder))
    assert result.code == -number, result.err
    written = (folder / "checkpoint.tmp").stat().st_size
    assert (written == 60_000) == (number == signal.SIGXFSZ)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert_same_results(run(f"--resume {folder}"), whole, after_step=512)


@pytest.mark.slow
@pytest.mark.parametrize("env_id, seed", [("CartPole-v1", 1), ("Acrobot-v1", 2)])
def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(env_id, seed, run):
    rng = random.Random(seed)
    flags = f"--env-id {env_id} --total-timesteps 12288 --checkpoint-interval 1e-9"
    whole = run(flags)
    episodes = []
    step = 0
    for kill in range(4):
        process = start(ROOT / "ppo.py", *flags.split())
        # An episode that ended after a rollout shows that this rollout was saved.
        out = read_until(process, step=step + 512 * rng.randint(1, 4))
        time.sleep(rng.choice([0, 0.003, 0.06]) * rng.random())
        process.kill()
        result = finish(process)
        assert result.code == -signal.SIGKILL, result.err

        if kill == 0:
            (folder,) = set(Path("runs").iterdir()) - {whole.folder}
            flags = f"--resume {folder}"
        step = saved_step(folder)
        played = parse_episodes(out + result.out)
        episodes += [episode for episode in played if episode[0] <= step]
    resumed = run(flags)
    assert_same_results(resumed, whole, after_step=step)
    assert episodes + resumed.episodes == whole.episodes


def read_until(process, step):
    """Read what a process prints, up to an episode that ended after a step."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        episodes = parse_episodes(line)
        if episodes and episodes[0][0] > step:
            break
    return "".join(lines)


# Faults


@pytest.mark.parametrize(
    "put, remove, word",
    [
        (lambda path: path.symlink_to("/dev/full"), Path.unlink, "No space left"),
        (Path.mkdir, Path.rmdir, "Is a directory"),
    ],
    ids=["full disk", "folder in its place"],
)
def test_what_cannot_be_saved_is_one_line_and_the_checkpoint_of_before_is_whole(
    put, remove, word, run, crash, fails
):
    whole = run(FLAGS)
    folder = crash(FLAGS, update=3)
    before = (folder / "checkpoint.pt").read_bytes()
    put(folder / "checkpoint.tmp")
    code, line = fails(f"--resume {folder}")
    assert code == 1
    assert f"cannot save {folder}" in line
    assert word in line
    assert (folder / "checkpoint.pt").read_bytes() == before
    remove(folder / "checkpoint.tmp")
    assert_same_results(run(f"--resume {folder}"), whole, after_step=512)


def test_curves_that_cannot_be_saved_break_the_run_and_the_checkpoint_is_whole(
    crash, fails
):
    """No file may grow beyond 1000 bytes, so the checkpoint cannot be saved either."""
    folder = crash(FLAGS, update=3)
    before = (folder / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, line = fails(f"--resume {folder}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "File too large" in line
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("how", ["Raises", "RaisesTwice"])
def test_when_an_environment_raises_its_traceback_and_the_way_on_are_shown(how, exits):
    result = exits(f"{FLAGS} --env-id environments:{how}0-v0")
    (folder,) = Path("runs").iterdir()
    assert result.code == 1
    assert 'raise HotMotor("motor", "100% hot")' in result.err
    assert "melted" not in result.err  # the error of close(), which comes second
    assert result.err.splitlines()[-1] == (
        "The run broke in step 600. To go on from its last checkpoint: "
        f"--resume {folder}"
    )
    # All that came before is kept.
    assert saved_step(folder) == 512
    assert [step for step, _ in scalars(folder)["losses/entropy"]] == [256, 512]
    episodes = read_events(folder).Scalars("charts/episodic_return")
    assert max(event.step for event in episodes) > 512


def test_an_environment_that_calls_exit_has_broken_the_run(exits):
    result = exits("--env-id environments:Exits0-v0")
    assert result.code == 1
    assert "sys.exit()" in result.err


def test_a_run_that_breaks_before_its_first_checkpoint_promises_no_way_on(exits):
    result = exits("--env-id environments:Raises0-v0")
    assert result.code == 1
    assert result.err.splitlines()[-1] == "The run broke in step 600."


def test_a_diverged_run_keeps_the_last_finite_checkpoint(fails):
    code, line = fails(f"{FLAGS} --env-id environments:GivesNaN0-v0")
    assert code == 1
    assert "reward that is not finite" in line
    assert "step 768" in line
    (folder,) = Path("runs").iterdir()
    checkpoint = ppo.load_checkpoint(folder)
    assert checkpoint["global_step"] == 512
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())
    for moments in checkpoint["optimizer"]["state"].values():
        assert all(tensor.isfinite().all() for tensor in moments.values())


# Strange files


@pytest.fixture
def refused(fails):
    """refused(folder): --resume and evaluate.py end with one line, which it returns."""

    def refused(folder):
        code, line = fails(f"--resume {folder}")
        assert code == 2
        assert "checkpoint.pt" in line
        assert fails(str(folder), main=evaluate.main) == (2, line)
        return line

    return refused


def test_a_truncated_or_broken_checkpoint_is_refused_in_one_line(run, refused):
    folder = run("--total-timesteps 512").folder
    rng = random.Random(1)
    whole = (folder / "checkpoint.pt").read_bytes()
    half = len(whole) // 2
    spoiled = [whole[: len(whole) * i // 8] for i in range(8)]
    spoiled.append(whole[:half] + rng.randbytes(half))
    spoiled.append(rng.randbytes(len(whole)))
    spoiled.append(b"not a checkpoint")
    for content in spoiled:
        (folder / "checkpoint.pt").write_bytes(content)
        assert "not a whole checkpoint" in refused(folder)


def test_a_missing_checkpoint_or_folder_is_refused_in_one_line(workdir, refused):
    refused("runs/none")
    Path("runs/empty").mkdir(parents=True)
    refused("runs/empty")
    Path("runs/empty/checkpoint.pt").mkdir()
    refused("runs/empty")


def test_a_foreign_torch_file_is_refused_in_one_line(run, refused):
    folder = run("--total-timesteps 512").folder
    keys = ppo.load_checkpoint(folder).keys()
    for data in (
        torch.zeros(3),
        {"model": torch.zeros(3)},
        [1, 2],
        None,
        dict.fromkeys(keys),
        {key: {} for key in keys},
    ):
        torch.save(data, folder / "checkpoint.pt")
        refused(folder)


def test_a_checkpoint_of_another_version_of_the_program_is_refused_in_one_line(
    run, refused
):
    folder = run("--total-timesteps 512").folder
    checkpoint = ppo.load_checkpoint(folder)
    newer = checkpoint | {"version": checkpoint["version"] + 1}
    # Before there were versions, these were the keys.
    names = ["args", "program", "wandb_id", "agent", "optimizer"]
    state = torch.zeros(8, dtype=torch.uint8)
    older = {name: checkpoint[name] for name in names}
    older |= {"update": 1, "processes": [[state, state]]}
    for other in (newer, older):
        torch.save(other, folder / "checkpoint.pt")
        assert "another version" in refused(folder)


class Payload:
    """Makes a file as soon as it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_code_in_a_strangers_checkpoint_is_never_executed(run, refused):
    folder = run("--total-timesteps 512").folder
    path = folder / "checkpoint.pt"
    whole = ppo.load_checkpoint(folder)
    path.write_bytes(pickle.dumps(Payload()))
    refused(folder)
    torch.save(Payload(), path)
    refused(folder)
    torch.save(Payload(), path, _use_new_zipfile_serialization=False)
    refused(folder)
    torch.save(whole | {"optimizer": Payload()}, path)
    refused(folder)
    assert not Path("executed").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert Path("executed").exists()  # so it would have been seen


def test_code_in_the_environments_of_a_checkpoint_is_not_executed_by_evaluate(
    run, capsys
):
    folder = run("--total-timesteps 512").folder
    checkpoint = ppo.load_checkpoint(folder)
    checkpoint["environments"] = [pickle.dumps(Payload())]
    torch.save(checkpoint, folder / "checkpoint.pt")
    evaluate.main([str(folder), "--episodes", "1"])
    assert "mean=" in capsys.readouterr().out
    assert not Path("executed").exists()


# Weights & Biases


@pytest.mark.slow
def test_without_a_connection_wandb_is_one_line_that_says_how_to_do_without(workdir):
    process = start(
        ROOT / "ppo.py",
        "--track",
        WANDB_MODE="online",
        WANDB_BASE_URL="http://127.0.0.1:9",  # nobody listens there
        WANDB_API_KEY="a" * 40,
        WANDB_INIT_TIMEOUT="2",
    )
    result = finish(process)
    assert result.code == 2
    assert "Traceback" not in result.err
    (line,) = [x for x in result.err.splitlines() if x.startswith("error: ")]
    assert "--track" in line
    assert "WANDB_MODE=offline" in line
