"""``python -m protoclip_losses.cluster``: cluster the rows of a .npy file, or captions by their words, from the command line.

    python -m protoclip_losses.cluster features.npy --num-clusters 20000 --out clusters/
    python -m protoclip_losses.cluster features.npy --num-clusters 20000 --out clusters/ --captions captions.txt
    python -m protoclip_losses.cluster --captions captions.txt --num-clusters 2000 --out clusters/

The features are memory-mapped and need not fit in memory. The folder then has ``clusters``, which ``KMeansResult.load`` reads and
``EpisodicClusterer.build`` takes for a teacher, ``report.json``, ``sizes.png`` if matplotlib is installed, and with captions
``captions.txt``: some captions of each cluster. ``--resume`` goes on after a kill, from the last iteration that ended.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..clustering import KMeans, KMeansResult
from ..clustering.result import RESULT
from ..plots import cluster_sizes
from ..teachers import TeacherAdapter
from ..teachers.files import open_rows

REPORT, PICTURE, CAPTIONS, CHECKPOINT = "report.json", "sizes.png", "captions.txt", "checkpoint"
ENCODED = "words.npy"


def main(arguments: Sequence[str] | None = None) -> KMeansResult:
    """Run the command with these arguments, None for those of the process; returns what was saved."""
    parser = _parser()
    args = parser.parse_args(arguments)
    out = Path(args.out)
    if args.features is None and args.captions is None:
        parser.error("features or --captions must be given, got neither")
    kmeans = KMeans(
        args.num_clusters,
        niter=args.niter,
        nredo=args.nredo,
        tol=args.tol,
        seed=args.seed,
        spherical=args.spherical,
        max_cluster_size=args.max_cluster_size,
        device=args.device,
        process_group=False,
        progress=not args.quiet,
    )
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not args.resume:
        parser.error(f"{checkpoint} is of a run that did not end: go on with --resume, or delete it")
    captions = None if args.captions is None else _lines(Path(args.captions))
    rows = _words(captions or [], out, args) if args.features is None else open_rows(args.features)
    if captions is not None and len(captions) != len(rows):
        parser.error(f"--captions must have a line for each of the {len(rows)} rows of {args.features}, got {len(captions)}")
    result = kmeans.fit(rows, checkpoint=checkpoint)
    result.save(out / RESULT)
    report = result.report
    (out / REPORT).write_text(json.dumps(report.scalars(), indent=1) + "\n")
    print(result)
    for name, value in report.scalars().items():
        print(f"{name:>16}  {value:.6g}")
    written = [RESULT, REPORT]
    try:
        cluster_sizes(result.counts, out / PICTURE)
        written.append(PICTURE)
    except ImportError as error:
        print(f"no picture of the sizes: {error}")
    if captions is not None:
        _write_captions(out / CAPTIONS, captions, result, args.samples, args.seed)
        written.append(CAPTIONS)
    print(f"{out}: {', '.join(written)}")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m protoclip_losses.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", nargs="?", help="a .npy file (N, D) of floats; without it the captions' words are clustered")
    parser.add_argument("--num-clusters", type=int, required=True, help="K")
    parser.add_argument("--out", required=True, help="folder of the results; it is made")
    parser.add_argument("--captions", help="a text file, line i is the caption of row i")
    parser.add_argument("--samples", type=int, default=5, help="captions of each cluster to write (default: %(default)s)")
    parser.add_argument("--niter", type=int, default=20, help="iterations, at most (default: %(default)s)")
    parser.add_argument("--nredo", type=int, default=1, help="runs, of which the best is kept (default: %(default)s)")
    parser.add_argument("--tol", type=float, default=1e-3, help="share of the objective to stop at (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spherical", action="store_true", help="cluster by cosine")
    parser.add_argument("--max-cluster-size", type=int, help="no cluster has more rows; ceil(N / K): clusters of one size")
    parser.add_argument("--dim", type=int, default=128, help="width of the words' features (default: %(default)s)")
    parser.add_argument("--device", help="where K-means runs, such as cuda; the rows are copied there in blocks")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder, if there is one")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _lines(path: Path) -> list[str]:
    """Without splitting at the other characters that Python's ``splitlines`` takes for the end of a line."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\r\n") for line in file]


def _words(captions: list[str], out: Path, args: argparse.Namespace) -> Any:
    """Features of the captions' words, in a file: a run that is resumed reads the same ones."""
    file = out / ENCODED
    if not (args.resume and file.exists()):
        file.unlink(missing_ok=True)
    TeacherAdapter.from_captions(captions, dim=args.dim, cache=file, progress=None if args.quiet else True, process_group=False)
    return open_rows(file)


def _write_captions(path: Path, captions: list[str], result: KMeansResult, samples: int, seed: int) -> None:
    """Up to ``samples`` captions of each cluster, drawn, the largest cluster first."""
    draw = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))
    order = draw[result.labels[draw].argsort(stable=True)]  # by cluster, and within one in the order of the draw
    ends = torch.bincount(result.labels + 1, minlength=len(result.counts) + 1).cumsum(0).tolist()  # rows without a label first
    with open(path, "w", encoding="utf-8") as file:
        for cluster in result.counts.argsort(descending=True, stable=True).tolist():
            start, end = ends[cluster], ends[cluster + 1]
            file.write(f"cluster {cluster}: {end - start} rows\n")
            for row in order[start : min(end, start + samples)].tolist():
                file.write(f"  {captions[row]}\n")
