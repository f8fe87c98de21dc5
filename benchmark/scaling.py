"""What do more environments, threads and processes bring?

    python -m benchmark.scaling        # ten to twenty minutes
    python -m benchmark.plots          # then draws what was saved

A second call goes on where one stopped. It measures steps per second, peak memory, and
the time to a solved CartPole. The cases take turns, so that whatever else the machine
does meets them alike, and only numbers of the same repeat are compared.

The raw rows go to results/scaling.csv, the tables to results/scaling.md. SPS is that of
the training loop, without imports and set-up. Peak memory is the largest resident set
of any one process.
"""

import itertools
import statistics
from dataclasses import dataclass

from benchmark import runs
from benchmark.measures import quotients, spread, table
from benchmark.runs import ROOT


@dataclass
class Case:
    """A run of ppo.py, with torchrun if it takes several processes."""

    steps: int
    flags: str
    processes: int = 1


# {mode: {environments: steps}}, so that each run takes some seconds. With async, each
# environment is a process.
STEPS = {
    "sync": {4: 50_000, 16: 100_000, 64: 150_000, 256: 200_000, 1024: 262_144},
    "async": {4: 25_000, 16: 50_000, 64: 50_000},
    "vector_entry_point": {
        4: 50_000,
        16: 150_000,
        64: 262_144,
        256: 262_144,
        1024: 262_144,
    },
}
CASES = {}
for mode, steps_of_size in STEPS.items():
    for size, steps in steps_of_size.items():
        flags = f"--vectorization-mode {mode} --num-envs {size}"
        CASES[f"{mode} {size}"] = Case(steps, flags)

CASES["vector_entry_point 256, 2 threads"] = Case(
    262_144, "--vectorization-mode vector_entry_point --num-envs 256 --num-threads 2"
)
CASES["sync 16, 2 processes"] = Case(
    100_000, "--vectorization-mode sync --num-envs 16", processes=2
)
CASES["sync 256, 2 processes"] = Case(
    200_000, "--vectorization-mode sync --num-envs 256", processes=2
)

SLOW = "--env-id benchmark.slow_cartpole:SlowCartPole-v0 --num-envs 8 --num-steps 32"
CASES["slow, sync 8"] = Case(1024, f"{SLOW} --vectorization-mode sync")
CASES["slow, async 8"] = Case(1024, f"{SLOW} --vectorization-mode async")

# What solves CartPole in seconds. In its rows, the seed stands as the repeat.
SOLVE = Case(
    250_000,
    "--vectorization-mode vector_entry_point --num-envs 128 --num-steps 32 "
    "--learning-rate 2.5e-3 --update-epochs 6 --no-clip-vloss --bootstrap-truncation",
)
SEEDS = range(1, 11)

RATIOS = [  # of the SPS, in the same repeat
    ("vector_entry_point 256, 2 threads", "sync 4"),
    ("vector_entry_point 256", "sync 4"),
    ("vector_entry_point 256, 2 threads", "vector_entry_point 256"),
    ("sync 16, 2 processes", "sync 16"),
    ("sync 256, 2 processes", "sync 256"),
    ("slow, async 8", "slow, sync 8"),
]
FIELDS = ["case", "repeat", "sps", "wall_seconds", "peak_mib", "last_100_returns"]
PACKAGES = ["torch", "numpy", "gymnasium"]


def command(case, seed=1, divisor=1):
    """The command of a run, after the word python."""
    start = []
    if case.processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        start.append(case.processes)
    steps = runs.shorten(case.steps, divisor, case.flags)
    return [
        *start,
        ROOT / "ppo.py",
        f"--total-timesteps={steps}",
        *case.flags.split(),
        f"--seed={seed}",
    ]


def read_rows(results):
    """{(case, repeat): row}"""
    rows = {}
    for row in runs.read_rows(results / "scaling.csv"):
        rows[row["case"], int(row["repeat"])] = row
    return rows


def run_all(results, repeats, divisor=1):
    """Run what is not saved yet, and return the keys of these runs."""
    commands = {}
    for repeat in range(repeats):
        for name, case in CASES.items():
            commands[name, repeat] = command(case, divisor=divisor)
    for seed in SEEDS:
        commands["solve", seed] = command(SOLVE, seed, divisor)

    machines = runs.read_json(results / "scaling_facts.json", {})

    def save(key, run):
        case, repeat = key
        returns = [episodic_return for _, episodic_return in run.episodes]
        row = {
            "case": case,
            "repeat": repeat,
            "sps": run.steps_per_second,
            "wall_seconds": round(run.wall_seconds, 2),
            "peak_mib": round(run.peak_mib, 1),
            "last_100_returns": round(statistics.mean(returns[-100:]), 1),
        }
        rows = [*read_rows(results).values(), row]
        runs.write_rows(results / "scaling.csv", FIELDS, rows)
        runs.note_machine(machines, PACKAGES)
        runs.write_json(results / "scaling_facts.json", machines)

    return runs.run_missing(commands, read_rows(results), save)


def column(rows, case, field):
    """The values of this field, repeat after repeat."""
    values = {}
    for (row_case, repeat), row in rows.items():
        if row_case == case:
            values[repeat] = float(row[field])
    return [values[repeat] for repeat in sorted(values)]


def ratio(rows, case, other):
    """How many times as fast a case is, repeat by repeat."""
    return quotients(column(rows, case, "sps"), column(rows, other, "sps"))


def case_table(rows):
    """The measured numbers of each case."""
    lines = []
    for name, case in CASES.items():
        sps = column(rows, name, "sps")
        lines.append(
            [
                name,
                f"{case.steps:,}",
                spread(sps),
                f"{1e6 / statistics.median(sps):.1f}",
                spread(column(rows, name, "wall_seconds"), 1),
                spread(column(rows, name, "peak_mib")),
            ]
        )
    header = [
        "case",
        "steps",
        "SPS of the loop",
        "microseconds per step",
        "whole process, s",
        "peak MiB",
    ]
    return table(header, lines, rule="---")


def ratio_table(rows):
    """How many times as fast some cases are as others."""
    lines = []
    for case, other in RATIOS:
        lines.append([case, other, spread(ratio(rows, case, other), 2)])
    return table(["SPS of", "divided by that of", "ratio"], lines, rule="---")


def size_table(rows):
    """What changes from one number of environments to the next."""
    lines = []
    for mode, steps_of_size in STEPS.items():
        for small, large in itertools.pairwise(steps_of_size):
            low = statistics.median(column(rows, f"{mode} {small}", "peak_mib"))
            high = statistics.median(column(rows, f"{mode} {large}", "peak_mib"))
            batch_growth = (large - small) * 128
            growth = (high - low) * 2**20 / batch_growth
            lines.append(
                [
                    mode,
                    f"{small} to {large}",
                    spread(ratio(rows, f"{mode} {small}", f"{mode} {large}"), 2),
                    f"{growth:,.0f}",
                ]
            )
    header = [
        "mode",
        "environments",
        "cost of a step, ratio",
        "more memory, bytes per step of the batch",
    ]
    return table(header, lines, rule="---")


TEXT = """# Scaling

`python -m benchmark.scaling`, {machines};
{repeats} repeats, each in a fresh process, the cases in turn. Medians (smallest to \
largest). 128 steps per
environment and rollout (the slow environment: 32); one torch thread unless another \
number is named. async
ends at 64 environments: each is a process, and more make no sense on a few cores. \
Peak memory is that of the
largest process. The slow environment is CartPole with steps of 5 ms.


{cases}

{ratios}

Cost of a step, and memory, from one size to the next:

{sizes}

## Time to a solved CartPole

`python ppo.py {solve_flags} --total-timesteps {solve_steps}`

Mean return of the last 100 episodes at least 475: {solved} of {seeds} seeds.
Whole process, imports included: median {wall_seconds:.1f} s.

{solve}
"""


def write_table(results):
    """Write scaling.md, and print it."""
    rows = read_rows(results)
    wall_seconds = column(rows, "solve", "wall_seconds")
    returns = column(rows, "solve", "last_100_returns")
    solve_lines = [
        ["mean return of the last 100 episodes", *returns],
        ["whole process, s", *[f"{seconds:.1f}" for seconds in wall_seconds]],
    ]
    machines = runs.read_json(results / "scaling_facts.json", {})
    text = TEXT.format(
        machines=runs.describe_machines(machines),
        repeats=len(column(rows, "sync 4", "sps")),
        cases=case_table(rows),
        ratios=ratio_table(rows),
        sizes=size_table(rows),
        solve_flags=SOLVE.flags,
        solve_steps=SOLVE.steps,
        solved=sum(value >= 475 for value in returns),
        seeds=len(returns),
        wall_seconds=statistics.median(wall_seconds),
        solve=table(["seed", *SEEDS], solve_lines, rule="---"),
    )
    runs.write_whole(results / "scaling.md", text)
    print(text)


def main(argv=None):
    """Run what the flags say, and write the tables."""
    parser = runs.make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = runs.parse_args(parser, argv)
    if not args.table_only:
        run_all(args.results, args.repeats, args.steps_divisor)
    write_table(args.results)


if __name__ == "__main__":
    main()
