"""Sums of the features of each cluster, from which the next centroids and prototypes are the means."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .._dtypes import sum_dtype
from ..clustering.points import finite_rows, segment_means_and_counts, segment_sums_and_counts
from ..distributed import Group, sum_over_ranks
from .source import Pair


class ClusterSums:
    """Sums and counts of this rank's samples in each of K clusters, for a teacher's own features and for each student's.

    Attributes:
        sums: (K, D + 1) by (features, teacher), the number of samples in the last column.
    """

    def __init__(self, num_clusters: int, sums: Mapping[Pair, Tensor] = {}) -> None:
        self.num_clusters, self.sums = num_clusters, {key: x.clone() for key, x in sums.items()}

    def add(self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], students: Iterable[str]) -> None:
        """Add samples with their labels (B,) by teacher. A row that is not finite is in no cluster."""
        for teacher, own in labels.items():
            for name in (teacher, *(s for s in students if s != teacher)):
                x = features[name]
                self._add((name, teacher), own.where(finite_rows(x), -1), x)

    def _add(self, key: Pair, labels: Tensor, x: Tensor) -> None:
        if key not in self.sums:
            self.sums[key] = x.new_zeros((self.num_clusters, x.shape[1] + 1), dtype=sum_dtype(x.device))
        self.sums[key] = self.sums[key].to(x.device)  # a loaded state may be on another device
        present, inverse = torch.unique(labels[labels >= 0], return_inverse=True)
        self.sums[key][present] += segment_sums_and_counts(inverse, x[labels >= 0], len(present))  # only clusters that occur

    def means(self, group: Group | None) -> dict[Pair, tuple[Tensor, Tensor]]:
        """Means (K, D) and counts (K,) over the samples of all ranks."""
        return {key: segment_means_and_counts(sum_over_ranks(x, group)) for key, x in self.sums.items()}
