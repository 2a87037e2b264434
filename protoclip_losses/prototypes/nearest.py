"""Which centroid each sample belongs to in online mode: the nearest."""

from collections.abc import Mapping

from torch import Tensor

from ..clustering.assign import assign
from ..clustering.points import finite_rows
from .source import Clustering


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
    return assign(features.detach().where(finite[:, None], 0), centroids)[0].where(finite, -1)
