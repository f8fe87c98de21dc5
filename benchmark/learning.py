"""Do ppo.py and its variants learn, and what does each detail add? Many seeds, details switched off in turn.

    pip install '.[benchmark,box2d,mujoco,atari]'
    python -m benchmark.learning        # about four hours on two cores; a second call goes on where one stopped
    python -m benchmark.plots           # then draws what was saved

Studies. "learning": 500,000 steps on three environments, beside published figures of other implementations. "example":
LunarLander with settings of its own. "ablations": 100,000 steps on two environments, each time with one detail off (or
a bonus on) and all else as by default. "continuous" and "atari": the variants. Runs go to parallel processes, one torch
thread each. Every episode is saved: results/<study>/<environment>__<variant>.csv.gz has those of all seeds. The tables
are results/learning.md and ablations.md; --table-only makes them of the saved episodes.
"""

import argparse
import contextlib
import gc
import gzip
import io
import json
import math
import multiprocessing
import os
import platform
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import ppo
from variants import atari, continuous_action

RESULTS = Path(__file__).parent / "results"
WINDOWS = 50  # points of a learning curve: each covers 2 % of a run's steps


def loss_without_policy_clipping(*minibatch_and_args, ppo_loss=ppo.ppo_loss):
    """ppo_loss, but its policy loss is that of a clip range that nothing leaves; --clip-coef still clips the values."""
    *minibatch, args = minibatch_and_args
    policy_alone = argparse.Namespace(**vars(args) | {"clip_coef": 1e30, "ent_coef": 0, "vf_coef": 0})
    policy_loss, policy_stats = ppo_loss(*minibatch, policy_alone)
    minibatch[4] = torch.zeros_like(minibatch[4])  # without advantages all but the policy loss is left
    rest, stats = ppo_loss(*minibatch, argparse.Namespace(**vars(args) | {"norm_adv": False}))
    return policy_loss + rest, stats | {"policy_loss": policy_stats["policy_loss"]}


def adam_with_eps_1e_minus_8(params, adam=torch.optim.Adam, **options):
    return adam(params, **options | {"eps": 1e-8})


VARIANTS = {  # name: (label, flags, what takes the place of which function where there is no flag)
    "default": ("default", "", {}),
    "no_vectorization": ("1 one environment, 512 steps", "--num-envs 1 --num-steps 512", {}),
    "torch_init": ("2 PyTorch's initialization", "", {"ppo.layer_init": lambda layer, *args, **options: layer}),
    "adam_eps_1e-8": ("3 Adam's epsilon 1e-8", "", {"torch.optim.Adam": adam_with_eps_1e_minus_8}),
    "no_anneal_lr": ("4 constant learning rate", "--no-anneal-lr", {}),
    "no_gae": ("5 no GAE", "--no-gae", {}),
    "one_minibatch": ("6 one minibatch", "--num-minibatches 1", {}),
    "no_norm_adv": ("7 no advantage normalization", "--no-norm-adv", {}),
    "no_policy_clipping": ("8 no policy clipping", "", {"ppo.ppo_loss": loss_without_policy_clipping}),
    "no_clip_vloss": ("9 no value clipping", "--no-clip-vloss", {}),
    "no_entropy_bonus": ("10 no entropy bonus", "--ent-coef 0", {}),
    "no_gradient_clipping": ("11 no gradient clipping", "--max-grad-norm 1e30", {}),
    "target_kl": ("bonus: target KL 0.015", "--target-kl 0.015", {}),
    "bootstrap_truncation": ("bonus: bootstrap truncation", "--bootstrap-truncation", {}),
}
STUDIES = {  # name: (steps, seeds, environments, variants)
    "learning": (500_000, 10, ("CartPole-v1", "Acrobot-v1", "LunarLander-v3"), ("default", "bootstrap_truncation")),
    "ablations": (100_000, 10, ("CartPole-v1", "Acrobot-v1"), tuple(VARIANTS)),
}
LUNAR_LANDER = (
    "--num-envs 16 --num-steps 1024 --num-minibatches 256 --learning-rate 0.001 --gamma 0.999 --gae-lambda 0.98 "
    "--no-clip-vloss --bootstrap-truncation"
)
VARIANTS["lunar_lander"] = ("LunarLander's settings", LUNAR_LANDER, {})
STUDIES["example"] = (1_000_000, 10, ("LunarLander-v3",), ("lunar_lander",))
PROGRAMS = {"continuous_action": continuous_action, "atari": atari}  # the others are ppo.py
VARIANTS |= {name: (f"variants/{name}.py", "", {}) for name in PROGRAMS}
ROBOTS = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "InvertedPendulum-v5")
STUDIES["continuous"] = (1_000_000, 5, ROBOTS, ("continuous_action",))
STUDIES["atari"] = (500_000, 2, ("ALE/Breakout-v5",), ("atari",))
PUBLISHED = {  # mean and deviation, as published; at 500,000 steps, if nothing else is said
    "CartPole-v1": {"CleanRL's ppo.py": "490.04 ± 6.12", "openai/baselines' ppo2": "497.54 ± 4.02"},
    "Acrobot-v1": {"CleanRL's ppo.py": "-86.36 ± 1.32", "openai/baselines' ppo2": "-81.82 ± 5.58"},
    "Hopper-v5": {"CleanRL's ppo_continuous_action.py, Hopper-v4": "2382.86 ± 271.74"},
    "Walker2d-v5": {"CleanRL's ppo_continuous_action.py, Walker2d-v4": "2287.95 ± 571.78"},
    "HalfCheetah-v5": {"CleanRL's ppo_continuous_action.py, HalfCheetah-v4": "1442.64 ± 46.03"},
    "InvertedPendulum-v5": {"CleanRL's ppo_continuous_action.py, InvertedPendulum-v4": "963.09 ± 22.20"},
    "ALE/Breakout-v5": {"CleanRL's ppo_atari.py, 10,000,000 steps (not run here)": "414.66 ± 28.09"},
    "ALE/Pong-v5": {"CleanRL's ppo_atari.py, 10,000,000 steps (not run here)": "20.36 ± 0.20"},
}


def run(env_id, variant, seed, steps):
    """Train once, in a folder that is then removed: what train() returns."""
    _, flags, replacements = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--env-id={env_id} --seed={seed} --total-timesteps={steps} {flags}"
        return train(folder, flags, replacements, PROGRAMS.get(variant, ppo))


def train(folder, flags, replacements, program=ppo):
    """Train once, in this folder: [(global_step, episodic_return), ...] and an error or ""."""
    flags = ["--no-cuda", "--checkpoint-interval=0", *flags.split()]
    out, err, error, here = io.StringIO(), io.StringIO(), "", os.getcwd()
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.callback(gc.unfreeze)  # ppo.py freezes what it finds; in a process of many runs it would pile up
        stack.callback(os.chdir, here)
        os.chdir(folder)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))  # where ppo.fail says why it gave up
        try:
            args = ppo.parse_args(flags, **getattr(program, "DEFAULTS", {}))
            ppo.train(args, program.make_envs, program.Agent)
        except (Exception, SystemExit) as e:  # one run that diverges must not end the others
            error = next((line for line in err.getvalue().splitlines() if line.startswith("error: ")), repr(e))
    found = re.findall(r"^global_step=(\d+), episodic_return=(\S+), episodic_length=\d+$", out.getvalue(), re.MULTILINE)
    return [(int(step), round(float(r), 2)) for step, r in found], error or ("" if found else "no episode ended")


def path_of(results, study, env_id, variant):
    return results / study / f"{env_id.replace('/', '-')}__{variant}.csv.gz"


def read_runs(results, study, env_id, variant):
    """{seed: (global steps, returns)} of a saved file, two arrays of one entry per episode each."""
    path = path_of(results, study, env_id, variant)
    rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2) if path.exists() else np.zeros((0, 3))
    return {int(seed): tuple(rows[rows[:, 0] == seed, 1:].T) for seed in np.unique(rows[:, 0])}


def save_run(results, study, env_id, variant, seed, episodes):
    """Add a run to a saved file. The same runs make the same file, byte by byte, in whatever order they finish."""
    runs = read_runs(results, study, env_id, variant) | {seed: zip(*episodes, strict=True)}
    rows = [(seed, int(step), float(r)) for seed in sorted(runs) for step, r in zip(*runs[seed], strict=True)]
    text = "".join(f"{','.join(map(str, row))}\n" for row in [("seed", "global_step", "episodic_return"), *rows])
    replace(path_of(results, study, env_id, variant), gzip.compress(text.encode(), mtime=0))


def replace(path, data):
    """Write all of a file or nothing of it, however the program ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_bytes(data)
    os.replace(path.with_suffix(".tmp"), path)


def machine():
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if "model name" in x), platform.processor())
    versions = {x.name.lower(): x.version for x in distributions()}  # those of some environments may be missing
    packages = ("torch", "numpy", "gymnasium", "box2d", "mujoco", "ale-py")
    packages = ", ".join(f"{p} {versions[p]}" for p in packages if p in versions)
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, {packages}"


def in_parallel(function, calls, workers):
    """Call the function with each value of ``calls``, {name: arguments}: (name, result) one by one as they finish."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are about to start
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(function, *arguments): name for name, arguments in calls.items()}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, what has not begun need not


def run_all(results, studies, seeds, workers, divisor):
    """Run what is not saved yet. learning_facts.json keeps where and when, and which runs failed; those run anew."""
    path, where = results / "learning_facts.json", machine()
    facts = json.loads(path.read_text()) if path.exists() else {"machines": {}, "failed": {}}
    keys = [(study, env_id, v) for study in studies for env_id in STUDIES[study][2] for v in STUDIES[study][3]]
    saved = {key: read_runs(results, *key) for key in keys}
    # Seed by seed, so that all comparisons grow at the same pace.
    wanted = [(*key, seed) for seed in range(1, seeds + 1) for key in keys if seed <= STUDIES[key[0]][1]]
    jobs = [(*key, seed) for *key, seed in wanted if seed not in saved[tuple(key)]]
    calls = {job: (*job[1:], STUDIES[job[0]][0] // divisor) for job in jobs}
    for job, (episodes, error) in in_parallel(run, calls, workers):
        facts["failed"].pop(" ".join(map(str, job)), None)
        if error:
            facts["failed"][" ".join(map(str, job))] = error
        else:
            save_run(results, *job, episodes)
        machines = facts["machines"].setdefault(job[0], {})
        first, _ = machines.get(where, [str(date.today())] * 2)
        machines[where] = [first, str(date.today())]
        replace(path, (json.dumps(facts, indent=1) + "\n").encode())
    return jobs


def last_100(steps, returns, total):
    """Mean return of a run's last 100 episodes: how good it ended."""
    return returns[-100:].mean()


def curve(steps, returns, total):
    """The mean return of the episodes that ended in each of WINDOWS equal parts of the run; NaN where none did."""
    window = np.minimum((steps - 1) * WINDOWS // total, WINDOWS - 1).astype(int)  # step 1 is the first, not step 0
    counts, sums = np.bincount(window, minlength=WINDOWS), np.bincount(window, returns, minlength=WINDOWS)
    return np.divide(sums, counts, out=np.full(WINDOWS, np.nan), where=counts > 0)


def curve_mean(steps, returns, total):
    """Mean of the learning curve: how soon a run was good, and whether it stayed so. Equal parts of a run count alike;
    in the mean of all episodes those of its bad part would count more, or less, for being shorter or longer."""
    return np.nanmean(curve(steps, returns, total))


def measure(results, study, env_id, variant, function):
    """{seed: what function says of that run}"""
    runs = read_runs(results, study, env_id, variant)
    return {seed: function(*run, STUDIES[study][0]) for seed, run in runs.items()}


def effect(results, env_id, variant, function):
    """Variant minus default, [one difference per seed]. Paired: two runs of a seed start from the same states and, but
    for other initializations, from the same weights, and some never differ at all."""
    ours, default = (measure(results, "ablations", env_id, v, function) for v in (variant, "default"))
    return [ours[seed] - default[seed] for seed in ours if seed in default]


def interval(values):
    """The 95 % percentile bootstrap interval of the mean over the first axis, the seeds: 10,000 resamples."""
    values = np.asarray(values)
    chosen = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    return np.percentile(values[chosen].mean(axis=1), [2.5, 97.5], axis=0)


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def learning_tables(results, studies, not_run=()):
    pairs, summary, columns = [(name, env_id) for name in studies for env_id in STUDIES[name][2]], [], {}
    for study, env_id in pairs:
        for variant in STUDIES[study][3]:
            values = measure(results, study, env_id, variant, last_100)
            columns[f"{env_id} {VARIANTS[variant][1]}".strip()] = values
            program = VARIANTS[variant][0] if variant in PROGRAMS else "ppo.py"
            if x := list(values.values()):
                low, high = interval(x)
                spread = f"{np.mean(x):.2f} ± {np.std(x, ddof=1) if len(x) > 1 else math.nan:.2f}"
                name = f"**{program}** {VARIANTS[variant][1]}".strip()
                summary.append((env_id, name, len(x), spread, f"{low:.2f} to {high:.2f}"))
        summary += [(env_id, name, "", spread, "") for name, spread in PUBLISHED.get(env_id, {}).items()]
    summary += [(env_id, name, "", spread, "") for env_id in not_run for name, spread in PUBLISHED[env_id].items()]
    seeds = sorted(set().union(*columns.values()))
    per_seed = [(s, *(f"{x[s]:.2f}" if s in x else "" for x in columns.values())) for s in seeds]
    header = ("environment", "program", "runs", "mean ± deviation", "95 % interval of the mean")
    return f"{table(header, summary)}\n\nRun by run:\n\n{table(('seed', *columns), per_seed)}"


def ablation_table(results, env_id):
    header = ("", "runs", "same as default", "over the run", "minus default's", "at the end", "minus default's")
    default, rows = read_runs(results, "ablations", env_id, "default"), []
    for variant in STUDIES["ablations"][3]:
        runs, is_default = read_runs(results, "ablations", env_id, variant), variant == "default"
        same = sum(seed in default and np.array_equal(runs[seed], default[seed]) for seed in runs)
        row = [VARIANTS[variant][0], len(runs), "" if is_default else same]
        for function in (curve_mean, last_100):
            values = list(measure(results, "ablations", env_id, variant, function).values())
            differences = [] if is_default else effect(results, env_id, variant, function)
            row.append(f"{np.mean(values):.1f}" if values else "")
            low_to_high = " to ".join(f"{x:+.1f}" for x in interval(differences)) if differences else ""
            row.append(f"{np.mean(differences):+.1f} ({low_to_high})" if differences else "")
        rows.append(row)
    return f"## {env_id}\n\n{table(header, rows)}"


def write_tables(results):
    facts = json.loads((results / "learning_facts.json").read_text())
    failed = "; ".join(f"{job}: {error}" for job, error in facts["failed"].items()) or "none"

    def made(*studies):  # where and when
        machines = {name: dates for study in studies for name, dates in facts["machines"].get(study, {}).items()}
        where = "; ".join(f"{' to '.join(sorted(set(dates)))}, {name}" for name, dates in machines.items())
        return f"`python -m benchmark.learning`, {where}; one torch thread for each run. Runs that failed: {failed}."

    ablations = "\n\n".join(ablation_table(results, env_id) for env_id in STUDIES["ablations"][2])
    texts = {
        "learning": f"""# Learning

Of each run, the mean return of its last 100 episodes; of all runs, the mean and **sample** deviation over seeds
(ddof 1), and the 95 % percentile bootstrap interval of the mean. The figures of the other programs are published ones,
on older versions of the environments and libraries: CleanRL's of 3 seeds, with the **population** deviation (ddof 0;
over 3 seeds 0.82 times the sample's); those of baselines as Huang et al. give them, without saying which.

## ppo.py

{made("learning", "example")}

500,000 steps (the last row: 1,000,000), default flags but for those named.

{learning_tables(results, ("learning", "example"))}

## The variants

{made("continuous", "atari")}

Default flags; {STUDIES["continuous"][0]:,} steps of the robots, {STUDIES["atari"][0]:,} (2,000,000 frames) of the game.

{learning_tables(results, ("continuous", "atari"), not_run=("ALE/Pong-v5",))}
""",
        "ablations": f"""# Ablations

{made("ablations")}

100,000 steps. The numbers are those of the details in ppo.py: each is switched off alone (a bonus: on). "Over the run"
is the mean of the learning curve of {WINDOWS} points, each the mean return of the episodes that ended in that part of
the run's steps: how soon it was good. "At the end" is the mean return of the last 100 episodes. Both are means over
seeds. Differences are taken seed by seed; after their mean, its 95 % percentile bootstrap interval. "Same as default"
counts the seeds whose every episode is the default's: there, what was switched never acted.

{ablations}
""",
    }
    for name, text in texts.items():
        replace(results / f"{name}.md", text.encode())
        print(text)


def parse_args(parser):
    """The parser's flags and those that it shares with benchmark.study."""
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--steps-divisor", type=int, default=1, help="shorten every run, to try the benchmark itself")
    parser.add_argument("--table-only", action="store_true", help="run nothing, make the tables of the saved runs anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the tables and the saved runs")
    args = parser.parse_args()
    if args.steps_divisor != 1 and args.results == RESULTS:
        parser.error("--steps-divisor makes runs that are not to be kept: --results must name another folder")
    return args


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=10, help="at most; the variants, which are slow, have fewer")
    args = parse_args(parser)
    if not args.table_only:
        run_all(args.results, args.studies, args.seeds, args.workers, args.steps_divisor)
    write_tables(args.results)


if __name__ == "__main__":
    main()
