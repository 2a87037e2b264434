"""What a clustering says of itself, as plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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


@dataclass(frozen=True)
class EpisodeReport:
    """How a call of :meth:`EpisodicClusterer.build` went.

    Attributes:
        clusterings: a :class:`ClusteringReport` for each modality and teacher.
        agreement: adjusted Rand index and adjusted mutual information of each two clusterings.
        drift: mean distance of the centroids in use from the nearest one of the episode before, for each clustering.
        changed: of the samples that were in the episode before, the share whose cluster's centroid is nearest to another
            old centroid than their own.
        seconds: of each stage.
    """

    clusterings: Mapping[str, ClusteringReport]
    agreement: Mapping[tuple[str, str], tuple[float, float]]
    drift: Mapping[str, float] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Every number under a name of its own, for any logger: ``for name, value in report.scalars().items(): ...``"""
        values = {f"{teacher}/{k}": v for teacher, report in self.clusterings.items() for k, v in report.scalars().items()}
        for (first, second), (rand, information) in self.agreement.items():
            values |= {f"{first}-{second}/ari": rand, f"{first}-{second}/ami": information}
        values |= {f"{teacher}/drift": v for teacher, v in self.drift.items()}
        values |= {f"{teacher}/changed": v for teacher, v in self.changed.items()}
        return values | {f"seconds/{stage}": v for stage, v in self.seconds.items()}
