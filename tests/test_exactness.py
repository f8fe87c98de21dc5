"""The same arguments give the same episodes as the reference implementation of the eleven details, to the last one."""

import csv
from pathlib import Path

from conftest import parse_episodes, spawn

REFERENCE = Path(__file__).parent / "cartpole_seed1_25k.csv"


def test_default_run_equals_the_reference_episode_by_episode_and_repeats_itself():
    rows = list(csv.DictReader(REFERENCE.open()))
    expected = [(int(r["global_step"]), float(r["episodic_return"]), int(r["episodic_length"])) for r in rows]
    assert len(expected) == 419
    for _ in range(2):
        result = spawn()
        assert result.returncode == 0, result.stderr
        assert parse_episodes(result.stdout) == expected


def test_same_seed_repeats_and_another_seed_differs(run):
    flags = "--total-timesteps 2048 --env-id Acrobot-v1 --num-envs 8 --num-steps 64"
    first, second = run(flags + " --seed 1"), run(flags + " --seed 1")
    other = run("--total-timesteps 2048 --seed 2")
    assert first.episodes == second.episodes
    for p, q in zip(first.agent.parameters(), second.agent.parameters(), strict=True):
        assert p.equal(q)
    assert other.episodes and other.episodes != run("--total-timesteps 2048 --seed 1").episodes


def test_torch_uses_one_thread_unless_told_otherwise(run):
    """The same numbers on any core count rest on it."""
    import torch

    torch.set_num_threads(2)
    run("--total-timesteps 512")
    assert torch.get_num_threads() == 1
