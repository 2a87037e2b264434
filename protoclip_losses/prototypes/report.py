"""How an episode's build went: the numbers of its clusterings, their agreement, and their change since the last episode."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from ..clustering.agreement import adjusted_agreement
from ..clustering.assign import assign
from ..clustering.report import ClusteringReport


@dataclass(frozen=True)
class EpisodeReport:
    """How a call of :meth:`EpisodicClusterer.build` went.

    **Use it when:** you log a run: ``prototypes.report.scalars()`` are floats for any logger.
    **Not when:** you want to know what the clusters contain: the functions of ``protoclip_losses.metrics`` say that.
    **Related:** :class:`Prototypes`, whose ``report`` it is; :class:`ClusteringReport`, one for each clustering.

    Attributes:
        clusterings: a :class:`ClusteringReport` for each modality and teacher.
        agreement: adjusted Rand index and adjusted mutual information of each two clusterings.
        drift: for each clustering, the mean distance from the centroids in use to the nearest one of the last episode.
        changed: for each clustering, of the samples that the last episode had too, the share whose centroid is nearest to
            another old centroid than their old one.
        seconds: duration of each stage.
    """

    clusterings: Mapping[str, ClusteringReport]
    agreement: Mapping[tuple[str, str], tuple[float, float]]
    drift: Mapping[str, float] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Every number under its own name, for any logger: ``for name, value in report.scalars().items(): ...``"""
        values = {f"{teacher}/{k}": v for teacher, report in self.clusterings.items() for k, v in report.scalars().items()}
        for (first, second), (rand, information) in self.agreement.items():
            values |= {f"{first}-{second}/ari": rand, f"{first}-{second}/ami": information}
        values |= {f"{teacher}/drift": v for teacher, v in self.drift.items()}
        values |= {f"{teacher}/changed": v for teacher, v in self.changed.items()}
        return values | {f"seconds/{stage}": v for stage, v in self.seconds.items()}


def agreements(labels: Mapping[str, Tensor]) -> dict[tuple[str, str], tuple[float, float]]:
    """Adjusted Rand index and adjusted mutual information of each two clusterings (N,) of the same samples."""
    return {(a, b): adjusted_agreement(x, y) for (a, x), (b, y) in combinations(labels.items(), 2)}


def centroid_drift(centroids: Tensor, labels: Tensor, old_centroids: Tensor, old_labels: Tensor) -> tuple[float, Tensor]:
    """Mean distance from the centroids in use (K, D) to the nearest old ones in use (K', D), and the ids of these (K,)."""
    old_ids = _in_use(old_labels, len(old_centroids)).nonzero()[:, 0]
    nearest, distances = assign(centroids, old_centroids[old_ids])
    drift = float(distances[_in_use(labels, len(centroids))].sqrt().mean())
    return drift, old_ids.to(nearest.device)[nearest]


def changed_share(successors: Tensor, labels: Tensor, old_labels: Tensor) -> float | None:
    """Share of samples whose centroid's nearest old one (K,) is not their old one; None without a sample labelled in both."""
    both = (labels >= 0) & (old_labels >= 0)
    is_changed = successors[labels[both]] != old_labels[both]
    return int(is_changed.sum()) / len(is_changed) if len(is_changed) else None


def _in_use(labels: Tensor, num_clusters: int) -> Tensor:
    return torch.bincount(labels + 1, minlength=num_clusters + 1)[1:] > 0
