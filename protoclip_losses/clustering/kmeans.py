"""K-means of rows: which rows are clustered, by which engine, and their labels."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import plain_arithmetic
from ..distributed import (
    Group,
    RankRows,
    active_group,
    check_process_group,
    gather_sizes,
    rank,
    sum_over_ranks,
    validate_on_all_ranks,
    world_size,
)
from . import faiss_engine, torch_engine
from .bounded import Assignment, bound_sizes
from .checkpoint import Checkpoint, rows_checksum, tensor_checksum
from .inputs import FitInput
from .labels import assign_points
from .points import EngineResult, KMeansConfig, ShardedPoints, positions
from .progress import Progress
from .report import ClusteringReport
from .result import KMeansResult as KMeansResult

ENGINES: dict[str, Callable[[ShardedPoints, int, KMeansConfig], EngineResult]] = {
    "faiss": faiss_engine.kmeans,
    "torch": torch_engine.kmeans,
}
BACKENDS = ("auto", *ENGINES)
SETTINGS = (
    *("niter", "nredo", "backend", "spherical", "seed", "device", "tol", "max_dropped"),
    *("max_cluster_size", "process_group"),
)


class KMeans:
    r"""K-means of the rows of all ranks.

    .. math::
        \min_{C, a} \sum_{i=1}^{N} \| x_i - C_{a_i} \|^2

    Lloyd's algorithm in float32. Under torch.distributed each rank passes its own rows, and every rank gets the same centroids.

    **Use it when:** you cluster features into many clusters (about 10 rows for each), on a CPU or GPU, on one process or many.
    **Not when:** clusters are few and large: up to K = 1,000 with 50 rows or more for each, ``backend="faiss"`` is up to 4 times
    as fast, at about the same objective.
    **Related:** :class:`EpisodicClusterer` clusters each modality of an episode and builds :class:`Prototypes`.

    Args:
        num_clusters: number K of clusters.
        niter: iterations, at most.
        nredo: runs from different seeds, of which the best is returned.
        backend: ``"torch"`` runs on the device of the rows and shares the work between ranks; ``"faiss"`` gathers all rows and
            runs on one rank; ``"auto"`` is ``"torch"``, which gives the same answer on any number of ranks.
        spherical: normalise the centroids in each iteration: the nearest is then the one with the largest cosine.
        seed: the same rows and the same seed give the same centroids.
        device: where K-means runs; None is the device of the rows for ``"torch"`` and the CPU for ``"faiss"``.
        tol: ``"torch"`` stops at the iteration that lowers the objective by no more than this share of it; 0 runs until no label
            changes.
        max_dropped: the share of rows with NaN or Inf above which :meth:`fit` raises; up to it they are left out and counted.
        max_cluster_size: no cluster has more rows; ceil(N / K) makes clusters of one size. Rows of a cluster that is full go to
            the next, so that the sum of squared distances is small: the labels are no longer the nearest centroids, which
            :meth:`KMeansResult.predict` returns. Not with weights. None: no bound.
        process_group: None for the default group, ``False`` for this process alone, or a group.
        progress: show iterations, objective and the time that is left, on the first rank: a bar if tqdm is installed, else lines.

    Shapes: x (N, D); centroids (K, D), labels (N,), counts (K,). float16, bfloat16, float32 and float64 rows are taken.

    Example:
        >>> import torch
        >>> result = KMeans(num_clusters=2).fit(torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]]))
        >>> result.counts, result.objective
        (tensor([2, 2]), 1.0)

    Source:
        Lloyd, IEEE Trans. Inf. Theory 28 (1982); seeding as in k-means++ (Arthur, Vassilvitskii, 2007), in a few rounds
        (k-means||, Bahmani et al., 2012); faiss, https://faiss.ai.
    """

    _x_name, _k_name = "x", "num_clusters"  # how errors name the arguments

    def __init__(
        self,
        num_clusters: int,
        *,
        niter: int = 20,
        nredo: int = 1,
        backend: str = "auto",
        spherical: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        tol: float = 1e-3,
        max_dropped: float = 0.01,
        max_cluster_size: int | None = None,
        process_group: Group | bool | None = None,
        progress: bool = False,
    ) -> None:
        self.num_clusters = check.positive_int(self._k_name, num_clusters)
        self.niter, self.nredo = check.positive_int("niter", niter), check.positive_int("nredo", nredo)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if not 0 <= tol < 1:
            raise ValueError(f"tol must be a share in [0, 1), got {tol}")
        if not 0 <= max_dropped <= 1:
            raise ValueError(f"max_dropped must be a share in [0, 1], got {max_dropped}")
        self.backend, self.spherical, self.seed = backend, spherical, check.seed("seed", seed)
        self.device = None if device is None else torch.device(device)
        self.tol, self.max_dropped, self.process_group = tol, max_dropped, check_process_group(process_group)
        self.progress = progress
        self.max_cluster_size = None if max_cluster_size is None else check.positive_int("max_cluster_size", max_cluster_size)

    def __repr__(self) -> str:
        return f"KMeans({self.num_clusters}, {', '.join(f'{name}={getattr(self, name)!r}' for name in SETTINGS)})"

    @plain_arithmetic()
    def fit(
        self,
        x: Tensor | Iterable[Any],
        *,
        init: Tensor | None = None,
        index: Tensor | None = None,
        weights: Tensor | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> KMeansResult:
        """Cluster this rank's rows together with those of all ranks.

        Rows that do not fit in memory are a memory-mapped array (``numpy.load(path, mmap_mode="r")``), a list of arrays, or an
        object that gives blocks of rows each time it is iterated. Of an array what is needed is read, less and less as clusters
        settle; blocks are read from the first on, some 60 times before the first iteration and 5 times in each. Results are on
        the CPU.

        Args:
            x: (N, D), this rank's rows; N may differ between ranks. A tensor, an array, a list of these with rows of one width
                and dtype, or a re-iterable of blocks (n, D).
            init: (K, D) centroids to start from, the same on every rank; None draws rows.
            index: (N,) int64, an id of each row. Rows are ordered by it, so that the result does not depend on which rank has
                which row; None is the order of the rows, rank by rank.
            weights: (N,) positive numbers, how often each row counts in means, objective and the draw of the first centroids; a
                row with weight 2 counts as two equal rows.
            checkpoint: a file for the state after each iteration. After a kill the same call goes on from it, to the same bits
                with the same number of threads; the file is deleted at the end. Each of several ranks has two files, whose
                names begin with this one.

        Raises:
            TypeError: x that is not floating point, or that can be iterated only once, an index that is not int64.
            ValueError: fewer finite rows than clusters, more rows with NaN or Inf than ``max_dropped`` allows, values of
                1e38 or more, weights that are not positive; a checkpoint of other data or settings; rows that are read in
                blocks, weights or a checkpoint with ``backend="faiss"``.
            RuntimeError: faiss is asked for a GPU and the installed one has none.
        """
        start = time.perf_counter()
        group, by_faiss = active_group(self.process_group), self.backend == "faiss"
        given = FitInput(self._x_name, self._k_name, self.num_clusters, x, init, index, weights, self.device, by_faiss)
        finite, points = validate_on_all_ranks(given.check, group, lambda: self._signature() | given.signature())
        total = int(sum_over_ranks(torch.tensor(len(finite), device="cpu"), group))
        kept = RankRows(group, gather_sizes(len(points), group))
        given.require_rows(kept.total, total, self.max_dropped, self.max_cluster_size)
        backend, device, reason = self._engine(points.device)
        kept_index, weights = (value if value is None else value[finite] for value in (index, weights))
        position = None if kept_index is None else positions(kept_index, kept)
        if backend == "torch":
            points = points.to(device) if isinstance(points, Tensor) else points
            position = None if position is None else position.to(device)
        sharded = ShardedPoints(points, position, kept, None if weights is None else weights.float().to(device))
        file = None if checkpoint is None else self._checkpoint(Path(checkpoint), sharded, init, device)
        progress = Progress(1 if init is not None else self.nredo, self.niter) if self.progress and rank(group) == 0 else None
        config = KMeansConfig(self.niter, self.tol, self.nredo, self.spherical, self.seed, device, init, file, progress)
        try:
            found = ENGINES[backend](sharded, self.num_clusters, config)
        finally:
            if progress is not None:
                progress.close()
        clustered = time.perf_counter()
        assigned, own_objective = assign_points(sharded, found.centroids, found.labels, self.spherical)
        objective = float(sum_over_ranks(own_objective, group))
        clusters = Assignment(found.centroids, assigned, objective)
        seconds = {"kmeans": clustered - start, "assign": time.perf_counter() - clustered}
        if self.max_cluster_size is not None:
            clusters = bound_sizes(sharded, clusters, self.max_cluster_size, config)
            seconds["bound"] = time.perf_counter() - clustered - seconds["assign"]
        assigned = clusters.labels
        counts = sum_over_ranks(torch.bincount(assigned, minlength=self.num_clusters), group).to(finite.device)
        if bool(finite.all()):
            labels = assigned.to(finite.device)
        else:
            labels = torch.full((len(finite),), -1, dtype=torch.int64, device=finite.device)
            labels[finite] = assigned.to(finite.device)
        if file is not None:
            file.remove()
        report = ClusteringReport(
            backend=backend,
            reason=reason,
            objectives=found.objectives,
            objective=clusters.objective,
            imbalance=float((counts.float() / kept.total).square().sum() * self.num_clusters),
            empty=int((counts == 0).sum()),
            reseeded=found.reseeded,
            dropped=total - kept.total,
            seconds=seconds,
            unbounded_objective=None if self.max_cluster_size is None else objective,
            not_nearest=clusters.not_nearest,
        )
        centroids = clusters.centroids.to(finite.device)
        return KMeansResult(centroids, labels, counts, clusters.objective, report, self.spherical, index)

    def _signature(self) -> dict[str, object]:
        settings = {name: getattr(self, name) for name in SETTINGS if name not in ("device", "process_group")}
        return {self._k_name: self.num_clusters, **settings}

    def _checkpoint(self, path: Path, points: ShardedPoints, init: Tensor | None, device: torch.device) -> Checkpoint:
        """For these rows and settings, of which it knows checksums."""
        if self.backend == "faiss":
            raise ValueError("checkpoint must be None for backend='faiss', which does not say where it is: use backend='torch'")
        group, own = points.ranks.group, points.points
        facts = {
            **self._signature(),
            "device": device.type,
            "processes": world_size(group),
            f"shape of {self._x_name}": (len(own), own.shape[1]),
            f"dtype of {self._x_name}": own.dtype,
            f"checksum of {self._x_name}": rows_checksum(own),
            "checksum of init": tensor_checksum(init),
            "checksum of the order by index": tensor_checksum(points.position),
            "checksum of weights": tensor_checksum(points.weights),
        }
        return Checkpoint(path, facts, group)

    def _engine(self, own_device: torch.device) -> tuple[str, torch.device, str]:
        """The engine's name, its device, and why this engine."""
        if self.backend == "faiss":
            return "faiss", self.device or torch.device("cpu"), "asked for"
        device = self.device or own_device
        # Not by size: an engine chosen by it, or by the number of ranks, would give different answers in different setups.
        automatic = f"it runs on {device.type} and gives the same answer on any number of ranks"
        return "torch", device, automatic if self.backend == "auto" else "asked for"
