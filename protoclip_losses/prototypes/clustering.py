"""A teacher's clustering, as prototypes are made from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import INTEGERS
from ..clustering.files import checksum
from ..functional._labels import check_labels, label_range


def tensor_versions(*tensors: Tensor) -> list[tuple[int, object]]:
    """What changes when a tensor is written to, or another takes its place.

    Inference tensors have no count of writes, so theirs is never the same.
    """
    return [(id(x), object() if x.is_inference() else x._version) for x in tensors]


@dataclass(frozen=True)
class Clustering:
    """A teacher's clustering: K centroids, and the label of each sample if labels are stored.

    **Use it when:** samples were clustered elsewhere: :meth:`EpisodicClusterer.build` takes one in place of a teacher.
    **Not when:** the library clusters them: :meth:`EpisodicClusterer.fit_teacher` and ``build`` make theirs.
    **Related:** :class:`KMeansResult`, which has a report and assigns new rows.

    Attributes:
        centroids: (K, Dt) in the teacher's space.
        labels: (N,) of an integer dtype, -1 where a sample has none; or (N, L), the centroids of a mixture, nearest first where
            they were found by distance. They may be memory-mapped. None in online mode, where the label of a sample is the
            centroid nearest to its feature.
    """

    centroids: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        check.matrix("centroids", self.centroids)
        if self.labels is not None:
            labels, num = self.labels, self.centroids.shape[0]
            # A teacher's may be narrow ones; a term's have to be int64, as all labels of the losses.
            check_labels("labels", labels[:0].long() if isinstance(labels, Tensor) and labels.dtype in INTEGERS else labels)
            low, high = (int(x) for x in labels.aminmax()) if labels.numel() else (0, 0)
            if low < -1 or high >= num:  # only then a copy: labels of a whole data set may lie on a disk
                label_range("labels", labels.where(labels != -1, 0).flatten(), num, " or be -1")

    def checksum(self) -> int:
        """Of centroids and labels, which all ranks must have alike. It is kept until one of them is written to."""
        tensors = [x for x in (self.centroids, self.labels) if x is not None]
        kept, versions = vars(self), tensor_versions(*tensors)
        if kept.get("_versions") != versions:  # a pass over all labels, which may be those of a whole data set
            kept.update(_versions=versions, _checksum=checksum(*tensors))
        return int(kept["_checksum"])

    def to(self, device: torch.device | str) -> "Clustering":
        """The same on another device."""
        return Clustering(self.centroids.to(device), None if self.labels is None else self.labels.to(device))
