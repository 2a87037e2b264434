"""The steps of a build around K-means: what is clustered, whose a sample is, a term, the last episode beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..clustering.agreement import adjusted_agreement
from ..clustering.assign import assign
from ..clustering.points import finite_rows, means_and_counts, sums_by_label
from ..clustering.report import ClusteringReport
from ..distributed import Group, RankRows, gather_strings, sum_over_ranks, validate_rows
from ..episodes import FeatureBank
from .episode import Prototypes
from .source import Clustering, PrototypeTerm


def modalities(bank: FeatureBank, group: Group | None) -> tuple[dict[str, Tensor], RankRows]:
    """The bank's features, and the rows of each rank; an empty bank that no batch reached has those of the others, in no row."""

    def complete() -> dict[str, Tensor]:
        if not isinstance(bank, FeatureBank):
            raise TypeError(f"bank must be a FeatureBank, got {type(bank).__name__}")
        if len(bank.index) or group is None:
            bank.require_complete()
        return bank.features

    features, ranks = validate_rows(complete, group, len(bank.index) if isinstance(bank, FeatureBank) else 0)
    kinds = json.dumps([(name, x.shape[1], str(x.dtype).removeprefix("torch.")) for name, x in features.items()])
    everyones = [kind for kind in map(json.loads, gather_strings(kinds, group)) if kind]
    if not everyones:
        raise ValueError("bank must hold a sample on some rank, got none on any")
    if not features:
        device = bank.index.device
        return {n: torch.empty((0, w), dtype=getattr(torch, d), device=device) for n, w, d in everyones[0]}, ranks
    return dict(features), ranks


def with_teachers(features: Mapping[str, Tensor], index: Tensor, teachers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Everything that is clustered, by name: the bank's modalities and the teachers' features of its samples."""
    sources = dict(features)
    for name, teacher in teachers.items():
        if name in sources:
            raise ValueError(f"teachers must not be named like a modality of the bank, got {name!r}")
        rows = teacher[index]
        if rows.shape[0] != len(index):
            raise ValueError(f"teacher {name!r} must give {len(index)} rows for as many indices, got {rows.shape[0]}")
        sources[name] = rows.to(index.device)
    return sources


def first_occurrences(everything: Tensor, ranks: RankRows) -> tuple[Tensor, Tensor]:
    """The episode's samples, sorted, and which of this rank's rows are the first to hold theirs."""
    index, inverse = torch.unique(everything, return_inverse=True)
    place = torch.arange(len(everything), device=everything.device)
    first = torch.full_like(index, len(everything)).scatter_reduce_(0, inverse, place, "amin")
    is_first = first[inverse] == place
    return index, is_first[ranks.own]


def back_translated(
    student: Tensor, own_labels: Tensor, centroids: Tensor, labels: Tensor, in_use: Tensor, group: Group | None
) -> PrototypeTerm:
    """The term of a student (n, D) and a teacher's clustering: labels of own rows (n,), of the episode (N,), clusters in use."""
    own = own_labels.where(finite_rows(student), -1)
    sums = sum_over_ranks(sums_by_label(own, student, len(centroids)), group)
    prototypes, counts = means_and_counts(sums)
    prototypes = prototypes.to(torch.promote_types(student.dtype, torch.float32))
    return PrototypeTerm(prototypes, (counts > 0) & in_use, Clustering(centroids, labels))


def agreements(prototypes: Prototypes) -> dict[tuple[str, str], tuple[float, float]]:
    """Adjusted Rand index and adjusted mutual information of each two clusterings."""
    named = prototypes.labels_by_teacher.items()
    return {(a, b): adjusted_agreement(x, y) for (a, x), (b, y) in combinations(named, 2)}


def compare(now: Prototypes, before: Prototypes) -> tuple[dict[str, float], dict[str, float]]:
    """Drift and share of changed labels of each clustering that both have; see :class:`EpisodeReport`."""
    drift, changed = {}, {}
    known = torch.isin(now.index, before.index.to(now.index.device))
    place = before.positions(now.index[known].to(before.index.device), check_values=False)
    for teacher, clustering in now.clusterings.items():
        old = before.clusterings.get(teacher)
        if old is None or old.centroids.shape[1] != clustering.centroids.shape[1]:
            continue
        labels, old_labels = now.labels_by_teacher[teacher], before.labels_by_teacher[teacher]
        counted = torch.bincount(old_labels + 1, minlength=len(old.centroids) + 1)[1:] > 0
        numbers = counted.nonzero()[:, 0].to(labels.device)
        nearest, distances = assign(clustering.centroids, old.centroids[counted])
        in_use = torch.bincount(labels + 1, minlength=len(clustering.centroids) + 1)[1:] > 0
        drift[teacher] = float(distances[in_use].sqrt().mean())
        labels, were = labels[known], old_labels[place].to(labels.device)
        both = (labels >= 0) & (were >= 0)
        if bool(both.any()):
            changed[teacher] = float((numbers[nearest][labels[both]] != were[both]).double().mean())
    return drift, changed


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
