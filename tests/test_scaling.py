"""More environments, worker processes and torchrun: the same algorithm, and clean ends when something breaks."""

import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, left_behind, result_of, torchrun
from environments import LENGTHS
from hypothesis import given, settings
from hypothesis import strategies as st

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


def watch(monkeypatch):
    """Record what enters compute_advantages, get_action_and_value and ppo_loss."""
    seen = SimpleNamespace(rollouts=[], obs=[], actions=[], batches=[])
    compute_advantages, ppo_loss = ppo.compute_advantages, ppo.ppo_loss
    get_action_and_value = ppo.Agent.get_action_and_value

    def watched_advantages(rewards, values, dones, *args):
        seen.rollouts.append((rewards.copy(), values.copy(), dones.copy()))
        return compute_advantages(rewards, values, dones, *args)

    def watched_agent(agent, obs, actions):
        seen.obs.append(obs)
        seen.actions.append(actions)
        return get_action_and_value(agent, obs, actions)

    def watched_loss(newlogprob, entropy, newvalue, *batch):
        seen.batches.append([len(newlogprob), *(len(x) for x in batch[:-1])])
        return ppo_loss(newlogprob, entropy, newvalue, *batch)

    monkeypatch.setattr(ppo, "compute_advantages", watched_advantages)
    monkeypatch.setattr(ppo.Agent, "get_action_and_value", watched_agent)
    monkeypatch.setattr(ppo, "ppo_loss", watched_loss)
    return seen


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


@pytest.mark.parametrize("env", ["Counting", "CountingSameStep", "CountingUntagged"])
@pytest.mark.filterwarnings("ignore:.*autoreset_mode")
def test_each_real_step_is_learned_from_once_an_epoch_and_no_dummy_step_ever_is(env, run, monkeypatch):
    seen = watch(monkeypatch)
    shape = "--num-envs 6 --num-steps 32 --total-timesteps 768 --update-epochs 3 --bootstrap-truncation"
    result = run(f"--env-id environments:{env}-v0 {VECTOR} {shape}")
    same_step = env == "CountingSameStep"
    steps, episodes = counting_steps(6, 128, same_step)
    assert sorted(result.episodes) == sorted(episodes)
    obs = torch.cat(seen.obs).numpy()
    assert not obs[:, 3].any()  # in a dummy step the policy sees the final observation
    learned, times = np.unique(obs[:, :3].astype(int), axis=0, return_counts=True)
    assert set(map(tuple, learned.tolist())) == steps and set(times) == {3}
    assert all(len({*sizes, len(o), len(a)}) == 1 for sizes, o, a in zip(seen.batches, seen.obs, seen.actions))  # noqa: B905
    assert len(seen.batches) == 4 * 3 * 4


@pytest.mark.parametrize("env", ["Counting", "CountingSameStep", "CountingUntagged"])
@pytest.mark.filterwarnings("ignore:.*autoreset_mode")
def test_truncation_bootstraps_the_final_observation_s_value(env, run, monkeypatch):
    seen, agents = watch(monkeypatch), []
    monkeypatch.setattr(ppo.Agent, "__init__", lambda *a, f=ppo.Agent.__init__: f(*a) or agents.append(a[0]))
    flags = "--num-envs 4 --num-steps 64 --total-timesteps 256 --bootstrap-truncation --learning-rate 0"
    run(f"--env-id environments:{env}-v0 {VECTOR} {flags}")
    (rewards, values, dones), time_step = seen.rollouts[0], np.zeros(4, int)
    for i in range(4):
        t, episode = 0, 0
        while t + LENGTHS[(i + episode) % 4] <= 64:
            length = LENGTHS[(i + episode) % 4]
            t += length
            assert dones[t, i] == 1
            value = agents[0].get_value(torch.tensor([i, episode, length, 1.0])).item()
            added = 0.99 * value if episode % 2 else 0.0
            assert rewards[t - 1, i] == pytest.approx(length + added, abs=1e-5)
            if env != "CountingSameStep":
                assert values[t, i] == pytest.approx(value, abs=1e-5)
                t += 1
            episode += 1
        time_step[i] = t
    assert time_step.min() > 58


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 25), st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.floats(0.05, 1)
)
def test_advantages_stop_at_next_step_boundaries(num_steps, seed, gamma, gae_lambda, gae, end_probability):
    """Each episode's, by the definition: the sum of its later TD errors. What dummy steps hold must not matter."""
    rng, num_envs = np.random.default_rng(seed), 3
    rewards = rng.normal(size=(num_steps, num_envs)).astype(np.float32)
    values = rng.normal(size=(num_steps + 1, num_envs)).astype(np.float32)
    dones = np.zeros((num_steps + 1, num_envs), np.float32)
    for t in range(num_steps + 1):  # no episode ends in a dummy step
        dones[t] = (rng.random(num_envs) < end_probability) & (dones[t - 1] == 0 if t else True)
    rewards[dones[:-1] == 1] *= 1000
    advantages, returns = ppo.compute_advantages(rewards, values, dones, gamma, gae_lambda, gae)
    for i in range(num_envs):
        for t in np.flatnonzero(dones[:-1, i] == 0):
            expected, weight = 0.0, 1.0
            for k in range(t, num_steps):  # the rest of t's episode
                over = dones[k + 1, i] == 1
                delta = float(rewards[k, i]) + (0 if over else gamma * float(values[k + 1, i])) - float(values[k, i])
                expected, weight = expected + weight * delta, weight * gamma * (gae_lambda if gae else 1)
                if over:
                    break
            assert advantages[t, i] == pytest.approx(expected, abs=1e-4)
            assert returns[t, i] == pytest.approx(expected + values[t, i], abs=1e-4)


@pytest.mark.parametrize(
    "flags, world_size, words",
    [
        (f"--env-id Acrobot-v1 {VECTOR}", 1, ["Acrobot-v1", "vector entry point", "sync and async"]),
        (f"{VECTOR} --capture-video", 1, ["--capture-video", "sync or async"]),
        ("--env-id environments:Counting-v0", 1, ["Counting-v0"]),
        ("--num-envs 5", 2, ["--num-envs 5", "2 processes"]),
        ("--vectorization-mode threads", 1, ["sync", "async", "vector_entry_point"]),
    ],
)
def test_what_cannot_be_vectorized_is_one_line_that_says_what_can(flags, world_size, words, fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    code, line = fails(flags)
    assert code == 2 and all(word in line for word in words), line


# Worker processes


IMPATIENT = """
import gymnasium, ppo
step_wait = gymnasium.vector.AsyncVectorEnv.step_wait
gymnasium.vector.AsyncVectorEnv.step_wait = lambda envs, timeout: step_wait(envs, min(timeout, 2))
ppo.main()
"""


@pytest.mark.parametrize(
    "how, which, words",
    [
        ("Exits", 0, []),
        ("Exits", 2, []),
        ("Killed", 3, []),
        ("Raises", 2, ["the motor is hot"]),
        ("Hangs", 1, ["Timeout"]),
    ],
)
def test_a_worker_that_breaks_is_named_and_none_is_left_behind(how, which, words, workdir):
    Path("impatient.py").write_text(IMPATIENT)
    process = launch("impatient.py", "--vectorization-mode", "async", "--env-id", f"environments:{how}{which}-v0")
    result = result_of(process, timeout=30)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 1 and len(errors) == 1, result.err
    words = [f"environments:{how}{which}-v0", f"sub-environment [{which}]", *words]
    assert all(word in errors[0] for word in words), errors
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


SHAPE = "--num-envs 8 --num-steps 64 --no-anneal-lr --checkpoint-interval 1"


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
def test_one_process_with_all_the_environments_computes_the_same_gradients(two_ranks):
    agent = ppo.Agent(4, 2)
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
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, line = fails(f"--resume {folder}", files_allowed=True)
    assert code == 2 and "'world_size': 1" in line


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


@pytest.mark.parametrize(
    "size", ["--num-envs 2 --num-steps 2 --num-minibatches 2", "--num-envs 4 --num-minibatches 256"]
)
def test_minibatches_that_reset_steps_leave_too_small_are_filled(size, run):
    agent = run(f"--vectorization-mode vector_entry_point {size} --total-timesteps 1024").agent
    assert all(p.isfinite().all() for p in agent.parameters())
