"""The benchmarks measure what they say, and what they saved makes the saved tables."""

import importlib.util
import math
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, scalars

import ppo
import ppo_continuous_action
import ppo_memory
import ppo_multi_discrete
import ppo_pixels
from benchmark import details, learning, measures, runs, scaling, study, throughput
from benchmark.details import DETAILS

# Measures


def test_last_100_takes_the_last_100_episodes():
    returns = np.array([1000.0] * 5 + [1.0] * 50 + [3.0] * 50)
    assert measures.last_100(np.arange(105), returns, 500) == 2
    assert measures.last_100(np.arange(5), returns[:5], 500) == 1000


def test_curve_gives_equal_parts_of_a_run_equal_weight():
    steps = np.array([1, 2, 3, 4, 100])
    returns = np.array([1.0, 3, 10, 20, 7])
    curve = measures.curve(steps, returns, total_steps=100)
    assert curve[[0, 1, 49]].tolist() == [2, 15, 7]
    assert np.isnan(curve[2:49]).all()
    assert measures.curve_mean(steps, returns, total_steps=100) == 8


def test_interval_is_that_of_the_mean():
    """The heads of 100 coins are binomial (100, 1/2), with quantiles 40 and 60."""
    coins = [0] * 50 + [1] * 50
    np.testing.assert_allclose(measures.interval(coins), [0.4, 0.6])
    two_columns = [[coin, 7] for coin in coins]
    np.testing.assert_allclose(measures.interval(two_columns), [[0.4, 7], [0.6, 7]])


# Details that are switched off


CHANGED = {
    "no_vectorization": {"num_envs": 1, "local_num_envs": 1, "num_steps": 512},
    "no_anneal_lr": {"anneal_lr": False},
    "no_gae": {"gae": False},
    "one_minibatch": {"num_minibatches": 1, "minibatch_size": 512},
    "no_norm_adv": {"norm_adv": False},
    "no_clip_vloss": {"clip_vloss": False},
    "no_entropy_bonus": {"ent_coef": 0.0},
    "no_gradient_clipping": {"max_grad_norm": 1e30},
    "target_kl": {"target_kl": 0.015},
    "bootstrap_truncation": {"bootstrap_truncation": True},
}
SHORT = "--total-timesteps=512 --update-epochs=1"


@pytest.fixture
def train(capsys, workdir):
    """train("no_gae") trains without that detail: .agent, .out and its .checkpoint."""

    def train(name, flags=SHORT):
        agent = details.main([name, *flags.split()])
        out = capsys.readouterr().out
        checkpoint = ppo.load_checkpoint(ppo.find_run("newest"))
        return SimpleNamespace(agent=agent, out=out, checkpoint=checkpoint)

    return train


@pytest.mark.parametrize("name", DETAILS)
def test_a_detail_changes_what_it_names_and_nothing_else(name, train):
    result = train(name)
    expected = vars(ppo.parse_args(SHORT.split()))
    assert result.checkpoint["args"] == expected | CHANGED.get(name, {})
    (group,) = result.checkpoint["optimizer"]["param_groups"]
    assert group["eps"] == (1e-8 if name == "adam_eps_1e-8" else 1e-5)
    is_torch_init = isinstance(result.agent, details.TorchInitAgent)
    assert is_torch_init == (name == "torch_init")


@pytest.mark.parametrize("name", ["default", "no_policy_clipping"])
def test_no_policy_clipping_changes_a_run_and_the_default_does_not(name, train, run):
    flags = "--total-timesteps=1024 --learning-rate=0.01 --update-epochs=2"
    expected = run(flags).agent.state_dict()
    trained = train(name, f"{flags} --exp-name=other").agent.state_dict()
    same = all(trained[key].equal(expected[key]) for key in expected)
    assert same == (name == "default")


ENVS = SimpleNamespace(
    single_observation_space=SimpleNamespace(shape=(4,)),
    single_action_space=SimpleNamespace(n=2),
)


def test_torch_init_is_pytorchs_default():
    torch.manual_seed(5)
    sizes = [(4, 64), (64, 64), (64, 1), (4, 64), (64, 64), (64, 2)]
    expected = []
    for size in sizes:
        expected += torch.nn.Linear(*size).parameters()

    torch.manual_seed(5)
    agent = details.TorchInitAgent(ENVS)
    for parameter, other in zip(agent.parameters(), expected, strict=True):
        assert parameter.equal(other)


def test_adam_steps_with_the_smaller_epsilon_as_long_as_it_is_asked_to():
    def step():
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.full((1,), 1e-6)
        torch.optim.Adam([parameter], lr=1.0, eps=1e-5, fused=True).step()
        return parameter.item()

    with details.adam_with_eps_1e_8():
        small_epsilon = step()
    assert small_epsilon == pytest.approx(-1e-6 / (1e-6 + 1e-8))
    assert step() == pytest.approx(-1e-6 / (1e-6 + 1e-5))


WITHOUT = details.update_without_policy_clipping
ONE_STEP = "--update-epochs 1 --num-minibatches 1"


def random_batch(agent, has_moved):
    """A batch of random data, whose values are far from those of the agent.

    If the agent has moved since, its probabilities are others, too.
    """
    obs = torch.randn(64, 4)
    actions, logprobs = agent.get_action(obs)
    logprobs = logprobs.detach()
    if has_moved:
        logprobs += torch.randn(64)
    return {
        "b_inds": np.arange(64),
        "b_obs": obs,
        "b_actions": actions,
        "b_logprobs": logprobs,
        "b_advantages": torch.randn(64),
        "b_returns": torch.randn(64),
        "b_values": torch.randn(64),
    }


def learn(update, flags, has_moved=True):
    """What an update logs, and the parameters after it, as one vector."""
    torch.manual_seed(3)
    np.random.seed(3)
    agent = ppo.Agent(ENVS)
    batch = random_batch(agent, has_moved)
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    stats = update(ppo.parse_args(flags.split()), agent, optimizer, **batch)
    return stats, torch.nn.utils.parameters_to_vector(agent.parameters())


@pytest.mark.parametrize("flags", ["", "--no-norm-adv", "--target-kl 0.01"])
def test_no_policy_clipping_is_clipping_to_a_range_that_nothing_leaves(flags):
    flags += " --no-clip-vloss"
    expected_stats, expected = learn(ppo.update, f"{flags} --clip-coef 1e9")
    stats, parameters = learn(WITHOUT, flags)
    torch.testing.assert_close(parameters, expected)
    assert stats.pop("clipfrac") > 0.5
    assert expected_stats.pop("clipfrac") == 0
    assert stats == pytest.approx(expected_stats, rel=1e-4)


def test_without_policy_clipping_values_are_still_clipped():
    """In the first step all ratios are 1, so there is no policy to clip."""
    expected_stats, expected = learn(ppo.update, ONE_STEP, has_moved=False)
    stats, parameters = learn(WITHOUT, ONE_STEP, has_moved=False)
    torch.testing.assert_close(parameters, expected)
    assert stats == pytest.approx(expected_stats, rel=1e-4)

    _, unclipped = learn(WITHOUT, f"{ONE_STEP} --no-clip-vloss", has_moved=False)
    assert not torch.allclose(parameters, unclipped)


@pytest.mark.parametrize(("flags", "counts"), [("", "16 16"), ("--target-kl 0", "4 4")])
def test_minibatches_of_each_update_are_counted(flags, counts, train):
    result = train("default", f"--total-timesteps=1024 {flags}")
    assert result.out.splitlines()[-1] == f"minibatches: {counts}"


# Runs


def test_a_run_leaves_its_episodes_its_curves_and_what_it_took(run):
    flags = "--total-timesteps=2048 --no-cuda"
    result = runs.run([ROOT / "ppo.py", *flags.split()])
    expected = run(flags)
    episodes = [(step, returned) for step, returned, _ in expected.episodes]
    assert result.episodes == episodes != []
    curve = scalars(expected.folder)["losses/approx_kl"]
    assert result.scalars["losses/approx_kl"].tolist() == [value for _, value in curve]
    assert result.error == ""
    assert result.steps_per_second > 2048 / result.wall_seconds
    assert 50 < result.peak_mib < 2000


def test_a_speed_that_a_program_prints_is_read():
    assert runs.run(["-c", "print('SPS=1234')"]).steps_per_second == 1234


def test_a_program_that_fails_ends_the_benchmark_with_its_error():
    with pytest.raises(RuntimeError, match="the motor is hot"):
        runs.run(["-c", "raise ValueError('the motor is hot')"])


def test_a_run_that_diverges_is_a_result():
    setting = "CartPole-v1", "rates"
    command = study.command(*setting, "no_norm_adv", rate=1e33, seed=1, divisor=150)
    flags = study.flags_of(*setting, rate=1e33)
    measured = study.measure_run(runs.run(command), "CartPole-v1", flags, steps=1000)
    assert "diverged" in measured["error"]
    assert measured["last_100"] == study.UNTRAINED["CartPole-v1"]
    assert measured["epochs"] == 4


@pytest.fixture
def runs_here(run, capsys, monkeypatch):
    """Lets a benchmark make its runs in this process, which has imported all.

    Other tests start processes. Returns a list that gets the command of each run.
    """
    commands = []

    def run_here(command):
        commands.append(command)
        if command[0] == "-m":
            assert command[1] == "benchmark.details"
            details.main(command[2:])
            output = capsys.readouterr().out
        else:
            assert command[0] == ROOT / "ppo.py"
            output = run(" ".join(command[1:])).out
        (folder,) = Path("runs").iterdir()
        found = {}
        for tag, curve in scalars(folder).items():
            found[tag] = np.array([value for _, value in curve])
        shutil.rmtree(folder)
        return runs.Run(output, "", found, wall_seconds=1.0, peak_mib=1.0)

    monkeypatch.setattr(runs, "run", run_here)
    return commands


def test_what_is_saved_does_not_run_again():
    commands = {name: ["-c", f"print('{name}')"] for name in "abc"}
    saved = {}

    def save(key, run):
        saved[key] = run.output

    assert runs.run_missing(commands, {"b"}, save) == ["a", "c"]
    assert saved == {"a": "a\n", "c": "c\n"}


def test_so_many_workers_run_at_the_same_time(workdir):
    """Each of two runs ends only when the other one has begun."""
    code = """
import sys, time
from pathlib import Path
ours, other = map(Path, sys.argv[1:])
ours.touch()
deadline = time.monotonic() + 60
while not other.exists():
    assert time.monotonic() < deadline
    time.sleep(0.01)
"""
    a, b = workdir / "a", workdir / "b"
    commands = {"a": ["-c", code, a, b], "b": ["-c", code, b, a]}
    saved = []
    runs.run_missing(commands, (), lambda key, run: saved.append(key), workers=2)
    assert sorted(saved) == ["a", "b"]


def test_an_error_ends_what_has_not_begun(workdir):
    commands = {"first": ["-c", "raise ValueError"]}
    for i in range(100):
        code = f"import time; time.sleep(0.2); open('{workdir / str(i)}', 'w')"
        commands[i] = ["-c", code]
    with pytest.raises(RuntimeError):
        runs.run_missing(commands, (), lambda key, run: None)
    assert len(list(workdir.iterdir())) < 50


def test_a_shortened_run_has_at_least_one_batch():
    assert runs.shorten(100_000, 100, "--num-envs 4") == 1000
    assert runs.shorten(100_000, 100, "--num-envs 256") == 256 * 128
    assert runs.shorten(100_000, 100, "", **ppo_continuous_action.DEFAULTS) == 2048


def test_shortened_runs_are_not_kept_among_the_results(tmp_path, capsys):
    parser = runs.make_parser("A benchmark.")
    with pytest.raises(SystemExit):
        runs.parse_args(parser, ["--steps-divisor", "100"])
    assert "--results must name another folder" in capsys.readouterr().err
    flags = ["--steps-divisor", "100", "--results", str(tmp_path)]
    assert runs.parse_args(parser, flags).results == tmp_path


def test_machines_have_their_first_and_last_day():
    machines = {}
    runs.note_machine(machines, ["torch"])
    (machine,) = machines
    assert f"torch {torch.__version__}" in machine
    machines[machine] = ["2026-01-01", "2026-01-02"]
    runs.note_machine(machines, ["torch"])
    first_day, last_day = machines[machine]
    assert first_day == "2026-01-01" < last_day


@pytest.mark.parametrize(
    ("benchmark", "tables"),
    [
        (learning, ["learning.md", "ablations.md"]),
        (study, ["study.md"]),
        (throughput, ["throughput.md"]),
        (scaling, ["scaling.md"]),
    ],
)
def test_what_is_saved_makes_the_saved_tables(benchmark, tables, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(runs.RESULTS, results)
    for name in tables:
        (results / name).unlink()
    benchmark.main(["--table-only", "--results", str(results)])
    for name in tables:
        assert (results / name).read_bytes() == (runs.RESULTS / name).read_bytes()


# Learning


def test_every_run_of_learning_is_started_as_its_study_says():
    keys = learning.keys(learning.STUDIES, seeds=3)
    assert len(keys) == len(set(keys)) == (6 + 28 + 1 + 4 + 3 + 3 + 2) * 3 + 2
    for study_name, env_id, variant, seed in keys:
        command = learning.command(study_name, env_id, variant, seed)
        if study_name == "ablations":
            assert command[:3] == ["-m", "benchmark.details", variant]
            flags = command[3:]
        elif variant in ("recurrent", "maskable"):
            assert command[:3] == ["-m", "benchmark.sb3_contrib_peers", variant]
            assert (ROOT / "benchmark/sb3_contrib_peers.py").exists()
            flags = command[3:]
        else:
            program, *flags = command
            assert program == ROOT / learning.PROGRAMS[variant].name
            assert program.exists()
            bootstraps = "--bootstrap-truncation" in flags
            assert bootstraps == (variant in ("bootstrap_truncation", "lunar_lander"))
        args = ppo.parse_args(flags, add_flags=ppo_multi_discrete.add_flags)
        assert args.env_id.split(":")[-1] == env_id
        assert args.seed == seed
        assert (args.masks is False) == (variant == "no_masks")
        assert args.total_timesteps == learning.STUDIES[study_name].steps
        assert not args.cuda


@pytest.mark.parametrize(
    "name, variant, own_flags",
    [("no_memory", ppo_memory, []), ("flat", ppo_pixels, ["frame_stack"])],
)
def test_ppo_has_the_settings_of_the_variant_beside_it(name, variant, own_flags):
    defaults = dict(variant.DEFAULTS)
    for flag in own_flags:
        del defaults[flag]
    expected = ppo.parse_args([], **defaults)
    args = ppo.parse_args(learning.PROGRAMS[name].flags.split())
    assert args.exp_name == "ppo"
    assert args.env_id == f"{variant.__name__}:{expected.env_id}"
    expected.exp_name = args.exp_name
    expected.env_id = args.env_id
    assert args == expected


def test_speeds_are_compared_seed_by_seed(tmp_path):
    env_id = "Sorting-v0"
    speeds = {
        f"masks {env_id} masks 1": 300,
        f"masks {env_id} masks 2": 100,
        f"masks {env_id} no_masks 1": 200,
    }
    runs.write_json(tmp_path / "learning_facts.json", {"steps_per_second": speeds})
    assert learning.speed_ratios(tmp_path, "masks", env_id, "masks") == []
    assert learning.speed_ratios(tmp_path, "masks", env_id, "no_masks") == [1.5]
    assert learning.describe_ratios([1.5]) == "1.50"
    assert learning.describe_ratios([1.5, 1, 2]) == "1.50 (1.00 to 2.00)"
    assert learning.describe_ratios([]) == ""


def test_learning_goes_on_where_it_stopped_and_tells_what_failed(
    tmp_path, monkeypatch, run, runs_here
):
    """In so few steps no episode of Acrobot ends."""
    tiny = learning.Study(
        steps=1024,
        seeds=1,
        env_ids=["CartPole-v1", "Acrobot-v1"],
        variants=["default", "bootstrap_truncation"],
    )
    monkeypatch.setitem(learning.STUDIES, "tiny", tiny)
    for env_id in tiny.env_ids:
        key = tmp_path, "tiny", env_id, "bootstrap_truncation"
        learning.save_run(*key, seed=1, episodes=[(9, 0.25)])
    failed = {"tiny CartPole-v1 default 1": "diverged, last time"}
    facts = {"machines": {}, "failed": failed}
    runs.write_json(tmp_path / "learning_facts.json", facts)

    keys = learning.run_all(tmp_path, ["tiny"], seeds=2, workers=1)
    assert runs_here == [learning.command(*key) for key in keys]
    assert keys == [
        ("tiny", "CartPole-v1", "default", 1),
        ("tiny", "Acrobot-v1", "default", 1),
    ]
    saved = learning.read_runs(tmp_path, "tiny", "CartPole-v1", "default")
    episodes = run("--total-timesteps 1024").episodes
    expected = [(step, episodic_return) for step, episodic_return, _ in episodes]
    assert np.transpose(saved[1]).tolist() == list(map(list, expected))
    facts = learning.read_facts(tmp_path)
    assert facts["failed"] == {"tiny Acrobot-v1 default 1": "no episode ended"}
    assert len(facts["machines"]["tiny"]) == 1


def test_returns_are_saved_to_two_decimals_and_come_back_in_any_order(tmp_path):
    episodes = {1: [(9, 0.25)], 2: [(7, -1234.567), (1_000_001, 2.0)]}
    files = []
    for seeds in ([1, 2], [2, 1]):
        key = tmp_path / str(seeds), "learning", "LunarLander-v3", "default"
        for seed in seeds:
            learning.save_run(*key, seed, episodes[seed])
        files.append(learning.path_of(*key).read_bytes())
    assert files[0] == files[1]
    saved = learning.read_runs(*key)
    assert np.transpose(saved[1]).tolist() == [[9, 0.25]]
    assert np.transpose(saved[2]).tolist() == [[7, -1234.57], [1_000_001, 2]]


def test_all_of_learning_is_saved():
    saved = set()
    wanted = learning.keys(learning.STUDIES, seeds=10)
    for key in {key[:-1] for key in wanted}:
        seeds = learning.read_runs(runs.RESULTS, *key)
        saved |= {(*key, seed) for seed in seeds}
    assert saved == set(wanted)


# The study


def row(mean_return=0.0, error="", **values):
    ones = dict.fromkeys(study.MEASURES, 1.0)
    return ones | {"mean_return": mean_return, "error": error} | values


def made_up(returns):
    """Rows of {variant: {rate: [return of seed 1, of seed 2, ...]}}."""
    rows = {}
    for variant, rates in returns.items():
        for rate, values in rates.items():
            for seed, value in enumerate(values, start=1):
                rows[variant, rate, seed] = row(value)
    return rows


def test_the_study_trains_as_it_says():
    command = study.command("CartPole-v1", "reuse", "target_kl", rate=30, seed=2)
    assert command[:3] == ["-m", "benchmark.details", "target_kl"]
    expected = {
        "num_envs": 16,
        "num_steps": 32,
        "vectorization_mode": "vector_entry_point",
        "update_epochs": 10,
        "learning_rate": 0.0075,
        "total_timesteps": 150_000,
        "seed": 2,
        "cuda": False,
        "checkpoint_interval": 0,
    }
    assert ppo.parse_args(command[3:]) == ppo.parse_args([], **expected)


def test_the_study_measures_what_a_run_has_left():
    output = "".join(
        f"global_step={step}, episodic_return={episodic_return}, episodic_length=9\n"
        for step, episodic_return in [(10, 30.0), (20, 50.0), (100, 100.0)]
    )
    run = runs.Run(
        output=f"{output}minibatches: 32 16\n",
        error="",
        scalars={
            "losses/approx_kl": np.array([1.0, 2.0, 6.0]),
            "losses/clipfrac": np.array([0.1, 0.3]),
            "losses/explained_variance": np.array([0.1, np.nan, 0.2, 0.6, -np.inf]),
        },
        wall_seconds=1.0,
        peak_mib=1.0,
    )
    flags = "--num-minibatches 8"
    measured = study.measure_run(run, "CartPole-v1", flags, steps=100)
    assert measured == pytest.approx(
        {
            "mean_return": (5 * 30 + 5 * 50 + 40 * 100) / 50,
            "last_100": 60,
            "kl_mean": 3,
            "kl_median": 2,
            "kl_max": 6,
            "clipfrac": 0.2,
            "explained_variance": 0.3,
            "explained_variance_median": 0.2,
            "epochs": 3,
            "ended_early": 0.5,
            "error": "",
        }
    )


def test_what_a_diverged_run_did_not_reach_counts_as_untrained():
    episodes = [(10, 30.0), (20, 50.0), (40, 100.0)]
    reached = 5 * 30 + 5 * 50 + 10 * 100
    measure = study.measure_returns
    returns = measure("CartPole-v1", episodes, "", steps=100)
    assert returns == {"mean_return": reached / 20, "last_100": 60}
    returns = measure("CartPole-v1", episodes, "diverged", steps=100)
    assert returns == {"mean_return": (reached + 30 * 20) / 50, "last_100": 20}
    returns = measure("CartPole-v1", [], "diverged", steps=100)
    assert returns == {"mean_return": 20, "last_100": 20}


def test_where_no_episode_ended_those_that_ended_next_count():
    episodes = [(10, -50.0), (60, -20.0), (60, -10.0)]  # and none at the end
    returns = study.measure_returns("Acrobot-v1", episodes, "", steps=100)
    assert returns["mean_return"] == (5 * -50 + 25 * -15) / 30


def test_rows_of_the_study_are_saved_and_come_back_in_any_order(tmp_path):
    rows = {
        ("target_kl", 1, 2): row(12.25, kl_max=math.inf),
        ("default", 30, 1): row(-7.5, error="error: a, b"),
    }
    files = []
    for keys in (list(rows), list(rows)[::-1]):
        results = tmp_path / keys[0][0]
        for key in keys:
            study.save_row(results, "Acrobot-v1", "rates", key, rows[key])
        assert study.read_rows(results, "Acrobot-v1", "rates") == rows
        files.append(study.path_of(results, "Acrobot-v1", "rates").read_bytes())
    assert files[0] == files[1]


def test_effects_are_paired_by_seed():
    default = {1: [10, 20, 30]}
    rows = made_up({"default": default, "no_gae": {1: [11, 23]}})
    assert study.effect(rows, "no_gae", 1) == [1, 3]
    rows = made_up({"default": default, "no_gae": {1: [11, 23, 34, 99]}})
    assert study.effect(rows, "no_gae", 1) == [1, 3, 4]
    assert study.effect(rows, "no_gae", 3) == []
    assert study.describe([1, 3]) == "**+2 (+1 to +3)**"
    assert study.describe([-1, 3]) == "+1 (-1 to +3)"
    assert not study.excludes_zero([1])
    assert not study.excludes_zero([0, 0])


def test_the_best_rate_is_chosen_on_the_other_half_of_the_seeds():
    default = {1: [1, 9], 3: [4, 2]}  # seed 1 chooses rate 3, and seed 2 rate 1
    ours = {1: [0, 0], 3: [7, 6]}
    rows = made_up({"default": default, "no_gae": ours})
    values, chosen = study.at_best_rate(rows, "default")
    assert values == {1: 1, 2: 2}
    assert chosen == {1: 1, 3: 1}
    assert study.effect_at_best(rows, "no_gae") == [6, 4]

    # Of four seeds, rate 1 is the best one for the halves with seed 4.
    rows = made_up({"default": {1: [0, 0, 0, 12], 3: [3, 3, 3, 3]}})
    values, chosen = study.at_best_rate(rows, "default")
    assert values == {1: 1, 2: 1, 3: 1, 4: 3}
    assert chosen == {1: 3, 3: 3}


def test_shares_are_of_the_defaults_best_above_an_untrained_agent():
    default = {1: [50, 90], 3: [110, 130]}
    ours = {1: [20, 20], 3: [110, 110]}
    rows = made_up({"default": default, "no_gae": ours})
    assert study.shares(rows, "default", 20) == {1: 0.5, 3: 1}
    assert study.shares(rows, "no_gae", 20) == {1: 0, 3: 0.9}
    table = study.summary_table(rows, ["default", "no_gae"], 20)
    assert "| 0% | **90%** |" in table


def test_a_run_has_failed_if_it_ends_like_an_untrained_agent():
    assert study.failed(row(last_100=-450), untrained=-500)
    assert not study.failed(row(last_100=-449), untrained=-500)
    assert study.failed(row(last_100=22), untrained=20)
    assert not study.failed(row(last_100=23), untrained=20)
    assert study.failed(row(last_100=500, error="error: diverged"), untrained=20)


def test_the_study_goes_on_where_it_stopped_and_makes_tables(
    tmp_path, monkeypatch, runs_here
):
    setting = study.Setting(1024, study.BATCHED, [30], ["default", "target_kl"])
    env_id = "CartPole-v1"
    monkeypatch.setattr(study, "SETTINGS", {(env_id, "rates"): setting})
    study.save_row(tmp_path, env_id, "rates", ("default", 30, 1), row(25.0))
    keys = study.run_all(tmp_path, [env_id], seeds=1, workers=1)
    assert keys == [(env_id, "rates", "target_kl", 30, 1)]
    assert runs_here == [study.command(*key) for key in keys]
    rows = study.read_rows(tmp_path, env_id, "rates")
    assert rows["default", 30, 1] == row(25.0)
    assert 9 < rows["target_kl", 30, 1]["mean_return"] < 500
    assert rows["target_kl", 30, 1]["error"] == ""

    study.write_tables(tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "1 seeds, 1,024 steps, `--num-envs 16" in text
    assert "| bonus: target KL 0.015 | 0 of 1 |" in text


def test_all_of_the_study_is_saved():
    saved = set()
    for env_id, setting in study.SETTINGS:
        for key in study.read_rows(runs.RESULTS, env_id, setting):
            saved.add((env_id, setting, *key))
    env_ids = {env_id for env_id, _ in study.SETTINGS}
    assert saved == set(study.keys(env_ids, seeds=10))


# Speed


@pytest.mark.parametrize("program", ["ppo", "sb3", "plain"])
def test_all_programs_are_compared_at_the_same_training(program):
    command = list(map(str, throughput.command(100_000, 16, program)))
    assert command[-2:] == ["--total-timesteps=100000", "--num-envs=16"]
    if command[0] == "-m":
        assert importlib.util.find_spec(command[1])
    else:
        assert command[0] == str(ROOT / "ppo.py")


def test_cases_of_scaling_are_what_their_names_say():
    for name, case in scaling.CASES.items():
        command = list(map(str, scaling.command(case, seed=7)))
        program = command.index(str(ROOT / "ppo.py"))
        args = ppo.parse_args(command[program + 1 :])
        mode, size = re.search(r"(\w+) (\d+)", name).groups()
        assert (args.vectorization_mode, args.num_envs) == (mode, int(size))
        assert args.num_threads == (2 if "2 threads" in name else 1)
        assert args.total_timesteps == case.steps
        assert args.seed == 7
        assert args.env_id.startswith("benchmark.slow_cartpole") == ("slow" in name)
        launcher = "torch.distributed.run --standalone --nproc-per-node 2"
        processes = f"-m {launcher}" if "2 processes" in name else ""
        assert " ".join(command[:program]) == processes


def test_the_slow_environment_sleeps_for_5_ms_in_each_step(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    env = gym.make("benchmark.slow_cartpole:SlowCartPole-v0")
    env.reset(seed=1)
    for _ in range(3):
        env.step(0)
    assert slept == [0.005] * 3
