"""A start of K-means in two levels, coarse clusters and then clusters within each, compared with the seeding of all at once.

    python -m benchmarks.speed.two_level_start
    python -m benchmarks.speed.two_level_start --cases mixture/1000000/100000/128    # an hour

Two levels: sqrt(K) coarse clusters, in each as many of the K clusters as its share of the rows, and then iterations of
all K from there, as after the seeding. Everything is `KMeans` itself. Times are CPU time.
"""

import argparse
import time

import torch
from torch import Tensor

from protoclip_losses import KMeans

from .clustering import features_of, objective
from .measure import machine

STARTS = ("all at once", "two levels")
CASES = ("mixture/60000/6000/128", "sphere/60000/6000/128")


def shares(counts: Tensor, num_clusters: int) -> list[int]:
    """How many of the clusters each coarse one gets, in proportion to its rows: largest remainders, at least one of each."""
    exact = counts.double() * num_clusters / counts.sum()
    whole = exact.floor().long().clamp(min=1)
    order = (exact - whole).argsort(descending=True)
    while (missing := num_clusters - int(whole.sum())) != 0:
        change = 1 if missing > 0 else -1
        can = [i for i in order.tolist() if 1 <= int(whole[i]) + change <= int(counts[i])]
        whole[can[: abs(missing)]] += change
    return whole.tolist()


def two_levels(rows: Tensor, num_clusters: int, seed: int) -> Tensor:
    """The centroids (K, D) to start from."""
    coarse = KMeans(round(num_clusters**0.5), seed=seed).fit(rows)
    counts = torch.bincount(coarse.labels, minlength=len(coarse.centroids))
    kept = counts.nonzero()[:, 0]
    order = coarse.labels.argsort()
    cells = torch.split(order, counts.tolist())
    parts = zip(kept.tolist(), shares(counts[kept], num_clusters), strict=True)
    return torch.cat([KMeans(share, seed=seed).fit(rows[cells[cell]]).centroids for cell, share in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES, help="mixture/N/K/D, sphere/N/K/D, or a .npy file of N rows")
    parser.add_argument("--starts", nargs="*", default=STARTS, choices=STARTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(machine("cpu"))
    print("| case | start | CPU seconds of the start | in all | iterations | objective |\n|---|---|---|---|---|---|")
    for case in args.cases:
        rows, num_clusters = features_of(case)
        KMeans(50, niter=1).fit(rows[:2000])  # thread pools and lazy imports
        for start in args.starts:
            began = time.process_time()
            init = two_levels(rows, num_clusters, args.seed) if start == "two levels" else None
            started = time.process_time()
            result = KMeans(num_clusters, seed=args.seed).fit(rows, init=init)
            seconds = [f"{started - began:.1f}" if init is not None else "", f"{time.process_time() - began:.1f}"]
            found = objective(rows, result.centroids, result.labels)
            print(f"| {case} | {start} | {' | '.join(seconds)} | {len(result.report.objectives)} | {found:.1f} |", flush=True)


if __name__ == "__main__":
    main()
