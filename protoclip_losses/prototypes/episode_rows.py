"""What an episode is built from: the rows of its bank and of its teachers, and which sample each belongs to."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import _checks as check
from ..clustering.kmeans import KMeansResult
from ..distributed import Group, RankRows, gather_strings, validate_rows
from ..episodes import FeatureBank
from .clustering import Clustering, tensor_versions

if TYPE_CHECKING:
    from ..teachers import TeacherAdapter

# The clusterings of results that live, with the versions of the tensors they were made of.
_conversions: WeakKeyDictionary[KMeansResult, tuple[Any, Clustering]] = WeakKeyDictionary()
LOOKED_AT = 2**20  # ids that are compared at a time
LARGEST_GAP = 16  # samples for each row of a clustering of some of them: more are ids and no indices


def modalities(bank: FeatureBank, group: Group | None) -> tuple[dict[str, Tensor], RankRows]:
    """The bank's features, and the rows of each rank; an empty bank that no batch reached has the others' features, no rows."""

    def complete() -> dict[str, Tensor]:
        if not isinstance(bank, FeatureBank):
            raise TypeError(f"bank must be a FeatureBank, got {type(bank).__name__}")
        if len(bank.index) or group is None:
            bank.require_complete()
        return bank.features

    features, ranks = validate_rows(complete, group, len(bank.index) if isinstance(bank, FeatureBank) else 0)
    kinds = json.dumps([(name, x.shape[1], str(x.dtype).removeprefix("torch.")) for name, x in features.items()])
    all_kinds = [kind for kind in map(json.loads, gather_strings(kinds, group)) if kind]
    if not all_kinds:
        raise ValueError("bank must hold a sample on some rank, got none on any")
    if not features:
        device = bank.index.device
        return {n: torch.empty((0, w), dtype=getattr(torch, d), device=device) for n, w, d in all_kinds[0]}, ranks
    return dict(features), ranks


def clustering_of(name: str, teacher: Clustering | KMeansResult) -> Clustering:
    """A teacher that was clustered over the whole data set, with labels by sample index."""
    clustering = teacher if isinstance(teacher, Clustering) else _converted(name, teacher)
    if clustering.labels is None:
        raise ValueError(f"teacher {name!r} must have labels by sample index, got a clustering without")
    return clustering


def with_teachers(
    features: Mapping[str, Tensor],
    own_index: Tensor,
    teachers: "Mapping[str, TeacherAdapter | Clustering]",
    wanted: Sequence[str],
    trained: Tensor | None,
) -> dict[str, Tensor]:
    """The bank's modalities and the teachers' features of its samples, or the labels of a teacher that was clustered before.

    Args:
        features: of each modality.
        own_index: the samples of these rows.
        teachers: by name.
        wanted: names of what is to have prototypes.
        trained: the samples to train, None for those of the bank.
    """
    if not wanted:
        raise ValueError("teachers must be given with internal=False, got none: there is nothing to build")
    clustered = [name for name in wanted if not isinstance(teachers.get(name), Clustering)]
    if trained is not None and clustered:
        raise ValueError(
            f"index must be None where {clustered} are clustered, as samples that the bank does not hold then have no label: "
            "cluster teachers before by fit_teacher, and pass internal=False"
        )
    sources = dict(features)
    for name, teacher in teachers.items():
        if name in sources:
            raise ValueError(f"teachers must not be named like a modality of the bank, got {name!r}")
        if isinstance(teacher, Clustering):
            rows = labels_of(name, teacher, own_index)
            if trained is not None:
                labels_of(name, teacher, trained)
        else:
            rows = teacher[own_index]
        if rows.shape[0] != len(own_index):
            raise ValueError(f"teacher {name!r} must give {len(own_index)} rows for as many indices, got {rows.shape[0]}")
        sources[name] = rows.to(own_index.device)
    return sources


def labels_of(name: str, teacher: Clustering, index: Tensor) -> Tensor:
    """A clustered teacher's labels of these samples, (n,) or (n, L)."""
    assert teacher.labels is not None
    check.integers("index", index)
    unknown = (index < 0) | (index >= len(teacher.labels))
    if bool(unknown.any()):
        raise IndexError(
            f"teacher {name!r} has labels of {len(teacher.labels)} samples: {int(unknown.sum())} of {len(index)} are outside "
            f"(sample {int(index[unknown][0])}, for one)"
        )
    return teacher.labels[index.to(teacher.labels.device)].to(index.device).long()


def _converted(name: str, teacher: KMeansResult) -> Clustering:
    """The clustering of a result, which is made once: to check the labels of a whole data set takes reading all of them."""
    versions = tensor_versions(*(x for x in (teacher.centroids, teacher.labels, teacher.index) if x is not None))
    known, clustering = _conversions.get(teacher, (None, None))
    if clustering is None or known != versions:
        clustering = Clustering(teacher.centroids, _by_sample(name, teacher))
        _conversions[teacher] = versions, clustering
    return clustering


def _by_sample(name: str, teacher: KMeansResult) -> Tensor:
    """Its labels by sample index: as they are, unless its rows had ids in another order."""
    labels, index = teacher.labels, teacher.index
    if index is None or all(
        torch.equal(part, torch.arange(start, start + len(part), device=part.device))
        for start, part in zip(range(0, len(index), LOOKED_AT), torch.split(index, LOOKED_AT), strict=True)
    ):
        return labels
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= LARGEST_GAP * len(index) + LOOKED_AT:
        raise ValueError(
            f"teacher {name!r} must have sample indices in its index, got ids from {low} to {high} of {len(index)} rows"
        )
    by_sample = torch.full((high + 1,), -1, dtype=labels.dtype, device=labels.device)
    by_sample[index] = labels
    return by_sample


def first_occurrences(gathered: Tensor, ranks: RankRows) -> tuple[Tensor, Tensor]:
    """The episode's samples (N,), sorted, and which of this rank's rows (n,) are the first to hold theirs."""
    index, inverse = torch.unique(gathered, return_inverse=True)
    position = torch.arange(len(gathered), device=gathered.device)
    first = torch.full_like(index, len(gathered)).scatter_reduce_(0, inverse, position, "amin")
    return index, (first[inverse] == position)[ranks.own]
