"""Whatever is typed, a run starts, or one line says why not. No traceback, no hang."""

import contextlib
import io

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import ppo

INTEGERS = (
    "total-timesteps seed num-threads num-envs num-steps num-minibatches update-epochs"
)
REALS = (
    "checkpoint-interval gamma gae-lambda learning-rate clip-coef ent-coef vf-coef "
    "max-grad-norm target-kl"
)
SWITCHES = (
    "torch-deterministic cuda track capture-video gae bootstrap-truncation anneal-lr "
    "norm-adv clip-vloss"
)
TEXTS = (
    "exp-name env-id gym-id resume wandb-project-name wandb-entity vectorization-mode"
)
GOOD = "--gamma=0.9 --num-envs=8 --seed=7 --no-gae --exp-name=x --num-steps=1000000"
ODD = [
    *["", " ", "-", "=", "@x", "../..", "\x00", "\n", "a\nb"],
    *["0", "-0", "1", "-1", "1e6", "1e400", "1e-400", "9" * 30, "0x10", "1_0"],
    *["nan", "-nan", "inf", "-inf", "true", "None", "%s", "%(default)s", "{}"],
    *["٣", "½", "é", "日本", "🎈"],
]

words = (
    st.sampled_from(ODD)
    | st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
)
names = [*INTEGERS.split(), *REALS.split(), *TEXTS.split(), "unknown", "h", ""]
names += SWITCHES.split()
names += [f"no-{name}" for name in SWITCHES.split()]
flags = st.sampled_from([f"--{name}" for name in names])
arguments = st.one_of(
    st.sampled_from(GOOD.split()).map(lambda flag: [flag]),
    flags.map(lambda flag: [flag]),
    st.tuples(flags, words).map(list),
    st.tuples(flags, words).map(lambda pair: ["=".join(pair)]),
    words.map(lambda word: [word]),
    # Before Python 3.13, argparse makes a list of what is written as --flag=--.
    st.just(["--"]),
)
command_lines = st.lists(arguments, max_size=6).map(
    lambda parts: [word for part in parts for word in part]
)

# The same examples come in each run. The folder of a test serves all of them.
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def outcome(function, argv):
    """Call a function that may exit; returns the exit code and standard error."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            function(argv)
        except SystemExit as exit:
            code = exit.code or 0
    return code, err.getvalue()


def assert_clear(code, err):
    """All went well in silence, or the input was wrong and one line says so."""
    assert code in (0, 2)
    if code == 0:
        assert err == ""
    else:
        assert len(err.splitlines()) == 1
        assert err.startswith("error: ")


@settings(max_examples=800, **SETTINGS)
@given(command_lines)
def test_any_command_line_is_understood_or_refused(workdir, argv):
    try:
        code, err = outcome(ppo.parse_args, argv)
    except ppo.RunEnded as ended:
        assert ended.exit_code == 2
        assert len(str(ended).splitlines()) == 1
    else:
        assert (code, err) == (0, "")
    assert not any(workdir.iterdir())


VISIBLE = st.characters(exclude_categories=["C", "Z"])
GOOD_VALUES = {
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
    "exp-name": st.text(VISIBLE, max_size=20),
    "bootstrap-truncation": st.booleans(),
    "norm-adv": st.booleans(),
    "gae": st.booleans(),
}


@settings(max_examples=25, **SETTINGS)
@given(st.fixed_dictionaries({}, optional=GOOD_VALUES))
def test_any_good_values_train(run, values):
    flags = [f"--{name}={value}" for name, value in values.items()]
    result = run(" ".join([*flags, "--num-steps=12 --total-timesteps=96"]))
    assert f"results: {result.folder}" in result.out


@settings(max_examples=200, **SETTINGS)
@given(
    st.lists(
        words
        | st.sampled_from(["--seed", "--episodes", "--deterministic", "--program"]),
        max_size=4,
    )
)
def test_any_command_line_of_evaluate_without_a_run_is_one_line(workdir, argv):
    code, err = outcome(evaluate.main, argv)
    assert_clear(code, err)
    assert code == 2 or "-h" in argv
    assert not any(workdir.iterdir())


@settings(max_examples=60, **SETTINGS)
@given(words)
def test_any_environment_id_is_one_line(workdir, env_id):
    code, err = outcome(ppo.main, [f"--env-id={env_id}", "--total-timesteps=512"])
    assert_clear(code, err)
    assert code == 2
    assert not any(workdir.iterdir())
