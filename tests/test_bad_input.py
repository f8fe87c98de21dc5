"""Bad input: one clear line on standard error, exit code 2, no file made."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import forked, spawn


class Toy(gym.Env):
    """One observation, one step per episode; its spaces and its reward are what a test needs."""

    def __init__(self, observation_space=None, action_space=None, reward=0.0, render_mode=None):
        self.observation_space = observation_space or gym.spaces.Box(-1, 1, (2,))
        self.action_space = action_space or gym.spaces.Discrete(2)
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), self.reward, True, False, {}


class Mission(gym.spaces.Space):
    """A text, as MiniGrid has it: Gymnasium knows nothing about its size."""


def register(name, **kwargs):
    gym.register(f"{name}-v0", Toy, kwargs=kwargs)


register("MultiDiscrete", action_space=gym.spaces.MultiDiscrete([2, 3]))
register("FromOne", action_space=gym.spaces.Discrete(2, start=1))
register("NoFixedSize", observation_space=gym.spaces.Sequence(gym.spaces.Discrete(3)))
register("Mission", observation_space=gym.spaces.Dict(image=gym.spaces.Box(0, 1, (3,)), mission=Mission()))
register("Exploding", reward=1e30)


def uninstalled(**kwargs):
    raise gym.error.DependencyNotInstalled('Box2D is not installed, run `pip install "gymnasium[box2d]"`')


gym.register("Uninstalled-v0", uninstalled)


class NotFinite(Toy):
    def step(self, action):
        return np.full(2, np.nan, np.float32), 0.0, False, False, {}


gym.register("NotFinite-v0", NotFinite)


class WithoutRenderMode(Toy):
    def __init__(self):
        super().__init__()


gym.register("WithoutRenderMode-v0", WithoutRenderMode)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id CartPol-v1", ["CartPol", "Did you mean: `CartPole`"]),
        ("--env-id CartPole-v7", ["v7", "`v1`"]),
        ("--env-id Pendulum-v1", ["Box(-2.0, 2.0, (1,), float32)", "not Discrete", "variants.continuous_action"]),
        ("--env-id MultiDiscrete-v0", ["MultiDiscrete([2 3])", "not Discrete"]),
        ("--env-id FromOne-v0", ["Discrete(2, start=1)", "from 0"]),
        ("--env-id NoFixedSize-v0", ["Sequence", "not a flat Box"]),
        ("--env-id Mission-v0", ["Mission-v0", "no fixed size"]),
        ("--env-id Uninstalled-v0", ["gymnasium[box2d]"]),
        ("--env-id nomodule:X-v0", ["nomodule", "searched: ", "PYTHONPATH"]),
        ("--env-id Pendulum-v1 --capture-video", ["not Discrete"]),
        ("--env-id Exploding-v0 --capture-video", ["--capture-video"]),
        ("--total-timesteps 511", ["--total-timesteps 511", "512 steps"]),
        ("--total-timesteps 0", ["--total-timesteps", "between 1 and"]),
        ("--num-minibatches 3", ["512", "--num-minibatches 3", "equal parts"]),
        ("--num-minibatches 512", ["512", "parts of 2 steps or more"]),
        ("--num-envs 0", ["--num-envs", "between 1 and", "got 0"]),
        ("--num-steps -1", ["--num-steps", "between 1 and"]),
        ("--num-minibatches 0", ["--num-minibatches", "between 1 and"]),
        ("--update-epochs 0", ["--update-epochs", "between 1 and"]),
        ("--num-threads 0", ["--num-threads", "between 1 and 1024"]),
        ("--gamma 1.01", ["--gamma", "between 0 and 1"]),
        ("--gamma nan", ["--gamma", "between 0 and 1", "got nan"]),
        ("--gae-lambda -0.1", ["--gae-lambda", "between 0 and 1"]),
        ("--learning-rate -1", ["--learning-rate", "between 0 and 1e+30"]),
        ("--learning-rate inf", ["--learning-rate", "between 0 and 1e+30"]),
        ("--clip-coef nan", ["--clip-coef", "between 0 and 1e+30"]),
        ("--ent-coef -0.01", ["--ent-coef", "between 0 and 1e+30"]),
        ("--vf-coef inf", ["--vf-coef", "between 0 and 1e+30"]),
        ("--max-grad-norm -1", ["--max-grad-norm", "between 0 and 1e+30"]),
        ("--target-kl -0.1", ["--target-kl", "between 0 and 1e+30"]),
        ("--seed -1", ["--seed", "4294967295"]),
        ("--seed 4294967296", ["--seed", "4294967295"]),
        ("--num-steps 1.5", ["--num-steps", "1.5"]),
        ("--seed None", ["--seed"]),  # only where it is the default
        ("--track=maybe", ["--track", "maybe"]),
        ("--checkpoint-interval -1", ["--checkpoint-interval", "between 0 and"]),
        ("--resume", ["runs/", "checkpoint.pt"]),  # there is none
        ("--no-such-flag", ["--no-such-flag"]),
        ("--total-time 1000", ["--total-time"]),  # no abbreviations: they break when a flag is added
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_file(flags, words, fails):
    code, line = fails(flags)
    assert code == 2
    for word in words:
        assert word in line


def test_tracking_without_an_account_says_how_to_get_one(workdir, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(workdir / "home"))
    (workdir / "home").mkdir()
    monkeypatch.setenv("NETRC", str(workdir / "home/netrc"))
    code, out, err = forked("--track")
    assert code == 2 and out == ""
    assert "wandb login" in err and "WANDB_MODE=offline" in err
    assert not {"runs", "videos", "wandb"} & {path.name for path in workdir.iterdir()}


def test_tracking_with_a_bad_project_name_is_one_line_and_leaves_no_run(workdir):
    code, out, err = forked("--track --wandb-project-name a/b")
    assert code == 2 and out == ""
    assert [line for line in err.splitlines() if line.startswith("error: --track: ")]
    assert not {"runs", "videos"} & {path.name for path in workdir.iterdir()}


def test_a_user_sees_the_line_and_the_exit_code(workdir):
    result = spawn("--env-id Pendulum-v1")
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id Exploding-v0", "update 1 (step 512) diverged"),
        ("--learning-rate 1e30", "update 1 (step 512) diverged"),
        ("--env-id NotFinite-v0", "NotFinite-v0 gave an observation that is not finite"),
    ],
)
def test_a_run_that_diverges_ends_with_exit_code_1_and_says_what_and_when(flags, words, fails):
    code, line = fails(flags + " --total-timesteps 4096", files_allowed=True)
    assert code == 1 and words in line and "step 512" in line


def test_a_folder_that_cannot_be_written_to_is_named(workdir, fails):
    (workdir / "runs").write_text("a file where the folder should be")
    code, line = fails("", files_allowed=True)
    assert code == 1 and "runs" in line
    (workdir / "runs").unlink()
    (workdir / "runs").symlink_to("nowhere")
    code, line = fails("", files_allowed=True)
    assert code == 1 and "runs" in line


SPACES = {
    "Discrete": gym.spaces.Discrete(5),
    "Image": gym.spaces.Box(0, 255, (4, 3, 2), np.uint8),
    "Float64": gym.spaces.Box(-1, 1, (3,), np.float64),
    "Tuple": gym.spaces.Tuple((gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,)))),
    "Dict": gym.spaces.Dict(a=gym.spaces.MultiBinary(3), b=gym.spaces.Box(-1, 1, (2, 2))),
}


@pytest.mark.parametrize("name, obs_dim", [("Discrete", 5), ("Image", 24), ("Float64", 3), ("Tuple", 5), ("Dict", 7)])
def test_observations_of_every_fixed_size_are_flattened(name, obs_dim, run):
    register(f"{name}Obs", observation_space=SPACES[name], reward=1)
    result = run(f"--env-id {name}Obs-v0 --total-timesteps 64 --num-steps 16")
    del gym.registry[f"{name}Obs-v0"]
    assert result.agent.actor[0].in_features == obs_dim
    assert len(result.episodes) == 64 and {r for _, r, _ in result.episodes} == {1.0}


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "WithoutRenderMode-v0"])
def test_environments_of_every_kind_run(env_id, run):
    assert run(f"--env-id {env_id} --total-timesteps 512").folder.exists()
