"""K-means in PyTorch operators, on the device of the points and over all ranks: its runs, and how they go on after a kill."""

import torch
from torch import Tensor

from .._dtypes import sum_dtype
from .assign import directions, row_lengths
from .lloyd import Lloyd
from .origin import LARGEST_LENGTH, SMALLEST_LENGTH, robust_origin
from .points import EngineResult, KMeansConfig, ShardedPoints, segment_sums_and_counts


def kmeans(points: ShardedPoints, num_clusters: int, config: KMeansConfig) -> EngineResult:
    """The best of ``nredo`` runs on ``config.device``, where the points are."""
    checkpoint, progress = config.checkpoint, config.progress
    saved = None if checkpoint is None else checkpoint.read()
    best, first = (None, 0) if saved is None else (_result_in(saved, points.device), int(saved["run"]))
    origin, dtype = _frame(points, num_clusters, config.spherical)
    for run in range(first, config.runs):
        if saved is not None:
            dtype = saved["score"].dtype
            lloyd = Lloyd(points, num_clusters, config.spherical, origin, dtype)
            lloyd.load_state(saved)
            saved = None
        else:
            lloyd = Lloyd(points, num_clusters, config.spherical, origin, dtype)
            lloyd.start(config.seed, run, config.init)
            if lloyd.rounding_hides_distances():
                dtype = sum_dtype(origin.device)
                lloyd = Lloyd(points, num_clusters, config.spherical, origin, dtype)
                lloyd.start(config.seed, run, config.init)
        for _ in lloyd.iterations(config.niter, config.tol, config.seed, run):
            if checkpoint is not None:
                step = run * (config.niter + 1) + len(lloyd.objectives)
                checkpoint.write(step, {**lloyd.state(), "run": torch.tensor(run, device="cpu"), **_tensors_of(best)})
            if progress is not None:
                progress.update(run, lloyd.objectives)
        result = lloyd.result()
        if best is None or result.objectives[-1] < best.objectives[-1]:
            best = result
    assert best is not None
    return best


def _frame(points: ShardedPoints, num_clusters: int, spherical: bool) -> tuple[Tensor, torch.dtype]:
    """The origin of scores and the dtype that holds them, the same on all ranks: float32, unless it cannot square the values."""
    device, wide = points.device, sum_dtype(points.device)
    sample = points.sample(num_clusters + 1)  # no more is sent than centroids are
    ends = torch.tensor([0.0, -torch.inf], dtype=wide, device=device)  # the largest length, and minus the smallest
    for _, block in points.blocks():
        lengths = row_lengths(block)
        ends[0] = torch.maximum(ends[0], lengths.amax())
        ends[1] = torch.maximum(ends[1], -lengths.masked_fill(lengths == 0, torch.inf).amin())
    largest, smallest = points.ranks.maximum(ends).tolist()
    fits = largest < LARGEST_LENGTH and (-smallest > SMALLEST_LENGTH or not spherical)
    dtype = torch.float32 if fits else wide
    if spherical:
        sample = directions(sample, wide)
        sums = torch.zeros(points.points.shape[1], dtype=wide, device=device)
        for _, block in points.blocks():
            sums += directions(block, dtype).sum(0, dtype=wide)
    else:
        one_segment = torch.zeros(len(points.points), dtype=torch.int32, device=device)
        sums = segment_sums_and_counts(one_segment, points.points, 1)[0, :-1]
    # Far from the origin a score has no digits left for a distance.
    origin, spread = robust_origin(points.sum(sums) / points.total, sample)
    return origin, wide if 0 < float(spread) < SMALLEST_LENGTH else dtype


def _tensors_of(best: EngineResult | None) -> dict[str, Tensor]:
    """The best of the runs that have ended, as tensors."""
    if best is None:
        return {}
    assert best.labels is not None
    numbers = torch.tensor([*best.objectives, float(best.reseeded)], dtype=torch.float64, device="cpu")
    return {"best_centroids": best.centroids, "best_labels": best.labels, "best_objectives_and_reseeded": numbers}


def _result_in(saved: dict[str, Tensor], device: torch.device) -> EngineResult | None:
    """What :func:`_tensors_of` made."""
    if "best_centroids" not in saved:
        return None
    *objectives, reseeded = saved["best_objectives_and_reseeded"].tolist()
    labels = saved["best_labels"].to(device)
    return EngineResult(saved["best_centroids"].to(device), tuple(objectives), int(reseeded), labels)
