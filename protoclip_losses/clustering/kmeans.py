"""K-means of rows: which rows are clustered, by which engine, and their labels."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import plain_arithmetic, sum_dtype
from ..distributed import Group, RankRows, active_group, check_process_group, gather_sizes, sum_over_ranks, validate_rows
from . import faiss_engine, torch_engine
from .assign import assign
from .points import EngineResult, KMeansConfig, ShardedPoints, finite_points, positions
from .report import ClusteringReport
from .result import KMeansResult as KMeansResult

ENGINES: dict[str, Callable[[ShardedPoints, int, KMeansConfig], EngineResult]] = {
    "faiss": faiss_engine.kmeans,
    "torch": torch_engine.kmeans,
}
BACKENDS = ("auto", *ENGINES)
SETTINGS = ("niter", "nredo", "backend", "spherical", "seed", "device", "tol", "max_dropped", "process_group")


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
        process_group: None for the default group, ``False`` for this process alone, or a group.

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
        process_group: Group | bool | None = None,
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

    def __repr__(self) -> str:
        return f"KMeans({self.num_clusters}, {', '.join(f'{name}={getattr(self, name)!r}' for name in SETTINGS)})"

    @plain_arithmetic()
    def fit(self, x: Tensor, *, init: Tensor | None = None, index: Tensor | None = None) -> KMeansResult:
        """Cluster this rank's rows together with those of all ranks.

        Args:
            x: (N, D), this rank's rows; N may differ between ranks.
            init: (K, D) centroids to start from, the same on every rank; None draws rows.
            index: (N,) int64, an id of each row. Rows are ordered by it, so that the result does not depend on which rank has
                which row; None is the order of the rows, rank by rank.

        Raises:
            TypeError: x that is not floating point, an index that is not int64.
            ValueError: fewer finite rows than clusters, more rows with NaN or Inf than ``max_dropped`` allows, values of
                1e38 or more.
            RuntimeError: faiss is asked for a GPU and the installed one has none.
        """
        start = time.perf_counter()
        group = active_group(self.process_group)
        (finite, points), ranks = validate_rows(
            lambda: self._checked(x, init, index),
            group,
            len(x) if isinstance(x, Tensor) and x.dim() else 0,
            signature=lambda: self._signature(x, init, index),
        )
        kept = RankRows(group, gather_sizes(len(points), group))
        self._require_enough(kept.total, ranks.total)
        backend, device, reason = self._engine(x.device)
        position = positions(None if index is None else index[finite], points, kept)
        if backend == "torch":
            points, position = points.to(device), position.to(device)
        config = KMeansConfig(self.niter, self.tol, self.nredo, self.spherical, self.seed, device, init)
        found = ENGINES[backend](ShardedPoints(points, position, kept), self.num_clusters, config)
        clustered = time.perf_counter()
        assigned, distances = assign(points, found.centroids, found.labels, spherical=self.spherical)
        counts = sum_over_ranks(torch.bincount(assigned, minlength=self.num_clusters), group).to(x.device)
        objective = float(sum_over_ranks(distances.to(sum_dtype(distances.device)).sum(), group))
        labels = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        labels[finite] = assigned.to(x.device)
        report = ClusteringReport(
            backend=backend,
            reason=reason,
            objectives=found.objectives,
            objective=objective,
            imbalance=float((counts.float() / kept.total).square().sum() * self.num_clusters),
            empty=int((counts == 0).sum()),
            reseeded=found.reseeded,
            dropped=ranks.total - kept.total,
            seconds={"kmeans": clustered - start, "assign": time.perf_counter() - clustered},
        )
        return KMeansResult(found.centroids.to(x.device), labels, counts, objective, report, self.spherical)

    def _checked(self, x: Tensor, init: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which rows are finite, and these rows."""
        name = self._x_name
        check.matrix(name, x)
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have a width of at least 1, got 0")
        if index is not None:
            check.integers("index", index, length=len(x), of=f" as {name} has rows")
            check.same_device("index", index, name, x)
        if init is not None:
            check.matrix("init", init, rows=self.num_clusters, width=x.shape[1], of=f" as {self._k_name} and {name} say")
            check.finite("init", init)
        return finite_points(name, x)

    def _signature(self, x: Tensor, init: Tensor | None, index: Tensor | None) -> dict[str, object]:
        settings = {name: getattr(self, name) for name in SETTINGS if name not in ("device", "process_group")}
        given = {"width and dtype": (x.shape[1], x.dtype), "init and index": (init is not None, index is not None)}
        return {self._k_name: self.num_clusters, **settings, **given}

    def _require_enough(self, kept: int, total: int) -> None:
        name = self._x_name
        if total - kept > self.max_dropped * total:
            share = f"at most max_dropped={self.max_dropped} of its rows"
            raise ValueError(f"{name} must hold NaN or Inf in {share}, got {total - kept} of {total} rows")
        if kept < self.num_clusters:
            raise ValueError(
                f"{name} must have at least as many finite rows as {self._k_name}={self.num_clusters}, got {kept}; "
                "about 10 rows for each is usual"
            )

    def _engine(self, own_device: torch.device) -> tuple[str, torch.device, str]:
        """The engine's name, its device, and why this engine."""
        if self.backend == "faiss":
            return "faiss", self.device or torch.device("cpu"), "asked for"
        device = self.device or own_device
        # Not by size: an engine chosen by it, or by the number of ranks, would give different answers in different setups.
        automatic = f"it runs on {device.type} and gives the same answer on any number of ranks"
        return "torch", device, automatic if self.backend == "auto" else "asked for"
