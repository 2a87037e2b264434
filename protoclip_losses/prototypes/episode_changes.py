"""How the clusterings of an episode differ from those of the one before, and what its report says of it."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..clustering.assign import assign
from ..clustering.report import ClusteringReport
from .episode import Prototypes
from .report import EpisodeReport, agreements
from .source import nearest_label, several_labels


def report_of(
    now: Prototypes, before: Prototypes | None, clusterings: Mapping[str, ClusteringReport], seconds: Mapping[str, float]
) -> EpisodeReport:
    """The report of an episode in which these teachers were clustered, after the one before."""
    start = time.perf_counter()
    drift, changed = ({}, {}) if before is None else compare(now, before, clusterings)
    labels = now.labels_by_teacher
    agreement = agreements({name: nearest_label(x) for name, x in labels.items()})
    number = {teacher: len(clustering.centroids) for teacher, clustering in now.clusterings.items()}
    report = EpisodeReport(
        clusterings,
        agreement,
        drift,
        changed,
        {**seconds, "compare": time.perf_counter() - start},
        unlabelled={name: int((several_labels(x) < 0).all(1).sum()) for name, x in labels.items()},
        sizes={
            name: tuple(torch.bincount(x.flatten() + 1, minlength=number[name] + 1)[1:].tolist()) for name, x in labels.items()
        },
    )
    return replace(report, history=(*(() if before is None else before.report.history), report.comparisons()))


def compare(now: Prototypes, before: Prototypes, teachers: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Drift and share of changed labels of these teachers' clusterings, where both have one; see :class:`EpisodeReport`."""
    drift: dict[str, float] = {}
    changed: dict[str, float] = {}
    common = torch.isin(now.index, before.index.to(now.index.device))
    position = before.positions(now.index[common].to(before.index.device), check_values=False)
    for teacher in teachers:
        clustering, old = now.clusterings[teacher], before.clusterings.get(teacher)
        if old is None or old.centroids.shape[1] != clustering.centroids.shape[1]:
            continue
        labels = nearest_label(now.labels_by_teacher[teacher])
        # The loss may have moved the old ones to its own device.
        old_labels = nearest_label(before.labels_by_teacher[teacher]).to(before.index.device)
        drift[teacher], successors = centroid_drift(clustering.centroids, labels, old.centroids, old_labels)
        share = changed_share(successors, labels[common], old_labels[position].to(labels.device))
        if share is not None:
            changed[teacher] = share
    return drift, changed


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
