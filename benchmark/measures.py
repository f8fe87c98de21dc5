"""What the runs are measured by, and how the measures are written down."""

import statistics

import numpy as np

WINDOWS = 50  # points of a learning curve; each covers 2 % of a run's steps

# A run's episodes are two arrays: the global steps at which they ended, and their
# returns. total_steps are those of the run.


def last_100(steps, returns, total_steps):
    """Mean return of the last 100 episodes: how good a run was at its end."""
    return returns[-100:].mean()


def curve(steps, returns, total_steps):
    """The learning curve: mean returns of the episodes that ended in each window.

    The windows are equal parts of the run. Where no episode ended, it is NaN.
    """
    # The first step has number 1, so the last one of a window is a multiple.
    window = ((steps - 1) * WINDOWS // total_steps).astype(int)
    window = np.minimum(window, WINDOWS - 1)
    counts = np.bincount(window, minlength=WINDOWS)
    sums = np.bincount(window, returns, minlength=WINDOWS)
    means = np.full(WINDOWS, np.nan)
    return np.divide(sums, counts, out=means, where=counts > 0)


def curve_mean(steps, returns, total_steps):
    """Mean of the learning curve: how soon a run was good, and whether it stayed so.

    Equal parts of a run count alike. In the mean of all episodes, those of a bad part
    would count more because they are shorter, or less because they are longer.
    """
    return np.nanmean(curve(steps, returns, total_steps))


def interval(values):
    """The 95 % percentile bootstrap interval of the mean over the first axis.

    It is made of 10,000 resamples.
    """
    values = np.asarray(values)
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(values), size=(10_000, len(values)))
    means = values[chosen].mean(axis=1)
    return np.percentile(means, [2.5, 97.5], axis=0)


def spread(values, digits=0):
    """The median, with the smallest and the largest value."""
    numbers = [statistics.median(values), min(values), max(values)]
    median, smallest, largest = [f"{number:,.{digits}f}" for number in numbers]
    return f"{median} ({smallest} to {largest})"


def quotients(values, others):
    return [value / other for value, other in zip(values, others, strict=True)]


def table(header, rows, rule=" --- "):
    """A table in Markdown."""
    lines = []
    for cells in [header, *rows]:
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.insert(1, f"|{'|'.join([rule] * len(header))}|")
    return "\n".join(lines)
