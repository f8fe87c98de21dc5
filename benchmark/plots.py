"""Draw what benchmark.study, benchmark.learning and benchmark.throughput saved.

    python -m benchmark.plots        # makes the .svg files: study, reuse, learning, variants, ablations and throughput

The pictures lie beside the saved rows that they show. The same rows make the same files, byte by byte.
"""

import argparse
import csv
import math
import statistics
from pathlib import Path

import matplotlib
import numpy as np

from benchmark import learning, study, throughput

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


def draw_study(results):
    """What each variant changes at each learning rate: a heat map, with the default's own return in its first row."""
    settings = {env_id: rates for (env_id, setting), (_, _, rates, _) in study.SETTINGS.items() if setting == "rates"}
    options = {"layout": "constrained", "sharey": True, "width_ratios": [len(rates) for rates in settings.values()]}
    figure, panels = plt.subplots(1, len(settings), figsize=(8.6, 5.0), **options)
    variants = [v for v in study.DETAILS if v != "default"]
    colors = matplotlib.colors.LinearSegmentedColormap.from_list("", (RED, "#FFFFFF", BLUE))
    for panel, (env_id, rates) in zip(panels, settings.items(), strict=True):
        rows = study.read_rows(results, env_id, "rates")
        effects = [[study.effect(rows, v, rate) for rate in rates] for v in variants]
        means = np.array([[np.mean(x) for x in row] for row in effects])
        largest = np.abs(means).max()
        image = panel.imshow(means, colors, vmin=-largest, vmax=largest, aspect="auto")
        for (y, x), mean in np.ndenumerate(means):
            found = study.excludes_zero(effects[y][x])
            if found:
                box = plt.Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, linewidth=1.2, edgecolor="black")
                panel.add_patch(box)
            style = {"weight": "bold" if found else "normal", "color": "white" if mean > 0.7 * largest else "black"}
            text = f"{mean:+.0f}".replace("-", "−") if any(effects[y][x]) else "="
            panel.text(x, y, text, ha="center", va="center", **style)
        for x, rate in enumerate(rates):
            default = study.mean_of(rows, "default", rate, "mean_return", ".0f").replace("-", "−")
            panel.text(x, -1.15, default, ha="center", va="center")
        panel.set_xticks(range(len(rates)), [f"{2.5e-4 * rate:g}\n× {rate}" for rate in rates])
        panel.set(title=env_id, xlabel="learning rate", ylim=(len(variants) - 0.5, -1.7))
        panel.axhline(variants.index("target_kl") - 0.5, color="black", linewidth=0.8)  # below: switched on, not off
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
        bar = figure.colorbar(image, ax=panel, location="bottom", aspect=10 * len(rates), pad=0.02)
        bar.set_label("difference to the default\n← worse   |   better →")
        bar.outline.set_visible(False)
    labels = ["default: return over the run", *(study.VARIANTS[v][0] for v in variants)]
    panels[0].set_yticks([-1.15, *range(len(variants))], labels)
    note = "framed: the 95 % interval of the mean over the seeds excludes zero      =: every run is the default's"
    figure.supxlabel(note, fontsize=9)
    return figure


def draw_reuse(results):
    """10 epochs for each batch: the return, and how far and how often the policy strays: means over seeds with their
    95 % intervals."""
    rows, rates = study.read_rows(results, "CartPole-v1", "reuse"), study.SETTINGS["CartPole-v1", "reuse"][2]
    figure, panels = plt.subplots(1, 3, figsize=(8.6, 3.0), layout="constrained", sharey=True)
    names = {"mean_return": "return over the run", "kl_mean": "approx_kl, nats", "clipfrac": "clipfrac"}
    for panel, (name, title) in zip(panels, names.items(), strict=True):
        for i, (rate, color, marker) in enumerate(zip(rates, (BLUE, RED), "os", strict=True)):
            for y, variant in enumerate(study.REUSE):
                values = [x for x in study.measure(rows, variant, rate, name).values() if math.isfinite(x)]
                y += 0.24 * (i - 0.5)  # side by side, not on top of each other
                label = f"learning rate {2.5e-4 * rate:g} (× {rate})" if y < 0.5 else None
                panel.plot(learning.interval(values), (y, y), color=color, linewidth=2, solid_capstyle="round")
                panel.plot(np.mean(values), y, marker, color=color, markersize=6, label=label)
        panel.set_title(title)
        panel.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(study.REUSE)), [study.VARIANTS[v][0] for v in study.REUSE])
    panels[0].invert_yaxis()
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1,)))
    panels[1].xaxis.set_major_formatter("{x:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_curves(panel, results, study, env_id, variant, color, label):
    """Return against steps, mean over seeds with its 95 % interval. Returns the number of seeds."""
    total = learning.STUDIES[study][0]
    steps = (np.arange(learning.WINDOWS) + 0.5) * total / learning.WINDOWS / 1000  # the middle of each window
    curves = list(learning.measure(results, study, env_id, variant, learning.curve).values())
    if curves:
        panel.plot(steps, np.mean(curves, axis=0), color=color, label=label)
        panel.fill_between(steps, *learning.interval(curves), color=color, alpha=0.2, linewidth=0)
    panel.set(title=env_id, xlabel="environment steps, thousands", xlim=(0, total / 1000))
    panel.grid(alpha=0.25)
    return len(curves)


def draw_published(panel, env_id, label="{}, at the end"):
    for name, text in list(learning.PUBLISHED.get(env_id, {}).items())[:1]:
        panel.axhline(float(text.split()[0]), color=GRAY, linestyle=":", label=label.format(name))


def draw_learning(results):
    """Return against steps on the environments of ppo.py itself."""
    _, _, env_ids, variants = learning.STUDIES["learning"]
    figure, panels = plt.subplots(1, len(env_ids), figsize=(8.6, 3.0), layout="constrained")
    for panel, env_id in zip(panels, env_ids, strict=True):
        for variant, color in zip(variants, (BLUE, RED), strict=True):
            label = f"ppo.py {learning.VARIANTS[variant][1]}"
            seeds = draw_curves(panel, results, "learning", env_id, variant, color, label)
        draw_published(panel, env_id)
    panels[0].set_ylabel(f"return of an episode\n({seeds} seeds: mean, 95 % interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_variants(results):
    """Return against steps on the robots and the game of the variants."""
    panels = [(name, env_id) for name in ("continuous", "atari") for env_id in learning.STUDIES[name][2]]
    figure, axes = plt.subplots(2, 3, figsize=(8.6, 4.6), layout="constrained")
    for panel, (name, env_id) in zip(axes.flat, panels, strict=False):
        (variant,) = learning.STUDIES[name][3]
        seeds = draw_curves(panel, results, name, env_id, variant, BLUE, "mean over seeds, 95 % interval")
        if name == "continuous":
            draw_published(panel, env_id, "CleanRL's, at the end, on v4")
        panel.set_title(f"{env_id} ({seeds} seeds)")
    for panel in axes[:, 0]:
        panel.set_ylabel("return of an episode")
    axes[1, 2].set_axis_off()
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
    return figure


def draw_ablations(results):
    """What each variant changes in the mean return over the run, with the 95 % interval of the mean."""
    _, _, env_ids, (_, *variants) = learning.STUDIES["ablations"]
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
            "study": draw_study,
            "reuse": draw_reuse,
            "learning": draw_learning,
            "variants": draw_variants,
            "ablations": draw_ablations,
            "throughput": draw_throughput,
        }.items():
            draw(args.results).savefig(args.results / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
