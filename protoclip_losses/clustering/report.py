"""What a clustering says of itself, as plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ClusteringReport:
    """How K-means went, the same on every rank but for ``seconds``.

    Attributes:
        backend: the engine that ran.
        reason: why that one.
        objectives: sum of squared distances after each iteration's assignment; its length is the iterations that ran.
        objective: that of the final labels.
        imbalance: K times the sum of squared shares of the clusters; 1 if all are of one size, K if one holds everything.
        empty: clusters without a sample at the end. They are masked.
        reseeded: how often an empty cluster was given a new start on the way.
        dropped: rows that held NaN or Inf.
        seconds: of each stage.
    """

    backend: str
    reason: str
    objectives: tuple[float, ...]
    objective: float
    imbalance: float
    empty: int
    reseeded: int
    dropped: int
    seconds: Mapping[str, float]

    def scalars(self) -> dict[str, float]:
        """Every number under a name of its own, for any logger."""
        names = ("objective", "imbalance", "empty", "reseeded", "dropped")
        values = {name: float(getattr(self, name)) for name in names}
        return values | {"iterations": float(len(self.objectives))} | {f"seconds/{k}": v for k, v in self.seconds.items()}
