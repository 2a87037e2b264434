"""What :meth:`KMeans.fit` is given, and whether it can be clustered."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .points import finite_points
from .row_source import RowSource, row_source


@dataclass
class FitInput:
    """The arguments of a fit.

    Attributes:
        name, count_name: how errors name the rows and the number of clusters.
        num_clusters: K.
        x, init, index, weights: as :meth:`KMeans.fit` is given them.
        device: where rows that are read in blocks are clustered.
        in_memory: whether the engine takes rows in memory alone, without weights: faiss.
        rows: what x is, once it was checked.
    """

    name: str
    count_name: str
    num_clusters: int
    x: Any
    init: Tensor | None
    index: Tensor | None
    weights: Tensor | None
    device: torch.device | None
    in_memory: bool

    def check(self) -> tuple[Tensor, Tensor | RowSource]:
        """Which rows are finite, and these rows."""
        name, source = self.name, row_source(self.name, self.x)
        if source is None:
            check.matrix(name, self.x)
        elif self.in_memory:
            got = "rows that are read in blocks"
            raise ValueError(
                f"{name} must be a torch.Tensor in memory for backend='faiss', got {got}: backend='torch' takes them"
            )
        else:
            source.device = self.device or source.device
        self.rows: Tensor | RowSource = self.x if source is None else source
        count, width = self.rows.shape
        if width == 0:
            raise ValueError(f"{name} must have a width of at least 1, got 0")
        here = self.rows if isinstance(self.rows, Tensor) else torch.empty(0, device="cpu")
        if self.index is not None:
            check.integers("index", self.index, length=count, of=f" as {name} has rows")
            check.same_device("index", self.index, name, here)
        if self.init is not None:
            check.matrix("init", self.init, rows=self.num_clusters, width=width, of=f" as {self.count_name} and {name} say")
            check.finite("init", self.init)
        if self.weights is not None:
            self._check_weights(self.weights, count, here)
        return finite_points(name, self.rows)

    def require_rows(self, finite: int, total: int, max_dropped: float, max_cluster_size: int | None) -> None:
        """Raise ValueError if too few rows of all ranks are finite, or more than have room in the clusters."""
        if total - finite > max_dropped * total:
            share = f"at most max_dropped={max_dropped} of its rows"
            raise ValueError(f"{self.name} must hold NaN or Inf in {share}, got {total - finite} of {total} rows")
        clusters = f"{self.count_name}={self.num_clusters}"
        if finite < self.num_clusters:
            raise ValueError(
                f"{self.name} must have at least as many finite rows as {clusters}, got {finite}; about 10 rows for each is usual"
            )
        if max_cluster_size is None:
            return
        if max_cluster_size * self.num_clusters < finite:
            needed = f"max_cluster_size must be at least {-(-finite // self.num_clusters)}"
            raise ValueError(f"{needed} for {finite} finite rows in {clusters} clusters, got {max_cluster_size}")
        if self.weights is not None:
            raise ValueError(f"weights must be None with max_cluster_size={max_cluster_size}, which counts rows, got a tensor")

    def _check_weights(self, weights: Tensor, count: int, here: Tensor) -> None:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights must be a torch.Tensor, got {type(weights).__name__}")
        if weights.shape != (count,):
            raise ValueError(f"weights must have {count} entries as {self.name} has rows, got shape {check.shape(weights)}")
        check.same_device("weights", weights, self.name, here)
        if self.in_memory:
            raise ValueError("weights must be None for backend='faiss', got a tensor: backend='torch' takes them")
        if count and not bool(((weights > 0) & (weights < torch.inf)).all()):
            low, high = (float(value) for value in weights.aminmax())
            raise ValueError(f"weights must be positive and finite, got values from {low:g} to {high:g}")

    def signature(self) -> dict[str, object]:
        """What must be equal on all ranks."""
        given = tuple(value is not None for value in (self.init, self.index, self.weights))
        return {"width and dtype": (self.rows.shape[1], self.rows.dtype), "init, index and weights": given}
