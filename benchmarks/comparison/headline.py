"""The tables that lead README and the documentation, computed from the committed results.

    python -m benchmarks.comparison.headline              # prints the Markdown of README
    python -m benchmarks.comparison.headline --rst FILE   # writes them for the documentation

An arm with fewer than five seeds is in the documentation, where its seeds are printed, and not in README.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..speed.measure import csv_table
from .report import BASE, CLOCK, Runs, shown
from .stats import Curve, paired, read_table

RESULTS = Path(__file__).parent / "results"
FEWEST_SEEDS = 5
ARMS = {
    "words_reuse": "**captions' words as teacher**, features of training reused",
    "words_extracted": "the same with an extraction pass",
    "distill_words": "captions' words distilled, no prototypes",
    "words_distill": "captions' words as teacher and distilled",
    "words_distill_narrow": "the same with heads of 128 in place of 512",
    "words_online": "captions' words as teacher, online mode",
    "minilm_reuse": "MiniLM, a pretrained model, as teacher",
    "both_distill": "words and MiniLM as teachers and distilled",
    "clip_same_time": "CLIP with more passes, in as much time",
}


class Table(NamedTuple):
    """A data set: its file of runs, and the columns that are shown."""

    title: str
    file: str
    columns: dict[str, str]


TABLES = (
    Table(
        "Emoji, concepts never trained on",
        "words.csv",
        {
            "concepts/zero_shot_group": "zero-shot, 9",
            "concepts/zero_shot_subgroup": "zero-shot, 99",
            "concepts/linear_probe_group": "linear probe, 9",
            "concepts/linear_probe_subgroup": "linear probe, 99",
            "concepts/image_to_text_recall@5": "image to text R@5",
            "concepts/text_to_image_recall@5": "text to image R@5",
            "concepts/ami_subgroup": "AMI, 99",
        },
    ),
    Table(
        "Icons, names never trained on; zero-shot, probe and AMI in eight sets never trained on",
        "icons.csv",
        {
            "test/zero_shot_group": "zero-shot",
            "test/linear_probe_group": "linear probe",
            "test/image_to_text_recall@5": "image to text R@5",
            "test/text_to_image_recall@5": "text to image R@5",
            "unseen/image_to_text_recall@5": "image to text R@5, sets not trained on",
            "test/ami_group": "AMI",
        },
    ),
)


def rows_of(table: Table, runs: Runs, fewest: int = 2) -> list[list[str]]:
    """Differences of each arm to CLIP, and its CPU time as a ratio to CLIP's: the median over seeds."""
    rows = []
    for arm, label in ARMS.items():
        seeds = len(runs.get(arm, {}).keys() & runs[BASE].keys())
        if seeds < fewest:
            continue
        found = {column: paired(runs[arm], runs[BASE], column) for column in table.columns}
        cells = [shown(column.partition("/")[2], value) for column, value in found.items() if value is not None]
        rows.append([label, str(seeds), *cells, f"{cost(runs[arm], runs[BASE]):.2f}"])
    return rows


def cost(ours: Mapping[int, Curve], theirs: Mapping[int, Curve]) -> float:
    """Median over the common seeds of the ratio of CPU time."""
    return statistics.median(ours[seed][-1][CLOCK] / theirs[seed][-1][CLOCK] for seed in ours.keys() & theirs.keys())


def header(table: Table) -> list[str]:
    return ["difference to CLIP", "seeds", *table.columns.values(), "CPU time"]


def markdown(table: Table, runs: Runs) -> str:
    """The table as README has it; empty while no arm has enough seeds."""
    rows = rows_of(table, runs, FEWEST_SEEDS)
    if not rows:
        return ""
    lines = [header(table), ["---"] * len(header(table)), *rows]
    return "\n".join([f"{table.title}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def rst(table: Table, runs: Runs) -> str:
    rows = [[cell.replace("**", "") if number == 0 else cell for number, cell in enumerate(row)] for row in rows_of(table, runs)]
    return csv_table(table.title, header(table), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rst", type=Path, help="file to write for the documentation")
    args = parser.parse_args()
    tables = [(table, read_table(RESULTS / table.file)) for table in TABLES]
    if args.rst is not None:
        args.rst.write_text("\n".join(rst(table, runs) for table, runs in tables))
        return
    print("\n\n".join(filter(None, (markdown(table, runs) for table, runs in tables))))


if __name__ == "__main__":
    main()
