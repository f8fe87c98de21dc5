"""How fast is ppo.py? The same training in turn by ppo.py, Stable-Baselines3 and a plain implementation.

    python -m benchmark.throughput        # about ten minutes; a second call goes on where one stopped

Each repeat is a fresh process on one torch thread, and the programs take turns, so that whatever else the machine does
meets them alike; only ratios within one repeat are compared. Raw rows go to results/throughput.csv, the table with the
machine and versions to results/throughput.md. SPS is that of the training loop, without imports and set-up; peak memory
is the process's largest resident set, compared with a process that only imports what ppo.py imports.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SETTINGS = [  # (steps, num_envs, programs); num_steps is 128 and there are 4 minibatches, as by default
    (25_000, 4, ("ppo", "sb3", "plain")),
    (100_000, 4, ("ppo", "sb3", "plain")),
    (100_000, 16, ("ppo", "sb3")),
    (100_000, 64, ("ppo", "sb3")),
    (100_000, 256, ("ppo", "sb3")),
]
COMMANDS = {
    "ppo": ["ppo.py"],
    "sb3": ["-m", "benchmark.sb3"],
    "plain": ["-m", "benchmark.plain"],
    "imports": ["-c", "import ppo"],
}
FIELDS = ("steps", "num_envs", "repeat", "program", "sps", "wall_seconds", "peak_mib")


def measure(program, steps, num_envs):
    """Run one program in a fresh process; returns (SPS or "", wall seconds, peak memory in MiB)."""
    flags = [] if program == "imports" else [f"--total-timesteps={steps}", f"--num-envs={num_envs}"]
    command = COMMANDS[program][:]
    if command[0].endswith(".py"):
        command[0] = str(ROOT / command[0])
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command, *flags],
            cwd=folder,
            stdout=out,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            sys.exit(f"{program} failed: {command}")
        out.seek(0)
        last = out.read().splitlines()[-1:]
        if program == "imports":
            sps = ""
        elif program == "ppo":  # the last value of charts/SPS
            events = EventAccumulator(str(Path(folder, last[0].removeprefix("results: "))))
            events.Reload()
            sps = int(events.Scalars("charts/SPS")[-1].value)
        else:
            sps = int(last[0].removeprefix("SPS="))
    return sps, round(wall, 2), round(usage.ru_maxrss / 1024, 1)


def read_rows(path):
    return list(csv.DictReader(path.open())) if path.exists() else []


def table(rows):
    """The medians, with the smallest and largest value, and the ratios pair by pair, as a markdown table."""

    def column(steps, num_envs, program, field):
        found = [r for r in rows if (r["steps"], r["num_envs"], r["program"]) == (str(steps), str(num_envs), program)]
        return [float(r[field]) for r in sorted(found, key=lambda r: int(r["repeat"]))]

    def spread(values, digits):
        return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"

    lines = [
        "| steps | environments | program | SPS of the loop | whole process, s | peak MiB | SPS, ppo.py : it "
        "| time, ppo.py : it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for steps, num_envs, programs in SETTINGS:
        ours = {f: column(steps, num_envs, "ppo", f) for f in FIELDS[4:]}
        for program in programs:
            theirs = {f: column(steps, num_envs, program, f) for f in FIELDS[4:]}
            ratios = ["", ""]
            if program != "ppo":
                sps = [a / b for a, b in zip(ours["sps"], theirs["sps"], strict=True)]
                wall = [a / b for a, b in zip(ours["wall_seconds"], theirs["wall_seconds"], strict=True)]
                ratios = [spread(sps, 2), spread(wall, 2)]
            cells = [f"{steps:,}", num_envs, {"ppo": "**ppo.py**", "sb3": "Stable-Baselines3"}.get(program, program)]
            cells += [
                spread(theirs["sps"], 0),
                spread(theirs["wall_seconds"], 1),
                spread(theirs["peak_mib"], 0),
                *ratios,
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    imports = statistics.median(float(r["peak_mib"]) for r in rows if r["program"] == "imports")
    ratio = statistics.median(column(100_000, 4, "ppo", "peak_mib")) / imports
    lines += [
        "",
        f"A process that only imports what ppo.py imports peaks at {imports:.0f} MiB; ppo.py's 100,000 steps at",
    ]
    lines += [f"the default shape peak at {ratio:.2f} times that."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps-divisor", type=int, default=1, help="shorten every run, to try the benchmark itself")
    parser.add_argument("--table-only", action="store_true", help="run nothing, make the table of the saved rows anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table and the raw rows")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "throughput.csv"
    rows = read_rows(path)
    done = {(r["steps"], r["num_envs"], r["repeat"], r["program"]) for r in rows}
    settings = [*SETTINGS, (0, 0, ("imports",))]
    jobs = [(s, n, k, p) for k in range(args.repeats) for s, n, programs in settings for p in programs]
    jobs = [] if args.table_only else [job for job in jobs if tuple(map(str, job)) not in done]
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not rows:
            writer.writeheader()
        for steps, num_envs, repeat, program in tqdm(jobs, unit="run"):
            values = measure(program, max(steps // args.steps_divisor, num_envs * 128), num_envs)
            writer.writerow(dict(zip(FIELDS, (steps, num_envs, repeat, program, *values), strict=True)))
            file.flush()
    packages = ("torch", "numpy", "gymnasium", "stable_baselines3")
    facts = ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)])
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.processor()
    )
    text = f"""# Throughput

`python -m benchmark.throughput`, {date.today()}, {cpu}, {os.cpu_count()} cores, {platform.system()}; {facts}; one torch
thread; {args.repeats} repeats, each in a fresh process, the programs in turn. Medians (smallest to largest).

{table(read_rows(path))}
"""
    (args.results / "throughput.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
