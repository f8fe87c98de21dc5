"""What real users bring: odd environments, schedulers, notebooks, sweeps. (Signals: test_stops; seconds between
checkpoints, --resume alone: test_checkpoints; recorders: test_videos_and_wandb; steps without end: test_evaluate.)"""

import importlib.util
import multiprocessing
import random
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, forked, read_events
from environments import Counting

import evaluate
import ppo

SHORT = "--env-id Odd-v0 --num-steps 16 --total-timesteps 64"  # one update


class Plain(gym.Env):
    """Episodes of three steps with a reward of 1 each."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps == 3, False, {}


@pytest.fixture
def register():
    """register(make) makes it the environment Odd-v0 of this test."""

    def register(entry_point, **options):
        gym.registry.pop("Odd-v0", None)
        gym.register("Odd-v0", entry_point, **options)

    yield register
    gym.registry.pop("Odd-v0", None)


class Drawing(Plain):
    """Rewards come from a generator that all environments of a process share."""

    def __init__(self, draw, render_mode=None):
        self.draw = draw

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.draw(), *rest


DRAWS = [random.random, np.random.random, lambda: torch.rand(1).item()]


@pytest.mark.parametrize("draw", DRAWS, ids=["random", "numpy", "torch"])
def test_each_worker_seeds_the_global_generators_with_its_own_seed(draw, register, run):
    register(Drawing, kwargs={"draw": draw})
    first, again, other = (run(f"{SHORT} --vectorization-mode async --seed {seed}").episodes for seed in (5, 5, 6))
    assert first == again != other
    returns = [{r for _, r, _ in episodes} for episodes in (first, other)]
    assert len(returns[0]) == 4 * 5 and len(returns[0] & returns[1]) == 3 * 5  # seeds 5 to 8, and 6 to 9


MODULE = """
import gymnasium, numpy
from gymnasium.envs.classic_control import CartPoleEnv

class Drawing(CartPoleEnv):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, numpy.random.random(), *rest

gymnasium.register("Drawing-v0", Drawing)
"""


@pytest.mark.slow
def test_spawned_workers_draw_as_forked_ones_do(run, workdir, monkeypatch):
    Path("drawing.py").write_text(MODULE)
    monkeypatch.syspath_prepend(workdir)
    flags, method = "--env-id drawing:Drawing-v0 --vectorization-mode async", multiprocessing.get_start_method()
    episodes = run(f"{flags} --total-timesteps 512").episodes
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert run(f"{flags} --total-timesteps 512").episodes == episodes != []
    finally:
        multiprocessing.set_start_method(method, force=True)


class Chatty(Plain):
    def __init__(self, info, render_mode=None):
        self.info = info

    def step(self, action):
        return *super().step(action)[:4], {"episode": self.info}


class ChattyBatch(Counting):
    def step(self, actions):
        *step, infos = super().step(actions)
        statistics = {"r": np.ones(self.num_envs), "l": np.ones(self.num_envs, int)}
        return *step, infos | {"episode": statistics, "_episode": np.ones(self.num_envs, bool)}


@pytest.mark.parametrize("info", [7, "seven", {"r": 1.0, "l": 1}, None], ids=str)
def test_an_info_called_episode_is_not_taken_for_statistics(info, register, run):
    register(Chatty, kwargs={"info": info})
    assert [(r, n) for _, r, n in run(SHORT).episodes] == [(3.0, 3)] * 20


def test_a_batched_environment_s_own_statistics_are_not_taken_for_ours(register, run):
    register(None, vector_entry_point=Counting)
    flags = f"{SHORT} --vectorization-mode vector_entry_point"
    plain = run(flags).episodes
    register(None, vector_entry_point=ChattyBatch)
    assert run(flags).episodes == plain != []


def test_returns_that_do_not_vary_have_no_explained_variance(register, run):
    class Constant(Plain):
        def step(self, action):  # the return, advantage + value, is 0.1 but for rounding
            return self.observation_space.sample(), 0.1, True, False, {}

    register(Constant)
    folder = run(f"{SHORT} --total-timesteps 640").folder
    assert all(np.isnan(e.value) for e in read_events(folder).Scalars("losses/explained_variance"))


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}], ids=str)
def test_a_scheduler_s_variables_do_not_make_a_group(variables, run, monkeypatch):
    for name, value in ({"RANK": "1", "LOCAL_RANK": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    assert run("--total-timesteps 512").episodes
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert ppo.Run(ppo.parse_args([])).device == torch.device("cuda", 0)


@pytest.mark.parametrize("value", ["2", "two", "0", "-1"])
def test_a_world_size_without_torchrun_is_one_line(value, fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    code, line = fails("")
    assert code == 2 and f"WORLD_SIZE={value}" in line and "torchrun" in line


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_sys_exit_in_a_step_is_an_error_of_the_environment(mode, register, fails):
    class Exiting(Plain):
        def step(self, action):
            sys.exit()

    register(Exiting)
    code, line = fails(f"{SHORT} --vectorization-mode {mode}", files_allowed=True)
    assert code == 1 and "Odd-v0" in line and "broke in global_step 4" in line


def test_running_statistics_in_the_environment_are_named_where_they_are_lost(register, run, capsys):
    register(lambda render_mode=None: gym.wrappers.NormalizeObservation(Plain(render_mode)))
    folder = run(SHORT).folder
    evaluate.main([str(folder), "--episodes", "1"])
    assert "note: this environment normalizes" in capsys.readouterr().out


def test_a_slow_reset_is_waited_for(register, run, monkeypatch):
    poll, timeouts = gym.vector.AsyncVectorEnv._poll_pipe_envs, set()
    monkeypatch.setattr(
        gym.vector.AsyncVectorEnv, "_poll_pipe_envs", lambda envs, t=None: timeouts.add(t) or poll(envs, t)
    )
    register(Plain)
    run(f"{SHORT} --vectorization-mode async")
    assert timeouts == {None}


# Environments of which not all can be made


class Once(Plain):
    """Can be made once."""

    left = 1

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        if not Once.left:
            raise RuntimeError("the licence is in use")
        Once.left -= 1


@pytest.fixture
def once(register, monkeypatch):
    monkeypatch.setattr(Once, "left", 1)
    register(Once)


def test_an_environment_that_can_be_started_only_once_trains_alone(once, run):
    assert len(run(f"{SHORT} --num-envs 1 --num-steps 64").episodes) == 21


class Choosy(Plain):
    """With what differs between the first instance and the others."""

    def __init__(self, how, render_mode=None):
        super().__init__(render_mode)
        self.how = how

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        if seed is not None and seed > 1:
            if self.how == "exit":
                sys.exit("no more seeds")
            if self.how == "spaces":
                return np.zeros(3, np.float32), info
            raise ValueError("the seed is too high")
        return obs, info


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("how", ["seeds", "spaces", "exit"])
def test_a_failing_first_reset_is_one_line_and_nothing_is_written(how, mode, register, fails):
    register(Choosy, kwargs={"how": how})
    code, line = fails(f"{SHORT} --vectorization-mode {mode} --track")
    assert code == 2 and "Odd-v0" in line


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_only_the_first_can_be_made_is_one_line_and_nothing_is_written(mode, once, workdir):
    code, out, err = forked(f"{SHORT} --vectorization-mode {mode} --capture-video --track")
    *warnings, line = err.splitlines()
    assert code == 2 and out == "" and line.startswith("error: ") and "the licence is in use" in line
    assert "Traceback" not in err and not any("error: " in x for x in warnings) and not any(workdir.iterdir())


def test_spaces_that_differ_are_one_line(register, fails):
    sizes = iter([2, 3, 2, 3])

    class Different(Plain):
        def __init__(self, render_mode=None):
            self.observation_space = gym.spaces.Box(-1, 1, (next(sizes),))

    register(Different)
    code, line = fails(SHORT)
    assert code == 2 and "Odd-v0" in line and "space" in line


def test_too_few_file_descriptors_are_one_line(register, workdir):
    register(Plain)
    flags = "--env-id Odd-v0 --vectorization-mode async --num-envs 128 --num-steps 16"
    code, out, err = forked(flags, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert code == 2 and out == "" and err.startswith("error: ") and "Too many open files" in err
    assert len(err.splitlines()) == 1 and not any(workdir.iterdir())


def test_an_environment_whose_first_reset_fails_is_closed(register, fails):
    closed = []

    class Failing(Plain):
        def reset(self, **kwargs):
            raise ConnectionRefusedError("no simulator answers")

        def close(self):
            closed.append(self)

    register(Failing)
    code, line = fails(SHORT)
    assert code == 2 and "no simulator answers" in line and len(closed) == 4


# Actions, frames, output


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_actions_are_of_the_space_s_own_type_in_both_programs(mode, register, run, capsys):
    class Strict(Plain):
        action_space = gym.spaces.Discrete(3, dtype=np.int32)

        def step(self, action):
            assert self.action_space.contains(action) and 0 <= action.item() < 3
            return super().step(action)

    register(Strict)
    folder = run(f"{SHORT} --vectorization-mode {mode}").folder
    evaluate.main([str(folder), "--episodes", "2"])
    assert "mean=3.0" in capsys.readouterr().out


def test_without_standard_streams_it_trains(workdir, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert ppo.main(["--total-timesteps", "512"]).actor
    monkeypatch.undo()


def test_with_closed_descriptors_it_trains(workdir):
    command = f"{sys.executable} {ROOT}/ppo.py --total-timesteps 512 >&- 2>&-"
    assert subprocess.run(command, shell=True).returncode == 0 and list(Path("runs").glob("*/checkpoint.pt"))


class Filmed(Plain):
    def __init__(self, shapes, render_mode=None):
        super().__init__(render_mode)
        self.shapes, self.frame = shapes, 0

    def render(self):
        self.frame += 1
        return np.full(self.shapes[self.frame % len(self.shapes)], 40 * (self.frame % 5), np.uint8)


@pytest.mark.parametrize("shapes", [[(32, 32)], [(32, 32, 3), (16, 16, 3)]], ids=["gray", "changing size"])
def test_frames_that_cannot_be_encoded_are_an_error_that_says_video(shapes, register, fails):
    register(Filmed, kwargs={"shapes": shapes})
    code, line = fails(f"{SHORT} --capture-video", files_allowed=True)
    assert code in (1, 2) and "Odd-v0" in line and "--capture-video" in line


def test_the_recorder_s_frames_are_not_in_the_checkpoint(register, run):
    register(Filmed, kwargs={"shapes": [(32, 32, 3)]})
    sizes = [
        len(ppo.load_checkpoint(str(run(SHORT + video).folder))[1]["processes"][0][1])
        for video in ("", " --capture-video")
    ]
    assert sizes[0] > 0 == sizes[1]


@pytest.mark.parametrize("step", [0, 7, 16])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_observation_that_is_not_finite_is_named_whenever_it_comes(value, step, register, fails):
    class Failing(Plain):
        def reset(self, **kwargs):
            super().reset(**kwargs)
            return np.full(2, value if step == 0 else 0, np.float32), {}

        def step(self, action):
            self.steps += 1
            return np.full(2, value if self.steps == step else 0, np.float32), 0.0, False, False, {}

    register(Failing)
    code, line = fails(SHORT, files_allowed=True)
    assert code == 1 and "an observation that is not finite" in line and "global_step 64" in line


def test_a_bug_of_ours_is_not_blamed_on_the_environment_whatever_the_folder_is_called(workdir):
    Path("gymnasium").mkdir()
    copy = shutil.copy(ROOT / "ppo.py", "gymnasium")
    spec = importlib.util.spec_from_file_location("copied_ppo", Path(copy).resolve())
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.compute_advantages = lambda *_: {}["a bug"]
    with pytest.raises(KeyError):
        module.main([])


def test_an_environment_that_has_changed_since_the_checkpoint_is_one_line(register, run, fails):
    class Larger(Plain):
        observation_space = gym.spaces.Discrete(3)

        def reset(self, **kwargs):
            super().reset(**kwargs)
            return 0, {}

    register(Plain)
    folder = run(SHORT).folder
    register(Larger)
    code, line = fails(f"--resume {folder}", files_allowed=True)
    assert code == 2 and "Odd-v0" in line


# Conveniences


def test_flags_may_be_spelled_as_sweep_tools_and_people_do():
    switches = "--anneal_lr=False --gae FALSE --norm_adv=false --no_cuda --clip_vloss=true --bootstrap-truncation True"
    values = "--learning_rate=0.001 --target-kl=None --wandb_entity None --total-timesteps 1e6 --num_steps 6.4e1"
    args = ppo.parse_args(f"{switches} {values} --exp_name=a_b --env_id my_module:My_Env-v0".split())
    assert not any((args.anneal_lr, args.gae, args.norm_adv, args.cuda, args.track))
    assert args.clip_vloss is args.bootstrap_truncation is True
    assert (args.learning_rate, args.target_kl, args.wandb_entity) == (0.001, None, None)
    assert (args.total_timesteps, args.num_steps, type(args.num_steps)) == (1_000_000, 64, int)
    assert (args.exp_name, args.env_id) == ("a_b", "my_module:My_Env-v0")


def test_a_run_without_one_finished_episode_says_so(register, run):
    class Endless(Plain):
        def step(self, action):
            return np.zeros(2, np.float32), 1.0, False, False, {}

    note = "note: not one episode ended"
    register(Plain)
    assert note not in run(SHORT).out
    register(Endless)
    assert note in run(SHORT).out


def test_a_worker_s_error_that_cannot_be_sent_ends_the_run(register, fails):
    class Jammed(Exception):
        def __init__(self, text):
            super().__init__(text)
            self.lock = threading.Lock()  # refuses to be pickled

    class Failing(Plain):
        def step(self, action):
            raise Jammed("the motor is jammed")

    register(Failing)
    code, line = fails(f"{SHORT} --vectorization-mode async", files_allowed=True)
    assert code == 1 and "the motor is jammed" in line
