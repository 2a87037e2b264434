"""Plot time and memory of the losses over the batch size and the number of prototypes.

    python -m benchmarks.speed.curves benchmarks/speed/results/curves.csv docs/_static/cost.png

If the CSV file does not exist, it is measured first by benchmarks.speed.losses, in about 6 minutes on 2 cores.
"""

import argparse
import csv
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .measure import python_m

SWEEPS = {
    "prototype term, K 20,000, D 128": ("B", "soft/float32/{}/20000/128", (64, 256, 1024, 4096, 16384)),
    "prototype term, B 1,024, D 128": ("K", "soft/float32/1024/{}/128", (256, 1024, 4096, 16384, 65536)),
    "InfoNCE, d 512": ("B", "pairs/{}/512", (256, 1024, 4096, 8192, 16384)),
}
STYLES = {"ours": ("this library", "C0", "o-"), "dense": ("dense expression", "C1", "s-"), "floor": ("bare products", "0.5", ":")}


def measure(path: Path) -> None:
    names = list(dict.fromkeys(name.format(size) for _, name, sizes in SWEEPS.values() for size in sizes))
    calls = ["ours", "dense", "floor", "floor3"]
    options = ["--repeats", "3", "--csv", str(path), "--calls", *calls, "--cases", *names]
    subprocess.run(python_m("benchmarks.speed.losses", *options), check=True)


def draw(
    time: Axes, memory: Axes, rows: dict[tuple[str, str], dict[str, str]], title: str, by: str, name: str, sizes: tuple[int, ...]
) -> None:
    for call, (label, colour, style) in STYLES.items():
        column = "floor3" if call == "floor" and name.startswith("pairs") else call
        found = [(size, rows[key]) for size in sizes if (key := (name.format(size), column)) in rows]
        time.loglog(
            [x for x, _ in found],
            [float(row["median ms [min, max]"].split()[0]) for _, row in found],
            style,
            color=colour,
            label=label,
        )
        if call != "floor":
            peaks = [max(1.0, float(row["peak extra MB"])) for _, row in found]
            memory.loglog([x for x, _ in found], peaks, style, color=colour, label=label)
    time.set_title(title, fontsize=10)
    memory.set_xlabel(by)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="CSV file of the measurements")
    parser.add_argument("figure", type=Path, help="PNG file to write")
    args = parser.parse_args()
    if not args.csv.exists():
        measure(args.csv)
    with args.csv.open() as file:
        machine = file.readline().removeprefix("# ").strip()
        rows = {(row["case"], row["call"]): row for row in csv.DictReader(file)}
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(11, 6), sharex="col", layout="constrained")
    for column, (title, (by, name, sizes)) in enumerate(SWEEPS.items()):
        draw(axes[0, column], axes[1, column], rows, title, by, name, sizes)
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("peak extra memory, MB")
    axes[0, 0].legend(frameon=False)
    for axis in axes.flat:
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(machine, fontsize=8, color="0.4")
    figure.savefig(args.figure, dpi=110)


if __name__ == "__main__":
    main()
