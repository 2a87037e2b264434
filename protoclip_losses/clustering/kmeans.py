"""A clustering of rows, and which rows go into it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import RankRows
from .points import finite_rows
from .report import ClusteringReport


@dataclass(frozen=True)
class Clusters:
    """A clustering of N rows.

    Attributes:
        centroids: (K, D) float32, the same on every rank; not normalised unless ``spherical``.
        labels: (N,) int64 of this rank's rows; -1 where the row was not finite.
        counts: (K,) int64, members of each cluster over all ranks; 0 where nobody is in it.
        objective: sum of squared distances to the assigned centroids, over all ranks.
        dropped: rows of all ranks that held NaN or Inf and were left out.
        report: how it went.
    """

    centroids: Tensor
    labels: Tensor
    counts: Tensor
    objective: float
    dropped: int
    report: ClusteringReport


def finite_points(features: Tensor, index: Tensor | None, init: Tensor | None, num_prototypes: int) -> tuple[Tensor, Tensor]:
    """Which rows are finite, and those rows, which are the features themselves where all are."""
    check.matrix("features", features)
    if features.shape[1] == 0:
        raise ValueError("features must have a width of at least 1, got 0")
    if index is not None:
        check.integers("index", index, length=len(features), of=" as features has rows")
        check.same_device("index", index, "features", features)
    if init is not None:
        check.matrix("init", init, rows=num_prototypes, width=features.shape[1], of=" as num_prototypes and features say")
        check.finite("init", init)
    features = features.detach()
    finite = finite_rows(features)
    points = features if bool(finite.all()) else features[finite]
    largest = max((abs(float(x)) for x in points.aminmax()), default=0.0) if len(points) else 0.0
    if not largest < 1e18 / features.shape[1] ** 0.5:
        raise ValueError(f"features must be small enough for float32 to hold their squared distances, got {largest:.3g}")
    # Features of float64 are clustered in float32 like all others.
    return finite, points.float() if points.dtype == torch.float64 else points


def places(index: Tensor | None, points: Tensor, ranks: RankRows) -> Tensor:
    """Where this rank's points (n, D) lie among those of all ranks: in the order of their ``index`` (n,), or rank by rank."""
    place = torch.arange(ranks.own.start, ranks.own.stop, device=points.device)
    return place if index is None else ranks.gather(index).argsort().argsort()[place]
