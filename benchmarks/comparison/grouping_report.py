"""Grouping over the size of the modality gap, as a table (RST) and a figure (PNG), from the runs of `plans/grouping.json`.

    results=benchmarks/comparison/results
    python -m benchmarks.comparison benchmarks/comparison/plans/grouping.json $results/grouping.csv --jobs 2
    python -m benchmarks.comparison.grouping_report $results/grouping.csv $results/grouping.rst docs/_static/grouping.png

Arms of that plan are called "method" or "method, degrees".
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt

from ..speed.measure import csv_table
from .stats import Interval, final, interval, read_table

METRICS = {
    "ami_subgroup": "K-means on image features, AMI with 99 subgroups",
    "linear_probe_subgroup": "linear probe, 99 subgroups",
    "zero_shot_group": "zero-shot, 9 groups",
}
METHODS = {
    "clip": ("InfoNCE only", "0.45", "o-"),
    "no_pbt": ("prototypes, not back-translated", "C1", "s--"),
    "protoclip": ("prototypes, back-translated", "C0", "^-"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file of the runs")
    parser.add_argument("rst", type=Path, help="RST file for the table")
    parser.add_argument("figure", type=Path, help="PNG file for the figure")
    args = parser.parse_args()
    runs = read_table(args.table)
    means = {
        arm: {metric: interval(list(final(seeds, f"validation/{metric}").values())) for metric in METRICS}
        for arm, seeds in runs.items()
    }
    rows = [[arm, str(len(runs[arm])), *(_shown(value) for value in values.values())] for arm, values in means.items()]
    args.rst.write_text(csv_table("Mean over seeds and 95% interval", ["arm", "seeds", *METRICS.values()], rows))
    figure, axes = plt.subplots(1, len(METRICS), figsize=(4 * len(METRICS), 3.6), layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for method, (label, colour, style) in METHODS.items():
            points = sorted((_degrees(arm), values[metric]) for arm, values in means.items() if _method(arm) == method)
            x, y = [degrees for degrees, _ in points], [value for _, value in points]
            bars = [value.high - value.mean if math.isfinite(value.high) else 0.0 for value in y]
            axis.errorbar(x, [value.mean for value in y], bars, fmt=style, color=colour, label=label, capsize=3)
        axis.axhline(means["random"][metric].mean, color="0.6", linestyle=":", label="random encoder")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("angle between image and text features, degrees")
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(args.figure, dpi=110)


def _method(arm: str) -> str:
    """Empty for an arm that belongs to none of the lines in the figure."""
    method, _, degrees = arm.partition(", ")
    return method if not degrees or degrees.isdigit() else ""


def _degrees(arm: str) -> int:
    return int(arm.partition(", ")[2] or 0)


def _shown(value: Interval) -> str:
    half = value.high - value.mean
    return f"{value.mean:.3f} ± {half:.3f}" if math.isfinite(half) else f"{value.mean:.3f}"


if __name__ == "__main__":
    main()
