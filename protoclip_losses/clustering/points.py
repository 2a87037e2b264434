"""What goes into an engine, the rows of all ranks, and what comes out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._dtypes import sum_dtype
from ..distributed import RankRows, rank
from ..functional.back_translation import segment_mean, segment_sum
from .assign import BLOCK_ROWS


@dataclass(frozen=True)
class Settings:
    """What an engine is asked for; see :class:`EpisodicClusterer`. From centroids ``init`` there is one run."""

    niter: int
    tol: float
    nredo: int
    spherical: bool
    seed: int
    device: torch.device
    init: Tensor | None = None


@dataclass(frozen=True)
class Run:
    """What an engine found.

    Attributes:
        centroids: (K, D) float32, equal on all ranks.
        objectives: sum of squared distances at each iteration.
        reseeded: how often an empty cluster was given a new start.
        labels: own rows' (n,), where there is no doubt which centroid is nearest, and -1 elsewhere; or None.
    """

    centroids: Tensor
    objectives: tuple[float, ...]
    reseeded: int
    labels: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of all ranks in one order: this rank's ``points`` (n, D) lie at ``place`` (n,) in it; ``ranks`` holds them."""

    points: Tensor
    place: Tensor
    ranks: RankRows

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return self.ranks.total

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.ranks.sum(x)

    def in_order(self) -> Tensor:
        """All rows, on every rank."""
        if self.ranks.is_single and bool((self.place[1:] > self.place[:-1]).all()):
            return self.points
        points, place = (self.ranks.gather(x) for x in (self.points, self.place))
        return points[place.argsort()]

    def smallest(self, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The rows with the ``count`` smallest finite keys, or as many as there are: (m, D) float32, and their places (m,).

        They come in the order of their places, and no other row travels.
        """
        offered = RankRows(self.ranks.group, [min(count, n) for n in self.ranks.sizes])
        own_keys, own = keys.topk(offered.sizes[rank(offered.group)], largest=False)
        keys, places = (offered.gather(x) for x in (own_keys, self.place[own]))
        order = places.argsort()  # the first place among equal keys
        order = order[keys[order].argsort(stable=True)][:count]
        chosen = places[order[keys[order].isfinite()]].sort().values
        held = torch.isin(self.place[own], chosen)
        rows = self.points.new_zeros((len(chosen), self.points.shape[1]), dtype=torch.float32)
        rows[torch.searchsorted(chosen, self.place[own[held]])] = self.points[own[held]].float()
        return self.sum(rows), chosen


def sums_by_label(labels: Tensor, features: Tensor, num_labels: int, origin: Tensor | None = None) -> Tensor:
    """Sum of ``features - origin`` under each label, with their number as a last column: (num_labels, D + 1); -1 is left out.

    In blocks, so that no second copy of the features is made.
    """
    dtype = sum_dtype(features.device)
    sums = torch.zeros((num_labels, features.shape[1] + 1), dtype=dtype, device=features.device)
    for part in torch.split((labels >= 0).nonzero()[:, 0], BLOCK_ROWS) if num_labels else ():
        block = features[part].float()
        block = torch.nn.functional.pad(block if origin is None else block - origin, (0, 1), value=1.0)
        sums += segment_sum(labels[part], block.to(dtype), num_labels, check_values=False)[0]
    return sums


def means_and_counts(sums: Tensor) -> tuple[Tensor, Tensor]:
    """(K, D) and (K,) int64 of what :func:`sums_by_label` returned, or of its sum over ranks; a zero row where nothing was."""
    counts = sums[:, -1].long()
    return segment_mean(sums[:, :-1], counts), counts


def finite_rows(features: Tensor) -> Tensor:
    """Which rows (N,) hold no NaN or Inf."""
    parts = [torch.isfinite(block).all(1) for block in torch.split(features, BLOCK_ROWS)]
    return torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool, device=features.device)
