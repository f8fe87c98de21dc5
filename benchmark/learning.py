"""Do ppo.py and its variants learn, and what does each detail add? Many seeds of each.

    pip install '.[benchmark,box2d,mujoco,atari]'
    python -m benchmark.learning        # about four hours on two cores
    python -m benchmark.plots           # then draws what was saved

A second call goes on where one stopped. There are eight studies. "learning" is 500,000
steps on three environments, beside published figures of other implementations.
"example" is LunarLander with settings of its own. "ablations" is 100,000 steps on two
environments, each time with one detail switched off (or a bonus on) and all else as by
default. "continuous" and "atari" are the variants. "memory" and "masks" are two more,
beside the programs of sb3-contrib, and "pixels" is one beside ppo.py. Each run has one
torch thread.

Programs are compared in speed only within "memory" and "masks", and seed by seed. With
--workers 1 they take turns, so whatever else the machine does meets them alike.

Every episode is saved: results/<study>/<environment>__<variant>.csv.gz has those of all
seeds. The tables are results/learning.md and ablations.md. --table-only makes them of
the saved episodes.
"""

import gzip
import itertools
import os
from dataclasses import dataclass, field

import numpy as np

import ppo_atari
import ppo_continuous_action
import ppo_memory
import ppo_multi_discrete
import ppo_pixels
from benchmark import runs
from benchmark.details import DETAILS
from benchmark.measures import (
    WINDOWS,
    curve_mean,
    interval,
    last_100,
    quotients,
    spread,
    table,
)
from benchmark.runs import ROOT


@dataclass
class Program:
    """A program with its flags, as users start it."""

    name: str
    flags: str = ""
    defaults: dict = field(default_factory=dict)  # of flags, as the program has them
    start: list = field(default_factory=list)  # if it is not the file of this name
    label: str = ""  # in tables, if it is not the name with the flags
    seeds: int = 10  # at most, where a program is slow
    add_flags: object = None  # as for ppo.parse_args, if it has flags of its own

    @property
    def row(self):
        """How a row of the table is called."""
        return self.label or f"**{self.name}** {self.flags}".strip()


def as_flags(defaults, **others):
    """The flags that give ppo.py the defaults of a variant, but for some others."""
    values = defaults | others
    return " ".join(f"--{key.replace('_', '-')} {values[key]}" for key in values)


LUNAR_LANDER = (
    "--num-envs 16 --num-steps 1024 --num-minibatches 256 --learning-rate 0.001 "
    "--gamma 0.999 --gae-lambda 0.98 --no-clip-vloss --bootstrap-truncation"
)
PROGRAMS = {
    "default": Program("ppo.py"),
    "bootstrap_truncation": Program("ppo.py", "--bootstrap-truncation"),
    "lunar_lander": Program("ppo.py", LUNAR_LANDER),
    "continuous_action": Program(
        "ppo_continuous_action.py", defaults=ppo_continuous_action.DEFAULTS
    ),
    "atari": Program("ppo_atari.py", defaults=ppo_atari.DEFAULTS),
    "memory": Program("ppo_memory.py", defaults=ppo_memory.DEFAULTS),
    "no_memory": Program(
        "ppo.py",
        as_flags(
            ppo_memory.DEFAULTS,
            exp_name="ppo",
            env_id="ppo_memory:CartPoleWithoutVelocities-v0",
        ),
        label="**ppo.py**, same settings",
    ),
    "recurrent": Program(
        "RecurrentPPO",
        defaults=ppo_memory.DEFAULTS,
        start=["-m", "benchmark.sb3_contrib_peers", "recurrent"],
        label="sb3-contrib's RecurrentPPO, same settings",
        seeds=3,
    ),
    "masks": Program(
        "ppo_multi_discrete.py",
        defaults=ppo_multi_discrete.DEFAULTS,
        add_flags=ppo_multi_discrete.add_flags,
    ),
    "no_masks": Program(
        "ppo_multi_discrete.py",
        "--no-masks",
        defaults=ppo_multi_discrete.DEFAULTS,
        add_flags=ppo_multi_discrete.add_flags,
    ),
    "maskable": Program(
        "MaskablePPO",
        defaults=ppo_multi_discrete.DEFAULTS,
        add_flags=ppo_multi_discrete.add_flags,
        start=["-m", "benchmark.sb3_contrib_peers", "maskable"],
        label="sb3-contrib's MaskablePPO, same settings",
    ),
    "pixels": Program(
        "ppo_pixels.py",
        defaults=ppo_pixels.DEFAULTS,
        add_flags=ppo_pixels.add_flags,
    ),
    "flat": Program(
        "ppo.py",
        "--env-id ppo_pixels:Catch-v0 --total-timesteps 100000 --num-envs 8 "
        "--clip-coef 0.1",
        label="**ppo.py**, same settings",
    ),
}


@dataclass
class Study:
    """Runs of each variant in each environment.

    A variant is one of PROGRAMS or, in "ablations", one of DETAILS.
    """

    steps: int
    seeds: int
    env_ids: list
    variants: list
    compares_speed: bool = False  # of its programs with that of the first one


STUDIES = {
    "learning": Study(
        steps=500_000,
        seeds=10,
        env_ids=["CartPole-v1", "Acrobot-v1", "LunarLander-v3"],
        variants=["default", "bootstrap_truncation"],
    ),
    "ablations": Study(
        steps=100_000,
        seeds=10,
        env_ids=["CartPole-v1", "Acrobot-v1"],
        variants=list(DETAILS),
    ),
    "example": Study(
        steps=1_000_000,
        seeds=10,
        env_ids=["LunarLander-v3"],
        variants=["lunar_lander"],
    ),
    "continuous": Study(
        steps=1_000_000,
        seeds=5,
        env_ids=["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "InvertedPendulum-v5"],
        variants=["continuous_action"],
    ),
    "atari": Study(
        steps=500_000,
        seeds=2,
        env_ids=["ALE/Breakout-v5"],
        variants=["atari"],
    ),
    "memory": Study(
        steps=100_000,
        seeds=10,
        env_ids=["CartPoleWithoutVelocities-v0"],
        variants=["memory", "no_memory", "recurrent"],
        compares_speed=True,
    ),
    "masks": Study(
        steps=100_000,
        seeds=10,
        env_ids=["Sorting-v0"],
        variants=["masks", "no_masks", "maskable"],
        compares_speed=True,
    ),
    "pixels": Study(
        steps=100_000,
        seeds=3,
        env_ids=["Catch-v0"],
        variants=["pixels", "flat"],
    ),
}

# Mean and deviation as they were published, at 500,000 steps if nothing else is said.
CONTINUOUS = "CleanRL's ppo_continuous_action.py"
ATARI = "CleanRL's ppo_atari.py, 10,000,000 steps (not run here)"
PUBLISHED = {
    "CartPole-v1": {
        "CleanRL's ppo.py": "490.04 ± 6.12",
        "openai/baselines' ppo2": "497.54 ± 4.02",
    },
    "Acrobot-v1": {
        "CleanRL's ppo.py": "-86.36 ± 1.32",
        "openai/baselines' ppo2": "-81.82 ± 5.58",
    },
    "Hopper-v5": {f"{CONTINUOUS}, Hopper-v4": "2382.86 ± 271.74"},
    "Walker2d-v5": {f"{CONTINUOUS}, Walker2d-v4": "2287.95 ± 571.78"},
    "HalfCheetah-v5": {f"{CONTINUOUS}, HalfCheetah-v4": "1442.64 ± 46.03"},
    "InvertedPendulum-v5": {f"{CONTINUOUS}, InvertedPendulum-v4": "963.09 ± 22.20"},
    "ALE/Breakout-v5": {ATARI: "414.66 ± 28.09"},
    "ALE/Pong-v5": {ATARI: "20.36 ± 0.20"},
}
PACKAGES = [
    "torch",
    "numpy",
    "gymnasium",
    "box2d",
    "mujoco",
    "ale-py",
    "stable_baselines3",
    "sb3_contrib",
]


# The runs


def keys(studies, seeds):
    """The runs of these studies: [(study, env_id, variant, seed), ...]."""
    found = []
    # Seed after seed, so that all comparisons grow at the same pace.
    for seed in range(1, seeds + 1):
        for name in studies:
            study = STUDIES[name]
            for env_id, variant in itertools.product(study.env_ids, study.variants):
                if seed <= seeds_of(study, variant):
                    found.append((name, env_id, variant, seed))
    return found


def seeds_of(study, variant):
    """How many runs of a program or a detail a study has."""
    if variant in PROGRAMS:
        return min(study.seeds, PROGRAMS[variant].seeds)
    return study.seeds


def command(study, env_id, variant, seed, divisor=1):
    """The command of a run, after the word python."""
    if study == "ablations":
        start = ["-m", "benchmark.details", variant]
        flags, defaults, add_flags = "", {}, None
    else:
        program = PROGRAMS[variant]
        start = program.start or [ROOT / program.name]
        flags, defaults = program.flags, program.defaults
        add_flags = program.add_flags
    steps = STUDIES[study].steps
    steps = runs.shorten(steps, divisor, flags, add_flags=add_flags, **defaults)
    return [
        *start,
        f"--env-id={env_id}",
        *flags.split(),
        f"--seed={seed}",
        f"--total-timesteps={steps}",
        "--no-cuda",
        "--checkpoint-interval=0",
    ]


def path_of(results, study, env_id, variant):
    return results / study / f"{env_id.replace('/', '-')}__{variant}.csv.gz"


def read_runs(results, study, env_id, variant):
    """{seed: (global steps, returns)} of a saved file, one entry for each episode."""
    path = path_of(results, study, env_id, variant)
    if not path.exists():
        return {}
    rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    episodes = {}
    for seed in np.unique(rows[:, 0]):
        steps, returns = rows[rows[:, 0] == seed, 1:].T
        episodes[int(seed)] = steps, returns
    return episodes


def save_run(results, study, env_id, variant, seed, episodes):
    """Add a run, [(global_step, episodic_return), ...], to a saved file.

    The same runs make the same file, byte by byte, in whatever order they end.
    """
    saved = read_runs(results, study, env_id, variant)
    saved[seed] = zip(*episodes, strict=True)
    lines = ["seed,global_step,episodic_return"]
    for number in sorted(saved):
        for step, episodic_return in zip(*saved[number], strict=True):
            rounded = round(float(episodic_return), 2)
            lines.append(f"{number},{int(step)},{rounded}")
    text = "".join(f"{line}\n" for line in lines)
    compressed = gzip.compress(text.encode(), mtime=0)
    runs.write_whole(path_of(results, study, env_id, variant), compressed)


def read_facts(results):
    """Where and when each study was run, how fast, and how runs failed.

    Those that failed run once more.
    """
    facts = {"machines": {}, "failed": {}, "steps_per_second": {}}
    return facts | runs.read_json(results / "learning_facts.json", {})


def run_all(results, studies, seeds, workers, divisor=1):
    """Run what is not saved yet, and return the keys of these runs."""
    commands = {}
    saved = set()
    for key in keys(studies, seeds):
        commands[key] = command(*key, divisor)
        *file, seed = key
        if seed in read_runs(results, *file):
            saved.add(key)
    facts = read_facts(results)

    def save(key, run):
        name = " ".join(map(str, key))
        facts["failed"].pop(name, None)
        if run.error or not run.episodes:
            facts["failed"][name] = run.error or "no episode ended"
        else:
            save_run(results, *key, run.episodes)
            if STUDIES[key[0]].compares_speed:
                facts["steps_per_second"][name] = run.steps_per_second
        machines = facts["machines"].setdefault(key[0], {})
        runs.note_machine(machines, PACKAGES)
        runs.write_json(results / "learning_facts.json", facts)

    return runs.run_missing(commands, saved, save, workers)


# The tables


def measure(results, study, env_id, variant, function):
    """{seed: what the function says of that run}"""
    total_steps = STUDIES[study].steps
    measured = {}
    for seed, (steps, returns) in read_runs(results, study, env_id, variant).items():
        measured[seed] = function(steps, returns, total_steps)
    return measured


def effect(results, env_id, variant, function):
    """A detail's run minus the default's, [one difference for each seed].

    Two runs of a seed start from the same states and, but for other initializations,
    from the same weights. Some never differ at all.
    """
    switched = measure(results, "ablations", env_id, variant, function)
    default = measure(results, "ablations", env_id, "default", function)
    return [switched[seed] - default[seed] for seed in switched if seed in default]


def learning_tables(results, studies, not_run=(), with_speed=False):
    """One row for each program and environment, and one column for each of these."""
    summary = []
    columns = {}
    for study in studies:
        for env_id in STUDIES[study].env_ids:
            for variant in STUDIES[study].variants:
                program = PROGRAMS[variant]
                values = measure(results, study, env_id, variant, last_100)
                name = program.label or program.flags
                columns[f"{env_id} {name}".strip()] = values
                if values:
                    cells = [env_id, program.row, *describe_runs(values)]
                    if with_speed:
                        ratios = speed_ratios(results, study, env_id, variant)
                        cells.append(describe_ratios(ratios))
                    summary.append(cells)
            summary += published_rows(env_id)
    for env_id in not_run:
        summary += published_rows(env_id)

    per_seed = []
    for seed in sorted(set().union(*columns.values())):
        cells = [f"{x[seed]:.2f}" if seed in x else "" for x in columns.values()]
        per_seed.append([seed, *cells])

    header = [
        "environment",
        "program",
        "runs",
        "mean ± deviation",
        "95 % interval of the mean",
    ]
    if with_speed:
        header.append("SPS, first program : it")
    runs_table = table(["seed", *columns], per_seed)
    return f"{table(header, summary)}\n\nRun by run:\n\n{runs_table}"


def describe_runs(values):
    """How many there are, their mean and deviation, and the interval of the mean."""
    values = list(values.values())
    if len(values) < 2:
        mean = "".join(f"{value:.2f}" for value in values)
        return [len(values), mean, ""]
    low, high = interval(values)
    mean = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    return [len(values), mean, f"{low:.2f} to {high:.2f}"]


def speed_ratios(results, study, env_id, variant):
    """The speed of a study's first program divided by this one's, seed by seed."""
    first = STUDIES[study].variants[0]
    if variant == first:
        return []
    speeds = read_facts(results)["steps_per_second"]
    ours = []
    theirs = []
    for seed in range(1, STUDIES[study].seeds + 1):
        our_name = f"{study} {env_id} {first} {seed}"
        their_name = f"{study} {env_id} {variant} {seed}"
        if our_name in speeds and their_name in speeds:
            ours.append(speeds[our_name])
            theirs.append(speeds[their_name])
    return quotients(ours, theirs)


def describe_ratios(ratios):
    if len(ratios) > 1:
        return spread(ratios, 2)
    return "".join(f"{ratio:.2f}" for ratio in ratios)


def published_rows(env_id):
    figures = PUBLISHED.get(env_id, {})
    return [[env_id, program, "", figure, ""] for program, figure in figures.items()]


def ablation_table(results, env_id):
    default = read_runs(results, "ablations", env_id, "default")
    rows = []
    for variant in STUDIES["ablations"].variants:
        switched = read_runs(results, "ablations", env_id, variant)
        same = 0
        for seed, episodes in switched.items():
            same += seed in default and np.array_equal(episodes, default[seed])
        if variant == "default":
            same = ""
        rows.append(
            [
                DETAILS[variant].label,
                len(switched),
                same,
                *describe_effect(results, env_id, variant, curve_mean),
                *describe_effect(results, env_id, variant, last_100),
            ]
        )
    header = [
        "",
        "runs",
        "same as default",
        "over the run",
        "minus default's",
        "at the end",
        "minus default's",
    ]
    return f"## {env_id}\n\n{table(header, rows)}"


def describe_effect(results, env_id, variant, function):
    """A variant's mean, and the mean difference to the default with its interval."""
    values = list(measure(results, "ablations", env_id, variant, function).values())
    mean = f"{np.mean(values):.1f}" if values else ""
    differences = effect(results, env_id, variant, function)
    if variant == "default" or not differences:
        return [mean, ""]
    low, high = interval(differences)
    return [mean, f"{np.mean(differences):+.1f} ({low:+.1f} to {high:+.1f})"]


LEARNING_TEXT = """# Learning

Of each run, the mean return of its last 100 episodes; of all runs, the mean and \
**sample** deviation over seeds
(ddof 1), and the 95 % percentile bootstrap interval of the mean. The figures of the \
other programs are published ones,
on older versions of the environments and libraries: CleanRL's of 3 seeds, with the \
**population** deviation (ddof 0;
over 3 seeds 0.82 times the sample's); those of baselines as Huang et al. give them, \
without saying which.

## ppo.py

{made_programs}

500,000 steps (the last row: 1,000,000), default flags but for those named.

{programs}

## The variants

{made_variants}

Default flags; {continuous_steps:,} steps of the robots, {atari_steps:,} (2,000,000 \
frames) of the game.

{variants}

## Memory, masks and pictures

{made_memory}

{memory_steps:,} steps, default flags but for those named. No figure here is a \
published one: RecurrentPPO and MaskablePPO
are run here, too, by `python -m benchmark.sb3_contrib_peers`.

{memory}

"SPS, first program : it" tells how many times as many steps per second the first \
program of the environment plays,
without imports and set-up. The programs ran one at a time and in turn, beside other \
work of the machine. Each ratio is
taken within a seed; where there are several, their median (smallest to largest).
"""

ABLATIONS_TEXT = """# Ablations

{made}

100,000 steps. The numbers are those of the details in ppo.py: each is switched off \
alone (a bonus: on). "Over the run"
is the mean of the learning curve of {windows} points, each the mean return of the \
episodes that ended in that part of
the run's steps: how soon it was good. "At the end" is the mean return of the last 100 \
episodes. Both are means over
seeds. Differences are taken seed by seed; after their mean, its 95 % percentile \
bootstrap interval. "Same as default"
counts the seeds whose every episode is the default's: there, what was switched never \
acted.

{tables}
"""


def write_tables(results):
    """Write learning.md and ablations.md, and print them."""
    facts = read_facts(results)
    failed = [f"{key}: {error}" for key, error in facts["failed"].items()]
    failed = "; ".join(failed) or "none"

    def made(*studies):
        """Say where and when."""
        machines = {}
        for study in studies:
            machines |= facts["machines"].get(study, {})
        machines = runs.describe_machines(machines)
        return (
            f"`python -m benchmark.learning`, {machines}; one torch thread for each "
            f"run. Runs that failed: {failed}."
        )

    learning_text = LEARNING_TEXT.format(
        made_programs=made("learning", "example"),
        programs=learning_tables(results, ["learning", "example"]),
        made_variants=made("continuous", "atari"),
        continuous_steps=STUDIES["continuous"].steps,
        atari_steps=STUDIES["atari"].steps,
        variants=learning_tables(results, ["continuous", "atari"], ["ALE/Pong-v5"]),
        made_memory=made("memory", "masks", "pixels"),
        memory_steps=STUDIES["memory"].steps,
        memory=learning_tables(results, ["memory", "masks", "pixels"], with_speed=True),
    )
    env_ids = STUDIES["ablations"].env_ids
    ablation_tables = [ablation_table(results, env_id) for env_id in env_ids]
    ablations_text = ABLATIONS_TEXT.format(
        made=made("ablations"),
        windows=WINDOWS,
        tables="\n\n".join(ablation_tables),
    )
    for name, text in {"learning": learning_text, "ablations": ablations_text}.items():
        runs.write_whole(results / f"{name}.md", text)
        print(text)


def main(argv=None):
    """Run what the flags say, and write the tables."""
    parser = runs.make_parser(__doc__)
    add = parser.add_argument
    add("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    add("--seeds", type=int, default=10, help="at most; the slow variants have fewer")
    add("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    args = runs.parse_args(parser, argv)
    if not args.table_only:
        run_all(
            args.results, args.studies, args.seeds, args.workers, args.steps_divisor
        )
    write_tables(args.results)


if __name__ == "__main__":
    main()
