"""More environments, worker processes and torchrun: the same algorithm, and clean ends when something breaks."""

import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, launch, left_behind, result_of, scalars, torchrun
from environments import LENGTHS

import ppo

VECTOR = "--vectorization-mode vector_entry_point"


def parameters(agent):
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach()


# Vectorization modes


@pytest.mark.parametrize("flags", ["", "--bootstrap-truncation"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1"])
def test_async_trains_as_sync_does_to_the_last_bit(env_id, flags, run):
    sync, other = (
        run(f"--env-id {env_id} --total-timesteps 4096 {flags} --vectorization-mode {mode}")
        for mode in ("sync", "async")
    )
    assert len(sync.episodes) >= 8 and other.episodes == sync.episodes
    assert parameters(other.agent).equal(parameters(sync.agent))


@pytest.fixture
def watched(run, monkeypatch):
    """watched(flags) trains and returns what entered compute_advantages, the network in updates, and ppo_loss."""
    seen = SimpleNamespace(rollouts=[], obs=[], batches=[])
    compute_advantages, ppo_loss = ppo.compute_advantages, ppo.ppo_loss

    def watched_advantages(rewards, values, dones, *args):
        seen.rollouts.append((rewards.copy(), values.copy(), dones.copy()))
        return compute_advantages(rewards, values, dones, *args)

    class WatchedAgent(ppo.Agent):
        def get_action_and_value(self, obs, action=None):
            if action is not None:
                seen.obs.append(obs)
            return super().get_action_and_value(obs, action)

    def watched_loss(newlogprob, entropy, newvalue, *batch):
        seen.batches.append({len(newlogprob), *(len(x) for x in batch[:-1])})
        return ppo_loss(newlogprob, entropy, newvalue, *batch)

    def watched(flags):
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "compute_advantages", watched_advantages)
            patch.setattr(ppo, "ppo_loss", watched_loss)
            seen.run = run(flags, Agent=WatchedAgent)
        return seen

    return watched


def counting_steps(num_envs, num_steps, same_step):
    """What Counting does: {(sub-environment, episode, step of it)} and [(global_step, return, length)] of episodes."""
    steps, episodes = set(), []
    for i in range(num_envs):
        time_step, episode = 0, 0
        while time_step < num_steps:
            length = LENGTHS[(i + episode) % 4]
            steps |= {(i, episode, s) for s in range(min(length, num_steps - time_step))}
            if time_step + length <= num_steps:
                episodes.append(((time_step + length) * num_envs, length * (length + 1) / 2, length))
            time_step, episode = time_step + length + (not same_step), episode + 1
    return steps, episodes


COUNTING = pytest.mark.parametrize("env", ["Counting", "CountingSameStep", "CountingUntagged"])


@COUNTING
@pytest.mark.filterwarnings("ignore:.*autoreset_mode")
def test_each_real_step_is_learned_from_once_an_epoch_and_no_dummy_step_ever_is(env, watched):
    shape = "--num-envs 6 --num-steps 32 --total-timesteps 768 --update-epochs 3 --bootstrap-truncation"
    seen = watched(f"--env-id environments:{env}-v0 {VECTOR} {shape}")
    steps, episodes = counting_steps(6, 128, env == "CountingSameStep")
    assert sorted(seen.run.episodes) == sorted(episodes)
    obs = torch.cat(seen.obs).numpy()
    assert not obs[:, 3].any()  # in a dummy step the policy sees the final observation
    learned, times = np.unique(obs[:, :3].astype(int), axis=0, return_counts=True)
    assert set(map(tuple, learned.tolist())) == steps and set(times) == {3}
    assert seen.batches == [{len(obs)} for obs in seen.obs] and len(seen.batches) == 4 * 3 * 4


@COUNTING
@pytest.mark.filterwarnings("ignore:.*autoreset_mode")
def test_truncation_bootstraps_the_final_observation_s_value(env, watched):
    flags = "--num-envs 4 --num-steps 64 --total-timesteps 256 --bootstrap-truncation --learning-rate 0"
    seen = watched(f"--env-id environments:{env}-v0 {VECTOR} {flags}")
    rewards, values, dones = seen.rollouts[0]

    def value_of(*obs):
        return seen.run.agent.get_value(torch.tensor(obs)).item()

    for i in range(4):
        t, episode = 0, 0
        while t + LENGTHS[(i + episode) % 4] <= 64:
            length = LENGTHS[(i + episode) % 4]
            t += length
            assert dones[t, i] == 1
            value = value_of(i, episode, length, 1.0)
            added = 0.99 * value if episode % 2 else 0.0
            assert rewards[t - 1, i] == pytest.approx(length + added, abs=1e-5)
            if env != "CountingSameStep":
                assert values[t, i] == pytest.approx(value, abs=1e-5)
                t += 1
            episode += 1
        if t < 64:  # the rollout ends in the middle of an episode
            assert dones[64, i] == 0
            assert values[64, i] == pytest.approx(value_of(i, episode, 64 - t, 0.0), abs=1e-5)
        assert t > 58


@pytest.mark.parametrize("shape", ["--num-envs 2 --num-steps 2 --num-minibatches 2", "--num-minibatches 256"])
def test_minibatches_that_reset_steps_may_leave_too_small_are_refused(shape, fails):
    code, line = fails(f"{VECTOR} {shape}")
    assert code == 2 and "--num-minibatches" in line


@pytest.mark.parametrize(
    "flags, world_size, words",
    [
        (f"--env-id Acrobot-v1 {VECTOR}", 1, ["Acrobot-v1", "vector entry point"]),
        (f"{VECTOR} --capture-video", 1, ["--capture-video", "sync or async"]),
        ("--env-id environments:Counting-v0", 1, ["Counting-v0"]),
        ("--num-envs 5", 2, ["--num-envs 5", "2 processes"]),
        ("--vectorization-mode threads", 1, ["sync", "async", "vector_entry_point"]),
    ],
)
def test_what_cannot_be_vectorized_is_one_line_that_says_what_can(flags, world_size, words, fails, monkeypatch):
    for name, value in (("WORLD_SIZE", world_size), ("RANK", 0), ("TORCHELASTIC_RUN_ID", "test")):
        monkeypatch.setenv(name, str(value))
    code, line = fails(flags)
    assert code == 2 and all(word in line for word in words), line


# Worker processes


@pytest.mark.parametrize(
    "how, which, word", [("Exits", 2, "died"), ("Killed", 3, "died"), ("Raises", 0, "motor is hot")]
)
def test_a_worker_that_breaks_ends_the_run_with_one_line_and_none_is_left_behind(how, which, word, workdir):
    env_id = f"environments:{how}{which}-v0"
    process = launch(ROOT / "ppo.py", "--vectorization-mode", "async", "--env-id", env_id)
    result = result_of(process, timeout=30)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 1 and len(errors) == 1 and env_id in errors[0] and word in errors[0], result.err
    assert str(ROOT / "ppo.py") not in result.err  # no traceback of ours
    assert not left_behind(process)


def stop_early(flags, number, command=torchrun):
    """Start a run that would take long, send it a signal after its first episode, and wait for its end."""
    process = command(flags)
    while "episodic_return" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    os.killpg(process.pid, number)  # as the terminal does for Ctrl-C
    result = result_of(process)
    assert not left_behind(process) and "to go on" in result.out, result.err
    return result.code, int(re.search(r"stopped at step (\d+)", result.out)[1])


def test_ctrl_c_ends_worker_processes_too(workdir):
    flags = "--vectorization-mode async --total-timesteps 1000000"
    assert stop_early(flags, signal.SIGINT, lambda flags: launch(ROOT / "ppo.py", *flags.split()))[0] == 130


# torchrun


SHAPE = "--num-envs 8 --num-steps 64 --no-anneal-lr"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Four updates by two processes that keep what they compute; gradients are not clipped."""
    folder = tmp_path_factory.mktemp("two_ranks")
    flags = f"{SHAPE} --total-timesteps 2048 --update-epochs 10 --learning-rate 0.003 --target-kl 0.001"
    flags += " --num-minibatches 1 --no-norm-adv --max-grad-norm 1e9"
    process = torchrun(flags, script=ROOT / "tests" / "driver.py", cwd=folder, DUMP=str(folder))
    result = result_of(process)
    assert result.code == 0, result.err
    result.folder, result.args = folder, ppo.parse_args(flags.split())
    result.ranks = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
    return result


@pytest.mark.slow
def test_both_processes_have_the_same_parameters_after_every_gradient_step(two_ranks):
    ours, theirs = (torch.stack(rank["params"]) for rank in two_ranks.ranks)
    assert ours.equal(theirs) and len(ours.unique(dim=0)) == len(ours)
    saved = torch.load(next(two_ranks.folder.glob("runs/*/checkpoint.pt")))["agent"]
    assert torch.cat([p.flatten() for p in saved.values()]).equal(ours[-1])


@pytest.mark.slow
def test_the_two_processes_play_different_environments(two_ranks):
    first, second = (rank["batches"][0][0] for rank in two_ranks.ranks)
    assert not len(set(map(tuple, first.tolist())) & set(map(tuple, second.tolist())))


@pytest.mark.slow
def test_only_process_0_writes(two_ranks):
    (run,) = two_ranks.folder.glob("runs/*")
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert two_ranks.out.count("results: ") == two_ranks.out.count("\nenv_id=") == 1
    assert 0 < sum(length for _, _, length in two_ranks.episodes) <= 4 * 64 * 4  # its own: 4 environments, 256 steps


@pytest.mark.slow
def test_target_kl_ends_an_update_of_both_processes_at_the_same_step(two_ranks):
    steps = [len(rank["grads"]) for rank in two_ranks.ranks]
    assert steps[0] == steps[1] and 4 < steps[0] < 40


@pytest.mark.slow
def test_logged_stats_are_the_mean_of_both_processes(two_ranks):
    ours, theirs = ([float(x) for x in rank["approx_kl"]] for rank in two_ranks.ranks)
    means = [(a + b) / 2 for a, b in zip(ours, theirs, strict=True)]
    (folder,) = two_ranks.folder.glob("runs/*")
    logged = [value for _, value in scalars(folder)["losses/approx_kl"]]
    assert len(logged) == 4 and logged[-1] == pytest.approx(means[-1])
    assert set(np.round(logged, 7)) <= set(np.round(means, 7)) and ours[-1] != pytest.approx(theirs[-1])


@pytest.mark.slow
def test_one_process_with_all_the_environments_computes_the_same_gradients(two_ranks):
    box, discrete = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)
    agent = ppo.Agent(SimpleNamespace(single_observation_space=box, single_action_space=discrete))
    ours, theirs = two_ranks.ranks
    for params, grad, first, second in zip(ours["params"], ours["grads"], ours["batches"], theirs["batches"]):  # noqa: B905
        torch.nn.utils.vector_to_parameters(params, agent.parameters())
        obs, actions, *rest = (torch.cat(pair) for pair in zip(first, second, strict=True))
        _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, actions)
        loss, _ = ppo.ppo_loss(newlogprob, entropy, newvalue, *rest, two_ranks.args)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*agent.parameters()])])
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
def test_resuming_two_processes_continues_as_if_never_interrupted(workdir):
    whole, first = (result_of(torchrun(f"{SHAPE} --total-timesteps {n} --exp-name {n}")) for n in (2048, 1024))
    assert whole.code == first.code == 0, whole.err + first.err
    (folder,) = Path("runs").glob("*__1024__*")
    rest = result_of(torchrun(f"--resume {folder} --total-timesteps 2048"))
    assert rest.code == 0, rest.err
    assert first.episodes + rest.episodes == whole.episodes and rest.episodes
    agents = [torch.load(next(Path("runs").glob(f"*__{n}__*/checkpoint.pt")))["agent"] for n in (2048, 1024)]
    assert all(p.equal(q) for p, q in zip(*(agent.values() for agent in agents), strict=True))


def test_a_run_cannot_be_resumed_by_another_number_of_processes(run, fails, monkeypatch):
    folder = run("--total-timesteps 512").folder
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("TORCHELASTIC_RUN_ID", "test")):
        monkeypatch.setenv(name, value)
    code, line = fails(f"--resume {folder}", files_allowed=True)
    assert code == 2 and "processes" in line


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other(workdir):
    process = torchrun("--total-timesteps 10000000", script=ROOT / "tests" / "driver.py", DIES="1")
    before = time.monotonic()
    result = result_of(process)
    assert result.code != 0 and time.monotonic() - before < 30
    assert not left_behind(process)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_torchrun_leaves_no_process_and_can_be_resumed(number, workdir):
    code, step = stop_early("--total-timesteps 10000000", number)
    assert code != 0
    (folder,) = Path("runs").glob("*")
    assert stop_early(f"--resume {folder}", number)[1] > step


@pytest.mark.slow
def test_one_process_of_torchrun_plays_the_same_episodes_as_none(run, workdir):
    alone = run("--total-timesteps 4096")
    result = result_of(torchrun("--total-timesteps 4096", processes=1))
    assert result.code == 0 and result.episodes == alone.episodes
