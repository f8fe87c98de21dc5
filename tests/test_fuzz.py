"""Whatever is typed: the run starts, or one line says why it does not. Never a traceback, never a hang."""

import contextlib
import io

import pytest
from conftest import finish, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import ppo

INTEGERS = "total-timesteps seed num-threads num-envs num-steps num-minibatches update-epochs".split()
REALS = "checkpoint-interval gamma gae-lambda learning-rate clip-coef ent-coef vf-coef max-grad-norm target-kl".split()
BOOLEANS = "torch-deterministic cuda track capture-video gae bootstrap-truncation anneal-lr norm-adv clip-vloss".split()
TEXTS = "exp-name env-id gym-id resume wandb-project-name wandb-entity".split()
ODD = ["", " ", "-", "--", "0", "-0", "1", "-1", "nan", "-nan", "inf", "-inf", "1e400", "1e-400", "9" * 30, "0x10"]
ODD += ["1_0", "٣", "½", "1e6", "true", "None", "%s", "%(default)s", "{}", "\x00", "\n", "a\nb", "é", "日本", "🎈"]
ODD += ["../..", "=", "@x"]

words = st.sampled_from(ODD) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
flags = st.sampled_from([f"--{name}" for name in INTEGERS + REALS + TEXTS + ["unknown", "h", ""]])
good = st.sampled_from(["--gamma=0.9", "--num-envs=8", "--seed=7", "--no-gae", "--exp-name=x", "--num-steps=1000000"])
switches = st.sampled_from([f"--{no}{name}" for name in BOOLEANS for no in ("", "no-")])
arguments = st.one_of(
    good.map(lambda x: [x]),
    switches.map(lambda x: [x]),
    st.tuples(flags | switches, words).map(list),
    st.tuples(flags | switches, words).map(lambda pair: ["=".join(pair)]),
    words.map(lambda x: [x]),
)
command_lines = st.lists(arguments, max_size=6).map(lambda parts: [word for part in parts for word in part])
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def outcome(main, argv):
    """The exit code and standard error."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(argv)
        except SystemExit as end:
            code = end.code
    return code or 0, err.getvalue()


def check(code, err):
    assert code in (0, 2)
    assert len(err.splitlines()) == (code == 2) and err.startswith("error: " if code else ""), err


@settings(max_examples=1500, **SETTINGS)
@given(command_lines)
def test_any_command_line_starts_a_run_or_is_one_line(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "train", lambda *args: None)
        check(*outcome(ppo.main, argv))


@settings(max_examples=40, **SETTINGS)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "gamma": st.floats(0, 1),
            "gae-lambda": st.floats(0, 1),
            "clip-coef": st.floats(0, 1),
            "ent-coef": st.floats(0, 1),
            "vf-coef": st.floats(0, 1),
            "max-grad-norm": st.floats(0, 10),
            "target-kl": st.floats(0, 1),
            "learning-rate": st.floats(0, 0.01),
            "seed": st.integers(0, 2**32 - 1),
            "num-envs": st.integers(1, 4),
            "num-minibatches": st.integers(1, 4),
            "update-epochs": st.integers(1, 3),
            "checkpoint-interval": st.sampled_from([0, 1e-9, 1]),
            "exp-name": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            "bootstrap-truncation": st.booleans(),
            "norm-adv": st.booleans(),
            "gae": st.booleans(),
        },
    )
)
def test_any_good_values_train(workdir, values):
    argv = [f"--{name}={value}" for name, value in values.items()]
    check(*outcome(ppo.main, [*argv, "--num-steps", "12", "--total-timesteps", "96"]))


@settings(max_examples=300, **SETTINGS)
@given(st.lists(words | st.sampled_from(["--seed", "--episodes", "--deterministic", "--render"]), max_size=4))
def test_any_command_line_of_evaluate_without_a_checkpoint_is_one_line(workdir, argv):
    code, err = outcome(evaluate.main, argv)
    assert not any(workdir.iterdir()) and (code == 2 or "-h" in argv)
    check(code, err)


@settings(max_examples=60, **SETTINGS)
@given(words)
def test_any_environment_id_is_one_line(env_id):
    check(*outcome(ppo.main, [f"--env-id={env_id}", "--total-timesteps=512"]))


@pytest.mark.parametrize("value", ["1000000000000", "9" * 30])
def test_batches_that_no_memory_holds_are_one_line(value):
    code, err = outcome(ppo.main, ["--num-steps", value, "--total-timesteps", value + "000"])
    assert code in (1, 2) and len(err.splitlines()) == 1


def test_an_empty_name_of_a_run_is_not_taken_for_a_new_run(workdir):
    code, err = outcome(ppo.main, ["--resume", "", "--total-timesteps", "512"])
    assert code == 2 and len(err.splitlines()) == 1 and not list(workdir.iterdir())


def test_bytes_that_are_not_text_are_one_line_or_a_run(workdir):
    process = start(b"--total-timesteps 512 --exp-name \xff".decode(errors="surrogateescape"), errors="replace")
    _, err = finish(process)
    assert process.returncode in (0, 2) and "Traceback" not in err
