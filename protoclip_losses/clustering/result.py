"""What K-means returns, which also labels new rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import plain_arithmetic
from .assign import nearest
from .points import finite_points
from .report import ClusteringReport


@dataclass(frozen=True, repr=False, eq=False)
class KMeansResult:
    """A clustering of N rows, which also labels new rows.

    **Use it when:** you want the labels of the rows that were clustered, or of others by :meth:`predict`.
    **Not when:** you train with prototypes: :class:`Prototypes` has the clusterings of an episode by sample index.
    **Related:** :class:`KMeans`, which returns it; :class:`ClusteringReport`.

    Attributes:
        centroids: (K, D) float32, equal on every rank; normalised only with ``spherical``.
        labels: (N,) int64 of this rank's rows, -1 for a row with NaN or Inf.
        counts: (K,) int64, members of each cluster over all ranks; 0 for an empty cluster.
        objective: sum of squared distances to the assigned centroids, over all ranks.
        report: how the run went.
        spherical: whether a row's nearest centroid is that of its direction, the one with the largest cosine.
    """

    centroids: Tensor
    labels: Tensor
    counts: Tensor
    objective: float
    report: ClusteringReport
    spherical: bool = False

    @property
    def dropped(self) -> int:
        """Rows of all ranks with NaN or Inf, which were left out."""
        return self.report.dropped

    @plain_arithmetic()
    def predict(self, x: Tensor, num_labels: int = 1) -> Tensor:
        """The nearest centroids of other rows, in Euclidean distance, ties to the lowest id. In blocks: never N x K at once.

        The rows that were clustered get the labels they have. All K centroids take part: one whose cluster was empty may be the
        nearest of a new row. No communication.

        Args:
            x: (n, D), on any device.
            num_labels: how many centroids to return for each row.

        Returns:
            (n,) int64, or (n, L) nearest first where ``num_labels`` is greater than 1; -1 for a row with NaN or Inf.

        Raises:
            TypeError: x that is not floating point.
            ValueError: another width than the centroids', values of 1e38 or more, more labels than centroids.

        Example:
            >>> import torch
            >>> from protoclip_losses import KMeans
            >>> result = KMeans(3).fit(torch.tensor([[0.0], [1.0], [5.0]]))
            >>> result.centroids[result.predict(torch.tensor([[0.9], [6.0]]), num_labels=2)].squeeze(2)
            tensor([[1., 0.],
                    [5., 1.]])
        """
        num_clusters, width = self.centroids.shape
        check.matrix("x", x, width=width, of=" as the centroids")
        if check.positive_int("num_labels", num_labels) > num_clusters:
            raise ValueError(f"num_labels must be at most the number of centroids, {num_clusters}, got {num_labels}")
        finite, points = finite_points("x", x)
        labels = torch.full((len(x), num_labels), -1, dtype=torch.int64, device=x.device)
        labels[finite] = nearest(points, self.centroids, num_labels, spherical=self.spherical)
        return labels if num_labels > 1 else labels[:, 0]

    def __repr__(self) -> str:
        (num_clusters, width), report = self.centroids.shape, self.report
        sizes = f"num_clusters={num_clusters}, width={width}, rows={len(self.labels)}, objective={self.objective:.6g}"
        return f"KMeansResult({sizes}, empty={report.empty}, dropped={report.dropped}, backend={report.backend!r})"
