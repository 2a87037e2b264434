"""The statistics of the comparison: what `compare_report.py` prints, from the rows of the table alone."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

Curve = list[dict[str, float]]  # a row per pass


def read_table(path: Path) -> dict[str, dict[int, Curve]]:
    """Rows of each arm and seed, by pass. Raises ValueError for an arm that was run with two settings."""
    runs: dict[str, dict[int, Curve]] = {}
    settings: dict[str, str] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            arm = row["arm"]
            if settings.setdefault(arm, row["settings"]) != row["settings"]:
                raise ValueError(f"{path}: arm {arm!r} has runs with settings {settings[arm]} and {row['settings']}")
            numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
            runs.setdefault(arm, {}).setdefault(int(row["seed"]), []).append(numbers)
    return runs


class Interval(NamedTuple):
    """A mean over n seeds, and its 95% confidence interval by Student's t."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% t interval; it is without bounds for a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    half = float(import_module("scipy.stats").t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def final(runs: Mapping[int, Curve], metric: str) -> dict[int, float]:
    """The figure at the end of each seed's run, where there is one."""
    return {seed: curve[-1][metric] for seed, curve in sorted(runs.items()) if metric in curve[-1]}


SCORE = ("zero_shot_group", "zero_shot_subgroup", "linear_probe_group", "linear_probe_subgroup", "ami_subgroup")
RECALLS = tuple(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


def score(runs: Mapping[int, Curve], part: str = "validation") -> float:
    """What settings are chosen by: the mean of five figures and of the mean recall, over seeds."""
    figures = [statistics.fmean(final(runs, f"{part}/{metric}").values()) for metric in SCORE]
    recall = statistics.fmean(value for metric in RECALLS for value in final(runs, f"{part}/{metric}").values())
    return statistics.fmean([*figures, recall])


def scores(runs: Mapping[int, Curve]) -> dict[int, float]:
    """The score of each seed."""
    return {seed: score({seed: curve}) for seed, curve in runs.items()}


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Difference over the seeds that both have: what a seed decides (start, order, augmentation) is the same in both."""
    both = ours.keys() & theirs.keys()
    return interval([ours[seed] - theirs[seed] for seed in sorted(both)]) if both else None


def paired(ours: Mapping[int, Curve], theirs: Mapping[int, Curve], metric: str) -> Interval | None:
    """:func:`difference` of a figure at the end of the runs."""
    return difference(final(ours, metric), final(theirs, metric))


def share_of_time(ours: Curve, theirs: Curve, metric: str, clock: str) -> float:
    """Share of the other run's whole time at which ours first reaches the best figure that the other has at any pass.

    Time is looked at where both are evaluated, after each pass, and not between. Infinite if ours never gets there.
    """
    best = max(row[metric] for row in theirs)
    reached = [row[clock] for row in ours if row[metric] >= best]
    return min(reached, default=math.inf) / theirs[-1][clock]


def mean_curve(runs: Mapping[int, Curve], metrics: Sequence[str]) -> Curve:
    """The mean over seeds of each column, pass by pass."""
    curves = list(runs.values())
    return [{name: statistics.fmean(row[name] for row in rows) for name in metrics} for rows in zip(*curves, strict=True)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
