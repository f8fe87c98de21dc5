"""More environments, worker processes and torchrun.

The algorithm stays the same, and what breaks ends cleanly.
"""

import contextlib
import itertools
import multiprocessing
import os
import re
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    finish,
    left_behind,
    parse_episodes,
    same_parameters,
    saved_step,
    scalars,
    start,
    torchrun,
)
from driver import KeepingAgent, flat
from environments import LENGTHS

import ppo

# Worker processes


@pytest.mark.parametrize(
    "flags",
    [
        "--env-id CartPole-v1 --total-timesteps 2048",
        pytest.param(
            "--env-id Acrobot-v1 --total-timesteps 4096 --bootstrap-truncation",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_async_trains_as_sync_does_to_the_last_bit(flags, run):
    sync = run(f"{flags} --vectorization-mode sync")
    other = run(f"{flags} --vectorization-mode async")
    assert len(sync.episodes) >= 8
    assert other.episodes == sync.episodes
    assert same_parameters(other.folder, sync.agent)


@contextlib.contextmanager
def at_most(seconds):
    """Raise TimeoutError if what is done here hangs."""

    def give_up(number, frame):
        raise TimeoutError

    old_handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)


def assert_no_workers():
    for worker in multiprocessing.active_children():
        worker.join(10)
    assert multiprocessing.active_children() == []


@pytest.mark.filterwarnings("ignore:.*ERROR", "ignore:.*WARN")
@pytest.mark.parametrize(
    "env, words",
    [
        ("Raises0", "raise HotMotor("),
        ("RaisesTwice1", "raise HotMotor("),
        ("RaisesLocked2", "raise Locked("),
        ("Exits3", "A worker process"),
        ("Dies2", "A worker process"),
        ("IsKilled1", "A worker process"),
    ],
)
def test_a_worker_that_breaks_ends_the_run_and_all_workers_and_shows_why(
    env, words, exits
):
    flags = f"--vectorization-mode async --env-id environments:{env}-v0"
    with at_most(seconds=100):
        result = exits(flags)
    assert result.code == 1
    assert words in result.err
    assert result.err.splitlines()[-1].startswith("The run broke in step 600.")
    assert_no_workers()


@pytest.mark.filterwarnings("ignore:.*ERROR", "ignore:.*WARN")
def test_a_worker_that_breaks_at_its_reset_ends_the_run_and_shows_why(exits):
    flags = "--vectorization-mode async --env-id environments:RaisesAtReset2-v0"
    with at_most(seconds=100):
        result = exits(flags)
    assert result.code == 1
    assert "raise HotMotor(" in result.err
    assert_no_workers()


# Environments that come as a batch

BATCH = "--vectorization-mode vector_entry_point"


def counting_episodes(num_envs, num_steps, same_step):
    """What Counting plays: (sub-environment, episode, first time step, length)."""
    for i in range(num_envs):
        time_step = 0
        for episode in itertools.count():
            length = LENGTHS[(i + episode) % len(LENGTHS)]
            yield i, episode, time_step, length
            time_step += length
            if not same_step:
                time_step += 1  # which only resets
            if time_step >= num_steps:
                break


@pytest.mark.parametrize("env", ["Counting", "CountingSameStep"])
def test_each_real_step_is_learned_from_once_an_epoch_and_no_other_step_is(env, run):
    flags = "--num-envs 6 --num-steps 32 --total-timesteps 768 --update-epochs 3"
    result = run(f"--env-id environments:{env}-v0 {BATCH} {flags}", Agent=KeepingAgent)
    minibatches = result.agent.kept["obs"]
    assert len(minibatches) == 4 * 3 * 4

    steps = set()
    episodes = []
    for i, episode, begin, length in counting_episodes(6, 128, "Same" in env):
        played = min(length, 128 - begin)
        steps |= {(i, episode, step) for step in range(played)}
        if played == length:
            episodic_return = length * (length + 1) / 2
            episodes.append(((begin + length) * 6, episodic_return, length))
    assert sorted(result.episodes) == sorted(episodes)

    obs = torch.cat(minibatches).numpy()
    # In a step that only resets, the policy sees the last observation of an episode.
    assert not obs[:, 3].any()
    learned, times = np.unique(obs[:, :3].astype(int), axis=0, return_counts=True)
    assert set(map(tuple, learned.tolist())) == steps
    assert set(times) == {3}


@pytest.mark.parametrize("env", ["Counting", "CountingSameStep"])
def test_returns_end_with_an_episode_and_a_time_limit_adds_the_last_value(env, run):
    # Nothing is learned, so the value loss tells what the critic was to learn.
    flags = (
        "--num-steps 64 --total-timesteps 512 --bootstrap-truncation --no-gae "
        "--learning-rate 0 --num-minibatches 1 --update-epochs 1 --no-clip-vloss"
    )
    result = run(f"--env-id environments:{env}-v0 {BATCH} {flags}")

    def value(*obs):
        return result.agent.get_value(torch.tensor(obs, dtype=torch.float32)).item()

    errors = {256: [], 512: []}  # of the two rollouts
    for i, episode, begin, length in counting_episodes(4, 128, "Same" in env):
        for step in range(min(length, 128 - begin)):
            rollout_end = 64 if begin + step < 64 else 128
            num_rewards = min(length - step, rollout_end - begin - step)
            rewards = range(step + 1, step + 1 + num_rewards)
            expected = sum(0.99**k * reward for k, reward in enumerate(rewards))
            if step + num_rewards < length:  # the rollout ends before the episode
                expected += 0.99**num_rewards * value(i, episode, rewards[-1], 0)
            elif episode % 2 == 1:  # a time limit ends it
                expected += 0.99**num_rewards * value(i, episode, length, 1)
            error = expected - value(i, episode, step, 0)
            errors[rollout_end * 4].append(error**2 / 2)

    logged = dict(scalars(result.folder)["losses/value_loss"])
    means = {global_step: np.mean(errors[global_step]) for global_step in errors}
    assert logged == pytest.approx(means, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*AutoresetMode")
@pytest.mark.parametrize("env", ["CountingDisabled", "CountingUntagged"])
def test_a_batch_whose_episodes_do_not_follow_each_other_is_refused(env, fails):
    code, line = fails(f"--env-id environments:{env}-v0 {BATCH}")
    assert code == 2
    assert f"environments:{env}-v0" in line
    assert "NEXT_STEP or SAME_STEP" in line


@pytest.mark.parametrize(
    "flags, world_size, words",
    [
        (f"--env-id Acrobot-v1 {BATCH}", 1, ["Acrobot-v1", "vector entry point"]),
        (f"{BATCH} --capture-video", 1, ["--capture-video", "sync or async"]),
        ("--env-id environments:Counting-v0", 1, ["environments:Counting-v0"]),
        ("--num-envs 5", 2, ["--num-envs 5", "2 processes"]),
        ("--vectorization-mode threads", 1, ["sync", "async", "vector_entry_point"]),
    ],
)
def test_what_cannot_be_vectorized_is_one_line_that_says_what_can(
    flags, world_size, words, fails, monkeypatch
):
    set_processes(monkeypatch, world_size)
    code, line = fails(flags)
    assert code == 2
    assert all(word in line for word in words), line


def set_processes(monkeypatch, world_size):
    """Set the variables that the first process of torchrun finds."""
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")


# torchrun

# Four updates, each of which target_kl may end after some of its steps.
TWO_RANKS = (
    "--num-envs 8 --num-steps 64 --total-timesteps 2048 --num-minibatches 1 "
    "--update-epochs 10 --learning-rate 0.003 --no-anneal-lr --target-kl 0.001"
)


def rank_files(folder):
    return [torch.load(Path(folder, f"rank{rank}.pt")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of two processes that keep what they compute."""
    folder = tmp_path_factory.mktemp("two_ranks")
    process = torchrun(TWO_RANKS, script=ROOT / "tests" / "driver.py", cwd=folder)
    result = finish(process)
    assert result.code == 0, result.err
    result.ranks = rank_files(folder)
    (result.folder,) = folder.glob("runs/*")
    return result


@pytest.mark.slow
def test_both_processes_have_the_same_parameters_in_every_gradient_step(two_ranks):
    ours, theirs = (
        torch.stack([*rank["parameters"], rank["end"]]) for rank in two_ranks.ranks
    )
    assert ours.equal(theirs)
    assert len(ours.unique(dim=0)) == len(ours)
    saved = ppo.load_checkpoint(two_ranks.folder)["agent"]
    assert flat(saved.values()).equal(ours[-1])


@pytest.mark.slow
def test_the_two_processes_play_different_environments(two_ranks):
    ours, theirs = (
        {tuple(obs) for obs in rank["obs"][0].tolist()} for rank in two_ranks.ranks
    )
    assert len(ours) == len(theirs) == 4 * 64
    assert not ours & theirs


@pytest.mark.slow
def test_only_the_first_process_writes(two_ranks):
    assert len(list(two_ranks.folder.glob("events.out.tfevents.*"))) == 1
    assert len(re.findall("^env_id=", two_ranks.out, re.MULTILINE)) == 1
    assert len(re.findall("^results: ", two_ranks.out, re.MULTILINE)) == 1
    # Its own episodes: those of 4 environments, in 4 rollouts of 64 steps.
    lengths = [length for _, _, length in two_ranks.episodes]
    assert 0 < sum(lengths) <= 4 * 4 * 64


@pytest.mark.slow
def test_target_kl_ends_an_update_of_both_processes_at_the_same_step(two_ranks):
    ours, theirs = (len(rank["parameters"]) for rank in two_ranks.ranks)
    assert ours == theirs
    assert 4 < ours < 40


@pytest.mark.slow
def test_what_is_logged_is_the_mean_of_both_processes(two_ranks):
    ours, theirs = (rank["entropy"][-1] for rank in two_ranks.ranks)
    assert ours != pytest.approx(theirs)
    step, logged = scalars(two_ranks.folder)["losses/entropy"][-1]
    assert step == 2048
    assert logged == pytest.approx((ours + theirs) / 2)


@pytest.mark.slow
def test_two_processes_learn_what_one_process_learns_from_the_data_of_both(workdir):
    torch.manual_seed(1)
    box = gym.spaces.Box(-1, 1, (4,))
    spaces = {"single_observation_space": box}
    spaces["single_action_space"] = gym.spaces.Discrete(2)
    agent = ppo.Agent(SimpleNamespace(**spaces))
    actions = torch.randint(2, (512,)).float()
    batch = {
        "b_obs": torch.randn(512, 4),
        "b_actions": actions,
        "b_logprobs": torch.randn(512) / 10 - 0.7,
        "b_advantages": torch.randn(512) + actions,
        "b_returns": torch.randn(512),
        "b_values": torch.randn(512),
    }
    torch.save({"agent": agent, **batch}, "batch.pt")

    # Plain SGD adds up the gradients. Each process normalizes its own advantages.
    flags = "--learning-rate 0.1 --update-epochs 3 --num-minibatches 1 --no-norm-adv"
    result = finish(torchrun(flags, script=ROOT / "tests" / "driver.py"))
    assert result.code == 0, result.err

    before = flat(agent.parameters())
    args = ppo.parse_args(flags.split())
    optimizer = torch.optim.SGD(agent.parameters(), args.learning_rate)
    ppo.update(args, agent, optimizer, b_inds=np.arange(512), **batch)
    step = flat(agent.parameters()) - before
    assert step.abs().max() > 0.01
    for rank in rank_files("."):
        torch.testing.assert_close(rank["end"] - before, step, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_two_processes_resume_as_if_they_had_never_been_stopped(two_ranks):
    first = finish(torchrun(f"{TWO_RANKS} --total-timesteps 1024"))
    assert first.code == 0, first.err
    (folder,) = Path("runs").iterdir()
    rest = finish(torchrun(f"--resume {folder} --total-timesteps 2048"))
    assert rest.code == 0, rest.err
    assert "new episodes" not in rest.out
    assert rest.episodes
    assert first.episodes + rest.episodes == two_ranks.episodes
    saved = ppo.load_checkpoint(folder)["agent"]
    assert flat(saved.values()).equal(two_ranks.ranks[0]["end"])


def test_a_run_cannot_be_resumed_by_another_number_of_processes(
    run, fails, monkeypatch
):
    folder = run("--total-timesteps 512").folder
    set_processes(monkeypatch, world_size=2)
    code, line = fails(f"--resume {folder}")
    assert code == 2
    assert "processes" in line


@pytest.mark.slow
def test_one_process_of_torchrun_plays_the_same_episodes_as_none(run):
    alone = run("--total-timesteps 4096")
    result = finish(torchrun("--total-timesteps 4096", processes=1))
    assert result.code == 0, result.err
    assert result.episodes == alone.episodes


@pytest.mark.slow
@pytest.mark.parametrize("env", ["Raises2", "Dies2"])
def test_a_process_that_breaks_ends_the_other(env, workdir):
    # Its sub-environment 2 is the first one of the second process.
    process = torchrun(f"--total-timesteps 10000000 --env-id environments:{env}-v0")
    result = finish(process)
    assert result.code != 0
    assert not left_behind(process)
    if env == "Raises2":
        assert "raise HotMotor(" in result.err
        assert "The run broke in step 600." in result.err


@pytest.mark.slow
def test_a_stopped_torchrun_leaves_no_process_behind_and_can_be_resumed(workdir):
    step = stop_torchrun("--total-timesteps 10000000", signal.SIGTERM)
    (folder,) = Path("runs").iterdir()
    assert saved_step(folder) == step
    assert stop_torchrun(f"--resume {folder}", signal.SIGINT) > step
    assert saved_step(folder) > step


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_update(workdir):
    # The second process sends it to itself in its 150th step, in the second update.
    process = torchrun("--env-id environments:AsksToStop2-v0")
    result = finish(process)
    assert "stopped at step 1024 of 25000" in result.out, result.err
    assert not left_behind(process)
    (folder,) = Path("runs").iterdir()
    assert saved_step(folder) == 1024


def stop_torchrun(flags, number):
    """Send a signal after the first episode; returns the step at which it stopped."""
    process = torchrun(flags)
    for line in process.stdout:
        if parse_episodes(line):
            break
    os.killpg(process.pid, number)  # as a terminal does for Ctrl-C
    result = finish(process)
    assert result.code != 0
    assert not left_behind(process)
    assert "to go on" in result.out, result.err
    return int(re.search(r"stopped at step (\d+)", result.out)[1])


# The recipe of docs/scaling.md


@pytest.mark.slow
def test_envpool_s_environments_train_and_resume(workdir):
    pytest.importorskip("envpool")  # .ci/run installs it before it runs this
    page = (ROOT / "docs/scaling.md").read_text()
    section = page.split("## EnvPool\n")[1].split("\n## ")[0]
    files = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", section, re.M | re.S)
    assert [name for name, _ in files] == ["my_envpool.py", "my_atari.py"]
    for name, text in files:
        Path(name).write_text(text)
    commands = re.findall(r"^python (\S+) (.*)$", section, re.MULTILINE)
    path = os.pathsep.join([str(ROOT), str(workdir)])

    def train(program, flags, steps):
        program = ROOT / program if program == "ppo.py" else program
        flags = [*shlex.split(flags), "--total-timesteps", steps]
        result = finish(start(program, *flags, PYTHONPATH=path))
        assert result.code == 0, result.err
        return result

    program, flags = commands[0]
    first = train(program, flags, 40_000)
    returns = [episodic_return for _, episodic_return, _ in first.episodes]
    assert np.mean(returns[-100:]) > 2 * np.mean(returns[:100])
    resumed = train(program, "--resume", 60_000)
    assert "note: the environments begin new episodes" in resumed.out
    assert resumed.episodes[0][0] > first.episodes[-1][0]
    small = "--num-envs 8 --num-steps 16 --num-minibatches 1 --update-epochs 1"
    for program, flags in commands[1:]:
        train(program, f"{flags} {small}", 256)
