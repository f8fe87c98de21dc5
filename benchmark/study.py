"""When does each detail of ppo.py matter? Each switched off in turn at several learning rates; and with data reused.

    pip install '.[benchmark]'
    python -m benchmark.study           # two cores: two and a half hours; a second call goes on where one stopped
    python -m benchmark.plots           # then draws what was saved

Three settings. "rates": as by default, but 16 environments x 32 steps in a batch, which is cheaper. "reuse": 10 epochs
for each batch instead of 4. "shape": the default's 4 x 128 steps, to see whether what two rows say holds there too.
Every run is one row of results/study/<environment>__<setting>.csv. The tables are results/study.md; --table-only makes
them of the saved rows.
"""

import argparse
import collections
import csv
import io
import itertools
import json
import math
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

import ppo
from benchmark import learning
from benchmark.learning import VARIANTS

RATES = (1, 3, 10, 30)  # times the default learning rate
DETAILS = learning.STUDIES["ablations"][3]
REUSE = ("default", "no_policy_clipping", "target_kl", "no_clip_vloss", "no_gradient_clipping", "no_norm_adv")
BATCHED = "--num-envs 16 --num-steps 32 --vectorization-mode vector_entry_point"
SETTINGS = {  # (environment, name): (steps, flags, rates, variants)
    ("CartPole-v1", "rates"): (150_000, BATCHED, RATES, DETAILS),
    ("CartPole-v1", "reuse"): (150_000, f"{BATCHED} --update-epochs 10", (10, 30), REUSE),
    ("CartPole-v1", "shape"): (150_000, "", (1, 30), ("default", "no_gae", "no_policy_clipping")),
    ("Acrobot-v1", "rates"): (100_000, "--num-envs 16 --num-steps 32", (1, 10), DETAILS),
}
# What the rest of a diverged run counts as: the return of an untrained agent, as its policy is of no use any more.
UNTRAINED = {"CartPole-v1": 20.0, "Acrobot-v1": -500.0}
KEY = ("variant", "rate", "seed")
MEASURES = ("mean_return", "last_100", "kl_mean", "kl_median", "kl_max", "clipfrac", "explained_variance")
MEASURES += ("explained_variance_median", "epochs", "ended_early", "error")


def run(env_id, setting, variant, rate, seed, steps):
    """Train once, in a folder that is then removed: what was measured, {name: value} of MEASURES."""
    _, flags, replacements = VARIANTS[variant]
    # Of two values of a flag the later one counts.
    flags = f"--env-id={env_id} {SETTINGS[env_id, setting][1]} {flags}"
    flags += f" --seed={seed} --total-timesteps={steps} --learning-rate={rate * 2.5e-4}"
    minibatches, compute_advantages = [], ppo.compute_advantages  # how many minibatches each update learned from
    ppo_loss = replacements.get("ppo.ppo_loss", ppo.ppo_loss)

    def counting_advantages(*args):
        minibatches.append(0)
        return compute_advantages(*args)

    def counting_loss(*args):
        minibatches[-1] += 1
        return ppo_loss(*args)

    replacements = replacements | {"ppo.compute_advantages": counting_advantages, "ppo.ppo_loss": counting_loss}
    with tempfile.TemporaryDirectory() as folder:
        episodes, error = learning.train(folder, flags, replacements)
        scalars = read_scalars(folder)
    if error and "diverged" not in error and error != "no episode ended":
        raise RuntimeError(f"{env_id} {setting} {variant} {rate} {seed}: {error}")  # no result of the algorithm's
    args = ppo.parse_args(flags.split())
    epochs = np.array(minibatches) / args.num_minibatches
    measured = dict.fromkeys(MEASURES, math.nan) | returns(env_id, episodes, error, steps) | {"error": error}
    if len(epochs):
        measured |= {"epochs": epochs.mean(), "ended_early": (epochs < args.update_epochs).mean()}
    if scalars:
        kl, clipfrac, explained = (scalars[f"losses/{x}"] for x in ("approx_kl", "clipfrac", "explained_variance"))
        measured |= {"kl_mean": kl.mean(), "kl_median": np.median(kl), "kl_max": kl.max(), "clipfrac": clipfrac.mean()}
        explained = explained[np.isfinite(explained)]  # not where all returns of a batch are the same
        measured |= {"explained_variance": explained.mean(), "explained_variance_median": np.median(explained)}
    return measured


def returns(env_id, episodes, error, steps):
    """Mean return over the run and of its last 100 episodes. A diverged run has no policy left: the part of the run
    that it did not reach, and its end, count as an untrained agent's."""
    curve = np.full(learning.WINDOWS, np.nan)
    if episodes:
        curve = learning.curve(*np.transpose(episodes), steps)
    for window in reversed(range(learning.WINDOWS - 1)):
        if math.isnan(curve[window]):  # no episode ended in it: those that end in the next one were being played
            curve[window] = curve[window + 1]
    if error:
        last = max((step for step, _ in episodes), default=0)
        unreached = np.arange(learning.WINDOWS) * steps / learning.WINDOWS >= last
        curve[unreached] = UNTRAINED[env_id]
        return {"mean_return": np.nanmean(curve), "last_100": UNTRAINED[env_id]}
    return {"mean_return": np.nanmean(curve), "last_100": np.mean([r for _, r in episodes[-100:]])}


def read_scalars(folder):
    """{tag: values, one for each update} of a run's TensorBoard events; empty if it logged no update."""
    scalars = {}
    for path in Path(folder).glob("runs/*/events.*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.startswith("losses/"):
                    scalars.setdefault(value.tag, []).append(value.simple_value)
    return {tag: np.array(values) for tag, values in scalars.items()}


def path_of(results, env_id, setting):
    return results / "study" / f"{env_id}__{setting}.csv"


def read_rows(results, env_id, setting):
    """{(variant, rate, seed): {name: value} of MEASURES} of a saved file."""
    path, rows = path_of(results, env_id, setting), {}
    for row in csv.DictReader(path.open(newline="")) if path.exists() else ():
        key = (row["variant"], int(row["rate"]), int(row["seed"]))
        rows[key] = {name: row[name] if name == "error" else float(row[name]) for name in MEASURES}
    return rows


def save_row(results, env_id, setting, key, measured):
    """Add a run to a saved file. The same runs make the same file, byte by byte, in whatever order they finish."""
    rows = read_rows(results, env_id, setting) | {key: measured}
    writer = csv.writer(out := io.StringIO(), lineterminator="\n")
    writer.writerow((*KEY, *MEASURES))
    for key in sorted(rows, key=lambda key: (SETTINGS[env_id, setting][3].index(key[0]), *key[1:])):
        values = (rows[key][name] for name in MEASURES)
        writer.writerow((*key, *(x if isinstance(x, str) else f"{x:.5g}" for x in values)))
    learning.replace(path_of(results, env_id, setting), out.getvalue().encode())


def run_all(results, env_ids, seeds, workers, divisor):
    """Run what is not saved yet. study_facts.json keeps where and when."""
    path, where = results / "study_facts.json", learning.machine()
    machines = json.loads(path.read_text()) if path.exists() else {}
    saved = {key: read_rows(results, *key) for key in SETTINGS if key[0] in env_ids}
    calls = {}
    for seed in range(1, seeds + 1):  # seed by seed, so that all comparisons grow at the same pace
        for setting in saved:
            steps, _, rates, variants = SETTINGS[setting]
            keys = [(variant, rate, seed) for variant in variants for rate in rates]
            calls |= {(*setting, *key): (*setting, *key, steps // divisor) for key in keys if key not in saved[setting]}
    for (env_id, setting, *key), measured in learning.in_parallel(run, calls, workers):
        save_row(results, env_id, setting, tuple(key), measured)
        first, _ = machines.get(where, [str(date.today())] * 2)
        machines[where] = [first, str(date.today())]
        learning.replace(path, (json.dumps(machines, indent=1) + "\n").encode())
    return list(calls)


def measure(rows, variant, rate, name="mean_return"):
    """{seed: value}"""
    return {seed: row[name] for (v, r, seed), row in rows.items() if (v, r) == (variant, rate)}


def differences(values, default):
    """[one difference per seed]. Paired, so that runs in which nothing differed cancel."""
    return [values[seed] - default[seed] for seed in sorted(values) if seed in default]


def effect(rows, variant, rate, name="mean_return"):
    """Variant minus default at this rate, [one difference per seed]."""
    return differences(measure(rows, variant, rate, name), measure(rows, "default", rate, name))


def seeds_and_rates(rows):
    """Those that all variants have."""
    rates = sorted({rate for _, rate, _ in rows})
    variants = {variant for variant, *_ in rows}
    seeds = sorted({seed for *_, seed in rows})
    return [seed for seed in seeds if all((v, rate, seed) in rows for v in variants for rate in rates)], rates


def at_best_rate(rows, variant):
    """{seed: return at the variant's best rate} and {rate: how often it was the best}. The best is chosen on half of
    the seeds and reported of the others, so that no run is reported that had a part in the choice. A seed's value is
    the mean over all ways to halve the seeds, as not all halves choose the same rate."""
    seeds, rates = seeds_and_rates(rows)
    values, chosen = {seed: [] for seed in seeds}, collections.Counter()
    for half in itertools.combinations(seeds, len(seeds) // 2):
        means = [np.mean([rows[variant, rate, seed]["mean_return"] for seed in half or seeds]) for rate in rates]
        best = rates[np.argmax(means)]
        chosen[best] += 1
        for seed in set(seeds) - set(half):
            values[seed].append(rows[variant, best, seed]["mean_return"])
    return {seed: np.mean(values[seed]) for seed in seeds}, chosen


def effect_at_best(rows, variant):
    """Variant minus default, each at its own best rate, [one difference per seed]."""
    return differences(at_best_rate(rows, variant)[0], at_best_rate(rows, "default")[0])


def shares(rows, variant, untrained):
    """{rate: mean return as a share of the default's at its best rate}, an untrained agent's being 0."""
    seeds, rates = seeds_and_rates(rows)

    def above_untrained(variant, rate):
        return np.mean([rows[variant, rate, seed]["mean_return"] for seed in seeds]) - untrained

    best = max((above_untrained("default", rate) for rate in rates), default=math.nan)
    return {rate: above_untrained(variant, rate) / best for rate in rates}


def failed(row, untrained):
    """Whether the run's last 100 episodes were not 10 % better than an untrained agent's, or it diverged."""
    return bool(row["error"]) or row["last_100"] <= untrained + 0.1 * abs(untrained)


def excludes_zero(values):
    low, high = learning.interval(values) if len(values) > 1 else (0, 0)
    return low > 0 or high < 0


def describe(values):
    """Mean and interval of differences, bold where the interval excludes zero."""
    if not values:
        return ""
    low, high = learning.interval(values)
    text = f"{np.mean(values):+.0f} ({low:+.0f} to {high:+.0f})"
    return f"**{text}**" if excludes_zero(values) else text


def mean_of(rows, variant, rate, name, form):
    values = [x for x in measure(rows, variant, rate, name).values() if math.isfinite(x)]
    return format(np.mean(values), form) if values else ""


def grid_table(rows, variants, name):
    """Effects at each rate; the first row is the default's own return."""
    rates = seeds_and_rates(rows)[1]
    lines = [("default", *(mean_of(rows, "default", rate, name, ".0f") for rate in rates))]
    lines += [(VARIANTS[v][0], *(describe(effect(rows, v, r, name)) for r in rates)) for v in variants[1:]]
    return learning.table(("", *(f"rate x {rate}" for rate in rates)), lines)


def summary_table(rows, variants, untrained):
    header = ("", "same as default", "effect at the default rate", "at the best rates", "best rate")
    rates, lines = seeds_and_rates(rows)[1], []
    for v in variants:  # the first is the default
        same = sum(row == rows.get(("default", *key)) for (variant, *key), row in rows.items() if variant == v)
        at_best, chosen = at_best_rate(rows, v)
        effects = ["", "", f"{np.mean([*at_best.values()]):.0f}"]
        if v != "default":
            runs = sum(variant == v for variant, *_ in rows)
            effects = [f"{same} of {runs}", describe(effect(rows, v, 1)), describe(effect_at_best(rows, v))]
        best = " or ".join(f"x {rate}" for rate in rates if chosen[rate] >= chosen.total() / 4)
        working = [f"**{x:.0%}**" if x >= 0.9 else f"{x:.0%}" for x in shares(rows, v, untrained).values()]
        lines.append((VARIANTS[v][0], *effects, best, *working))
    return learning.table((*header, *(f"share at rate x {rate}" for rate in rates)), lines)


def mechanism_table(rows, variants, untrained):
    header = ("", "rate", "return", "failed", "approx_kl: mean", "median", "highest", "clipfrac", "explained variance")
    lines = []
    for v, rate in [(v, rate) for v in variants for rate in seeds_and_rates(rows)[1]]:
        runs = [row for (variant, r, _), row in rows.items() if (variant, r) == (v, rate)]
        numbers = [mean_of(rows, v, rate, f"kl_{x}", ".4f") for x in ("mean", "median", "max")]
        numbers += [mean_of(rows, v, rate, "clipfrac", ".3f")]
        numbers += [mean_of(rows, v, rate, "explained_variance_median", ".2f")]
        numbers += [mean_of(rows, v, rate, "epochs", ".2f"), mean_of(rows, v, rate, "ended_early", ".0%")]
        fails = f"{sum(failed(row, untrained) for row in runs)} of {len(runs)}"
        lines.append((VARIANTS[v][0], f"x {rate}", mean_of(rows, v, rate, "mean_return", ".0f"), fails, *numbers))
    return learning.table((*header, "epochs", "updates ended early"), lines)


def write_tables(results):
    machines = json.loads((results / "study_facts.json").read_text())
    where = "; ".join(f"{' to '.join(sorted(set(dates)))}, {name}" for name, dates in machines.items())
    sections, compared = [], []
    for (env_id, setting), (steps, flags, rates, variants) in SETTINGS.items():
        rows, untrained = read_rows(results, env_id, setting), UNTRAINED[env_id]
        variants = [v for v in variants if any(v == variant for variant, *_ in rows)]
        summary = summary_table(rows, variants, untrained) if setting == "rates" else ""
        compared += [effect(rows, v, rate) for v in variants[1:] for rate in rates]
        seeds = len(seeds_and_rates(rows)[0])
        sections.append(f"""## {env_id}, {setting}

{seeds} seeds, {steps:,} steps, {f"`{flags}`" if flags else "all other flags at their defaults"}

Effect on the return over the run; first the default's own:

{grid_table(rows, variants, "mean_return")}

Effect on the return of the last 100 episodes:

{grid_table(rows, variants, "last_100")}

{summary}

What the updates did, means over seeds:

{mechanism_table(rows, variants, untrained)}
""")
    untrained = ", ".join(f"{env_id}: {value:.0f}" for env_id, value in UNTRAINED.items())
    compared = [x for x in compared if any(x)]
    found = sum(map(excludes_zero, compared))
    text = f"""# When does each detail matter?

`python -m benchmark.study`, {where}; one torch thread for each run.

Learning rate 2.5e-4 times {", ".join(map(str, RATES))}. The numbers are those of the details in ppo.py: each is
switched off alone (a bonus: on). Return over the run is the mean of the learning curve of {learning.WINDOWS} points,
each the mean return of the episodes that ended in that part of the run's steps; where none did, of those that ended
next. Effects are differences to the default's run of the same seed; after their mean, its 95 % percentile bootstrap
interval; bold where it excludes zero. "Same as default" counts the runs that are the default's in all that was
measured: there, what was switched never acted.

At the best rates: each side at its own best of the rates of its table, chosen on one half of the seeds and reported of
the other, in the mean over all ways to halve them. "Best rate" is what at least a quarter of the halves chose. Share:
the mean return in units of the default's at its best rate, where an untrained agent ({untrained}) is 0;
bold from 90 % on: a rate that works.

Failed: runs whose last 100 episodes were less than 10 % better than an untrained agent's, and those that diverged (not
finite any more), of which what was not reached, and the last 100 episodes, count as an untrained agent's. The last 100
episodes of a good run are a third of CartPole's steps. approx_kl is that of each update's last minibatch; the mean,
median and highest of the updates. clipfrac is of all minibatches: what leaves 1 ± 0.2, also where nothing is clipped.
Explained variance is the median of the updates. Epochs are how many an update had, as --target-kl may end one early.

Chance: {len(compared)} intervals of the return over the run compare a variant with the default at a rate (without those
where it never acted), and {found} exclude zero. If nothing had any effect, 5 % would by chance,
{0.05 * len(compared):.0f}; in truth about 10 %, {0.1 * len(compared):.0f}, as a percentile interval of ten values is
too narrow (tried with normal values). All variants at a rate are compared with the same ten runs of the default:
several bold ones in a column may have one cause, several in a row are better evidence. Where a run learns all or
nothing, as on Acrobot, a single failure moves the mean by a tenth of all there is to gain.

{chr(10).join(sections)}"""
    learning.replace(results / "study.md", text.encode())
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    env_ids = list(dict.fromkeys(env_id for env_id, _ in SETTINGS))
    parser.add_argument("--environments", nargs="+", default=env_ids, choices=env_ids)
    parser.add_argument("--seeds", type=int, default=10)
    args = learning.parse_args(parser)
    if not args.table_only:
        run_all(args.results, args.environments, args.seeds, args.workers, args.steps_divisor)
    write_tables(args.results)


if __name__ == "__main__":
    main()
