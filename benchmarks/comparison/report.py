"""Tables (RST) and a figure (PNG) of the comparison, from the CSV table of its runs.

    results=benchmarks/comparison/results
    python -m benchmarks.comparison.report $results/tuning.csv $results
    python -m benchmarks.comparison.report $results/levers.csv $results
    python -m benchmarks.comparison.report $results/final.csv $results/final docs/_static/compare.png
    python -m benchmarks.comparison.report $results/second.csv $results/second docs/_static/second.png
    python -m benchmarks.comparison.report $results/words.csv $results/words docs/_static/words.png
    python -m benchmarks.comparison.report $results/icons.csv $results/icons docs/_static/icons.png

Without a figure: one file of tables on the validation concepts, called after the CSV file. With a figure: a file of tables for
each test part, and for time.

Differences are paired by seed, with 95% intervals (Student's t). Values are percent, except for ARI, AMI and modality gap.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..speed.measure import csv_table
from .stats import Curve, Interval, difference, final, interval, mean_curve, read_table, score, scores, share_of_time

BASE = "clip"
ABLATED, ABLATIONS = "protoclip", ("protoclip_reuse", "online", "no_pbt", "hard")
PARTS = {
    "validation": "validation concepts",
    "concepts": "concepts never trained on",
    "styles": "styles never trained on",
    "both": "concepts and styles never trained on",
    "test": "names never trained on; zero-shot, probe and grouping in sets never trained on",
    "unseen": "names in sets never trained on",
}
METRICS = {
    "linear_probe_group": "probe",
    "linear_probe_subgroup": "probe, fine",
    "zero_shot_group": "zero-shot",
    "zero_shot_subgroup": "zero-shot, fine",
    "image_to_text_recall@1": "I>T R@1",
    "image_to_text_recall@5": "R@5",
    "image_to_text_recall@10": "R@10",
    "text_to_image_recall@1": "T>I R@1",
    "text_to_image_recall@5": "R@5",
    "text_to_image_recall@10": "R@10",
    "ari_group": "ARI",
    "ami_group": "AMI",
    "ari_subgroup": "ARI, fine",
    "ami_subgroup": "AMI, fine",
    "modality_gap": "gap",
}
NOT_PERCENT = ("ari", "ami", "modality_gap")
CURVES = {
    "zero_shot_group": "zero-shot, groups",
    "zero_shot_subgroup": "zero-shot, subgroups",
    "ridge_probe_group": "ridge probe, groups",
    "ridge_probe_subgroup": "ridge probe, subgroups",
    "image_to_text_recall@5": "image to text, R@5",
    "text_to_image_recall@5": "text to image, R@5",
}
DRAWN = {
    "clip": ("CLIP", "0.55", "-"),
    "protoclip": ("ProtoCLIP", "C0", "-"),
    "teacher": ("with MiniLM as teacher", "C3", "--"),
    "distill": ("CLIP, MiniLM distilled", "C2", ":"),
    "protoclip_K600": ("ProtoCLIP, K 600", "C0", "-"),
    "teacher_soft": ("MiniLM as teacher, soft", "C3", "--"),
    "distill_4": ("CLIP, MiniLM distilled", "C2", ":"),
    "teacher_distill": ("MiniLM as teacher and distilled", "C4", "-."),
    "words_reuse": ("the captions' words as teacher", "C0", "-"),
    "clip_same_time": ("CLIP, as much time", "0.55", ":"),
    "words_distill": ("words as teacher and distilled", "C3", "--"),
}
# Also compared with these two: the same time without the words, and the words without prototypes.
OTHER_BASES = ("clip_same_time", "distill_words")
OF_WORDS = ("words_reuse", "words_distill")
CLOCK = "cpu_s"  # CPU time of the process does not depend on what else the machine runs

Runs = Mapping[str, Mapping[int, Curve]]


def scaled(metric: str, value: float) -> float:
    return value if metric.startswith(NOT_PERCENT) else 100 * value


def figure(metric: str, value: float, sign: str = "") -> str:
    return f"{scaled(metric, value):{sign}.{3 if metric.startswith(NOT_PERCENT) else 1}f}"


def shown(metric: str, value: Interval) -> str:
    """Mean and half-width of the interval, in bold where it excludes 0."""
    half = value.high - value.mean
    text = figure(metric, value.mean, "+") + (f" ± {figure(metric, half)}" if math.isfinite(half) else "")
    return f"**{text}**" if value.clear else text


def levels(runs: Runs, part: str) -> str:
    """Mean metrics of every arm."""
    metrics = {key: title for key, title in METRICS.items() if final(runs[BASE], f"{part}/{key}")}
    rows = []
    for arm, seeds in runs.items():
        cells = [figure(key, statistics.fmean(final(seeds, f"{part}/{key}").values())) for key in metrics]
        rows.append([arm, str(len(seeds)), *cells])
    return csv_table(f"Means: {PARTS[part]}", ["arm", "seeds", *metrics.values()], rows)


def base_of(arm: str, runs: Runs, base: str) -> str:
    """The base arm under the same condition, which is what follows the comma in the arm's name; else the base arm itself."""
    same = base + arm[len(arm.split(",")[0]) :]
    return same if same in runs else base


def differences(runs: Runs, part: str, base: str = BASE) -> str:
    """Paired differences to the base arm; on validation concepts also for the score that settings are chosen by."""
    metrics = {key: title for key, title in METRICS.items() if final(runs[base], f"{part}/{key}")}
    if part == "validation":
        metrics = {"score": "score", **metrics}

    def figures(arm: str, key: str) -> dict[int, float]:
        return scores(runs[arm]) if key == "score" else final(runs[arm], f"{part}/{key}")

    rows = []
    for arm, seeds in runs.items():
        own_base = base_of(arm, runs, base)
        found = {key: difference(figures(arm, key), figures(own_base, key)) for key in metrics}
        if arm not in (own_base, "random") and all(found.values()):
            rows.append([arm, str(len(seeds)), *(shown(key, x) for key, x in found.items() if x is not None)])
    return csv_table(f"Difference to {base}: {PARTS[part]}", ["arm", "seeds", *metrics.values()], rows)


def curves_of(runs: Runs) -> dict[str, str]:
    """The metrics that are drawn over the training, as far as the data set has them."""
    return {key: title for key, title in CURVES.items() if final(runs[BASE], f"validation/{key}")}


def against(runs: Runs, part: str, base: str, arms: Sequence[str]) -> str:
    """Differences of these arms alone to this base; empty where it was not run, or none of them."""
    found = {arm: seeds for arm, seeds in runs.items() if arm in (base, *arms)}
    return differences(found, part, base) if base in found and len(found) > 1 else ""


def shares(runs: Runs) -> str:
    """Share of CLIP's training time after which an arm's mean curve reaches the best point of CLIP's mean curve."""
    names = {f"validation/{key}": title for key, title in curves_of(runs).items()}
    base = mean_curve(runs[BASE], [*names, CLOCK])
    rows = []
    for arm, seeds in runs.items():
        if arm not in ("random", BASE):
            curve = mean_curve(seeds, [*names, CLOCK])
            found = [share_of_time(curve, base, name, CLOCK) for name in names]
            rows.append([arm, *(f"{100 * x:.0f}%" if math.isfinite(x) else "not reached" for x in found)])
    return csv_table("Share of CLIP's training time to CLIP's best validation figure", ["arm", *names.values()], rows)


def tried(runs: Runs) -> str:
    """Every setting that was tried, best score first."""
    order = sorted(runs, key=lambda arm: -score(runs[arm]))
    metrics = {key: title for key, title in METRICS.items() if final(runs[BASE], f"validation/{key}")}
    rows = []
    for arm in order:
        cells = [figure(key, statistics.fmean(final(runs[arm], f"validation/{key}").values())) for key in metrics]
        rows.append([arm, str(len(runs[arm])), f"{100 * score(runs[arm]):.2f}", *cells])
    return csv_table("Settings tried, on validation concepts", ["setting", "seeds", "score", *metrics.values()], rows)


def costs(runs: Runs) -> str:
    """CPU time per training sample by stage, and its ratio to CLIP's, paired by seed."""
    stages = ("cpu_training_s", "cpu_loss_s", "cpu_extraction_s", "cpu_clustering_s", "cpu_back_translation_s")

    def per_sample(curve: Curve, column: str) -> float:
        return 1e3 * curve[-1][column] / curve[-1]["samples"]

    rows = []
    for arm, seeds in runs.items():
        if arm == "random":
            continue
        ratios = [per_sample(seeds[s], CLOCK) / per_sample(runs[BASE][s], CLOCK) for s in seeds.keys() & runs[BASE].keys()]
        times = [f"{statistics.median(per_sample(curve, stage) for curve in seeds.values()):.3f}" for stage in stages]
        rows.append([arm, f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]", *times])
    header = ["arm", "all / CLIP", "training", "of it loss", "extraction", "clustering", "of it back translation"]
    return csv_table("CPU milliseconds per training sample, medians over seeds", header, rows)


def draw(runs: Runs, path: Path) -> None:
    """Validation metrics over training samples and, below, over CPU time: means over seeds with 95% intervals."""
    curves = curves_of(runs)
    columns = 3 if len(curves) % 3 == 0 else 2
    height = 5.25 * len(curves) / columns
    picture, axes = plt.subplots(2 * len(curves) // columns, columns, figsize=(9, height), layout="constrained")
    for number, (metric, title) in enumerate(curves.items()):
        block, column = divmod(number, columns)
        for row, clock in enumerate(("samples", CLOCK)):
            axis: Axes = axes[2 * block + row, column]
            for arm, (label, colour, style) in DRAWN.items():
                if arm in runs:
                    _line(axis, runs[arm], f"validation/{metric}", clock, label, colour, style)
            axis.set_xlabel("training samples, thousands" if row == 0 else "CPU time of training, s")
            axis.grid(True, alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[2 * block, column].set_title(title, fontsize=10)
        axes[2 * block, column].sharey(axes[2 * block + 1, column])
    handles, names = axes[0, 0].get_legend_handles_labels()
    picture.legend(handles, names, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    picture.supylabel("percent, concepts never trained on (validation)", fontsize=9)
    picture.savefig(path, dpi=150)


def _line(axis: Axes, seeds: Mapping[int, Curve], metric: str, clock: str, label: str, colour: str, style: str) -> None:
    points = list(zip(*seeds.values(), strict=True))
    x = [statistics.fmean(row[clock] for row in rows) / (1e3 if clock == "samples" else 1) for rows in points]
    y = [interval([100 * row[metric] for row in rows]) for rows in points]
    axis.plot(x, [value.mean for value in y], style, color=colour, label=f"{label}, {len(seeds)} seeds")
    if len(seeds) > 1:
        axis.fill_between(x, [v.low for v in y], [v.high for v in y], color=colour, alpha=0.15, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file of the runs")
    parser.add_argument("folder", type=Path, help="folder for the tables; it is created")
    parser.add_argument("figure", type=Path, nargs="?", help="PNG file for the curves")
    args = parser.parse_args()
    table, folder = args.table, args.folder
    folder.mkdir(parents=True, exist_ok=True)
    runs = read_table(table)
    if args.figure is None:
        repeated = any(len(seeds) > 1 for seeds in runs.values())
        (folder / f"{table.stem}.rst").write_text((differences(runs, "validation") if repeated else "") + tried(runs))
        return
    for part in PARTS:
        if part == "validation" or not any(name.startswith(f"{part}/") for name in runs[BASE][min(runs[BASE])][-1]):
            continue
        others = "".join(against(runs, part, base, OF_WORDS) for base in OTHER_BASES)
        (folder / f"{part}.rst").write_text(differences(runs, part) + others + levels(runs, part))
    if ABLATED in runs:
        (folder / "ablation.rst").write_text(against(runs, "concepts", ABLATED, ABLATIONS))
    (folder / "time.rst").write_text(shares(runs) + costs(runs))
    draw(runs, args.figure)


if __name__ == "__main__":
    main()
