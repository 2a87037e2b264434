"""Which centroid each sample belongs to in online mode: the nearest."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .._dtypes import may_read_values
from ..clustering.assign import assign, nearest_without_waiting
from ..clustering.points import finite_rows
from .batch_features import BatchFeatures
from .clustering import Clustering


def with_known_rows(features: BatchFeatures) -> dict[str, Tensor]:
    """All features by name, NaN in rows of zeros of external teachers: they have no label, and are left out of every mean."""
    known = {name: x.where(x.any(1, keepdim=True), torch.nan) for name, x in features.teachers.items()}
    return {**features.students, **known}


def nearest_centroids(
    features: Mapping[str, Tensor], clusterings: Mapping[str, Clustering], given: Mapping[str, Tensor] = {}
) -> dict[str, Tensor]:
    """Labels (B,) of each teacher: those ``given``, or its nearest centroids."""
    return {
        teacher: given[teacher] if teacher in given else nearest_centroid(features[teacher], clustering.centroids)
        for teacher, clustering in clusterings.items()
    }


def nearest_centroid(features: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row, -1 where the row is not finite."""
    finite = finite_rows(features)
    rows = features.detach().masked_fill(~finite[:, None], 0)
    labels = assign(rows, centroids)[0] if may_read_values(rows) else nearest_without_waiting(rows, centroids)
    return labels.masked_fill(~finite, -1)
