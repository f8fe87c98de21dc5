"""Start runs, go on where a benchmark has stopped, and read what the runs leave.

A run is a program with its flags, in a process and in a folder of its own. A benchmark
makes a dict of all its runs, {key: command}. Those that are not saved yet are started,
and each is saved as soon as it has ended.
"""

import argparse
import csv
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import ppo

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """What a run has left."""

    output: str  # its standard output
    error: str  # how it diverged, or ""
    scalars: dict  # {tag: array of values}, as it logged them for TensorBoard
    wall_seconds: float  # of the whole process, imports included
    peak_mib: float  # the largest resident set of any one process

    @property
    def episodes(self):
        """[(global_step, episodic_return), ...] in the order of their ends."""
        pattern = r"^global_step=(\d+), episodic_return=(\S+), episodic_length=\d+$"
        found = re.findall(pattern, self.output, re.MULTILINE)
        return [(int(step), float(episodic_return)) for step, episodic_return in found]

    @property
    def steps_per_second(self):
        """The speed of the training loop, without imports and set-up."""
        printed = re.search(r"^SPS=(\d+)$", self.output, re.MULTILINE)
        if printed:
            return int(printed[1])
        return int(self.scalars["charts/SPS"][-1])


def run(command):
    """Run a Python program; ``command`` is what follows the word python.

    Raises RuntimeError if the program fails, unless the training has diverged: that is
    a result.
    """
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    with tempfile.TemporaryDirectory() as folder:
        out_path = Path(folder, "out")
        err_path = Path(folder, "err")
        with out_path.open("w") as out, err_path.open("w") as err:
            start = time.perf_counter()
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            _, status, usage = os.wait4(process.pid, 0)
            wall_seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)

        errors = err_path.read_text()
        error = ""
        if process.returncode != 0:
            diverged = re.search(r"^error: .* diverged.*$", errors, re.MULTILINE)
            if diverged is None:
                raise RuntimeError(f"{' '.join(command)}\n{errors}")
            error = diverged[0]

        return Run(
            output=out_path.read_text(),
            error=error,
            scalars=read_scalars(folder),
            wall_seconds=wall_seconds,
            peak_mib=usage.ru_maxrss / 1024,
        )


def read_scalars(folder):
    """{tag: array of values} of the run below this folder; empty if there is none."""
    scalars = {}
    for path in Path(folder).glob("runs/*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values = [event.value for event in events.Scalars(tag)]
            scalars[tag] = np.array(values)
    return scalars


def run_missing(commands, saved, save, workers=1):
    """Run {key: command}, except those whose key is in ``saved``, and return the keys.

    So many workers run one each at a time. ``save(key, run)`` is called as they end.
    """
    missing = [key for key in commands if key not in saved]
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(run, commands[key]): key for key in missing}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
                save(futures[future], future.result())
        finally:
            # After an error or Ctrl-C, what has not begun need not begin.
            pool.shutdown(cancel_futures=True)
    return missing


def shorten(steps, divisor, flags, **defaults):
    """The steps of a run that only tries the benchmark: at least one batch."""
    flags = [*flags.split(), f"--total-timesteps={steps}"]
    args = ppo.parse_args(flags, **defaults)
    return max(steps // divisor, args.batch_size)


# Files


def write_whole(path, text):
    """Write all of a file or nothing of it, however the program ends."""
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def read_rows(path):
    """The rows of a .csv file as dicts of texts; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, fields, rows):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())


def read_json(path, default):
    return json.loads(path.read_text()) if path.exists() else default


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=1) + "\n")


# Where and when runs were made: {machine: [first day, last day]}


def note_machine(machines, packages):
    """Note that this machine has made a run today."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    if cpuinfo.exists():
        model = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        cpu = model[1].strip() if model else cpu
    versions = {item.name.lower(): item.version for item in distributions()}
    facts = [f"Python {platform.python_version()}"]
    facts += [f"{name} {versions[name]}" for name in packages if name in versions]
    machine = f"{cpu}, {os.cpu_count()} cores, {platform.system()}; {', '.join(facts)}"

    today = str(date.today())
    first_day, _ = machines.get(machine, [today, today])
    machines[machine] = [first_day, today]


def describe_machines(machines):
    parts = []
    for machine, days in machines.items():
        parts.append(f"{' to '.join(sorted(set(days)))}, {machine}")
    return "; ".join(parts)


# The command line


def make_parser(docstring):
    """The flags that all benchmarks have."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    add = parser.add_argument
    add("--steps-divisor", type=int, default=1, help="shorten runs, to try it all")
    add("--table-only", action="store_true", help="run nothing, make the tables anew")
    add("--results", type=Path, default=RESULTS, help="folder of what is saved")
    return parser


def parse_args(parser, argv=None):
    args = parser.parse_args(argv)
    if args.steps_divisor != 1 and args.results == RESULTS:
        parser.error(
            "--steps-divisor makes runs that are not to be kept: --results must name "
            "another folder"
        )
    return args
