"""docs/change.md is true: every piece of it works as it stands.

A diff is applied to a copy of ppo.py. Python that begins with the name of a file is
saved under it, and other Python is run as in a session. Commands run in this process,
except loops. All of them train for 1,024 steps only.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CLOCK, ROOT, new_folder, scalars
from environments import Corridor
from torch.distributions import Categorical

import ppo

PAGE = (ROOT / "docs/change.md").read_text()
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
SECTIONS = dict(section.split("\n", 1) for section in SECTIONS)


def blocks(heading, language):
    """The blocks of code of a section that are in this language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    found = re.findall(pattern, SECTIONS[heading], re.MULTILINE | re.DOTALL)
    assert found
    return found


def apply(diff, text):
    """Apply a diff without numbers of lines; each part must fit in one place."""
    for part in diff.split("@@\n"):
        lines = part.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" +-\n")
        old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
        new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def session(workdir, monkeypatch):
    """A folder with the programs in it, in which Python is started."""
    for path in ROOT.glob("*.py"):
        os.symlink(path, path.name)
    monkeypatch.syspath_prepend(workdir)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == workdir:
            del sys.modules[name]


@pytest.fixture
def shell(session, monkeypatch):
    """shell("python ppo.py --seed 2") runs a program here; returns its new folder."""

    def shell(line):
        python, program, *flags = shlex.split(line)
        assert python == "python"
        if program.startswith(("ppo", "my_")) and "--total-timesteps" not in flags:
            flags += ["--total-timesteps", "1024"]
        if "50000" in flags:
            flags[flags.index("50000")] = "2048"
        monkeypatch.setattr(sys, "argv", [program, *flags])
        with CLOCK.next_second(), new_folder() as folder:
            runpy.run_path(program, run_name="__main__")
        return folder.path

    return shell


@pytest.fixture
def change(shell):
    """change(heading, flags) runs ppo.py as changed; returns folder and curves."""

    def change(heading, flags=""):
        (diff,) = blocks(heading, "diff")
        Path("my_ppo.py").write_text(apply(diff, (ROOT / "ppo.py").read_text()))
        folder = shell(f"python my_ppo.py {flags}")
        shell(f"python evaluate.py --program my_ppo.py --episodes 2 {folder}")
        return folder, scalars(folder)

    return change


def save_files(heading):
    """Save the blocks of Python that begin with the name of a file."""
    for text in blocks(heading, "python"):
        (name,) = re.findall(r"\A# (\w+\.py)\n", text)
        Path(name).write_text(text)


def commands(heading):
    return [line for block in blocks(heading, "sh") for line in block.splitlines()]


def test_a_third_layer(change):
    folder, _ = change("A network of your own")
    agent = ppo.load_checkpoint(folder)["agent"]
    weights = [name for name in agent if name.startswith("actor") and "weight" in name]
    assert len(weights) == 4


def test_another_number_for_each_update(change):
    folder, curves = change("Another number for each update")
    (_, first), (step, last) = curves["losses/weights"]
    assert step == 1024
    agent = ppo.load_checkpoint(folder)["agent"]
    vector = torch.cat([parameter.flatten() for parameter in agent.values()])
    assert first != last == pytest.approx(vector.norm().item())


class Lucky(Corridor):
    """Every other episode succeeds, and each reward is 1."""

    episodes = 0

    def reset(self, **options):
        self.episodes += 1
        return super().reset(**options)

    def step(self, action):
        *result, _ = super().step(action)
        return *result, {"is_success": self.episodes % 2 == 0}


def test_another_number_for_each_episode(change):
    gym.registry.pop("Lucky-v0", None)
    gym.register("Lucky-v0", Lucky, kwargs={"end": 4})
    _, curves = change("Another number for each episode", "--env-id Lucky-v0")
    assert {value for _, value in curves["charts/reward_per_step"]} == {1.0}
    assert [value for _, value in curves["charts/success"]][:4] == [0, 1, 0, 1]


def test_another_schedule(change):
    heading = "Another schedule of the learning rate"
    _, curves = change(heading, "--total-timesteps 2048")
    rates = [value for _, value in curves["charts/learning_rate"]]
    cosines = 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4))
    assert rates == pytest.approx(2.5e-4 * cosines)


def test_an_extra_reward(change, run):
    folder, curves = change("An extra reward")
    plain = run("--total-timesteps 1024")
    agent = ppo.load_checkpoint(folder)["agent"]
    assert "predictor.weight" in agent
    assert curves["losses/value_loss"] != scalars(plain.folder)["losses/value_loss"]
    returns = [value for _, value in curves["charts/episodic_return"]]
    lengths = [value for _, value in curves["charts/episodic_length"]]
    assert returns == lengths != []  # those of CartPole, without the extra


def test_an_agent_in_float64(run):
    text = (ROOT / "ppo.py").read_text()
    assert text.count("obs.float()") == 2  # the two places that the page speaks of

    class Agent(ppo.Agent):
        def __init__(self, envs):
            super().__init__(envs)
            self.double()

        def get_value(self, obs):
            return self.critic(obs.double()).squeeze(-1)

        def get_policy(self, obs):
            return Categorical(logits=self.actor(obs.double()))

    result = run("--total-timesteps 1024", Agent=Agent)
    saved = ppo.load_checkpoint(result.folder)["agent"]
    assert saved["actor.0.weight"].dtype == torch.float64
    assert not saved["actor.0.bias"].equal(torch.zeros(64, dtype=torch.float64))


def test_a_wrapper(shell, capsys):
    heading = "A wrapper around an environment"
    save_files(heading)
    train, evaluate = commands(heading)
    assert shell(train).name.startswith("my_module-make__ppo__1__")
    shell(f"{evaluate} --episodes 1")
    assert "mean=" in capsys.readouterr().out


def test_arguments(shell, capsys):
    train, evaluate = commands("Arguments of an environment")
    folder = shell(train)
    args = ppo.load_checkpoint(folder)["args"]
    assert args["env_kwargs"] == {"is_slippery": False}
    shell(evaluate)
    assert "mean=" in capsys.readouterr().out


def test_a_variant(shell, capsys):
    heading = "A variant of your own"
    save_files(heading)
    train, resume, evaluate = commands(heading)
    folder = shell(train)
    shell(resume)
    checkpoint = ppo.load_checkpoint(folder)
    assert checkpoint["program"] == "my_variant"
    assert checkpoint["global_step"] == 2048
    assert checkpoint["agent"]["critic.0.weight"].shape == (256, 4)
    shell(evaluate)
    assert "mean=" in capsys.readouterr().out


def test_a_table(shell, capsys):
    heading = "Several seeds and rates"
    save_files(heading)
    loop, table = blocks(heading, "sh")
    (train,) = re.findall(r"python ppo\.py .*", loop)
    for seed, rate in (("1", "0.00025"), ("2", "0.00025"), ("1", "0.0025")):
        shell(train.replace("$seed", seed).replace("$rate", rate))
    capsys.readouterr()
    shell(table)
    *_, first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"0\.00025 +\d\d\.\d+ +\d+\.\d+ +2", first)
    assert re.fullmatch(r"0\.00250 +\d\d\.\d+ +NaN +1", second)


@pytest.mark.slow
def test_a_loop_of_the_shell(session):
    loop, _ = blocks("Several seeds and rates", "sh")
    loop = loop.replace("--exp-name", "--total-timesteps 512 --exp-name")
    loop = loop.replace("in 1 2 3;", "in 1 2;")  # each start takes seconds
    folder = Path(sys.executable).parent
    subprocess.run(
        ["bash", "-eux", "-c", loop],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        check=True,
        timeout=600,
    )
    assert len(list(Path("runs").glob("*__sweep__*/checkpoint.pt"))) == 4


def test_an_agent_in_a_session_and_its_actor_alone(run):
    trained = run("--total-timesteps 1024").agent
    names = {}
    for heading in (
        "An agent in a Python session",
        "The actor alone, for another program",
    ):
        for text in blocks(heading, "python"):
            exec(text, names)
    assert names["total"] == 200
    assert names["agent"].actor[0].weight.equal(trained.actor[0].weight)

    obs = torch.randn(7, 4)
    expected = trained.actor(obs)
    torch.testing.assert_close(names["actor"](obs), expected)
    assert names["action"].shape == (1,)
    (onnx_logits,) = names["session"].run(None, {names["name"]: obs.numpy()})
    np.testing.assert_allclose(onnx_logits, expected.detach(), atol=1e-5)
    assert names["onnx_logits"].shape == (1, 2)


def test_many_runs(session, capsys):
    (text,) = blocks("Many runs from Python", "python")
    text = text.replace('"--exp-name"', '"--total-timesteps", "1024", "--exp-name"')
    names = {}
    exec(text, names)
    assert list(names["agents"]) == [0.00025]
    assert "1e+20: the update at step 512 diverged" in capsys.readouterr().out


def test_every_piece_is_run():
    """A new piece needs a test here; this says how many there are."""
    assert len(SECTIONS) == 12
    assert len(re.findall(r"^```\w+$", PAGE, re.MULTILINE)) == 17
    assert max(map(len, PAGE.splitlines())) < 100
