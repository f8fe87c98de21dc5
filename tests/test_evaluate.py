"""evaluate.py plays what was learned, says so in numbers, and records what it plays."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import finish, frames, start

import evaluate
import ppo

SHORT = "--total-timesteps 1024"


@pytest.fixture
def play(capsys):
    """play("runs/name --seed 2") returns .run, .returns, .mean, .std and .out."""

    def play(flags=""):
        returned = evaluate.main(str(flags).split())
        out = capsys.readouterr().out
        first = out.splitlines()[0]
        rows = re.findall(r"^episode=(\d+), episodic_return=(\S+)$", out, re.MULTILINE)
        returns = [float(episodic_return) for _, episodic_return in rows]
        assert [int(i) for i, _ in rows] == list(range(len(rows)))
        assert returns == returned
        mean, std = re.search(r"^mean=(\S+), std=(\S+)$", out, re.MULTILINE).groups()
        return SimpleNamespace(
            run=first.removeprefix("run="),
            returns=returns,
            mean=float(mean),
            std=float(std),
            out=out,
        )

    return play


# The numbers


def test_all_returns_are_printed_with_their_mean_and_deviation(run, play):
    folder = run(SHORT).folder
    result = play(folder)
    assert len(result.returns) == 10
    assert len(set(result.returns)) > 1
    assert result.mean == round(np.mean(result.returns), 2)
    assert result.std == round(np.std(result.returns), 2)
    assert len(play(f"{folder} --episodes 3").returns) == 3


@pytest.mark.parametrize("flags", ["", "--deterministic"])
def test_the_same_seed_repeats_and_another_seed_differs(flags, run, play):
    folder = run(SHORT).folder
    first = play(f"{folder} {flags}")
    assert play(f"{folder} {flags} --seed 1000").returns == first.returns
    assert play(f"{folder} {flags} --seed 1").returns != first.returns


def test_deterministic_means_the_likeliest_action(run, play):
    result = run(SHORT)
    expected = []
    env = gym.make("CartPole-v1")
    for episode in range(3):
        obs, _ = env.reset(seed=5 if episode == 0 else None)
        episodic_return = 0.0
        done = False
        while not done:
            action = result.agent.actor(torch.tensor(obs)).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            episodic_return += reward
            done = terminated or truncated
        expected.append(episodic_return)
    flags = f"{result.folder} --episodes 3 --seed 5"
    assert play(f"{flags} --deterministic").returns == expected
    assert play(flags).returns != expected


def test_what_was_learned_is_played(run, play):
    flags = "--num-envs 16 --num-steps 32 --learning-rate 0.003"
    folder = run(f"{flags} --total-timesteps 10240").folder
    result = play(f"{folder} --deterministic --episodes 3")
    assert result.mean > 100  # an untrained agent reaches about 10


def test_max_steps_ends_what_has_no_end(run, play, fails):
    short = run("--env-id environments:Terminates7-v0 --total-timesteps 512").folder
    cut = play(f"{short} --max-steps 20")
    assert cut.returns == [7.0, 7.0]
    assert "note: --max-steps 20 were over" in cut.out
    whole = play(f"{short} --max-steps 21 --episodes 3")
    assert whole.returns == [7.0, 7.0, 7.0]
    assert "note" not in whole.out

    endless = run("--env-id environments:Endless-v0 --total-timesteps 512").folder
    code, line = fails(f"{endless} --max-steps 50", evaluate.main)
    assert code == 1
    assert "no episode ended within --max-steps" in line


# Which run, and which program


def test_the_run_that_plays_is_printed_first(run, play):
    """Without a folder it is the newest one. Its checkpoint may be named, too."""
    old = run(SHORT).folder
    new = run(f"{SHORT} --seed 2").folder
    os.utime(old / "checkpoint.pt", (0, 0))
    newest = play()
    assert newest.run == str(new)
    named = play(new / "checkpoint.pt")
    assert named.run == str(new)
    assert named.returns == newest.returns
    other = play(old)
    assert other.run == str(old)
    assert other.returns != newest.returns


VARIANT = """
import ppo
from helpers_of_variant import FACTOR

class Agent(ppo.Agent):
    def get_policy(self, obs):
        return super().get_policy(FACTOR * obs)

def make_envs(*args):
    print("made by the variant")
    return ppo.make_envs(*args)

if __name__ == "__main__":
    ppo.main(make_envs=make_envs, Agent=Agent, exp_name="my_variant")
"""


def test_a_variant_of_one_s_own_is_played_by_itself(workdir, fails, play, monkeypatch):
    """A user writes a file that imports another one, trains with it, and plays."""
    folder = workdir / "elsewhere"
    folder.mkdir()
    program = folder / "my_variant.py"
    program.write_text(VARIANT)
    (folder / "helpers_of_variant.py").write_text("FACTOR = -1")
    trained = finish(start(program, *SHORT.split()))
    assert trained.code == 0, trained.err

    code, line = fails("", evaluate.main)
    assert code == 2
    assert "my_variant.py: name that file with --program" in line

    monkeypatch.setattr(sys, "path", list(sys.path))
    result = play(f"--program {program}")
    assert result.run.startswith("runs/CartPole-v1__my_variant__1__")
    assert result.out.splitlines()[1] == "made by the variant"


@pytest.mark.parametrize(
    "text",
    [
        "class Agent(ppo.Agent): pass",
        "def make_envs(*args): return ppo.make_envs(*args)",
    ],
)
def test_a_variant_may_define_only_one_of_both(text, run, play):
    Path("half.py").write_text(f"import ppo\n{text}\n")
    folder = run("--total-timesteps 512").folder
    assert play(f"{folder} --program half.py").returns == play(folder).returns


def test_a_stranger_s_checkpoint_does_not_choose_what_is_imported(run, fails):
    folder = run("--total-timesteps 512").folder
    Path("evil.py").write_text("open('was imported', 'w')")
    checkpoint = ppo.load_checkpoint(folder)
    for name in ("evil", "./evil.py", "os"):
        torch.save(checkpoint | {"program": name}, folder / "checkpoint.pt")
        code, line = fails(str(folder), evaluate.main)
        assert code == 2
        assert "name that file with --program" in line
    assert not Path("was imported").exists()


# Videos


def test_a_video_of_every_episode_has_a_frame_per_step(run, play):
    folder = run("--total-timesteps 512").folder
    result = play(f"{folder} --capture-video --episodes 3")
    videos = Path("videos", folder.name, "evaluation")
    assert result.out.splitlines()[-1] == f"videos: {videos}"
    paths = sorted(videos.glob("*.mp4"))
    assert len(paths) == 3
    for path, episodic_return in zip(paths, result.returns, strict=True):
        pictures = frames(path)
        assert episodic_return <= len(pictures) <= episodic_return + 2
        assert (pictures[0] != pictures[-1]).any()


# What ends it


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--episodes 0", "--episodes"),
        ("--episodes x", "--episodes"),
        ("--max-steps 0", "--max-steps"),
        ("--seed -1", "--seed"),
        ("--seed 1.5", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--render --capture-video", "--render"),
        ("--no-such-flag", "--no-such-flag"),
        ("--program none.py", "none.py"),
        ("runs/none", "runs/none/checkpoint.pt"),
    ],
)
def test_bad_input_is_one_line(flags, word, run, fails):
    run("--total-timesteps 512")
    code, line = fails(flags, evaluate.main)
    assert code == 2
    assert word in line


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "Gone-v1", "Pendulum-v1"])
def test_an_environment_that_is_gone_or_has_changed_is_named(env_id, run, fails):
    folder = run("--total-timesteps 512").folder
    checkpoint = ppo.load_checkpoint(folder)
    checkpoint["args"]["env_id"] = env_id
    torch.save(checkpoint, folder / "checkpoint.pt")
    code, line = fails(str(folder), evaluate.main)
    assert code == 2
    assert env_id in line


def test_errors_of_the_environment_keep_their_traceback(run):
    """Such an environment breaks when it has played 150 steps."""
    flags = "--env-id environments:Raises0-v0 --total-timesteps 512"
    folder = run(flags).folder
    with pytest.raises(Exception, match="the motor\nis 100% hot"):
        evaluate.main([str(folder), "--seed", "1"])
