"""What do more environments, threads and processes bring? Steps per second, peak memory, and time to a solved CartPole.

    python -m benchmark.scaling        # some ten minutes; a second call goes on where one stopped

Each repeat is a fresh process, and the cases take turns, so that whatever else the machine does meets them alike; only
ratios within one repeat are compared. Raw rows go to results/scaling.csv, the table with the machine and versions to
results/scaling.md, the plot to results/scaling.svg. SPS is that of the training loop, without imports and set-up; peak
memory is the largest resident set of any one process.
"""

import argparse
import csv
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (a screen is not needed, and must not be looked for)

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SIZES = (4, 16, 64, 256, 1024)
MODES = {"sync": SIZES, "async": SIZES[:3], "vector_entry_point": SIZES}  # async: each environment is a process
STEPS = {  # so that each run takes some seconds
    "sync": (50_000, 100_000, 150_000, 200_000, 262_144),
    "async": (25_000, 50_000, 50_000),
    "vector_entry_point": (50_000, 150_000, 262_144, 262_144, 262_144),
}
CASES = {  # name: (steps, number of processes, flags)
    f"{mode} {n}": (steps, 1, f"--vectorization-mode {mode} --num-envs {n}")
    for mode, sizes in MODES.items()
    for n, steps in zip(sizes, STEPS[mode], strict=True)
}
CASES |= {
    "vector_entry_point 256, 2 threads": (262_144, 1, f"{CASES['vector_entry_point 256'][2]} --num-threads 2"),
    "sync 16, 2 processes": (100_000, 2, CASES["sync 16"][2]),
    "sync 256, 2 processes": (200_000, 2, CASES["sync 256"][2]),
}
SLOW = "--env-id benchmark.slow:SlowCartPole-v0 --num-envs 8 --num-steps 32 --vectorization-mode"
CASES |= {f"slow, {mode} 8": (1024, 1, f"{SLOW} {mode}") for mode in ("sync", "async")}
SOLVE_FLAGS = "--vectorization-mode vector_entry_point --num-envs 128 --num-steps 32 --learning-rate 2.5e-3"
SOLVE = (250_000, 1, f"{SOLVE_FLAGS} --update-epochs 6 --no-clip-vloss --bootstrap-truncation")
SEEDS = range(1, 11)
RATIOS = (  # of the SPS, in the same repeat
    ("vector_entry_point 256, 2 threads", "sync 4"),
    ("vector_entry_point 256", "sync 4"),
    ("vector_entry_point 256, 2 threads", "vector_entry_point 256"),
    ("sync 16, 2 processes", "sync 16"),
    ("sync 256, 2 processes", "sync 256"),
    ("slow, async 8", "slow, sync 8"),
)
FIELDS = ("case", "repeat", "sps", "wall_seconds", "peak_mib", "last_100_returns")
COLORS = {"vector_entry_point": "#0072B2", "sync": "#D55E00", "async": "#009E73"}  # Okabe and Ito's
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "ppo",  # with no date in the file, the same numbers make the same file
}


def measure(steps, processes, flags):
    """Run ppo.py in a fresh process, or several; returns the values of FIELDS[2:]."""
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "ppo.py"), "--total-timesteps", str(steps), *flags.split()]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        if status:
            sys.exit(f"failed: {' '.join(command)}")
        out.seek(0)
        text = out.read()
        events = EventAccumulator(str(Path(folder, text.splitlines()[-1].removeprefix("results: "))))
        events.Reload()
        sps = int(events.Scalars("charts/SPS")[-1].value)
    returns = [float(r) for r in re.findall("episodic_return=(.+),", text)][-100:]
    return sps, round(wall, 2), round(usage.ru_maxrss / 1024, 1), round(statistics.mean(returns), 1)


def column(rows, case, field):
    found = [r for r in rows if r["case"] == case]
    return [float(r[field]) for r in sorted(found, key=lambda r: int(r["repeat"]))]


def spread(values, digits=0):
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def quotients(rows, case, other, field="sps"):
    return [a / b for a, b in zip(column(rows, case, field), column(rows, other, field), strict=True)]


def text_of(rows, repeats, note):
    """The medians, with the smallest and largest value, and the ratios repeat by repeat, as markdown."""
    packages = ("torch", "numpy", "gymnasium")
    facts = ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)])
    lines = open("/proc/cpuinfo").readlines() if Path("/proc/cpuinfo").exists() else ()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    lines = [
        f"# Scaling\n\n`python -m benchmark.scaling`, {date.today()}, {cpu}, {os.cpu_count()} cores, "
        f"{platform.system()}; {facts};",
        f"{repeats} repeats, each in a fresh process, the cases in turn. Medians (smallest to largest). 128 steps per",
        "environment and rollout (the slow environment: 32); one torch thread unless another number is named. async",
        "ends at 64 environments: each is a process, and more make no sense on a few cores. Peak memory is that of the",
        f"largest process. The slow environment is CartPole with steps of 5 ms.\n{note}\n",
        "| case | steps | SPS of the loop | microseconds per step | whole process, s | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for case, (steps, _, _) in CASES.items():
        sps, wall, peak = (column(rows, case, field) for field in FIELDS[2:5])
        cells = (case, f"{steps:,}", spread(sps), f"{1e6 / statistics.median(sps):.1f}", spread(wall, 1), spread(peak))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["\n| SPS of | divided by that of | ratio |\n|---|---|---|"]
    lines += [f"| {case} | {other} | {spread(quotients(rows, case, other), 2)} |" for case, other in RATIOS]
    lines += ["\nCost of a step, and memory, from one size to the next:\n"]
    lines += [
        "| mode | environments | cost of a step, ratio | more memory, bytes per step of the batch |\n|---|---|---|---|"
    ]
    for mode, sizes in MODES.items():
        for small, large in zip(sizes, sizes[1:], strict=False):
            cases = f"{mode} {small}", f"{mode} {large}"
            low, high = (statistics.median(column(rows, case, "peak_mib")) for case in cases)
            growth = (high - low) * 2**20 / (large - small) / 128
            lines.append(f"| {mode} | {small} to {large} | {spread(quotients(rows, *cases), 2)} | {growth:,.0f} |")
    walls, returns = column(rows, "solve", "wall_seconds"), column(rows, "solve", "last_100_returns")
    solved = sum(r >= 475 for r in returns)
    lines += [
        "\n## Time to a solved CartPole\n",
        f"`python ppo.py {SOLVE[2]} --total-timesteps {SOLVE[0]}`",
        f"\nMean return of the last 100 episodes at least 475: {solved} of {len(returns)} seeds.",
        f"Whole process, imports included: median {statistics.median(walls):.1f} s.\n",
        f"| seed | {' | '.join(map(str, SEEDS))} |\n|{'---|' * (1 + len(SEEDS))}",
        f"| mean return of the last 100 episodes | {' | '.join(map(str, returns))} |",
        f"| whole process, s | {' | '.join(f'{wall:.1f}' for wall in walls)} |\n",
    ]
    return "\n".join(lines)


def draw(rows):
    """Steps per second by the number of environments: median, smallest and largest."""
    figure, panel = plt.subplots(figsize=(8.6, 3.6), layout="constrained")

    def line(cases, sizes, label, **style):
        sps = [column(rows, case, "sps") for case in cases]
        medians = [statistics.median(x) for x in sps]
        errors = [[m - min(x) for m, x in zip(medians, sps)], [max(x) - m for m, x in zip(medians, sps)]]  # noqa: B905
        panel.errorbar(sizes, medians, yerr=errors, label=label, capsize=3, **style)

    two_threads = {"marker": "*", "markersize": 11, "linestyle": "none", "zorder": 3}
    label = "vector_entry_point, 2 threads"
    line([f"{label[:18]} 256, 2 threads"], [256], label, color=COLORS["vector_entry_point"], **two_threads)
    for mode in COLORS:
        line([f"{mode} {n}" for n in MODES[mode]], MODES[mode], mode, color=COLORS[mode], marker="o")
    two = {"color": COLORS["sync"], "marker": "s", "linestyle": ":", "markerfacecolor": "white"}
    line([f"sync {n}, 2 processes" for n in (16, 256)], (16, 256), "sync, 2 processes", **two)
    panel.set(xscale="log", yscale="log", xlabel="environments (CartPole-v1)", ylabel="steps per second")
    panel.set_xticks(SIZES, map(str, SIZES))
    panel.minorticks_off()
    panel.set_yticks([5_000, 10_000, 20_000, 50_000, 100_000, 200_000])
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.grid(alpha=0.25)
    figure.legend(loc="outside right center")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps-divisor", type=int, default=1, help="shorten every run, to try the benchmark itself")
    parser.add_argument("--table-only", action="store_true", help="run nothing, make table and plot of the saved rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table, the plot and the raw rows")
    parser.add_argument("--note", default="", help="what else should be known about the machine")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "scaling.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(r["case"], int(r["repeat"])) for r in rows}
    jobs = [(case, repeat) for repeat in range(args.repeats) for case in CASES] + [("solve", seed) for seed in SEEDS]
    jobs = [] if args.table_only else [job for job in jobs if job not in done]
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if not rows:
            writer.writerow(FIELDS)
        for case, repeat in tqdm(jobs, unit="run"):
            steps, processes, flags = CASES.get(case, SOLVE)
            batch = int(re.search(r"num-envs (\d+)", flags)[1]) * int(
                (re.search(r"num-steps (\d+)", flags) or (0, 128))[1]
            )
            flags += f" --seed {repeat if case == 'solve' else 1}"
            writer.writerow((case, repeat, *measure(max(steps // args.steps_divisor, batch), processes, flags)))
            file.flush()
    text = text_of(list(csv.DictReader(path.open())), args.repeats, args.note)
    (args.results / "scaling.md").write_text(text)
    with plt.rc_context(STYLE):
        figure = draw(list(csv.DictReader(path.open())))
        figure.savefig(args.results / "scaling.svg", metadata={"Date": None, "Creator": None})
    print(text)


if __name__ == "__main__":
    main()
