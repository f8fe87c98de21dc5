"""The same arguments give the same episodes as the reference implementation of the eleven details, to the last one."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import parse_episodes, spawn

import ppo
from benchmark import plain

REFERENCE = Path(__file__).parent / "cartpole_seed1_25k.csv"


def test_default_run_equals_the_reference_episode_by_episode_and_repeats_itself():
    rows = list(csv.DictReader(REFERENCE.open()))
    expected = [(int(r["global_step"]), float(r["episodic_return"]), int(r["episodic_length"])) for r in rows]
    first, second = spawn(), spawn()
    assert first.returncode == 0 and parse_episodes(first.stdout) == parse_episodes(second.stdout), first.stderr
    if torch.__version__[:5] in ("2.13.", "2.14."):  # others may round differently: then the plain one below counts
        assert len(expected) == 419 and parse_episodes(first.stdout) == expected


OTHER = "--num-envs 16 --num-steps 64 --num-minibatches 8 --update-epochs 10 --learning-rate 0.001 --clip-coef 0.1"


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 3 --num-envs 16 --num-steps 64 --total-timesteps 20000",
        "--seed 4 --no-gae --no-clip-vloss --no-norm-adv --total-timesteps 10000",
        "--seed 6 --target-kl 0.015 --learning-rate 0.002 --total-timesteps 15000",
        "--seed 7 --bootstrap-truncation --learning-rate 0.001 --total-timesteps 20000",
        "--seed 8 --num-minibatches 1 --update-epochs 10 --no-anneal-lr --total-timesteps 10000",
        "--seed 9 --gamma 0.9 --gae-lambda 0.8 --ent-coef 0.1 --vf-coef 1 --max-grad-norm 0.1 --clip-coef 0.1",
        "--seed 10 --env-id Acrobot-v1 --num-envs 2 --num-steps 256 --total-timesteps 10000",
        "--seed 11 --env-id MountainCar-v0 --bootstrap-truncation --total-timesteps 5000",
        "--seed 12 --env-id FrozenLake-v1 --total-timesteps 5000",
        pytest.param("--seed 13 --total-timesteps 100000", marks=pytest.mark.slow),
        pytest.param("--seed 14 --env-id Acrobot-v1 --total-timesteps 100000", marks=pytest.mark.slow),
        pytest.param(f"--seed 15 {OTHER} --target-kl 0.05 --total-timesteps 100000", marks=pytest.mark.slow),
    ],
)
def test_every_episode_equals_that_of_a_plain_implementation(flags, run, capsys):
    episodes = run(flags).episodes
    plain.train(ppo.parse_args(flags.split()))
    assert episodes and episodes == parse_episodes(capsys.readouterr().out)


def test_same_seed_repeats_and_another_seed_differs(run):
    flags = "--total-timesteps 2048 --env-id Acrobot-v1 --num-envs 8 --num-steps 64"
    first, second = run(flags + " --seed 1"), run(flags + " --seed 1")
    other = run("--total-timesteps 2048 --seed 2")
    assert first.episodes == second.episodes
    for p, q in zip(first.agent.parameters(), second.agent.parameters(), strict=True):
        assert p.equal(q)
    assert other.episodes and other.episodes != run("--total-timesteps 2048 --seed 1").episodes


@pytest.mark.parametrize("flag, enabled", [("", True), ("--no-torch-deterministic", False)])
def test_torch_deterministic_switches_deterministic_algorithms(flag, enabled, run):
    torch.set_deterministic_debug_mode("default" if enabled else "warn")
    run(f"--total-timesteps 512 {flag}")
    assert torch.are_deterministic_algorithms_enabled() is enabled


def test_torch_uses_one_thread_unless_told_otherwise(run):
    """The same numbers on any core count rest on it."""
    torch.set_num_threads(2)
    run("--total-timesteps 512")
    assert torch.get_num_threads() == 1
