"""evaluate.py plays what was learned: its numbers add up, repeat themselves, and its videos can be watched."""

import os
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import frames, spawn

import evaluate
import ppo


@pytest.fixture
def play(capsys):
    """play("runs/name --seed 2"): the printed returns, the mean and the standard deviation."""

    def play(flags=""):
        evaluate.main(str(flags).split())
        out = capsys.readouterr().out
        rows = re.findall(r"^episode=(\d+), episodic_return=(\S+)$", out, re.MULTILINE)
        assert [int(i) for i, _ in rows] == list(range(len(rows)))
        mean, std = re.search(r"^mean=(\S+), std=([^\s,]+)", out, re.MULTILINE).groups()
        return [float(r) for _, r in rows], float(mean), float(std)

    return play


def test_every_return_is_printed_and_mean_and_standard_deviation_follow_from_them(run, play):
    folder = run("--total-timesteps 2048").folder
    returns, mean, std = play(folder)
    assert len(returns) == 10 and len(set(returns)) > 1
    assert (mean, std) == (round(np.mean(returns), 2), round(np.std(returns), 2))
    assert len(play(f"{folder} --episodes 3")[0]) == 3


@pytest.mark.parametrize("flags", ["", "--deterministic"])
def test_the_same_seed_repeats_and_another_seed_differs(flags, run, play):
    folder = run("--total-timesteps 2048").folder
    assert play(f"{folder} {flags}") == play(f"{folder} {flags} --seed 1000") != play(f"{folder} {flags} --seed 1")


def test_deterministic_means_the_likeliest_action(run, play):
    result = run("--total-timesteps 2048")
    env, expected = gym.make("CartPole-v1"), []
    for episode in range(3):
        obs, _ = env.reset(seed=5 if episode == 0 else None)
        total, done = 0.0, False
        while not done:
            action = result.agent.actor(torch.tensor(obs)).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        expected.append(total)
    assert play(f"{result.folder} --deterministic --episodes 3 --seed 5")[0] == expected


def test_what_was_learned_is_played_not_a_fresh_agent(run, play):
    folder = run("--total-timesteps 20480 --learning-rate 0.001").folder
    assert play(f"{folder} --deterministic")[1] > 100  # a fresh agent: about 10


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Blackjack-v1"])
def test_flattened_observations_are_played(env_id, run, play):
    assert len(play(run(f"--env-id {env_id} --total-timesteps 512").folder)[0]) == 10


def test_without_a_folder_the_newest_run_plays_and_its_checkpoint_may_be_named(run, play):
    old, new = (run(f"--total-timesteps 2048 --seed {seed}").folder for seed in (1, 2))
    os.utime(old / "checkpoint.pt", (0, 0))
    assert play() == play(new / "checkpoint.pt") != play(old)


class Marching(gym.Env):
    """Episodes of so many steps; 0: without end."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, length=0, render_mode=None):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps == self.length, False, {}


gym.register("Endless-v0", Marching)
gym.register("Marching7-v0", Marching, kwargs={"length": 7})


def test_after_max_steps_it_ends_and_says_what_was_not_finished(run, play, capsys):
    folder = run("--env-id Marching7-v0 --total-timesteps 512").folder
    assert play(f"{folder} --max-steps 20") == ([7.0, 7.0], 7.0, 0.0)
    assert len(play(f"{folder} --max-steps 21 --episodes 3")[0]) == 3
    endless = run("--env-id Endless-v0 --total-timesteps 512").folder
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main([str(endless), "--max-steps", "50"])
    out, err = capsys.readouterr()
    assert exit_info.value.code == 1 and "--max-steps 50" in err and len(err.splitlines()) == 1 and "mean" not in out


def test_errors_of_the_environment_are_one_line_and_those_of_the_program_are_not_hidden(run, monkeypatch, capsys):
    folder = str(run("--env-id Marching7-v0 --total-timesteps 512").folder)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(Marching, "step", lambda *_: {}["no road"])
        evaluate.main([folder])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code in (1, 2) and "Marching7-v0" in line and "no road" in line
    monkeypatch.setattr(ppo.Agent, "get_action_and_value", lambda *_: {}["a bug"])
    with pytest.raises(KeyError):
        evaluate.main([folder])


def test_a_video_of_every_episode_has_a_frame_per_step(run, play):
    folder = run("--total-timesteps 512").folder
    returns, *_ = play(f"{folder} --capture-video --episodes 3")
    videos = sorted(Path("videos", folder.name, "evaluation").glob("*.mp4"))
    assert len(videos) == 3
    for path, episodic_return in zip(videos, returns, strict=True):
        assert episodic_return <= len(frames(path)) <= episodic_return + 2


@pytest.mark.parametrize(
    "flags",
    ["--episodes 0", "--episodes -1", "--episodes x", "--seed -1", "--seed 99999999999999999999", "--no-such-flag"]
    + ["--render --capture-video", "--seed 1.5", "--max-steps 0"],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, run, capsys):
    folder = run("--total-timesteps 512").folder
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main([str(folder), *flags.split()])
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")


@pytest.mark.parametrize(
    "change", [{"env_id": "Acrobot-v1"}, {"env_id": "Gone-v1"}, {"env_id": "Pendulum-v1"}], ids=lambda c: c["env_id"]
)
def test_an_environment_that_is_missing_or_has_changed_is_one_line_that_names_it(change, run, capsys):
    folder = run("--total-timesteps 512").folder
    checkpoint = ppo.load_checkpoint(str(folder))[1]
    torch.save(checkpoint | {"args": checkpoint["args"] | change}, folder / "checkpoint.pt")
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main([str(folder)])
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2 and out == "" and len(err.splitlines()) == 1 and change["env_id"] in err


def test_a_user_sees_the_line_and_the_exit_code(workdir):
    result = spawn("runs/none", script="evaluate.py")
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert "runs/none/checkpoint.pt" in result.stderr and not list(workdir.iterdir())
