"""Draw what benchmark.learning and benchmark.throughput saved.

    python -m benchmark.plots        # makes learning.svg, ablations.svg and throughput.svg

The pictures lie beside the saved rows that they show. The same rows make the same files, byte by byte.
"""

import argparse
import csv
import math
import statistics
from pathlib import Path

import matplotlib
import numpy as np

from benchmark import learning, throughput

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (a screen is not needed, and must not be looked for)

BLUE, RED, GRAY = "#0072B2", "#D55E00", "#888888"  # Okabe and Ito's, for all kinds of colour vision
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "ppo",  # with no date in the file, the same numbers make the same file
}


def draw_learning(results):
    """Return against steps, mean over seeds with its 95 % interval."""
    total, env_ids, variants = learning.STUDIES["learning"]
    figure, panels = plt.subplots(1, len(env_ids), figsize=(8.6, 3.0), layout="constrained")
    steps = (np.arange(learning.WINDOWS) + 0.5) * total / learning.WINDOWS / 1000  # the middle of each window
    for panel, env_id in zip(panels, env_ids, strict=True):
        for variant, color in zip(variants, (BLUE, RED), strict=True):
            label = f"ppo.py {learning.VARIANTS[variant][1]}"
            curves = list(learning.measure(results, "learning", env_id, variant, learning.curve).values())
            panel.plot(steps, np.mean(curves, axis=0), color=color, label=label)
            panel.fill_between(steps, *learning.interval(curves), color=color, alpha=0.2, linewidth=0)
        for name, text in list(learning.PUBLISHED.get(env_id, {}).items())[:1]:
            panel.axhline(float(text.split()[0]), color=GRAY, linestyle=":", label=f"{name}, at the end")
        panel.set(title=env_id, xlabel="environment steps, thousands", xlim=(0, total / 1000))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(f"return of an episode\n({len(curves)} seeds: mean, 95 % interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_ablations(results):
    """What each variant changes in the mean return over the run, with the 95 % interval of the mean."""
    total, env_ids, (_, *variants) = learning.STUDIES["ablations"]
    figure, panels = plt.subplots(1, len(env_ids), figsize=(8.6, 4.2), layout="constrained", sharey=True)
    for panel, env_id in zip(panels, env_ids, strict=True):
        for y, variant in enumerate(variants):
            differences = learning.effect(results, env_id, variant, learning.curve_mean) or [math.nan]
            low, high = learning.interval(differences)
            color = RED if high < 0 else BLUE if low > 0 else GRAY
            panel.plot((low, high), (y, y), color=color, linewidth=2, solid_capstyle="round")
            panel.plot(np.mean(differences), y, "o", color=color, markersize=6)
        default = learning.measure(results, "ablations", env_id, "default", learning.curve_mean)
        panel.axvline(0, color="black", linewidth=0.8, zorder=0)
        panel.axhline(10.5, color=GRAY, linewidth=0.5, linestyle=":")  # what follows is switched on, not off
        mean = np.mean(list(default.values()))
        panel.set(title=env_id, xlabel=f"return over the run, minus the default's ({mean:.0f})\n← worse   |   better →")
        panel.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(variants)), [learning.VARIANTS[variant][0] for variant in variants])
    panels[0].invert_yaxis()
    return figure


def draw_throughput(results):
    """Steps per second by the number of environments, median and range of the repeats."""
    rows = list(csv.DictReader((results / "throughput.csv").open()))
    settings = [s for s in throughput.SETTINGS if s[0] == 100_000]
    figure, panel = plt.subplots(figsize=(8.6, 3.0), layout="constrained")
    programs = {"ppo": ("ppo.py", BLUE), "sb3": ("Stable-Baselines3", RED), "plain": ("plain version", GRAY)}
    for i, (program, (label, color)) in enumerate(programs.items()):
        for x, (steps, num_envs, shown) in enumerate(settings):
            if program in shown:
                wanted = (str(steps), str(num_envs), program)
                sps = [float(r["sps"]) for r in rows if (r["steps"], r["num_envs"], r["program"]) == wanted]
                median, x = statistics.median(sps), x + 0.27 * (i - (len(shown) - 1) / 2)
                spread = [[median - min(sps)], [max(sps) - median]]
                panel.bar(x, median, 0.25, color=color, label=label, yerr=spread, capsize=3)
                text = f"{median / 1000:.1f}k"
                panel.annotate(text, (x, max(sps)), (0, 3), textcoords="offset points", ha="center", va="bottom")
    panel.set_xticks(range(len(settings)), [str(num_envs) for _, num_envs, _ in settings])
    panel.set(xlabel="environments (CartPole-v1, 100,000 steps in all)", ylabel="steps per second")
    panel.yaxis.set_major_formatter("{x:,.0f}")
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    panel.legend(handles.values(), handles.keys(), loc="upper left")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=learning.RESULTS, help="folder of the saved results")
    args = parser.parse_args()
    with plt.rc_context(STYLE):
        for name, draw in {
            "learning": draw_learning,
            "ablations": draw_ablations,
            "throughput": draw_throughput,
        }.items():
            draw(args.results).savefig(args.results / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
