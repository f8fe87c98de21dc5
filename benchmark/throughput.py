"""How fast is ppo.py, beside Stable-Baselines3 and a plain implementation?

    python -m benchmark.throughput        # ten to twenty minutes
    python -m benchmark.plots             # then draws what was saved

A second call goes on where one stopped. All programs do the same training, on one torch
thread. They take turns, so that whatever else the machine does meets them alike, and
only numbers of the same repeat are compared.

The raw rows go to results/throughput.csv, the table to results/throughput.md. SPS is
that of the training loop, without imports and set-up. Peak memory is the process's
largest resident set. It is compared with a process that only imports what ppo.py
imports.
"""

import statistics
from dataclasses import dataclass

from benchmark import runs
from benchmark.measures import quotients, spread, table
from benchmark.runs import ROOT


@dataclass
class Program:
    """A command after the word python, and its name in the table."""

    command: list
    label: str = ""


PROGRAMS = {
    "ppo": Program([ROOT / "ppo.py"], "**ppo.py**"),
    "sb3": Program(["-m", "benchmark.stable_baselines3"], "Stable-Baselines3"),
    "plain": Program(["-m", "tests.reference.plain"], "plain"),
    "imports": Program(["-c", "import ppo"]),
}

# (steps, environments): programs. All other flags are at their defaults.
SETTINGS = {
    (25_000, 4): ["ppo", "sb3", "plain"],
    (100_000, 4): ["ppo", "sb3", "plain"],
    (100_000, 16): ["ppo", "sb3"],
    (100_000, 64): ["ppo", "sb3"],
    (100_000, 256): ["ppo", "sb3"],
    (0, 0): ["imports"],
}
FIELDS = [
    "steps",
    "num_envs",
    "repeat",
    "program",
    "sps",
    "wall_seconds",
    "peak_mib",
]
PACKAGES = ["torch", "numpy", "gymnasium", "stable_baselines3"]


def command(steps, num_envs, program, divisor=1):
    """The command of a run, after the word python."""
    if program == "imports":
        return PROGRAMS[program].command
    flags = f"--num-envs={num_envs}"
    steps = runs.shorten(steps, divisor, flags)
    return [*PROGRAMS[program].command, f"--total-timesteps={steps}", flags]


def read_rows(results):
    """{(steps, num_envs, repeat, program): row}"""
    rows = {}
    for row in runs.read_rows(results / "throughput.csv"):
        steps = int(row["steps"])
        num_envs = int(row["num_envs"])
        rows[steps, num_envs, int(row["repeat"]), row["program"]] = row
    return rows


def run_all(results, repeats, divisor=1):
    """Run what is not saved yet, and return the keys of these runs."""
    commands = {}
    for repeat in range(repeats):
        for (steps, num_envs), programs in SETTINGS.items():
            for program in programs:
                key = steps, num_envs, repeat, program
                commands[key] = command(steps, num_envs, program, divisor)

    machines = runs.read_json(results / "throughput_facts.json", {})

    def save(key, run):
        steps, num_envs, repeat, program = key
        row = {
            "steps": steps,
            "num_envs": num_envs,
            "repeat": repeat,
            "program": program,
            "sps": "" if program == "imports" else run.steps_per_second,
            "wall_seconds": round(run.wall_seconds, 2),
            "peak_mib": round(run.peak_mib, 1),
        }
        rows = [*read_rows(results).values(), row]
        runs.write_rows(results / "throughput.csv", FIELDS, rows)
        runs.note_machine(machines, PACKAGES)
        runs.write_json(results / "throughput_facts.json", machines)

    return runs.run_missing(commands, read_rows(results), save)


def column(rows, steps, num_envs, program, field):
    """The values of this field, repeat after repeat."""
    values = {}
    for (row_steps, row_num_envs, repeat, row_program), row in rows.items():
        if (row_steps, row_num_envs, row_program) == (steps, num_envs, program):
            values[repeat] = float(row[field])
    return [values[repeat] for repeat in sorted(values)]


def table_of(rows):
    """Medians with the smallest and the largest, and ratios repeat by repeat."""
    lines = []
    for (steps, num_envs), programs in SETTINGS.items():
        for program in programs:
            if program == "imports":
                continue
            ours = {}
            theirs = {}
            for field in ("sps", "wall_seconds", "peak_mib"):
                ours[field] = column(rows, steps, num_envs, "ppo", field)
                theirs[field] = column(rows, steps, num_envs, program, field)
            ratios = ["", ""]
            if program != "ppo":
                ratios = [
                    spread(quotients(ours["sps"], theirs["sps"]), 2),
                    spread(quotients(ours["wall_seconds"], theirs["wall_seconds"]), 2),
                ]
            lines.append(
                [
                    f"{steps:,}",
                    num_envs,
                    PROGRAMS[program].label,
                    spread(theirs["sps"]),
                    spread(theirs["wall_seconds"], 1),
                    spread(theirs["peak_mib"]),
                    *ratios,
                ]
            )
    header = [
        "steps",
        "environments",
        "program",
        "SPS of the loop",
        "whole process, s",
        "peak MiB",
        "SPS, ppo.py : it",
        "time, ppo.py : it",
    ]
    return table(header, lines, rule="---")


TEXT = """# Throughput

`python -m benchmark.throughput`, {machines}; one torch
thread; {repeats} repeats, each in a fresh process, the programs in turn. Medians \
(smallest to largest).

{table}

A process that only imports what ppo.py imports peaks at {imports:.0f} MiB; ppo.py's \
100,000 steps at
the default shape peak at {ratio:.2f} times that.
"""


def write_table(results):
    """Write throughput.md, and print it."""
    rows = read_rows(results)
    imports = statistics.median(column(rows, 0, 0, "imports", "peak_mib"))
    training = column(rows, 100_000, 4, "ppo", "peak_mib")
    machines = runs.read_json(results / "throughput_facts.json", {})
    text = TEXT.format(
        machines=runs.describe_machines(machines),
        repeats=len(training),
        table=table_of(rows),
        imports=imports,
        ratio=statistics.median(training) / imports,
    )
    runs.write_whole(results / "throughput.md", text)
    print(text)


def main(argv=None):
    """Run what the flags say, and write the table."""
    parser = runs.make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = runs.parse_args(parser, argv)
    if not args.table_only:
        run_all(args.results, args.repeats, args.steps_divisor)
    write_table(args.results)


if __name__ == "__main__":
    main()
