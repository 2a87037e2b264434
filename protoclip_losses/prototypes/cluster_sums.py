"""Sums of the features of each cluster, from which the next centroids and prototypes are the means."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .._dtypes import sum_dtype
from ..clustering.points import finite_rows, segment_means_and_counts
from ..distributed import Group, sum_over_ranks
from .source import Pair


class ClusterSums:
    """Sums and counts of this rank's samples in each of K clusters, for a teacher's own features and for each student's.

    Samples without a cluster are summed in an extra row, which is left out of the result. Selecting the others would make every
    step on an accelerator wait for it.
    """

    def __init__(self, num_clusters: int, sums: Mapping[Pair, Tensor] = {}) -> None:
        self.num_clusters = num_clusters
        self._tables = {key: torch.nn.functional.pad(x, (0, 0, 0, 1)) for key, x in sums.items()}

    @property
    def sums(self) -> dict[Pair, Tensor]:
        """(K, D + 1) by (features, teacher), the number of samples in the last column."""
        return {key: x[: self.num_clusters].clone() for key, x in self._tables.items()}

    def add(self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], students: Iterable[str]) -> None:
        """Add samples with their labels (B,) by teacher. A row that is not finite is in no cluster."""
        students = list(students)
        names = dict.fromkeys((*labels, *students))
        is_bad = {name: ~finite_rows(features[name]) for name in names}
        rows = {name: torch.nn.functional.pad(_wide(features[name]), (0, 1), value=1.0) for name in names}
        for teacher, own in labels.items():
            clusters = own.masked_fill(own < 0, self.num_clusters)
            for name in (teacher, *(s for s in students if s != teacher)):
                self._add((name, teacher), clusters.masked_fill(is_bad[name], self.num_clusters), rows[name])

    def _add(self, key: Pair, clusters: Tensor, rows: Tensor) -> None:
        if key not in self._tables:
            self._tables[key] = rows.new_zeros((self.num_clusters + 1, rows.shape[1]))
        self._tables[key] = self._tables[key].to(rows.device)  # a loaded state may be on another device
        self._tables[key].index_add_(0, clusters, rows)

    def means(self, group: Group | None) -> dict[Pair, tuple[Tensor, Tensor]]:
        """Means (K, D) and counts (K,) over the samples of all ranks."""
        return {key: segment_means_and_counts(sum_over_ranks(x, group)) for key, x in self.sums.items()}


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(sum_dtype(x.device))
