"""What K-means returns, which also labels new rows and can be saved."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import _checks as check
from .._dtypes import plain_arithmetic
from .files import read_tensors, write_tensors
from .labels import predict_rows
from .report import ClusteringReport
from .row_source import row_source

KIND = "KMeansResult.save"
RESULT = "clusters"  # the file of a result in the folder of the command


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
        index: (N,) int64, the ids of this rank's rows, if :meth:`KMeans.fit` was given them.
    """

    centroids: Tensor
    labels: Tensor
    counts: Tensor
    objective: float
    report: ClusteringReport
    spherical: bool = False
    index: Tensor | None = None

    @property
    def dropped(self) -> int:
        """Rows of all ranks with NaN or Inf, which were left out."""
        return self.report.dropped

    @plain_arithmetic()
    def predict(self, x: Tensor | Iterable[Any], num_labels: int = 1) -> Tensor:
        """The nearest centroids of other rows, in Euclidean distance, ties to the lowest id. In blocks: never N x K at once.

        The rows that were clustered get the labels they have, but for a bound on the size of clusters. All K centroids take part:
        one whose cluster was empty may be the nearest of a new row. No communication.

        Args:
            x: (n, D), on any device; or rows that are read in blocks, as :meth:`KMeans.fit` takes them.
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
        rows = row_source("x", x)
        if rows is None:
            check.matrix("x", x, width=width, of=" as the centroids")  # type: ignore[arg-type]
        elif rows.width != width:
            raise ValueError(f"x must have width {width} as the centroids, got {rows.width}")
        if check.positive_int("num_labels", num_labels) > num_clusters:
            raise ValueError(f"num_labels must be at most the number of centroids, {num_clusters}, got {num_labels}")
        labels = predict_rows(x if rows is None else rows, self.centroids, num_labels, self.spherical)  # type: ignore[arg-type]
        return labels if num_labels > 1 else labels[:, 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file of exactly this name, complete or not at all: safetensors, without pickle.

        Labels and index are those of this rank: several ranks write files of different names.
        """
        tensors = {"centroids": self.centroids, "labels": self.labels, "counts": self.counts}
        if self.index is not None:
            tensors["index"] = self.index
        facts = {"objective": self.objective, "spherical": self.spherical, "report": asdict(self.report)}
        write_tensors(Path(path), tensors, {"kind": KIND, "format": 1, **facts})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "KMeansResult":
        """Read what :meth:`save` wrote, on the CPU. Labels and index stay on the disk, memory-mapped.

        Args:
            path: the file, or the folder that ``python -m protoclip_losses.cluster`` wrote it to.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another kind or format, or one that is cut short.

        Example:
            >>> import tempfile, torch
            >>> from protoclip_losses import KMeans, KMeansResult
            >>> path = f"{tempfile.mkdtemp()}/clusters"
            >>> KMeans(2).fit(torch.tensor([[0.0], [1.0], [5.0]])).save(path)
            >>> KMeansResult.load(path).counts.tolist()
            [2, 1]
        """
        path = Path(path)
        tensors, facts = read_tensors(path / RESULT if path.is_dir() else path, KIND)
        report = facts["report"]
        report = ClusteringReport(**{**report, "objectives": tuple(report["objectives"])})
        centroids, counts = (tensors[name].clone() for name in ("centroids", "counts"))
        index = tensors.get("index")
        return cls(centroids, tensors["labels"], counts, facts["objective"], report, facts["spherical"], index)

    def __repr__(self) -> str:
        (num_clusters, width), report = self.centroids.shape, self.report
        sizes = f"num_clusters={num_clusters}, width={width}, rows={len(self.labels)}, objective={self.objective:.6g}"
        return f"KMeansResult({sizes}, empty={report.empty}, dropped={report.dropped}, backend={report.backend!r})"
