"""When does each detail of ppo.py matter? Each is switched off at several rates.

    pip install '.[benchmark]'
    python -m benchmark.study           # about three hours on two cores
    python -m benchmark.plots           # then draws what was saved

A second call goes on where one stopped. There are three settings. "rates" is as by
default, but with 16 environments x 32 steps in a batch, which is cheaper. "reuse" has
10 epochs for each batch instead of 4. "shape" has the default's 4 x 128 steps, to see
whether what two rows say holds there, too.

Each run is one row of results/study/<environment>__<setting>.csv. The tables are
results/study.md. --table-only makes them of the saved rows.
"""

import collections
import itertools
import math
import os
import re
from dataclasses import dataclass

import numpy as np

import ppo
from benchmark import measures, runs
from benchmark.details import DETAILS
from benchmark.measures import WINDOWS, interval, table

RATES = [1, 3, 10, 30]  # times the default learning rate
BATCHED = "--num-envs 16 --num-steps 32 --vectorization-mode vector_entry_point"
REUSE = [
    "default",
    "no_policy_clipping",
    "target_kl",
    "no_clip_vloss",
    "no_gradient_clipping",
    "no_norm_adv",
]


@dataclass
class Setting:
    """Runs of these variants, which are keys of DETAILS, at these rates."""

    steps: int
    flags: str
    rates: list
    variants: list


SETTINGS = {
    ("CartPole-v1", "rates"): Setting(
        steps=150_000,
        flags=BATCHED,
        rates=RATES,
        variants=list(DETAILS),
    ),
    ("CartPole-v1", "reuse"): Setting(
        steps=150_000,
        flags=f"{BATCHED} --update-epochs 10",
        rates=[10, 30],
        variants=REUSE,
    ),
    ("CartPole-v1", "shape"): Setting(
        steps=150_000,
        flags="",
        rates=[1, 30],
        variants=["default", "no_gae", "no_policy_clipping"],
    ),
    ("Acrobot-v1", "rates"): Setting(
        steps=100_000,
        flags="--num-envs 16 --num-steps 32",
        rates=[1, 10],
        variants=list(DETAILS),
    ),
}

# The return of an untrained agent. The rest of a diverged run counts as that, because
# its policy is of no use any more.
UNTRAINED = {"CartPole-v1": 20.0, "Acrobot-v1": -500.0}

MEASURES = [
    "mean_return",
    "last_100",
    "kl_mean",
    "kl_median",
    "kl_max",
    "clipfrac",
    "explained_variance",
    "explained_variance_median",
    "epochs",
    "ended_early",
    "error",
]
FIELDS = ["variant", "rate", "seed", *MEASURES]
PACKAGES = ["torch", "numpy", "gymnasium", "box2d", "mujoco", "ale-py"]


# The runs


def flags_of(env_id, setting, rate):
    """The flags of a setting; those of the detail come later, and then count."""
    rate = 2.5e-4 * rate
    flags = (
        f"--env-id={env_id} --learning-rate={rate} --no-cuda --checkpoint-interval=0"
    )
    return f"{flags} {SETTINGS[env_id, setting].flags}"


def steps_of(env_id, setting, divisor):
    flags = SETTINGS[env_id, setting].flags
    return runs.shorten(SETTINGS[env_id, setting].steps, divisor, flags)


def command(env_id, setting, variant, rate, seed, divisor=1):
    """The command of a run, after the word python."""
    flags = flags_of(env_id, setting, rate)
    steps = steps_of(env_id, setting, divisor)
    return [
        "-m",
        "benchmark.details",
        variant,
        f"--seed={seed}",
        f"--total-timesteps={steps}",
        *flags.split(),
    ]


def measure_run(run, env_id, flags, steps):
    """{name: value} of MEASURES for a run with these flags, NaN where it has none."""
    error = run.error
    if not error and not run.episodes:
        error = "no episode ended"
    measured = dict.fromkeys(MEASURES, math.nan)
    measured["error"] = error
    measured |= measure_returns(env_id, run.episodes, error, steps)

    args = ppo.parse_args(flags.split())
    counts = re.search(r"^minibatches:(.*)$", run.output, re.MULTILINE)[1]
    epochs = np.array(counts.split(), dtype=float) / args.num_minibatches
    if len(epochs) > 0:
        measured["epochs"] = epochs.mean()
        measured["ended_early"] = (epochs < args.update_epochs).mean()

    if "losses/approx_kl" in run.scalars:
        kl = run.scalars["losses/approx_kl"]
        measured["kl_mean"] = kl.mean()
        measured["kl_median"] = np.median(kl)
        measured["kl_max"] = kl.max()
        measured["clipfrac"] = run.scalars["losses/clipfrac"].mean()
        explained = run.scalars["losses/explained_variance"]
        explained = explained[np.isfinite(explained)]  # not if all returns are the same
        measured["explained_variance"] = explained.mean()
        measured["explained_variance_median"] = np.median(explained)
    return measured


def measure_returns(env_id, episodes, error, steps):
    """The mean return over the run, and that of its last 100 episodes.

    A diverged run has no policy left. The part of the run that it did not reach, and
    its end, count as an untrained agent's.
    """
    curve = np.full(WINDOWS, np.nan)
    if episodes:
        curve = measures.curve(*np.transpose(episodes), steps)

    # Where no episode ended, those that ended in the next window were being played.
    for window in reversed(range(WINDOWS - 1)):
        if math.isnan(curve[window]):
            curve[window] = curve[window + 1]

    if error:
        reached = max([step for step, _ in episodes], default=0)
        begins = np.arange(WINDOWS) * steps / WINDOWS
        curve[begins >= reached] = UNTRAINED[env_id]
        return {"mean_return": np.nanmean(curve), "last_100": UNTRAINED[env_id]}
    returns = [episodic_return for _, episodic_return in episodes]
    return {"mean_return": np.nanmean(curve), "last_100": np.mean(returns[-100:])}


def path_of(results, env_id, setting):
    return results / "study" / f"{env_id}__{setting}.csv"


def read_rows(results, env_id, setting):
    """{(variant, rate, seed): {name: value} of MEASURES} of a saved file."""
    rows = {}
    for row in runs.read_rows(path_of(results, env_id, setting)):
        measured = {name: float(row[name]) for name in MEASURES if name != "error"}
        measured["error"] = row["error"]
        rows[row["variant"], int(row["rate"]), int(row["seed"])] = measured
    return rows


def save_row(results, env_id, setting, key, measured):
    """Add a run, key (variant, rate, seed), to a saved file.

    The same runs make the same file, byte by byte, in whatever order they end.
    """
    path = path_of(results, env_id, setting)
    variant, rate, seed = key
    row = {"variant": variant, "rate": rate, "seed": seed}
    for name, value in measured.items():
        row[name] = value if name == "error" else f"{value:.5g}"

    variants = SETTINGS[env_id, setting].variants

    def order(row):
        return variants.index(row["variant"]), int(row["rate"]), int(row["seed"])

    rows = sorted([*runs.read_rows(path), row], key=order)
    runs.write_rows(path, FIELDS, rows)


def keys(env_ids, seeds):
    """The runs: [(env_id, setting, variant, rate, seed), ...]."""
    found = []
    # Seed after seed, so that all comparisons grow at the same pace.
    for seed in range(1, seeds + 1):
        for (env_id, name), setting in SETTINGS.items():
            if env_id in env_ids:
                for variant, rate in itertools.product(setting.variants, setting.rates):
                    found.append((env_id, name, variant, rate, seed))
    return found


def run_all(results, env_ids, seeds, workers, divisor=1):
    """Run what is not saved yet, and return the keys of these runs."""
    commands = {key: command(*key, divisor) for key in keys(env_ids, seeds)}
    saved = set()
    for env_id, setting in SETTINGS:
        for key in read_rows(results, env_id, setting):
            saved.add((env_id, setting, *key))

    path = results / "study_facts.json"
    machines = runs.read_json(path, {})

    def save(key, run):
        env_id, setting, variant, rate, seed = key
        flags = f"{flags_of(env_id, setting, rate)} {DETAILS[variant].flags}"
        steps = steps_of(env_id, setting, divisor)
        measured = measure_run(run, env_id, flags, steps)
        save_row(results, env_id, setting, (variant, rate, seed), measured)
        runs.note_machine(machines, PACKAGES)
        runs.write_json(path, machines)

    return runs.run_missing(commands, saved, save, workers)


# What the rows say


def measure(rows, variant, rate, name="mean_return"):
    """{seed: value}"""
    values = {}
    for (row_variant, row_rate, seed), row in rows.items():
        if (row_variant, row_rate) == (variant, rate):
            values[seed] = row[name]
    return values


def differences(values, default):
    """[one difference for each seed], so that runs in which nothing differed cancel."""
    return [values[seed] - default[seed] for seed in sorted(values) if seed in default]


def effect(rows, variant, rate, name="mean_return"):
    """A variant minus the default at this rate, [one difference for each seed]."""
    values = measure(rows, variant, rate, name)
    return differences(values, measure(rows, "default", rate, name))


def seeds_and_rates(rows):
    """The seeds that all variants have at all rates, and these rates."""
    variants = {variant for variant, _, _ in rows}
    rates = sorted({rate for _, rate, _ in rows})
    seeds = []
    for seed in sorted({seed for _, _, seed in rows}):
        if all((*pair, seed) in rows for pair in itertools.product(variants, rates)):
            seeds.append(seed)
    return seeds, rates


def mean_return(rows, variant, rate, seeds):
    return np.mean([rows[variant, rate, seed]["mean_return"] for seed in seeds])


def at_best_rate(rows, variant):
    """{seed: return at the variant's best rate}, and {rate: how often it was the best}.

    The best rate is chosen on half of the seeds and its return reported of the others,
    so that no run is reported that had a part in the choice. A seed's value is the mean
    over all ways to halve the seeds, as not all halves choose the same rate.
    """
    seeds, rates = seeds_and_rates(rows)
    values = {seed: [] for seed in seeds}
    chosen = collections.Counter()
    for half in itertools.combinations(seeds, len(seeds) // 2):
        means = [mean_return(rows, variant, rate, half or seeds) for rate in rates]
        best = rates[np.argmax(means)]
        chosen[best] += 1
        for seed in set(seeds) - set(half):
            values[seed].append(rows[variant, best, seed]["mean_return"])
    return {seed: np.mean(values[seed]) for seed in seeds}, chosen


def effect_at_best(rows, variant):
    """A variant minus the default, each at its own best rate."""
    values, _ = at_best_rate(rows, variant)
    default, _ = at_best_rate(rows, "default")
    return differences(values, default)


def shares(rows, variant, untrained):
    """{rate: mean return}, where 0 is an untrained agent's and 1 the default's best."""
    seeds, rates = seeds_and_rates(rows)
    defaults = [mean_return(rows, "default", rate, seeds) for rate in rates]
    best = max(defaults, default=math.nan) - untrained
    values = {}
    for rate in rates:
        values[rate] = (mean_return(rows, variant, rate, seeds) - untrained) / best
    return values


def failed(row, untrained):
    """Whether it diverged, or its end was not 10 % better than an untrained agent's."""
    return bool(row["error"]) or row["last_100"] <= untrained + 0.1 * abs(untrained)


def excludes_zero(values):
    """Whether the interval of their mean lies on one side of zero."""
    if len(values) < 2:
        return False
    low, high = interval(values)
    return low > 0 or high < 0


def describe(values):
    """Mean and interval of differences, bold where the interval excludes zero."""
    if not values:
        return ""
    low, high = interval(values)
    text = f"{np.mean(values):+.0f} ({low:+.0f} to {high:+.0f})"
    return f"**{text}**" if excludes_zero(values) else text


def mean_of(rows, variant, rate, name, form):
    """The mean over the seeds as a text of this form."""
    values = measure(rows, variant, rate, name).values()
    values = [value for value in values if math.isfinite(value)]
    return format(np.mean(values), form) if values else ""


# The tables


def grid_table(rows, variants, name):
    """Effects at each rate; the first row is the default's own return."""
    _, rates = seeds_and_rates(rows)
    default = [mean_of(rows, "default", rate, name, ".0f") for rate in rates]
    lines = [["default", *default]]
    for variant in variants[1:]:
        effects = [describe(effect(rows, variant, rate, name)) for rate in rates]
        lines.append([DETAILS[variant].label, *effects])
    return table(["", *[f"rate x {rate}" for rate in rates]], lines)


def summary_table(rows, variants, untrained):
    """Effects at the best rates, and which rates work."""
    _, rates = seeds_and_rates(rows)
    lines = []
    for variant in variants:
        values, chosen = at_best_rate(rows, variant)
        if variant == "default":
            effects = ["", "", f"{np.mean(list(values.values())):.0f}"]
        else:
            effects = [
                count_same(rows, variant),
                describe(effect(rows, variant, 1)),
                describe(effect_at_best(rows, variant)),
            ]
        often = chosen.total() / 4
        best = " or ".join([f"x {rate}" for rate in rates if chosen[rate] >= often])
        shown = []
        for share in shares(rows, variant, untrained).values():
            shown.append(f"**{share:.0%}**" if share >= 0.9 else f"{share:.0%}")
        lines.append([DETAILS[variant].label, *effects, best, *shown])

    header = [
        "",
        "same as default",
        "effect at the default rate",
        "at the best rates",
        "best rate",
        *[f"share at rate x {rate}" for rate in rates],
    ]
    return table(header, lines)


def count_same(rows, variant):
    """How many of a variant's runs are the default's in all that was measured."""
    count = 0
    same = 0
    for (row_variant, *key), row in rows.items():
        if row_variant == variant:
            count += 1
            same += row == rows.get(("default", *key))
    return f"{same} of {count}"


def mechanism_table(rows, variants, untrained):
    """What the updates did, one line for each variant and rate."""
    shown = {
        "kl_mean": ".4f",
        "kl_median": ".4f",
        "kl_max": ".4f",
        "clipfrac": ".3f",
        "explained_variance_median": ".2f",
        "epochs": ".2f",
        "ended_early": ".0%",
    }
    _, rates = seeds_and_rates(rows)
    lines = []
    for variant, rate in itertools.product(variants, rates):
        found = [row for key, row in rows.items() if key[:2] == (variant, rate)]
        failures = sum(failed(row, untrained) for row in found)
        means = [
            mean_of(rows, variant, rate, name, form) for name, form in shown.items()
        ]
        lines.append(
            [
                DETAILS[variant].label,
                f"x {rate}",
                mean_of(rows, variant, rate, "mean_return", ".0f"),
                f"{failures} of {len(found)}",
                *means,
            ]
        )
    header = [
        "",
        "rate",
        "return",
        "failed",
        "approx_kl: mean",
        "median",
        "highest",
        "clipfrac",
        "explained variance",
        "epochs",
        "updates ended early",
    ]
    return table(header, lines)


SECTION = """## {env_id}, {name}

{seeds} seeds, {steps:,} steps, {flags}

Effect on the return over the run; first the default's own:

{mean_return}

Effect on the return of the last 100 episodes:

{last_100}

{summary}

What the updates did, means over seeds:

{mechanism}
"""

TEXT = """# When does each detail matter?

`python -m benchmark.study`, {machines}; one torch thread for each run.

Learning rate 2.5e-4 times {rates}. The numbers are those of the details in ppo.py: \
each is
switched off alone (a bonus: on). Return over the run is the mean of the learning \
curve of {windows} points,
each the mean return of the episodes that ended in that part of the run's steps; where \
none did, of those that ended
next. Effects are differences to the default's run of the same seed; after their mean, \
its 95 % percentile bootstrap
interval; bold where it excludes zero. "Same as default" counts the runs that are the \
default's in all that was
measured: there, what was switched never acted.

At the best rates: each side at its own best of the rates of its table, chosen on one \
half of the seeds and reported of
the other, in the mean over all ways to halve them. "Best rate" is what at least a \
quarter of the halves chose. Share:
the mean return in units of the default's at its best rate, where an untrained agent \
({untrained}) is 0;
bold from 90 % on: a rate that works.

Failed: runs whose last 100 episodes were less than 10 % better than an untrained \
agent's, and those that diverged (not
finite any more), of which what was not reached, and the last 100 episodes, count as \
an untrained agent's. The last 100
episodes of a good run are a third of CartPole's steps. approx_kl is that of each \
update's last minibatch; the mean,
median and highest of the updates. clipfrac is of all minibatches: what leaves 1 ± \
0.2, also where nothing is clipped.
Explained variance is the median of the updates. Epochs are how many an update had, as \
--target-kl may end one early.

Chance: {compared} intervals of the return over the run compare a variant with the \
default at a rate (without those
where it never acted), and {found} exclude zero. If nothing had any effect, 5 % would \
by chance,
{by_chance:.0f}; in truth about 10 %, {in_truth:.0f}, as a percentile interval of ten \
values is
too narrow (tried with normal values). All variants at a rate are compared with the \
same ten runs of the default:
several bold ones in a column may have one cause, several in a row are better \
evidence. Where a run learns all or
nothing, as on Acrobot, a single failure moves the mean by a tenth of all there is to \
gain.

{sections}"""


def write_tables(results):
    """Write study.md, and print it."""
    sections = []
    compared = []
    for (env_id, name), setting in SETTINGS.items():
        rows = read_rows(results, env_id, name)
        saved = {variant for variant, _, _ in rows}
        variants = [variant for variant in setting.variants if variant in saved]
        sections.append(section(rows, env_id, name, variants))
        for variant, rate in itertools.product(variants[1:], setting.rates):
            effects = effect(rows, variant, rate)
            if any(effects):
                compared.append(effects)

    untrained = [f"{env_id}: {value:.0f}" for env_id, value in UNTRAINED.items()]
    machines = runs.read_json(results / "study_facts.json", {})
    text = TEXT.format(
        machines=runs.describe_machines(machines),
        rates=", ".join(map(str, RATES)),
        windows=WINDOWS,
        untrained=", ".join(untrained),
        compared=len(compared),
        found=sum(map(excludes_zero, compared)),
        by_chance=0.05 * len(compared),
        in_truth=0.1 * len(compared),
        sections="\n".join(sections),
    )
    runs.write_whole(results / "study.md", text)
    print(text)


def section(rows, env_id, name, variants):
    """The tables of one setting."""
    setting = SETTINGS[env_id, name]
    untrained = UNTRAINED[env_id]
    flags = "all other flags at their defaults"
    if setting.flags:
        flags = f"`{setting.flags}`"
    summary = ""
    if name == "rates":
        summary = summary_table(rows, variants, untrained)
    seeds, _ = seeds_and_rates(rows)
    return SECTION.format(
        env_id=env_id,
        name=name,
        seeds=len(seeds),
        steps=setting.steps,
        flags=flags,
        mean_return=grid_table(rows, variants, "mean_return"),
        last_100=grid_table(rows, variants, "last_100"),
        summary=summary,
        mechanism=mechanism_table(rows, variants, untrained),
    )


def main(argv=None):
    """Run what the flags say, and write the tables."""
    env_ids = list(dict.fromkeys(env_id for env_id, _ in SETTINGS))
    parser = runs.make_parser(__doc__)
    add = parser.add_argument
    add("--environments", nargs="+", default=env_ids, choices=env_ids)
    add("--seeds", type=int, default=10)
    add("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    args = runs.parse_args(parser, argv)
    if not args.table_only:
        run_all(
            args.results,
            args.environments,
            args.seeds,
            args.workers,
            args.steps_divisor,
        )
    write_tables(args.results)


if __name__ == "__main__":
    main()
