"""What a bound on the size of clusters costs: seconds and objective beside K-means without one, and beside a peer.

    python -m benchmarks.speed.bounded_clusters                                # two minutes on one core
    python -m benchmarks.speed.bounded_clusters --cases mixture/2000/100/16    # beside k-means-constrained, if it is installed

The peer is ``KMeansConstrained(size_max=..., n_init=1)`` of the package k-means-constrained, whose every iteration solves a flow
problem of N x K edges: it takes minutes from some thousand rows on, and is run up to a million edges.
"""

import argparse
import time

import numpy as np
import torch

from protoclip_losses import KMeans

from .clustering import features_of, objective
from .measure import machine

CASES = ("mixture/20000/2000/64", "sphere/20000/2000/64", "mixture/40000/200/64", "mixture/2000/100/16")
SIZES = (2.0, 1.2, 1.0)
LARGEST_PEER = 1_000_000


def peer(features: torch.Tensor, columns: int, max_size: int) -> tuple[float, float] | None:
    """Seconds and objective of k-means-constrained; None if it is not installed or would take too long."""
    if len(features) * columns > LARGEST_PEER:
        return None
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError:
        return None
    engine = KMeansConstrained(columns, size_max=max_size, n_init=1, max_iter=20, random_state=0)
    start = time.perf_counter()
    engine.fit(features.numpy())
    seconds = time.perf_counter() - start
    labels = torch.from_numpy(np.asarray(engine.labels_).astype(np.int64))
    return seconds, objective(features, torch.from_numpy(np.asarray(engine.cluster_centers_)).float(), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES, help="mixture/N/K/D, sphere/N/K/D, or a .npy file of N rows")
    args = parser.parse_args()
    print(machine("cpu"))
    header = ["case", "at most", "largest without", "seconds", "objective", "not nearest", "peer seconds", "peer objective"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|", flush=True)
    for case in args.cases:
        features, columns = features_of(case)
        KMeans(50, niter=1).fit(features[:2000])  # thread pools
        start = time.perf_counter()
        free = KMeans(columns).fit(features)
        seconds = time.perf_counter() - start
        print(f"| {case} | no bound | {int(free.counts.max())} | {seconds:.1f} | {free.objective:.1f} | 0 | | |", flush=True)
        for factor in SIZES:
            max_size = -(-int(factor * len(features)) // columns)
            start = time.perf_counter()
            result = KMeans(columns, max_cluster_size=max_size).fit(features)
            seconds = time.perf_counter() - start
            change = f"{100 * (result.objective / free.objective - 1):+.1f}%"
            share = f"{100 * result.report.not_nearest / len(features):.1f}%"
            row = [case, f"{max_size} ({factor:g} N / K)", "", f"{seconds:.1f}", change, share]
            found = peer(features, columns, max_size)
            row += ["", ""] if found is None else [f"{found[0]:.1f}", f"{100 * (found[1] / free.objective - 1):+.1f}%"]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
