"""Statistics of the comparison, computed from the rows of its table alone; `report.py` prints them."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

Curve = list[dict[str, float]]  # one row per evaluated pass


def read_table(path: Path) -> dict[str, dict[int, Curve]]:
    """Rows of each arm and seed, in the order of passes. An arm that was run with different settings raises ValueError."""
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
    """Mean over n seeds with a 95% confidence interval (Student's t)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0: significant at the 5% level."""
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% t interval, which is infinite for a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    half = float(import_module("scipy.stats").t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def final(runs: Mapping[int, Curve], metric: str) -> dict[int, float]:
    """The last value of a metric for each seed whose run has it."""
    return {seed: curve[-1][metric] for seed, curve in sorted(runs.items()) if metric in curve[-1]}


SCORE = ("zero_shot_group", "zero_shot_subgroup", "linear_probe_group", "linear_probe_subgroup", "ami_subgroup")
RECALLS = tuple(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


def score(runs: Mapping[int, Curve], part: str = "validation") -> float:
    """The criterion for choosing settings: the mean of zero-shot, probes, AMI and mean recall, averaged over seeds.

    Over the metrics that the data set has: the icons have one kind of classes, and there it is AMI with that.
    """
    found = [final(runs, f"{part}/{metric}") for metric in SCORE]
    if not found[-1]:
        found[-1] = final(runs, f"{part}/ami_group")
    figures = [statistics.fmean(values.values()) for values in found if values]
    recall = statistics.fmean(value for metric in RECALLS for value in final(runs, f"{part}/{metric}").values())
    return statistics.fmean([*figures, recall])


def scores(runs: Mapping[int, Curve]) -> dict[int, float]:
    """:func:`score` of each seed."""
    return {seed: score({seed: curve}) for seed, curve in runs.items()}


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Paired difference over the seeds that both have; a seed fixes initialisation, order and augmentation in both."""
    both = ours.keys() & theirs.keys()
    return interval([ours[seed] - theirs[seed] for seed in sorted(both)]) if both else None


def paired(ours: Mapping[int, Curve], theirs: Mapping[int, Curve], metric: str) -> Interval | None:
    """:func:`difference` of a metric at the end of the runs."""
    return difference(final(ours, metric), final(theirs, metric))


def share_of_time(ours: Curve, theirs: Curve, metric: str, clock: str) -> float:
    """Time at which our run first reaches the other run's best value, as a share of the other run's total time.

    Values are known after evaluated passes only and are not interpolated. Infinite if our run never reaches it.
    """
    best = max(row[metric] for row in theirs)
    reached = [row[clock] for row in ours if row[metric] >= best]
    return min(reached, default=math.inf) / theirs[-1][clock]


def mean_curve(runs: Mapping[int, Curve], metrics: Sequence[str]) -> Curve:
    """Mean over seeds of each column, pass by pass."""
    curves = list(runs.values())
    return [{name: statistics.fmean(row[name] for row in rows) for name in metrics} for rows in zip(*curves, strict=True)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
