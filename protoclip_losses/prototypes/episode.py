"""The prototypes of an episode, with labels by sample index."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import assert_on_device
from ..clustering.files import checksum
from ..functional._labels import check_labels
from .batch_features import BatchFeatures
from .clustering import Clustering
from .report import EpisodeReport
from .source import Pair, PrototypeSource, PrototypeTerm


class Prototypes(PrototypeSource, kind="episode"):
    """The terms of an episode and its samples. Free of any temperature or weight: those belong to the loss.

    **Use it when:** the loss is called with sample indices; :meth:`EpisodicClusterer.build` makes one per episode.
    **Not when:** no sample index reaches the loss (:class:`OnlinePrototypes`).
    **Related:** :class:`EpisodicClusterer`, :meth:`ProtoLoss.set_prototypes`.

    Args:
        index: (N,) int64, sample indices of the episode, each once.
        terms: mapping from (student, teacher) to :class:`PrototypeTerm`, each with N labels; all terms of a teacher have the
            same labels.
        report: how the clustering went. Not saved.

    Attributes:
        labels_by_teacher: (N,) or (N, L) int64 of each teacher, -1 for samples without a cluster.
        report: an :class:`EpisodeReport`, empty if the prototypes were not built here.

    Example:
        >>> import torch
        >>> term = PrototypeTerm(torch.eye(2), torch.tensor([True, True]), Clustering(torch.eye(2), torch.tensor([0, 1])))
        >>> prototypes = Prototypes(torch.tensor([30, 10]), {("image", "text"): term})
        >>> prototypes.positions(torch.tensor([10, 30, 30]))
        tensor([1, 0, 0])
    """

    def __init__(self, index: Tensor, terms: Mapping[Pair, PrototypeTerm], report: EpisodeReport | None = None) -> None:
        check.integers("index", index)
        if index.numel() == 0:
            raise ValueError("index must hold at least one sample, got none")
        ordered, order = index.sort()
        repeated = ordered[1:] == ordered[:-1]
        if bool(repeated.any()):
            first = int(ordered[1:][repeated][0])
            raise ValueError(f"index must hold each sample once, got {int(repeated.sum())} repeats (sample {first}, for one)")
        labels: dict[str, Tensor] = {}
        for (student, teacher), term in terms.items():
            own = term.labels
            if own is None:
                raise ValueError(f"labels of ({student}, {teacher}) must be given for an episode, got None")
            check_labels(f"labels of ({student}, {teacher})", own, rows=len(index), of=" as index")
            if own is not labels.setdefault(teacher, own) and not torch.equal(own, labels[teacher]):
                raise ValueError(
                    f"labels of teacher {teacher!r} must be the same for all its students, those of {student!r} differ"
                )
        self._checksum: int | None = None
        self.num_samples = len(index)
        self.index, self.terms, self.report = index, dict(terms), report or EpisodeReport({}, {})
        self._ordered, self._order, self.labels_by_teacher = ordered, order, labels

    def __repr__(self) -> str:
        pairs = ", ".join(f"{student} <- {teacher}" for student, teacher in self.terms)
        return f"Prototypes({len(self.index)} samples; {pairs})"

    def labels(self, features: BatchFeatures, index: Tensor | None, *, check_values: bool | None = None) -> dict[str, Tensor]:
        """Labels (B,) or (B, L) of each teacher by sample index; the features are not looked at.

        Raises:
            ValueError: no index, or features of a teacher that was not clustered.
            IndexError: a sample that is not in the episode.
        """
        if index is None:
            raise ValueError("index must be given while prototypes are set: it tells which cluster each sample is in")
        for name in features.teachers:
            if name not in self.external_teachers:
                raise ValueError(f"teacher_features must be of {sorted(self.external_teachers)}, got [{name!r}]")
        positions = self.positions(index.to(features.device, non_blocking=True), check_values=check_values)
        labels = {}
        for teacher, own in self.labels_by_teacher.items():
            if own.device != positions.device:
                own = self.labels_by_teacher[teacher] = own.to(positions.device)
            labels[teacher] = own[positions]
        return labels

    def signature(self) -> dict[str, object]:
        """Terms and a checksum of the prototypes: they must have been built, or loaded, together on all ranks."""
        if self._checksum is None:
            self._checksum = checksum(*(term.prototypes for term in self.terms.values()))
        return {**super().signature(), "the checksum of the prototypes, which one build gives to all ranks": self._checksum}

    def positions(self, index: Tensor, *, check_values: bool | None = None) -> Tensor:
        """Positions (B,) of sample indices (B,) in the episode: what ``term.labels`` is indexed with.

        Raises:
            IndexError: a sample that is not in the episode. On CUDA it is raised asynchronously unless ``check_values=True``.
        """
        check.integers("index", index)
        if self._ordered.device != index.device:
            self._ordered, self._order = self._ordered.to(index.device), self._order.to(index.device)
        position = torch.searchsorted(self._ordered, index).clamp(max=self._ordered.shape[0] - 1)
        known = self._ordered[position] == index
        if check.values_are_checked(index, check_values):
            if not bool(known.all()):
                unknown = ~known
                first = int(index[unknown][0])
                raise IndexError(
                    f"index must name samples of the episode that was clustered: {int(unknown.sum())} of {index.numel()} are not "
                    f"in it (sample {first}, for one)"
                )
        else:
            assert_on_device(known)
        return self._order[position]

    def to(self, device: torch.device | str) -> "Prototypes":
        """The same on another device."""
        clusterings = {teacher: clustering.to(device) for teacher, clustering in self.clusterings.items()}
        terms = {
            (student, teacher): PrototypeTerm(term.prototypes.to(device), term.valid.to(device), clusterings[teacher])
            for (student, teacher), term in self.terms.items()
        }
        return Prototypes(self.index.to(device), terms, self.report)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and strings; a teacher's clustering is saved once, however many students it has."""
        return {
            "format": 1,
            "kind": self.kind,
            "index": self.index,
            "clusterings": {name: {"centroids": x.centroids, "labels": x.labels} for name, x in self.clusterings.items()},
            "terms": [
                {"student": student, "teacher": teacher, "prototypes": term.prototypes, "valid": term.valid}
                for (student, teacher), term in self.terms.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved; all or nothing."""
        other = Prototypes.from_state_dict(state)
        self.__dict__.update(other.__dict__)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Prototypes":
        """Prototypes from a saved state, for a process that has none yet."""
        if check.state_format("Prototypes", state) == 0:
            clusterings = {t["teacher"]: Clustering(t["teacher_centroids"], t["labels"]) for t in state["terms"]}
        else:
            clusterings = {teacher: Clustering(**saved) for teacher, saved in state["clusterings"].items()}
        terms = {
            (t["student"], t["teacher"]): PrototypeTerm(t["prototypes"], t["valid"], clusterings[t["teacher"]])
            for t in state["terms"]
        }
        return cls(state["index"], terms)
