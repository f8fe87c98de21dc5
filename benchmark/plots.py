"""Draw what the benchmarks have saved.

    python -m benchmark.plots

This makes the .svg files of results/: study, reuse, solved, learning, variants,
ablations, throughput and scaling. The same rows make the same files, byte by byte.
"""

import argparse
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import LogLocator

from benchmark import learning, scaling, study, throughput
from benchmark.details import DETAILS
from benchmark.measures import WINDOWS, curve, curve_mean, interval
from benchmark.runs import RESULTS

# These are Okabe and Ito's, for all kinds of color vision.
BLUE = "#0072B2"
RED = "#D55E00"
GREEN = "#009E73"
GRAY = "#888888"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "ppo",  # with no date in the file, the same numbers make the same
}


# What each detail does at each learning rate


def draw_study(results):
    """A heat map of the effects, with the default's own return in its first row."""
    rates = {}
    for (env_id, name), setting in study.SETTINGS.items():
        if name == "rates":
            rates[env_id] = setting.rates
    figure, panels = plt.subplots(
        1,
        len(rates),
        figsize=(8.6, 5.0),
        layout="constrained",
        sharey=True,
        width_ratios=[len(rates[env_id]) for env_id in rates],
    )
    variants = [variant for variant in DETAILS if variant != "default"]
    for panel, env_id in zip(panels, rates, strict=True):
        rows = study.read_rows(results, env_id, "rates")
        image = draw_effects(panel, rows, variants, rates[env_id])
        panel.set_title(env_id)
        bar = figure.colorbar(
            image,
            ax=panel,
            location="bottom",
            aspect=10 * len(rates[env_id]),
            pad=0.02,
        )
        bar.set_label("difference to the default\n← worse   |   better →")
        bar.outline.set_visible(False)

    labels = [DETAILS[variant].label for variant in variants]
    labels = ["default: return over the run", *labels]
    panels[0].set_yticks([-1.15, *range(len(variants))], labels)
    figure.supxlabel(
        "framed: the 95 % interval of the mean over the seeds excludes zero      "
        "=: every run is the default's",
        fontsize=9,
    )
    return figure


def draw_effects(panel, rows, variants, rates):
    """One panel of the heat map: a row for each variant, a column for each rate."""
    means = np.zeros((len(variants), len(rates)))
    for y, variant in enumerate(variants):
        for x, rate in enumerate(rates):
            means[y, x] = np.mean(study.effect(rows, variant, rate))
    largest = np.abs(means).max()
    colors = LinearSegmentedColormap.from_list("", (RED, "#FFFFFF", BLUE))
    image = panel.imshow(means, colors, vmin=-largest, vmax=largest, aspect="auto")

    for (y, x), mean in np.ndenumerate(means):
        effects = study.effect(rows, variants[y], rates[x])
        weight = "normal"
        if study.excludes_zero(effects):
            weight = "bold"
            frame = plt.Rectangle(
                (x - 0.46, y - 0.44),
                0.92,
                0.88,
                fill=False,
                linewidth=1.2,
                edgecolor="black",
            )
            panel.add_patch(frame)
        panel.text(
            x,
            y,
            f"{mean:+.0f}".replace("-", MINUS) if any(effects) else "=",
            ha="center",
            va="center",
            weight=weight,
            color="white" if mean > 0.7 * largest else "black",
        )
    for x, rate in enumerate(rates):
        default = study.mean_of(rows, "default", rate, "mean_return", ".0f")
        default = default.replace("-", MINUS)
        panel.text(x, -1.15, default, ha="center", va="center")

    labels = [f"{2.5e-4 * rate:g}\n{TIMES} {rate}" for rate in rates]
    panel.set_xticks(range(len(rates)), labels)
    panel.set(xlabel="learning rate", ylim=(len(variants) - 0.5, -1.7))
    # What stands below this line is switched on, not off.
    panel.axhline(variants.index("target_kl") - 0.5, color="black", linewidth=0.8)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return image


def draw_reuse(results):
    """With 10 epochs for each batch: the return, and how far the policy strays.

    These are means over the seeds with their 95 % intervals.
    """
    rows = study.read_rows(results, "CartPole-v1", "reuse")
    setting = study.SETTINGS["CartPole-v1", "reuse"]
    figure, panels = plt.subplots(
        1, 3, figsize=(8.6, 3.0), layout="constrained", sharey=True
    )
    titles = {
        "mean_return": "return over the run",
        "kl_mean": "approx_kl, nats",
        "clipfrac": "clipfrac",
    }
    lower, higher = setting.rates
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        draw_reuse_of_rate(panel, rows, name, lower, BLUE, "o", shift=-0.12)
        draw_reuse_of_rate(panel, rows, name, higher, RED, "s", shift=0.12)
        panel.set_title(title)
        panel.grid(axis="x", alpha=0.25)

    labels = [DETAILS[variant].label for variant in setting.variants]
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1,)))
    panels[1].xaxis.set_major_formatter("{x:g}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def draw_reuse_of_rate(panel, rows, name, rate, color, marker, shift):
    """A point and an interval for each variant; the shift puts rates side by side."""
    for y, variant in enumerate(study.REUSE):
        values = study.measure(rows, variant, rate, name).values()
        values = [value for value in values if math.isfinite(value)]
        label = None
        if y == 0:
            label = f"learning rate {2.5e-4 * rate:g} ({TIMES} {rate})"
        draw_interval(panel, values, y + shift, color, marker, label)


def draw_interval(panel, values, y, color, marker="o", label=None):
    """The mean and its interval."""
    panel.plot(
        interval(values), (y, y), color=color, linewidth=2, solid_capstyle="round"
    )
    panel.plot(np.mean(values), y, marker, color=color, markersize=6, label=label)


# Learning curves


def draw_learning(results):
    """Return against steps in the environments of ppo.py itself."""
    learned = learning.STUDIES["learning"]
    figure, panels = plt.subplots(
        1, len(learned.env_ids), figsize=(8.6, 3.0), layout="constrained"
    )
    for panel, env_id in zip(panels, learned.env_ids, strict=True):
        for variant, color in zip(learned.variants, (BLUE, RED), strict=True):
            label = f"ppo.py {learning.PROGRAMS[variant].flags}"
            seeds = draw_curve(
                panel, results, "learning", env_id, variant, color, label
            )
        draw_published(panel, env_id, "{}, at the end")
    panels[0].set_ylabel(f"return of an episode\n({seeds} seeds: mean, 95 % interval)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def draw_solved(results):
    """The return in three environments, with settings that solve them."""
    chosen = {
        "CartPole-v1": ("learning", "bootstrap_truncation", "--bootstrap-truncation"),
        "Acrobot-v1": ("learning", "default", "default settings"),
        "LunarLander-v3": ("example", "lunar_lander", "settings of its own"),
    }
    figure, panels = plt.subplots(1, 3, figsize=(8.6, 2.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for panel, (env_id, choice) in zip(panels, chosen.items(), strict=True):
        name, variant, label = choice
        seeds = draw_curve(panel, results, name, env_id, variant, BLUE, label)
        panel.set_title(f"{env_id}\n{label}")
    panels[0].set_ylabel(f"return of an episode\n({seeds} seeds, 95 % interval)")
    return figure


def draw_variants(results):
    """Return against steps on the robots and the game of the variants."""
    pairs = []
    for name in ("continuous", "atari"):
        pairs += [(name, env_id) for env_id in learning.STUDIES[name].env_ids]
    figure, axes = plt.subplots(2, 3, figsize=(8.6, 4.6), layout="constrained")
    for panel, (name, env_id) in zip(axes.flat, pairs, strict=False):
        (variant,) = learning.STUDIES[name].variants
        label = "mean over seeds, 95 % interval"
        seeds = draw_curve(panel, results, name, env_id, variant, BLUE, label)
        if name == "continuous":
            draw_published(panel, env_id, "CleanRL's, at the end, on v4")
        panel.set_title(f"{env_id} ({seeds} seeds)")
    for panel in axes[:, 0]:
        panel.set_ylabel("return of an episode")
    axes[1, 2].set_axis_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[1, 2].legend(handles, labels, loc="center")
    return figure


def draw_curve(panel, results, name, env_id, variant, color, label):
    """The mean over the seeds with its 95 % interval. Returns the number of seeds."""
    total = learning.STUDIES[name].steps
    middles = (np.arange(WINDOWS) + 0.5) * total / WINDOWS / 1000
    curves = learning.measure(results, name, env_id, variant, curve)
    curves = list(curves.values())
    if curves:
        low, high = interval(curves)
        panel.plot(middles, np.mean(curves, axis=0), color=color, label=label)
        panel.fill_between(middles, low, high, color=color, alpha=0.2, linewidth=0)
    panel.set(
        title=env_id,
        xlabel="environment steps, thousands",
        xlim=(0, total / 1000),
    )
    panel.grid(alpha=0.25)
    return len(curves)


def draw_published(panel, env_id, label):
    """The first of the published figures, as a line."""
    for program, figure in list(learning.PUBLISHED.get(env_id, {}).items())[:1]:
        mean = float(figure.split()[0])
        panel.axhline(mean, color=GRAY, linestyle=":", label=label.format(program))


# What each detail adds to the default


def draw_ablations(results):
    """What each variant changes in the mean return over the run."""
    ablations = learning.STUDIES["ablations"]
    _, *variants = ablations.variants
    figure, panels = plt.subplots(
        1,
        len(ablations.env_ids),
        figsize=(8.6, 4.2),
        layout="constrained",
        sharey=True,
    )
    for panel, env_id in zip(panels, ablations.env_ids, strict=True):
        for y, variant in enumerate(variants):
            differences = learning.effect(results, env_id, variant, curve_mean)
            differences = differences or [math.nan]
            draw_interval(panel, differences, y, color_of(differences))
        default = learning.measure(results, "ablations", env_id, "default", curve_mean)
        mean = np.mean(list(default.values()))
        panel.axvline(0, color="black", linewidth=0.8, zorder=0)
        # What stands below this line is switched on, not off.
        panel.axhline(10.5, color=GRAY, linewidth=0.5, linestyle=":")
        panel.set(
            title=env_id,
            xlabel=f"return over the run, minus the default's ({mean:.0f})\n"
            "← worse   |   better →",
        )
        panel.grid(axis="x", alpha=0.25)
    labels = [DETAILS[variant].label for variant in variants]
    panels[0].set_yticks(range(len(variants)), labels)
    panels[0].invert_yaxis()
    return figure


def color_of(differences):
    low, high = interval(differences)
    if high < 0:
        return RED
    if low > 0:
        return BLUE
    return GRAY


# Speed


def draw_throughput(results):
    """Steps per second of several programs: the median, with the range."""
    rows = throughput.read_rows(results)
    settings = {}
    for (steps, num_envs), programs in throughput.SETTINGS.items():
        if steps == 100_000:
            settings[num_envs] = programs
    bars = {
        "ppo": ("ppo.py", BLUE),
        "sb3": ("Stable-Baselines3", RED),
        "plain": ("plain version", GRAY),
    }
    figure, panel = plt.subplots(figsize=(8.6, 3.0), layout="constrained")
    for i, (program, (label, color)) in enumerate(bars.items()):
        for group, (num_envs, programs) in enumerate(settings.items()):
            if program not in programs:
                continue
            sps = throughput.column(rows, 100_000, num_envs, program, "sps")
            median, errors = median_and_errors(sps)
            x = group + 0.27 * (i - (len(programs) - 1) / 2)
            panel.bar(x, median, 0.25, color=color, label=label, yerr=errors, capsize=3)
            panel.annotate(
                f"{median / 1000:.1f}k",
                (x, max(sps)),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
            )
    panel.set_xticks(range(len(settings)), map(str, settings))
    panel.set(
        xlabel="environments (CartPole-v1, 100,000 steps in all)",
        ylabel="steps per second",
    )
    panel.yaxis.set_major_formatter("{x:,.0f}")
    handles, labels = panel.get_legend_handles_labels()
    handle_of = dict(zip(labels, handles, strict=True))  # one for each program
    panel.legend(handle_of.values(), handle_of.keys(), loc="upper left")
    return figure


def draw_scaling(results):
    """Steps per second by the number of environments: the median, with the range."""
    rows = scaling.read_rows(results)
    colors = {"vector_entry_point": BLUE, "sync": RED, "async": GREEN}
    figure, panel = plt.subplots(figsize=(8.6, 3.6), layout="constrained")

    def line(mode, sizes, addition="", **style):
        medians = []
        errors = [[], []]
        for size in sizes:
            sps = scaling.column(rows, f"{mode} {size}{addition}", "sps")
            median, [[below], [above]] = median_and_errors(sps)
            medians.append(median)
            errors[0].append(below)
            errors[1].append(above)
        panel.errorbar(
            sizes,
            medians,
            yerr=errors,
            label=f"{mode}{addition}",
            color=colors[mode],
            capsize=3,
            **style,
        )

    line(
        "vector_entry_point",
        [256],
        ", 2 threads",
        marker="*",
        markersize=11,
        linestyle="none",
        zorder=3,
    )
    for mode in colors:
        line(mode, list(scaling.STEPS[mode]), marker="o")
    line(
        "sync",
        [16, 256],
        ", 2 processes",
        marker="s",
        linestyle=":",
        markerfacecolor="white",
    )

    panel.set(
        xscale="log",
        yscale="log",
        xlabel="environments (CartPole-v1)",
        ylabel="steps per second",
    )
    sizes = list(scaling.STEPS["sync"])
    panel.set_xticks(sizes, map(str, sizes))
    panel.minorticks_off()
    panel.set_yticks([2_000, 5_000, 10_000, 20_000, 50_000])
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.grid(alpha=0.25)
    figure.legend(loc="outside right center")
    return figure


def median_and_errors(values):
    """The median, and how far the range reaches below and above it: [[x], [y]]."""
    median = statistics.median(values)
    return median, [[median - min(values)], [max(values) - median]]


PICTURES = {
    "study": draw_study,
    "reuse": draw_reuse,
    "solved": draw_solved,
    "learning": draw_learning,
    "variants": draw_variants,
    "ablations": draw_ablations,
    "throughput": draw_throughput,
    "scaling": draw_scaling,
}


def main():
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="folder of what is saved")
    args = parser.parse_args()
    plt.switch_backend("svg")  # it needs no screen
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            # Neither a date nor a version goes into the file.
            metadata = {"Date": None, "Creator": None}
            draw(args.results).savefig(args.results / f"{name}.svg", metadata=metadata)


if __name__ == "__main__":
    main()
