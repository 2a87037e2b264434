"""K-means of an episode, from features to labels: our engines and faiss's own ``Kmeans``, with ten rows per centroid.

    python -m benchmarks.speed.clustering                     # synthetic features, 60,000 rows: 12 minutes on 2 cores
    python -m benchmarks.speed.clustering --cases features.npy --repeats 2    # your own features (N, D)
    python -m benchmarks.speed.clustering --cases mixture/200000/20000/128 --repeats 1 --peer-redo 1
    python -m benchmarks.speed.clustering --cases mixture/1000000/20000/128 --repeats 1 --peer-redo 0 --engines torch superkmeans
    python -m benchmarks.speed.clustering --memory            # peak memory at N = 1,000,000 and K = 5,000
    python -m benchmarks.speed.clustering --ranks 1 2         # distributed over processes of one thread each
    python -m benchmarks.speed.clustering --device cuda       # rows on a GPU, with flash-kmeans if installed; a report to paste
    python -m benchmarks.speed.clustering --csv out.csv

The reference is ``faiss.Kmeans(niter=20, nredo=3)`` on all rows, with labels from a search of its index, and without it the first
engine. Round r runs all engines one after the other with seed r. Objectives are sums of squared distances to the assigned
centroids, in float64.
"""

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import protoclip_losses
from protoclip_losses import EpisodicClusterer

from . import gpu
from .measure import in_new_process, machine, peak_extra_bytes, ratio

Fit = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]  # features, K, seed: centroids and labels
CASES = ("mixture/60000/6000/128", "sphere/60000/6000/128")
MEMORY = ("torch/float32", "torch/float16", "faiss/float32")


def features_of(case: str) -> tuple[Tensor, int]:
    """Features and K: a mixture of N / 10 groups, uniform on the sphere, or the rows of a file."""
    if case.endswith(".npy"):
        features = torch.from_numpy(np.load(case)).float()
        return features, len(features) // 10
    kind, *sizes = case.split("/")
    rows, columns, width = (int(size) for size in sizes)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, width, generator=generator)
    if kind == "sphere":
        return F.normalize(noise, dim=1), columns
    centers = F.normalize(torch.randn(rows // 10, width, generator=generator), dim=1)
    groups = torch.randint(len(centers), (rows,), generator=generator)
    return F.normalize(centers[groups] + 0.05 * noise, dim=1), columns


def ours(backend: str, device: str | None = None) -> Fit:
    def fit(features: Tensor, columns: int, seed: int) -> tuple[Tensor, Tensor]:
        clusters = EpisodicClusterer(columns, backend=backend, seed=seed, device=device).fit(features)
        return clusters.centroids, clusters.labels

    return fit


def peer(nredo: int) -> Fit:
    def fit(features: Tensor, columns: int, seed: int) -> tuple[Tensor, Tensor]:
        points = features.cpu().numpy()
        settings = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
        engine = faiss.Kmeans(points.shape[1], columns, niter=20, nredo=nredo, seed=seed, **settings)
        engine.train(points)
        labels = engine.index.search(points, 1)[1][:, 0]
        return torch.from_numpy(engine.centroids), torch.from_numpy(labels)

    return fit


def flash_kmeans(features: Tensor, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    from flash_kmeans import batch_kmeans_Euclid

    torch.manual_seed(seed)
    labels, centroids, *_ = batch_kmeans_Euclid(features[None], n_clusters=columns, max_iters=20, tol=0.0)
    return centroids[0], labels[0].long()


def superkmeans(features: Tensor, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    from superkmeans import SuperKMeans

    points = features.cpu().numpy()
    settings = {"hierarchical": False, "sampling_fraction": 1.0, "iters": 20, "n_threads": torch.get_num_threads()}
    engine = SuperKMeans(columns, points.shape[1], seed=seed, **settings)
    centroids = engine.train(points)
    labels = engine.assign(points, centroids)
    return torch.from_numpy(np.array(centroids)), torch.from_numpy(labels.astype(np.int64))


def calls_of(peer_redo: int, device: str) -> dict[str, Fit]:
    """The engines that are compared, by name."""
    calls = {"torch": ours("torch"), "faiss": ours("faiss")}
    if peer_redo:
        calls[f"faiss itself, nredo={peer_redo}"] = peer(peer_redo)
    if device == "cuda":
        calls |= {"faiss on the GPU": ours("faiss", device), "flash-kmeans": flash_kmeans}
    try:
        import superkmeans as _  # noqa: F401

        return calls | {"superkmeans itself": superkmeans}
    except ImportError:
        return calls


def objective(features: Tensor, centroids: Tensor, labels: Tensor) -> float:
    centroids, labels = centroids.to(features.device), labels.to(features.device)
    return float((features.double() - centroids[labels].double()).square().sum())


def memory_of(case: str) -> int:
    backend, dtype = case.split("/")
    features = torch.randn(1_000_000, 32, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    ours(backend)(features[:1000].clone(), 100, 0)  # warm-up: thread pools and lazy imports must not count
    return peak_extra_bytes(lambda: EpisodicClusterer(5000, backend=backend, niter=2).fit(features))


def on_rank(rank: int, world_size: int, case: str, folder: str) -> None:
    """Write the time of K-means over all ranks, and the memory of rank 0, to a file in ``folder``."""
    torch.set_num_threads(1)
    init_method = f"file://{folder}/{world_size}"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timedelta(minutes=10))
    features, columns = features_of(case)
    own = features[rank::world_size].clone()
    del features
    fit = EpisodicClusterer(columns, backend="torch").fit
    EpisodicClusterer(64, backend="torch").fit(own[:1000])
    extra = peak_extra_bytes(lambda: fit(own))
    times = []
    for _ in range(3):
        dist.barrier()
        start = time.perf_counter()
        fit(own)
        times.append(time.perf_counter() - start)
    if rank == 0:
        megabytes = [own.numel() * own.element_size() / 1e6, extra / 1e6]
        Path(folder, f"{world_size}.json").write_text(json.dumps([statistics.median(times), *megabytes]))
    dist.barrier()
    dist.destroy_process_group()


def over_ranks(case: str, world_sizes: list[int]) -> None:
    print("| case | processes | seconds | one process / it | its features MB | peak extra MB |\n|---|---|---|---|---|---|")
    first = None
    for world_size in world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            spawn(on_rank, (world_size, case, folder), world_size)  # type: ignore[no-untyped-call]
            seconds, held, extra = json.loads(Path(folder, f"{world_size}.json").read_text())
        first = first or seconds
        print(f"| {case} | {world_size} | {seconds:.2f} | {first / seconds:.2f} | {held:.0f} | {extra:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES, help="mixture/N/K/D, sphere/N/K/D, or a .npy file of N rows")
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds, each with its own seed")
    parser.add_argument("--engines", nargs="*", help="some of torch, faiss and superkmeans; default: all that are installed")
    parser.add_argument(
        "--peer-redo", type=int, default=3, help="nredo of faiss's own Kmeans, to which its time is proportional; 0: without"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the rows are")
    parser.add_argument("--csv", help="also write the time and the objective of every fit to this file")
    parser.add_argument("--memory", action="store_true", help="measure only memory")
    parser.add_argument("--ranks", nargs="*", type=int, help="measure only the time with these numbers of processes")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps({"bytes": memory_of(args.memory_of)}))
        return
    gpu.require(args.device)
    faiss.omp_set_num_threads(torch.get_num_threads())
    print(machine(args.device) + f", faiss {faiss.__version__}")
    if args.ranks:
        for case in args.cases:
            over_ranks(case, args.ranks)
        return
    if args.memory:
        print("| N 1,000,000, K 5,000, D 32 | features MB | peak extra MB |\n|---|---|---|")
        for case in MEMORY:
            extra = in_new_process("benchmarks.speed.clustering", "--memory-of", case)["bytes"]
            print(f"| {case} | {32 * (4 if '32' in case else 2)} | {extra / 1e6:.0f} |", flush=True)
        return
    header = ["case", "engine", "seconds to labels [min, max]", "peer / it", "objective", "above the peer's"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    rows: list[list[object]] = []
    lines: list[list[str]] = []
    notes = gpu.missing(["flash_kmeans"]) if args.device == "cuda" else []
    for case in args.cases:
        features, columns = features_of(case)
        features = features.to(args.device)
        wanted = args.engines
        calls = calls_of(args.peer_redo, args.device)
        calls = {n: f for n, f in calls.items() if not wanted or n.split()[0] in wanted or "nredo" in n}
        if args.device == "cuda":  # a warm-up, too
            calls, failed = gpu.that_run(calls, features[:2000], 200, 0)
            notes += failed
        else:
            for fit in calls.values():
                fit(features[:2000], 200, 0)  # warm-up, not counted
        times: dict[str, list[float]] = {name: [] for name in calls}
        objectives: dict[str, list[float]] = {name: [] for name in calls}
        for seed in range(args.repeats):
            for name, fit in calls.items():
                start = time.perf_counter()
                centroids, labels = fit(features, columns, seed)
                if args.device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
                objectives[name].append(objective(features, centroids, labels))
                rows.append([case, name, seed, f"{times[name][-1]:.3f}", f"{objectives[name][-1]:.2f}"])
        peers = next((name for name in calls if name.startswith("faiss itself")), next(iter(calls)))
        for name in calls:
            mean, reference = statistics.mean(objectives[name]), statistics.mean(objectives[peers])
            spread = f"{statistics.median(times[name]):.2f} [{min(times[name]):.2f}, {max(times[name]):.2f}]"
            above = f"{100 * (mean / reference - 1):+.2f}%"
            lines.append([case, name, spread, ratio(times, peers, name), f"{mean:.1f}", above])
            print(f"| {' | '.join(lines[-1])} |", flush=True)
    if args.device == "cuda":
        print(gpu.report("benchmarks.speed.clustering --device cuda", protoclip_losses.__version__, header, lines, notes))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([["case", "engine", "seed", "seconds", "objective"], *rows])


if __name__ == "__main__":
    main()
