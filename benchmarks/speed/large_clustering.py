"""K-means of a file that need not fit in memory, in a new process: seconds by stage, and the memory it takes.

    python -m benchmarks.speed.large_clustering                                     # N 1,000,000, K 2,000, D 128, 3 iterations
    python -m benchmarks.speed.large_clustering --rows 10000000 --clusters 10000    # a data set: hours on a quiet machine
    python -m benchmarks.speed.large_clustering --form blocks                       # a re-iterable of blocks, not a mapped file

The file holds N rows of width D in float16, a mixture of N / 100 groups, and is deleted at the end. RssAnon is the memory of the
process itself; pages of the file, which the system may drop at any time, are not in it. Its peak is sampled every 5 ms.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from protoclip_losses import KMeans
from protoclip_losses.clustering.progress import Progress

from .measure import anonymous_bytes, in_new_process, machine, peak_anonymous_bytes

BLOCK = 2**15
STAGES = ("first reading and seeding", "iterations", "labels", "predict")


def now() -> tuple[float, float]:
    """Seconds, and seconds of the processor in this process."""
    return time.perf_counter(), time.process_time()


def make_file(path: Path, rows: int, width: int) -> None:
    file = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    random = np.random.default_rng(0)
    centers = random.standard_normal((max(1, rows // 100), width), dtype=np.float32)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        noise = 0.5 * random.standard_normal((count, width), dtype=np.float32)
        file[start : start + count] = centers[random.integers(len(centers), size=count)] + noise


class Blocks:
    def __init__(self, file: "np.ndarray[tuple[int, ...], np.dtype[np.float16]]") -> None:
        self.file = file

    def __iter__(self) -> Iterator["np.ndarray[tuple[int, ...], np.dtype[np.float16]]"]:
        return (self.file[start : start + BLOCK] for start in range(0, len(self.file), BLOCK))


class Clock(Progress):
    """When each iteration ended."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def update(self, run: int, objectives: object) -> None:
        self.times.append(now())


def cluster(path: str, form: str, clusters: int, niter: int) -> dict[str, float]:
    """Run in the new process."""
    file = np.load(path, mmap_mode="r")
    KMeans(50, niter=1).fit(file[:2000])  # thread pools and lazy imports
    before, peak, clock = anonymous_bytes(), peak_anonymous_bytes(), Clock()
    Progress.update = lambda self, run, objectives: clock.update(run, objectives)  # type: ignore[method-assign]
    start = now()
    result = KMeans(clusters, niter=niter, tol=0, progress=True).fit(Blocks(file) if form == "blocks" else file)
    fitted = now()
    result.predict(file)
    ends = [start, clock.times[0], clock.times[-1], fitted, now()]
    found = {"iterations": float(len(result.report.objectives)), "before": float(before), "peak": float(peak[0])}
    for number, stage in enumerate(STAGES):
        for column, kind in enumerate(("seconds", "CPU seconds")):
            found[f"{stage} {kind}"] = ends[number + 1][column] - ends[number][column]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--niter", type=int, default=3)
    parser.add_argument("--form", choices=("file", "blocks"), default="file")
    parser.add_argument("--folder", help="where the file is made; None is the system's folder of temporary files")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        print(json.dumps(cluster(args.of, args.form, args.clusters, args.niter)))
        return
    print(machine("cpu"))
    print(
        f"N {args.rows:,}, K {args.clusters:,}, D {args.width}, float16: {args.rows * args.width * 2 / 1e6:.0f} MB, {args.form}"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "rows.npy")
        make_file(path, args.rows, args.width)
        options = ["--form", args.form, "--clusters", str(args.clusters), "--niter", str(args.niter)]
        found = in_new_process("benchmarks.speed.large_clustering", "--of", str(path), *options)
    print("| stage | seconds | CPU seconds |\n|---|---|---|")
    for stage in STAGES:
        print(f"| {stage} | {found[f'{stage} seconds']:.1f} | {found[f'{stage} CPU seconds']:.1f} |")
    extra = found["peak"] - found["before"]
    print(f"{found['iterations']:.0f} iterations; peak RssAnon {found['peak'] / 1e6:.0f} MB,")
    print(f"of which {extra / 1e6:.0f} MB by K-means: {extra / args.rows:.0f} bytes a row")


if __name__ == "__main__":
    main()
