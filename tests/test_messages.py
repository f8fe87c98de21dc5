"""What a run says where something does not suit it, and what it takes without a word.

Each message names what is wrong and what to do, and what it tells to do works.
"""

import importlib
import shutil
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, scalars
from environments import Counting, ThreeSteps, Toy, register

import evaluate
import ppo
import ppo_continuous_action

SHORT = "--num-steps 16 --total-timesteps 64"  # one update
ODD = f"--env-id Odd-v0 {SHORT}"


def lengths(result):
    """How long the episodes of a run were."""
    return {length for _, _, length in result.episodes}


def last_line(result):
    return result.err.splitlines()[-1]


# Ids


@pytest.fixture
def module(workdir, monkeypatch):
    """module(text) writes its_module.py, which can be imported in this test."""
    monkeypatch.syspath_prepend(workdir)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    registered = dict(gym.registry)
    yield Path("its_module.py").write_text
    sys.modules.pop("its_module", None)
    gym.registry.clear()
    gym.registry.update(registered)


def test_a_module_that_registers_nothing_is_told_so(module, fails):
    module("# nothing here")
    code, line = fails("--env-id its_module:Its-v0")
    assert code == 2
    assert line.startswith("error: --env-id its_module:Its-v0: its_module was imported")
    assert "registered no ids" in line
    assert "no class or function Its-v0" in line
    assert "Name" in line


REGISTERING = """
import gymnasium
gymnasium.register("Its-v1", "its_module:Env")
gymnasium.register("Made-v1", lambda: None)
gymnasium.register("Batch-v1", vector_entry_point="its_module:Batch")
"""


def test_the_ids_that_a_module_has_registered_are_named(module, fails):
    module(REGISTERING)
    _, line = fails("--env-id its_module:Mine-v1")
    assert "It has registered Batch-v1, Its-v1, Made-v1, and" in line


def test_ids_of_other_packages_are_not_taken_for_those_of_the_module(module, fails):
    Path("toy.py").write_text("")  # Gymnasium has a package toy_text
    try:
        _, line = fails("--env-id toy:Its-v0")
    finally:
        del sys.modules["toy"]
    assert "registered no ids" in line


def test_a_long_list_of_ids_is_cut_short(module, fails):
    module(
        "import gymnasium\n"
        "for i in range(1000, 1500):\n"
        "    gymnasium.register(f'Its{i}-v0', 'its_module:Env')\n"
    )
    _, line = fails("--env-id its_module:Mine-v1")
    assert "Its1000-v0, Its1001-v0" in line
    assert "and 490 more" in line
    assert "Its1011" not in line


FACTORIES = """
import gymnasium
from environments import Corridor

class Short(Corridor):
    def __init__(self, end=3, render_mode=None):
        super().__init__(end=end, render_mode=render_mode)

def make(end=3, render_mode=None):
    env = Corridor(end=end, render_mode=render_mode)
    return gymnasium.wrappers.TransformReward(env, lambda reward: 2 * reward)

def make_published(render_mode=None):
    env = gymnasium.make("CartPole-v1", max_episode_steps=5, render_mode=render_mode)
    return gymnasium.wrappers.TransformAction(env, int, env.action_space)
"""


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", ["Short", "make", "make_published"])
def test_a_class_or_a_function_needs_no_registration(name, mode, module, run):
    module(FACTORIES)
    env_id = f"its_module:{name}"
    result = run(f"--env-id {env_id} {SHORT} --vectorization-mode {mode}")
    assert lengths(result) == {5 if name == "make_published" else 3}
    assert result.folder.name.startswith(f"its_module-{name}__")

    returns = evaluate.main(f"{result.folder} --episodes 2 --env-id {env_id}".split())
    assert returns == {"Short": [3, 3], "make": [6, 6], "make_published": [5, 5]}[name]


def test_a_class_or_a_function_is_filmed_and_resumed(module, run, workdir):
    module(FACTORIES)
    result = run(f"--env-id its_module:make_published {SHORT} --capture-video")
    assert list(workdir.glob("videos/its_module-make_published__*/*.mp4"))
    resumed = run(f"--resume {result.folder} --total-timesteps 128")
    assert lengths(resumed) == {5}


def test_a_checkpoint_may_not_choose_a_function_to_be_called(module, run, fails):
    """It may be a stranger's, and name subprocess:run with arguments of its own."""
    module(FACTORIES + "\ncalled = []\ndef evil(**kwargs): called.append(kwargs)\n")
    folder = run(f"--env-id its_module:make {SHORT}").folder
    saved = ppo.load_checkpoint(folder)
    saved["args"] |= {"env_id": "its_module:evil", "env_kwargs": {"text": "x"}}
    torch.save(saved, folder / "checkpoint.pt")

    code, line = fails(str(folder), main=evaluate.main)
    assert code == 2
    assert "--env-id its_module:evil" in line
    assert sys.modules["its_module"].called == []


def test_a_checkpoint_may_choose_a_class_of_environments(module, run):
    module(FACTORIES)
    folder = run(f"--env-id its_module:Short {SHORT}").folder
    assert evaluate.main([str(folder), "--episodes", "2"]) == [3, 3]


# Arguments of the environment


def test_arguments_are_given_in_training_in_evaluation_and_after_resume(run, fails):
    flags = f'--env-id environments:Corridor {SHORT} --env-kwargs {{"end":3}}'
    result = run(flags)
    assert lengths(result) == {3}
    assert evaluate.main([str(result.folder), "--episodes", "2"]) == [3, 3]
    resumed = run(f"--resume {result.folder} --total-timesteps 128")
    assert lengths(resumed) == {3}

    _, line = fails(f'--resume {result.folder} --env-kwargs {{"end":5}}')
    assert "these were different: {'env_kwargs': {'end': 3}}" in line


@pytest.mark.parametrize("text", ["{end:3}", "3", "[3]", "end=3", ""])
def test_arguments_that_are_no_json_are_named(text, fails):
    code, line = fails(f"--env-kwargs={text}")
    assert code == 2
    assert line.startswith("error: argument --env-kwargs: expected JSON such as {")
    assert line.endswith(f"got {text}".strip())


def test_an_environment_that_needs_arguments_says_which_and_how(exits):
    def make(size, render_mode=None):
        return ThreeSteps(render_mode)

    register(make)
    result = exits(ODD)
    assert "missing 1 required positional argument: 'size'" in result.err
    assert "Odd-v0 got the arguments {}" in last_line(result)
    assert "--env-kwargs" in last_line(result)


def test_arguments_are_passed_to_a_batch(run):
    flags = "--env-id environments:CountingSameStep-v0 --vectorization-mode"
    flags += f" vector_entry_point {SHORT}"
    flags += ' --env-kwargs {"autoreset_mode":"NextStep"}'
    with pytest.raises(ppo.RunEnded, match="metadata has autoreset_mode NextStep"):
        run(flags)


# Videos


@pytest.mark.parametrize("modes", [[], ["human", "ansi"]])
@pytest.mark.parametrize("program", ["ppo.py", "evaluate.py"])
def test_a_video_of_what_cannot_be_filmed_names_its_modes(
    program, modes, run, fails, workdir
):
    class Unseen(ThreeSteps):
        metadata = {"render_modes": modes}  # noqa: RUF012

        def __init__(self, render_mode=None):
            super().__init__(None)
            self.metadata = {"render_modes": modes}

    register(Unseen)
    if program == "ppo.py":
        code, line = fails(f"{ODD} --capture-video")
    else:
        folder = run(ODD).folder
        code, line = fails(f"{folder} --capture-video", main=evaluate.main)
    assert code == 2
    assert f"rgb_array, and Odd-v0 has {modes or 'none'}" in line
    assert not list(workdir.glob("videos/**"))


@pytest.mark.parametrize("has_mujoco", [True, False])
def test_who_films_mujoco_is_told_how_without_a_screen(has_mujoco, exits, monkeypatch):
    class Dark(ThreeSteps):
        def render(self):
            raise RuntimeError("no display")

    register(Dark)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    if has_mujoco:
        monkeypatch.setitem(sys.modules, "mujoco", types.ModuleType("mujoco"))
    result = exits(f"{ODD} --capture-video")
    assert "RuntimeError: no display" in result.err
    assert ("MUJOCO_GL=egl" in last_line(result)) == has_mujoco
    assert "MUJOCO_GL" not in last_line(exits("--env-id environments:Raises0-v0"))


# Steps that break


class Broken(ThreeSteps):
    def step(self, action):
        raise NotImplementedError("100% of %s and %d")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_error_of_a_step_keeps_its_traceback_and_its_signs(mode, exits):
    register(Broken)
    result = exits(f"{ODD} --vectorization-mode {mode}")
    assert result.code == 1
    assert 'raise NotImplementedError("100% of %s and %d")' in result.err
    assert "NotImplementedError: 100% of %s and %d\n" in result.err
    assert "error: " not in result.err.splitlines()  # it is no wrong input
    assert last_line(result).startswith("The run broke in step 4.")


class WantsInt(ThreeSteps):
    def step(self, action):
        assert type(action) is int, "no int"
        return super().step(action)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_who_wants_python_s_int_is_told_how_and_that_works(mode, exits, run):
    register(WantsInt)
    flags = f"{ODD} --vectorization-mode {mode}"
    result = exits(flags)
    hint = "gym.wrappers.TransformAction(env, int, env.action_space)"
    assert "numpy.int64" in last_line(result)
    assert hint in last_line(result)

    def make(render_mode=None):
        env = WantsInt(render_mode)
        return eval(hint, {"gym": gym, "env": env})

    register(make)
    assert lengths(run(flags)) == {3}


def test_no_int_is_proposed_where_actions_are_none(exits):
    class Robot(Broken):
        action_space = gym.spaces.Box(-1, 1, (2,))

    register(Robot)
    result = exits(ODD, main=main_of(ppo_continuous_action), num_envs=1)
    assert "NotImplementedError" in result.err
    assert "int" not in last_line(result).replace("point", "")


def main_of(program):
    def main(argv, **defaults):
        ppo.main(argv, make_envs=program.make_envs, Agent=program.Agent, **defaults)

    return main


def test_the_hint_is_only_for_the_first_step(exits):
    class Late(ThreeSteps):
        def step(self, action):
            assert self.position < 2
            return super().step(action)

    register(Late)
    assert last_line(exits(ODD)) == "The run broke in step 12."


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_reward_of_several_numbers_gets_one_line(mode, fails):
    register(lambda render_mode=None: Toy(reward=np.array([1.0, 2.0])))
    code, line = fails(f"{ODD} --vectorization-mode {mode}", leaves_files=True)
    assert code == 2
    assert "Odd-v0: its reward is [1. 2.]. PPO needs one number" in line


def test_a_reward_of_several_numbers_in_a_batch_gets_one_line(fails):
    class Several(Counting):
        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            return obs, np.stack([rewards, rewards], axis=1), *rest

    register(None, vector_entry_point=Several)
    flags = f"{ODD} --vectorization-mode vector_entry_point"
    code, line = fails(flags, leaves_files=True)
    assert code == 2
    assert "Odd-v0: its rewards have the shape (4, 2)" in line


# One instance in a process


class Single(ThreeSteps):
    alive = 0

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        assert not Single.alive, "the licence is in use"
        Single.alive += 1

    def close(self):
        Single.alive = 0


def test_one_instance_in_a_process_is_told_of_async_and_that_works(exits, run):
    register(Single)
    result = exits(ODD)
    assert "AssertionError: the licence is in use" in result.err
    assert "--vectorization-mode async" in last_line(result)

    Single.alive = 0
    assert lengths(run(f"{ODD} --vectorization-mode async")) == {3}


def test_no_async_is_proposed_to_who_has_it(exits):
    class Once(Single):
        def close(self):
            pass  # so the workers cannot make another one

    Single.alive = 0
    register(Once)
    result = exits(f"{ODD} --vectorization-mode async")
    assert result.code == 1
    assert "async" not in last_line(result)


# Actions

BOXES = {
    "integers": gym.spaces.Box(0, 5, (2,), np.int64),
    "two dimensions": gym.spaces.Box(-1, 1, (2, 2)),
}


@pytest.mark.parametrize("kind", BOXES)
def test_programs_do_not_send_to_each_other(kind, fails):
    register(lambda render_mode=None: Toy(action_space=BOXES[kind]))
    _, line = fails(ODD)
    assert "its actions are Box" in line
    assert "gym.wrappers.TransformAction" in line
    assert "ppo_continuous_action.py" not in line

    _, line = fails(ODD, main=main_of(ppo_continuous_action))
    assert "its actions are Box" in line
    assert "gym.wrappers.TransformAction" in line


# Batches


def lists(array):
    return array.tolist()


def turned_around(array):
    return np.flip(np.flip(array).copy())


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def integers(array):
    return array.astype(np.uint8)


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize(
    "convert", [torch.as_tensor, lists, turned_around, read_only, integers]
)
def test_batches_may_return_arrays_of_any_kind(convert, same_step, run):
    class Plain(Counting):
        def __init__(self, num_envs):
            modes = gym.vector.AutoresetMode
            super().__init__(
                num_envs, modes.SAME_STEP if same_step else modes.NEXT_STEP
            )

    class Converting(Plain):
        def reset(self, **options):
            obs, infos = super().reset(**options)
            return convert(obs), infos

        def step(self, actions):
            *arrays, infos = super().step(actions)
            return *[convert(array) for array in arrays], infos

    runs = []
    for batch in (Plain, Converting):
        register(None, vector_entry_point=batch)
        flags = f"{ODD} --vectorization-mode vector_entry_point"
        runs.append(run(f"{flags} --bootstrap-truncation"))
    plain, converted = runs
    assert plain.episodes == converted.episodes != []
    assert scalars(plain.folder) == scalars(converted.folder)


# What environments do to torch


@pytest.fixture
def settings_of_torch():
    """Give them back, whatever a test has done to them."""
    yield
    ppo.reset_torch()


@pytest.mark.parametrize(
    "where, batch",
    [
        ("constructor", False),
        ("constructor", True),
        ("reset", False),
        ("reset", True),
        ("later reset", False),
    ],
)
def test_an_environment_may_change_the_settings_of_torch(
    where, batch, run, settings_of_torch
):
    def change(place):
        if place == where:
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)

    def changing(Env):
        class Changing(Env):
            resets = 0

            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                change("constructor")

            def reset(self, **options):
                self.resets += 1
                change("reset" if self.resets == 1 else "later reset")
                return super().reset(**options)

        return Changing

    flags = f"{ODD} --bootstrap-truncation"
    if batch:
        flags += " --vectorization-mode vector_entry_point"
    agents = []
    for wrap in (lambda Env: Env, changing):
        if batch:
            register(None, vector_entry_point=wrap(Counting))
        else:
            register(wrap(ThreeSteps), max_episode_steps=2)
        result = run(flags)
        agents.append(result.agent.state_dict())
        if not batch:  # evaluate.py plays in single environments
            evaluate.main([str(result.folder), "--episodes", "2"])
    for name, parameter in agents[0].items():
        assert parameter.dtype == agents[1][name].dtype == torch.float32
        assert parameter.equal(agents[1][name])


# Copies of the program, and notebooks


def test_a_renamed_copy_of_the_program_is_a_program_of_its_own(
    workdir, fails, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    shutil.copy(ROOT / "ppo.py", "my_ppo.py")
    monkeypatch.syspath_prepend(workdir)
    my_ppo = importlib.import_module("my_ppo")
    monkeypatch.setitem(sys.modules, "my_ppo", my_ppo)  # forgets it afterwards
    my_ppo.train(my_ppo.parse_args(SHORT.split()))
    (folder,) = Path("runs").glob("CartPole-v1__my_ppo__1__*")

    _, line = fails(str(folder), main=evaluate.main)
    assert "trained by my_ppo.py: name that file with --program" in line
    flags = [str(folder), "--program", "my_ppo.py", "--episodes", "2"]
    assert len(evaluate.main(flags)) == 2
    _, line = fails(f"--resume {folder}")
    assert "made by my_ppo.py, not by ppo.py" in line
    capsys.readouterr()
    my_ppo.train(my_ppo.parse_args(["--resume", "--total-timesteps", "128"]))
    assert "the program has changed" not in capsys.readouterr().out
    assert ppo.load_checkpoint(folder)["global_step"] == 128

    # Its class RunEnded is another one, and still no bug.
    flags = f"{folder} --program my_ppo.py --env-id Pendulum-v1"
    code, line = fails(flags, main=evaluate.main)
    assert code == 2
    assert "its actions are Box" in line


@pytest.fixture
def notebook(monkeypatch):
    """A notebook: its cells are executed in a module without a file."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    return lambda cell: exec(cell, vars(module))


def test_the_program_is_pasted_into_a_cell_of_a_notebook(notebook, capsys):
    notebook((ROOT / "ppo.py").read_text())  # it does not start with Jupyter's flags
    notebook(f"agent = train(parse_args({SHORT.split()}))")
    notebook("assert isinstance(agent, Agent)")
    (folder,) = Path("runs").glob("CartPole-v1__ppo__1__*")
    notebook("main(['--resume', '--total-timesteps', '128'])")
    assert "begin new episodes" not in capsys.readouterr().out
    assert ppo.load_checkpoint(folder)["global_step"] == 128
    assert len(evaluate.main([str(folder), "--episodes", "2"])) == 2


# Changed programs


def test_an_update_may_return_another_number_of_any_kind(run, monkeypatch):
    original = ppo.update

    def update(*args, **options):
        stats = original(*args, **options)
        stats["whole"] = 3
        stats["numpy"] = np.float64(0.5)
        return stats

    monkeypatch.setattr(ppo, "update", update)
    result = run(SHORT)
    assert scalars(result.folder)["losses/whole"] == [(64, 3.0)]
    assert scalars(result.folder)["losses/numpy"] == [(64, 0.5)]


# The folder of the run


def dangling():
    Path("runs").symlink_to("gone")


def file():
    Path("runs").write_text("")


def link_to_file():
    Path("file").write_text("")
    Path("runs").symlink_to("file")


@pytest.mark.parametrize("make_runs", [dangling, file, link_to_file])
def test_a_folder_of_runs_that_is_none_is_named(make_runs, fails):
    make_runs()
    code, line = fails(SHORT)
    assert code == 2
    assert str(Path("runs").absolute()) in line


def test_a_folder_of_runs_that_is_not_ours_is_named(fails, monkeypatch):
    """Root may write everywhere, so the error is made here."""

    def mkdir(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.mkdir", mkdir)
    code, line = fails(SHORT)
    assert code == 2
    assert "Permission denied" in line
    assert str(Path("runs").absolute()) in line


# What a resumed run may change


@pytest.mark.parametrize(
    "flags",
    [
        "--checkpoint-interval 5",
        "--no-cuda",
        "--num-threads 2",
        "--wandb-project-name other",
        "--wandb-entity me",
    ],
)
def test_a_resumed_run_may_change_what_is_no_part_of_learning(flags, run):
    folder = run(SHORT).folder
    out = run(f"--resume {folder} --total-timesteps 128 {flags}").out
    rounds = "numbers may round differently" in out
    assert rounds == ("cuda" in flags or "threads" in flags)
    name, _, value = flags.removeprefix("--").partition(" ")
    saved = ppo.load_checkpoint(folder)["args"]
    if name == "no-cuda":
        assert saved["cuda"] is False
    else:
        assert str(saved[name.replace("-", "_")]).removesuffix(".0") == value


def test_a_resumed_run_may_begin_and_end_to_film(run, workdir):
    folder = run(SHORT).folder
    out = run(f"--resume {folder} --total-timesteps 256 --capture-video").out
    assert "begin new episodes, as those of the checkpoint cannot be recorded" in out
    assert len(list(workdir.glob(f"videos/{folder.name}/from-step-64__*/*.mp4"))) >= 1

    out = run(f"--resume {folder} --total-timesteps 320 --no-capture-video").out
    assert "note: the environments begin new episodes" in out
    assert not list(workdir.glob(f"videos/{folder.name}/from-step-256__*"))


def test_what_a_resumed_run_may_change_is_said_where_it_may_not(run, fails):
    folder = run(SHORT).folder
    code, line = fails(f"--resume {folder} --seed 2 --no-gae --no-cuda")
    assert code == 2
    assert "total_timesteps may grow" in line
    for name in ppo.MAY_CHANGE:
        assert name in line
    assert line.endswith("these were different: {'gae': True, 'seed': 1}")


# From Python


def test_train_raises_what_it_has_to_say(workdir):
    register(Broken)
    with pytest.raises(NotImplementedError, match="100% of %s"):
        ppo.train(ppo.parse_args(ODD.split()))
    with pytest.raises(ppo.RunEnded, match="CartPol") as ended:
        ppo.train(ppo.parse_args(["--env-id", "CartPol-v1"]))
    assert ended.value.exit_code == 2
    with pytest.raises(ppo.RunEnded, match="learning-rate"):
        ppo.parse_args(["--learning-rate", "fast"])
    # It goes on as if nothing had happened.
    assert isinstance(ppo.train(ppo.parse_args(SHORT.split())), ppo.Agent)
