"""Labels of many rows, in memory or read in blocks: the final assignment of a fit, and the prediction for other rows."""

import torch
from torch import Tensor

from .._dtypes import sum_dtype
from .assign import assign, nearest
from .points import ShardedPoints, finite_points
from .row_source import RowSource


def assign_points(points: ShardedPoints, centroids: Tensor, known: Tensor | None, spherical: bool) -> tuple[Tensor, Tensor]:
    """Labels (n,) of this rank's points, and the sum of their squared distances times their weights, a 0-d tensor.

    Labels ``known`` (n,) that are not -1 are kept.
    """
    if isinstance(points.points, Tensor):
        labels, distances = assign(points.points, centroids, known, spherical=spherical)
        return labels, points.weighted(distances).to(sum_dtype(distances.device)).sum()
    labels = torch.empty(len(points.points), dtype=torch.int64, device=points.device)
    objective = torch.zeros((), dtype=sum_dtype(points.device), device=points.device)
    for part, block in points.blocks():
        labels[part], distances = assign(block, centroids, None if known is None else known[part], spherical=spherical)
        objective += (distances if points.weights is None else distances * points.weights[part]).sum(dtype=objective.dtype)
    return labels, objective


def predict_rows(x: Tensor | RowSource, centroids: Tensor, num_labels: int, spherical: bool) -> Tensor:
    """The nearest centroids of each row: (n, L) int64, nearest first; -1 for a row with NaN or Inf."""
    if isinstance(x, RowSource):
        labels, start = torch.empty((x.count, num_labels), dtype=torch.int64, device=centroids.device), 0
        for block in x.raw_blocks():
            labels[start : start + len(block)] = _predict(block.to(centroids.device), centroids, num_labels, spherical)
            start += len(block)
        return labels
    return _predict(x, centroids, num_labels, spherical)


def _predict(x: Tensor, centroids: Tensor, num_labels: int, spherical: bool) -> Tensor:
    finite, points = finite_points("x", x)
    assert isinstance(points, Tensor)
    labels = torch.full((len(x), num_labels), -1, dtype=torch.int64, device=x.device)
    labels[finite] = nearest(points, centroids, num_labels, spherical=spherical)
    return labels
