"""Same arguments, same episodes, to the last one.

They are compared with those of a reference run, and with those of a plain program that
was written separately.
"""

import csv

import pytest
import torch
from conftest import ROOT, parse_episodes

import ppo
from tests.reference import plain

REFERENCE = ROOT / "tests" / "cartpole_seed1_25k.csv"


@pytest.mark.skipif(
    not torch.__version__.startswith(("2.13.", "2.14.")),
    reason="made with PyTorch 2.13, and the same with 2.14; others round differently",
)
def test_the_default_run_equals_the_reference_in_all_419_episodes(run):
    with REFERENCE.open() as file:
        rows = list(csv.DictReader(file))
    expected = []
    for row in rows:
        step = int(row["global_step"])
        length = int(row["episodic_length"])
        expected.append((step, float(row["episodic_return"]), length))
    assert len(expected) == 419
    assert run().episodes == expected


def slow(flags):
    return pytest.param(flags, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "flags",
    [
        slow("--seed 3 --num-envs 16 --num-steps 64 --total-timesteps 8192"),
        slow("--seed 4 --no-gae --no-clip-vloss --no-norm-adv --total-timesteps 4096"),
        "--seed 6 --target-kl 0.015 --learning-rate 0.002 --total-timesteps 4096",
        slow(
            "--seed 8 --num-minibatches 1 --update-epochs 10 --no-anneal-lr "
            "--total-timesteps 4096"
        ),
        "--seed 9 --gamma 0.9 --gae-lambda 0.8 --ent-coef 0.1 --vf-coef 1 "
        "--max-grad-norm 0.1 --clip-coef 0.1 --total-timesteps 4096",
        slow(
            "--seed 10 --env-id Acrobot-v1 --num-envs 2 --num-steps 256 "
            "--total-timesteps 5120"
        ),
        "--seed 11 --env-id MountainCar-v0 --bootstrap-truncation "
        "--total-timesteps 3072",
        "--seed 12 --env-id FrozenLake-v1 --total-timesteps 3072",
        slow(
            "--seed 7 --bootstrap-truncation --learning-rate 0.001 "
            "--total-timesteps 8000"
        ),
        slow("--seed 13 --total-timesteps 15000"),
        slow("--seed 14 --env-id Acrobot-v1 --total-timesteps 10000"),
        slow(
            "--seed 15 --num-envs 16 --num-steps 64 --num-minibatches 8 "
            "--update-epochs 10 --learning-rate 0.001 --clip-coef 0.1 "
            "--target-kl 0.05 --total-timesteps 15000"
        ),
    ],
)
def test_every_episode_equals_that_of_the_plain_program(flags, run, capsys):
    result = run(flags)
    expected = plain.train(ppo.parse_args(flags.split()))
    assert result.episodes
    assert result.episodes == parse_episodes(capsys.readouterr().out)

    # The parameters show what has not changed an action yet. The order of some sums may
    # be another, so their last bits may differ.
    ours, theirs = result.agent.state_dict(), expected.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_same_seed_repeats_a_run_and_another_does_not(run):
    flags = "--total-timesteps 2048 --num-envs 8 --num-steps 64 --seed "
    first = run(flags + "1")
    again = run(flags + "1")
    other = run(flags + "2")
    assert first.episodes == again.episodes
    for one, two in zip(
        first.agent.parameters(), again.agent.parameters(), strict=True
    ):
        assert one.equal(two)
    assert first.episodes
    assert other.episodes != first.episodes


@pytest.mark.parametrize("flag, on", [("", True), ("--no-torch-deterministic", False)])
def test_torch_deterministic_switches_deterministic_algorithms(flag, on, run):
    torch.use_deterministic_algorithms(not on)
    run(f"--total-timesteps 512 {flag}")
    assert torch.are_deterministic_algorithms_enabled() is on


@pytest.mark.parametrize("flag, threads", [("", 1), ("--num-threads 2", 2)])
def test_torch_has_one_thread_unless_told_otherwise(flag, threads, run):
    """The same numbers on any number of cores rest on it."""
    torch.set_num_threads(3 - threads)
    run(f"--total-timesteps 512 {flag}")
    assert torch.get_num_threads() == threads
