"""What goes into an engine, the points of all ranks, and what comes out; sums and means of the points of each cluster."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._dtypes import may_read_values, sum_dtype
from ..distributed import RankRows, rank
from ..functional.back_translation import segment_mean, segment_sum
from ..kernels.sizes import rows_per_copy
from .origin import LARGEST_LENGTH, SAMPLED_ROWS, sampled_positions

LARGEST = 1e38  # differences of such values are below the largest of float32


@dataclass(frozen=True)
class KMeansConfig:
    """The settings of an engine, as :class:`KMeans` describes them. With centroids ``init`` there is one run."""

    niter: int
    tol: float
    nredo: int
    spherical: bool
    seed: int
    device: torch.device
    init: Tensor | None = None


@dataclass(frozen=True)
class EngineResult:
    """What an engine returns.

    Attributes:
        centroids: (K, D) float32, equal on all ranks.
        objectives: sum of squared distances at each iteration.
        reseeded: how often an empty cluster was moved to a row of the data.
        labels: (n,) int64 of this rank's points, -1 where rounding may decide which centroid is nearest; None if unknown.
    """

    centroids: Tensor
    objectives: tuple[float, ...]
    reseeded: int
    labels: Tensor | None = None


@dataclass(frozen=True)
class ShardedPoints:
    """The points of all ranks in one order.

    Attributes:
        points: (n, D), those of this rank.
        position: (n,) int64, where they are among the points of all ranks.
        ranks: how many each rank has.
    """

    points: Tensor
    position: Tensor
    ranks: RankRows

    @property
    def total(self) -> int:
        """Points of all ranks."""
        return self.ranks.total

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.ranks.sum(x)

    def in_order(self) -> Tensor:
        """All points by position, on every rank."""
        if self.ranks.is_single and bool((self.position[1:] > self.position[:-1]).all()):
            return self.points
        points, position = (self.ranks.gather(x) for x in (self.points, self.position))
        return points[position.argsort()]

    def smallest(self, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The points with the ``count`` smallest finite keys (n,), or as many as there are: (m, D) float32, and positions (m,).

        They are sorted by position, the lowest position wins among equal keys, and no other point is communicated.
        """
        candidates = RankRows(self.ranks.group, [min(count, n) for n in self.ranks.sizes])
        own_keys, own = keys.topk(candidates.sizes[rank(candidates.group)], largest=False)
        keys, positions = (candidates.gather(x) for x in (own_keys, self.position[own]))
        order = positions.argsort()
        order = order[keys[order].argsort(stable=True)][:count]
        chosen = positions[order[keys[order].isfinite()]].sort().values
        return self._rows_at(chosen, own), chosen

    def sample(self, count: int) -> Tensor:
        """Up to ``count`` of the points of all ranks, (m, D) float32, the same on every rank."""
        positions = sampled_positions(self.total, min(count, SAMPLED_ROWS)).to(self.position.device)
        return self._rows_at(positions, torch.arange(len(self.position), device=self.position.device))

    def _rows_at(self, positions: Tensor, own: Tensor) -> Tensor:
        """The points at these sorted positions (m,), of which this rank holds none but those in its rows ``own``."""
        held = own[torch.isin(self.position[own], positions)]
        rows = self.points.new_zeros((len(positions), self.points.shape[1]), dtype=torch.float32)
        rows[torch.searchsorted(positions, self.position[held])] = self.points[held].float()
        return self.sum(rows)


def segment_sums_and_counts(labels: Tensor, points: Tensor, num_segments: int, origin: Tensor | None = None) -> Tensor:
    """Sum of ``points - origin`` with each label, and their number as the last column: (num_segments, D + 1); -1 is left out.

    In blocks, so that no second copy of the points is made.
    """
    dtype = sum_dtype(points.device)
    sums = torch.zeros((num_segments, points.shape[1] + 1), dtype=dtype, device=points.device)
    rows = rows_per_copy(points.shape[1], points.device)
    known = (labels >= 0).nonzero()[:, 0] if may_read_values(labels) else torch.arange(len(labels), device=labels.device)
    for part in torch.split(known, rows) if num_segments else ():
        block = points[part].float() if origin is None else points[part].to(origin.dtype) - origin
        block = torch.nn.functional.pad(block, (0, 1), value=1.0)
        sums += segment_sum(labels[part], block.to(dtype), num_segments, check_values=False)[0]
    return sums


def segment_means_and_counts(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Means (K, D) and counts (K,) int64 from :func:`segment_sums_and_counts` or its sum over ranks; an empty row is zero."""
    counts = sums[:, -1].long()
    return segment_mean(sums[:, :-1], counts), counts


def finite_rows(x: Tensor) -> Tensor:
    """Which rows (N,) have no NaN or Inf."""
    if x.device.type != "cpu":  # few operators; 0 times what is not finite is NaN
        return (x.detach() * 0).sum(1) == 0
    parts = [torch.isfinite(block).all(1) for block in torch.split(x, rows_per_copy(x.shape[1], x.device))]
    return torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool, device=x.device)


def finite_points(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of ``x`` (N, D) are finite, and these rows, which are ``x`` itself if all are; ``name`` is for errors."""
    x = x.detach()
    finite = finite_rows(x)
    points = x if bool(finite.all()) else x[finite]
    largest = max((abs(float(value)) for value in points.aminmax()), default=0.0) if len(points) else 0.0
    if not largest < LARGEST:
        raise ValueError(f"{name} must hold values below {LARGEST:g}, which float32 can subtract, got {largest:.3g}")
    if sum_dtype(x.device) == torch.float32 and not largest < LARGEST_LENGTH / x.shape[1] ** 0.5:
        raise ValueError(f"{name} must be small enough for float32 to square it on {x.device}, got {largest:.3g}")
    # Rows of float64 are clustered in float32 like all others.
    return finite, points.float() if points.dtype == torch.float64 else points


def positions(index: Tensor | None, points: Tensor, ranks: RankRows) -> Tensor:
    """Where this rank's points are among those of all ranks: in the order of their ``index`` (n,), or rank by rank."""
    position = torch.arange(ranks.own.start, ranks.own.stop, device=points.device)
    return position if index is None else ranks.gather(index).argsort().argsort()[position]
