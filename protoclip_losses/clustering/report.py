"""How a K-means run went, as plain numbers for a log."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ClusteringReport:
    """How K-means went. Equal on all ranks except for ``seconds``.

    **Use it when:** you log or compare clusterings: ``result.report.scalars()`` are floats for any logger.
    **Not when:** you need the clustering itself: that is :class:`KMeansResult`.
    **Related:** :class:`EpisodeReport`, which has one for each modality and teacher of an episode.

    Attributes:
        backend: the engine that ran.
        reason: why it was chosen.
        objectives: sum of squared distances at each iteration; its length is the number of iterations.
        objective: sum of squared distances of the final labels.
        imbalance: K times the sum of squared cluster shares: 1 if all clusters have the same size, K if one has all rows.
        empty: clusters that have no row in the end.
        reseeded: how often an empty cluster was moved to a row of the data.
        dropped: rows with NaN or Inf, which were left out.
        seconds: duration of each stage.
        unbounded_objective: ``objective`` before sizes were bounded by ``max_cluster_size``; None without one.
        not_nearest: rows to which another centroid is nearer, because the sizes of clusters are bounded.
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
    unbounded_objective: float | None = None
    not_nearest: int = 0

    def scalars(self) -> dict[str, float]:
        """Every number under its own name, for any logger."""
        names = ["objective", "imbalance", "empty", "reseeded", "dropped"]
        if self.unbounded_objective is not None:
            names += ["unbounded_objective", "not_nearest"]
        values = {name: float(getattr(self, name)) for name in names}
        return values | {"iterations": float(len(self.objectives))} | {f"seconds/{k}": v for k, v in self.seconds.items()}
