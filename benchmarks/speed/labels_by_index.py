"""Prototypes of a teacher that was clustered over N samples, N small and large: seconds by stage, and the memory they take.

    python -m benchmarks.speed.labels_by_index --folder /somewhere          # N 100,000 and 100,000,000, K 10,000, D 128
    python -m benchmarks.speed.labels_by_index --rounds 1 --rows 100000 1000000

For each N a file of ``KMeansResult.save`` (labels int64) and a .npy of the same labels as int32 are written in blocks, and
deleted at the end. A new process for each N and form, in turn, trains on episodes of ``--episode`` samples drawn from all N: the
first from features that were extracted, the others from those that the training of the episode before computed. The pages of its
file are dropped before it starts, so that the first build reads all labels from the disk. RssAnon is the memory of the process
itself; pages of the file, which the system may drop at any time, are not in it. Its peak is sampled every 5 ms.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protoclip_losses import Clustering, ClusteringReport, EpisodicClusterer, FeatureBank, KMeansResult, ProtoLoss

from .large_clustering import now
from .measure import anonymous_bytes, in_new_process, machine, peak_anonymous_bytes

BLOCK = 2**20
FORMS = {"result": "KMeansResult, int64", "narrow": "Clustering, int32"}
STAGES = ("load", "first build", "later builds", "step")


def make_files(folder: Path, rows: int, clusters: int, width: int) -> None:
    """``result`` and ``narrow.npy``: the same drawn labels, in both forms."""
    mapped = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (rows,))
        for name, dtype in (("wide", np.int64), ("narrow", np.int32))
    ]
    random, counts = np.random.default_rng(0), np.zeros(clusters, np.int64)
    for start in range(0, rows, BLOCK):
        labels = random.integers(clusters, size=min(BLOCK, rows - start))
        counts += np.bincount(labels, minlength=clusters)
        for file in mapped:
            file[start : start + len(labels)] = labels
    report = ClusteringReport("torch", "", (1.0,), 1.0, 1.0, 0, 0, 0, {})
    centroids, wide = torch.randn(clusters, width), torch.from_numpy(mapped[0])
    KMeansResult(centroids, wide, torch.from_numpy(counts), 1.0, report).save(folder / "result")
    (folder / "wide.npy").unlink()


def drop_pages(path: Path) -> None:
    """Leave nothing of a file in memory, as far as the system does so when told."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path, form: str) -> Clustering | KMeansResult:
    result = KMeansResult.load(folder / "result")
    if form == "result":
        return result
    return Clustering(result.centroids, torch.from_numpy(np.load(folder / "narrow.npy", mmap_mode="c")))


def train(folder: Path, form: str, rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Run in the new process."""
    random = np.random.default_rng(1)

    def draw() -> Tensor:
        """Samples of an episode, each once."""
        drawn = np.unique(random.integers(rows, size=2 * args.episode))
        return torch.from_numpy(random.permutation(drawn)[: args.episode])

    def features(index: Tensor) -> list[Tensor]:
        return [torch.nn.functional.normalize(torch.randn(len(index), args.width), dim=1).requires_grad_() for _ in range(2)]

    clusterer, loss = EpisodicClusterer(args.clusters), ProtoLoss(w_proto=0.0)
    index = draw()
    spent: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}
    bank = FeatureBank(index, args.width)
    bank.update(index, *(x.detach() for x in features(index)))
    small = Clustering(torch.randn(args.clusters, args.width), torch.zeros(1, dtype=torch.int64))
    sample = FeatureBank.from_features(torch.zeros(1, dtype=torch.int64), image=torch.ones(1, 2), text=torch.ones(1, 2))
    clusterer.build(sample, [small], internal=False)  # thread pools and lazy imports
    before, peak = anonymous_bytes(), peak_anonymous_bytes()

    def timed(stage: str, start: tuple[float, float]) -> None:
        spent[stage].append((now()[0] - start[0], now()[1] - start[1]))

    start = now()
    teacher = load(folder, form)
    timed("load", start)
    for number in range(args.episodes):
        start = now()
        prototypes = clusterer.build(bank, {"teacher": teacher}, internal=False, index=index)
        timed("later builds" if number else "first build", start)
        loss.set_prototypes(prototypes)
        order = [index[end - args.batch : end] for end in range(args.batch, len(index) + 1, args.batch)]
        bank = FeatureBank(torch.cat(order), args.width)
        for batch in order:
            image, text = features(batch)
            start = now()
            loss(image, text, 10.0, index=batch).backward()
            timed("step", start)
            bank.update(batch, image.detach(), text.detach())
        index = draw()
    found = {"peak": float(peak[0]), "before": float(before)}
    for stage, times in spent.items():
        found[f"{stage} s"], found[f"{stage} CPU s"] = (statistics.median(column) for column in zip(*times, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 100_000_000], help="N")
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--episode", type=int, default=25_000)
    parser.add_argument("--episodes", type=int, default=3, help="of a process, at least 2")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the files are made; None is the system's folder of temporary files")
    parser.add_argument("--of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        folder, form, rows = args.of
        print(json.dumps(train(Path(folder), form, int(rows), args)))
        return
    print(machine("cpu"))
    print(
        f"K {args.clusters:,}, D {args.width}, episodes of {args.episode:,}, B {args.batch}; {args.rounds} rounds: median [range]"
    )
    sizes = [x for name in ("clusters", "width", "episode", "episodes", "batch") for x in (f"--{name}", str(getattr(args, name)))]
    found: dict[tuple[int, str], list[dict[str, float]]] = {(rows, form): [] for rows in args.rows for form in FORMS}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for rows in args.rows:
            Path(folder, str(rows)).mkdir()
            make_files(Path(folder, str(rows)), rows, args.clusters, args.width)
        for _ in range(args.rounds):
            for rows, form in found:
                for file in Path(folder, str(rows)).iterdir():
                    drop_pages(file)
                place = str(Path(folder, str(rows)))
                found[rows, form].append(
                    in_new_process("benchmarks.speed.labels_by_index", "--of", place, form, str(rows), *sizes)
                )
    columns = [f"{stage} {kind}" for stage in STAGES for kind in ("s", "CPU s")]
    print("| N | teacher | " + " | ".join(columns) + " | peak MB | before MB |")
    print("|---" * (len(columns) + 4) + "|")
    for (rows, form), measured in found.items():
        cells = [spread([one[name] for one in measured], 3) for name in columns]
        cells += [spread([one[name] / 1e6 for one in measured], 0) for name in ("peak", "before")]
        print(f"| {rows:,} | {FORMS[form]} | {' | '.join(cells)} |")


def spread(values: list[float], digits: int) -> str:
    middle, low, high = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    main()
