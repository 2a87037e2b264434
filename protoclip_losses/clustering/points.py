"""What goes into an engine, the points of all ranks, and what comes out; sums and means of the points of each cluster."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._dtypes import may_read_values, sum_dtype
from ..distributed import RankRows, rank
from ..functional.back_translation import segment_mean, segment_sum
from ..kernels.sizes import rows_per_copy
from .origin import LARGEST_LENGTH, SAMPLED_ROWS, sampled_positions
from .row_source import STRIPE_ROWS, Part, RowSource, chosen_rows, read_blocks

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .progress import Progress

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
    checkpoint: "Checkpoint | None" = None
    progress: "Progress | None" = None

    @property
    def runs(self) -> int:
        """Number of runs."""
        return self.nredo if self.init is None else 1


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
        points: (n, D), those of this rank, in memory or read in blocks.
        position: (n,) int64, where they are among the points of all ranks; None: rank by rank.
        ranks: how many each rank has.
        weights: (n,) how much each point counts, None: alike.
    """

    points: Tensor | RowSource
    position: Tensor | None
    ranks: RankRows
    weights: Tensor | None = None

    @property
    def total(self) -> int:
        """Points of all ranks."""
        return self.ranks.total

    @property
    def device(self) -> torch.device:
        """Where blocks of points are."""
        return self.points.device

    def blocks(self, rows: Iterable[Tensor] | None = None, step: int | None = None) -> Iterator[tuple[Part, Tensor]]:
        """Blocks of this rank's points: see :func:`read_blocks`."""
        return read_blocks(self.points, rows, step)

    def weighted(self, values: Tensor, part: Part = slice(None)) -> Tensor:
        """Values of this part of the rank's points, times their weights."""
        return values if self.weights is None else values * self.weights[part]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.ranks.sum(x)

    def in_order(self) -> Tensor:
        """All points by position, on every rank; they have to be in memory."""
        assert isinstance(self.points, Tensor)
        position = None if self.position is None else self.ranks.gather(self.position)
        points = self.ranks.gather(self.points)
        return points if position is None or bool((position[1:] > position[:-1]).all()) else points[position.argsort()]

    def own(self, values: Tensor) -> Tensor:
        """Of values (N,) of the points of all ranks by position, those of this rank's points (n,)."""
        own: Tensor = values[self.ranks.own if self.position is None else self.position]
        return own

    def positions_of(self, part: Part) -> Tensor:
        """Where these points of this rank are among the points of all ranks."""
        if self.position is not None:
            return self.position[part]
        first = self.ranks.own.start
        if isinstance(part, slice):
            return torch.arange(first + part.start, first + part.stop, device=self.device)
        return part.add(first)

    def held(self, positions: Tensor) -> Tensor:
        """Which of this rank's points are at one of these sorted positions (m,): ids, ascending."""
        if self.position is None:
            first, end = self.ranks.own.start, self.ranks.own.stop
            held: Tensor = positions[(positions >= first) & (positions < end)] - first
            return held
        parts = enumerate(torch.split(self.position, STRIPE_ROWS))  # isin sorts both
        found = [torch.isin(part, positions).nonzero()[:, 0] + number * STRIPE_ROWS for number, part in parts]
        return torch.cat(found) if found else positions[:0]

    def smallest(self, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The points with the ``count`` smallest finite keys (n,), or as many as there are: (m, D) float32, and positions (m,).

        They are sorted by position, the lowest position wins among equal keys, and no other point is communicated.
        """
        candidates = RankRows(self.ranks.group, [min(count, n) for n in self.ranks.sizes])
        own_keys, own = _smallest(keys, candidates.sizes[rank(candidates.group)])
        keys, positions = (candidates.gather(x) for x in (own_keys, self.positions_of(own)))
        order = positions.argsort()
        order = order[keys[order].argsort(stable=True)][:count]
        chosen = positions[order[keys[order].isfinite()]].sort().values
        return self._rows_at(chosen, own[torch.isin(self.positions_of(own), chosen)]), chosen

    def sample(self, count: int) -> Tensor:
        """Up to ``count`` of the points of all ranks, (m, D) float32, the same on every rank."""
        positions = sampled_positions(self.total, min(count, SAMPLED_ROWS)).to(self.device)
        return self._rows_at(positions, self.held(positions))

    def _rows_at(self, positions: Tensor, held: Tensor) -> Tensor:
        """The points at these sorted positions (m,), of which this rank has its rows ``held``."""
        rows = torch.zeros((len(positions), self.points.shape[1]), dtype=torch.float32, device=self.device)
        for part, block in self.blocks([held.sort().values]):
            rows[torch.searchsorted(positions, self.positions_of(part))] = block.float()
        return self.sum(rows)


def _smallest(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest keys and where they are: of those of each stripe, as a search sorts in 16 bytes for each key."""
    if len(keys) <= STRIPE_ROWS:
        found = keys.topk(count, largest=False)
        return found.values, found.indices
    values, rows = [], []
    for number, stripe in enumerate(torch.split(keys, STRIPE_ROWS)):
        found = stripe.topk(min(count, len(stripe)), largest=False)
        values.append(found.values)
        rows.append(found.indices + number * STRIPE_ROWS)
    best = torch.cat(values).topk(count, largest=False)
    return best.values, torch.cat(rows)[best.indices]


def segment_sums_and_counts(
    labels: Tensor,
    points: Tensor | RowSource,
    num_segments: int,
    origin: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum of ``points - origin`` with each label, and their number as the last column: (num_segments, D + 1); -1 is left out.

    With ``weights`` (n,) both are weighted. In blocks, so that no second copy of the points is made.
    """
    dtype = sum_dtype(points.device)
    sums = torch.zeros((num_segments, points.shape[1] + 1), dtype=dtype, device=points.device)
    # Where reading what is chosen would wait, all points are added: labels below 0 count for none.
    rows = chosen_rows(labels >= 0) if may_read_values(labels) else None
    for part, block in read_blocks(points, rows) if num_segments else ():
        block = block.float() if origin is None else block.to(origin.dtype) - origin
        block = torch.nn.functional.pad(block, (0, 1), value=1.0).to(dtype)
        if weights is not None:
            block *= weights[part, None]
        sums += segment_sum(labels[part].long(), block, num_segments, check_values=False)[0]
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


def finite_points(name: str, x: Tensor | RowSource) -> tuple[Tensor, Tensor | RowSource]:
    """Which rows of ``x`` (N, D) are finite, and these rows, which are ``x`` itself if all are; ``name`` is for errors.

    Rows that are read in blocks stay where they are, and are read once here.
    """
    if isinstance(x, RowSource):
        parts, largest = [], 0.0
        for block in x.raw_blocks():
            parts.append(finite_rows(block))
            good = block if bool(parts[-1].all()) else block[parts[-1]]
            largest = max([largest, *(abs(float(value)) for value in good.aminmax())]) if len(good) else largest
        finite = torch.cat([part.cpu() for part in parts]) if parts else torch.ones(0, dtype=torch.bool)
        x.kept = None if bool(finite.all()) else finite.nonzero()[:, 0]
        _check_size(name, largest, x)
        return finite, x
    x = x.detach()
    finite = finite_rows(x)
    points = x if bool(finite.all()) else x[finite]
    largest = max((abs(float(value)) for value in points.aminmax()), default=0.0) if len(points) else 0.0
    _check_size(name, largest, x)
    # Rows of float64 are clustered in float32 like all others.
    return finite, points.float() if points.dtype == torch.float64 else points


def _check_size(name: str, largest: float, x: Tensor | RowSource) -> None:
    if not largest < LARGEST:
        raise ValueError(f"{name} must hold values below {LARGEST:g}, which float32 can subtract, got {largest:.3g}")
    if sum_dtype(x.device) == torch.float32 and not largest < LARGEST_LENGTH / x.shape[1] ** 0.5:
        raise ValueError(f"{name} must be small enough for float32 to square it on {x.device}, got {largest:.3g}")


def positions(index: Tensor, ranks: RankRows) -> Tensor:
    """Where this rank's points are among those of all ranks in the order of their ``index`` (n,)."""
    return ranks.gather(index).argsort().argsort()[ranks.own]
