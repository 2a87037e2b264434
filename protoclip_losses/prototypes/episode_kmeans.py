"""K-means of the features of an episode: rows of zeros, and several labels for a sample."""

import torch
from torch import Tensor

from ..clustering.kmeans import KMeans, KMeansResult


class FeatureKMeans(KMeans):
    """:class:`KMeans`, whose errors name the arguments as :class:`EpisodicClusterer` does."""

    _x_name, _k_name = "features", "num_prototypes"


def fit_known(
    kmeans: KMeans,
    labels_per_sample: int,
    rows: Tensor,
    index: Tensor,
    init: Tensor | None = None,
    *,
    zeros_are_rows: bool = False,
) -> tuple[KMeansResult, Tensor]:
    """K-means of the rows that are not all zero, and the label or labels of every row, -1 for the others."""
    known = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if zeros_are_rows else rows.any(1)
    some = rows if bool(known.all()) else rows[known]
    result = kmeans.fit(some, init=init, index=index[known])
    found = result.labels if labels_per_sample == 1 else result.predict(some, labels_per_sample)
    labels = torch.full((len(rows), *found.shape[1:]), -1, dtype=torch.int64, device=rows.device)
    labels[known] = found
    return result, labels
