"""What an episode's clustering leaves behind: the constants of every prototype term, keyed by sample index."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .report import EpisodeReport


@dataclass(frozen=True)
class PrototypeTerm:
    """One (student, teacher) pair: K prototypes in the student's space and the teacher's clustering of N samples.

    Attributes:
        prototypes: (K, D), back-translated into the student's space; the row of an invalid prototype is zero.
        teacher_centroids: (K, Dt).
        labels: (N,) int64, -1 where the teacher's features were not finite.
        valid: (K,) bool, False where no sample is in the cluster.
    """

    prototypes: Tensor
    teacher_centroids: Tensor
    labels: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        check.matrix("prototypes", self.prototypes)
        num = self.prototypes.shape[0]
        check.matrix("teacher_centroids", self.teacher_centroids, rows=num, of=" as prototypes")
        check.integers("labels", self.labels)
        check.valid_mask(self.valid, num)
        check.label_range("labels", self.labels.where(self.labels != -1, 0), num, " or be -1")
        if not bool(self.valid.any()):
            raise ValueError("valid must leave at least one prototype, got none")
        check.finite("prototypes", self.prototypes[self.valid])
        check.finite("teacher_centroids", self.teacher_centroids[self.valid])


class Terms:
    """Terms by (student, teacher), and who is who among them."""

    terms: dict[tuple[str, str], PrototypeTerm]

    @property
    def students(self) -> set[str]:
        """Modalities that are trained."""
        return {student for student, _ in self.terms}

    @property
    def external_teachers(self) -> set[str]:
        """Teachers that are not themselves trained."""
        return {teacher for _, teacher in self.terms} - self.students

    @property
    def clusterings(self) -> dict[str, PrototypeTerm]:
        """A term of each teacher, for its clustering: it has the same one for every student."""
        return {teacher: term for (_, teacher), term in self.terms.items()}


class Prototypes(Terms):
    """The terms of an episode, and the samples they speak of. Free of any temperature or weight: those belong to the loss.

    Args:
        index: (N,) int64, sample indices of the episode, each once.
        terms: mapping from (student, teacher) to :class:`PrototypeTerm`, each with N labels.

    A teacher that is also a student of some term is internal; any other is external.

    Attributes:
        report: how the :meth:`EpisodicClusterer.build` that made them went; None for prototypes made otherwise, or loaded.

    Example:
        >>> import torch
        >>> term = PrototypeTerm(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.tensor([True, True]))
        >>> prototypes = Prototypes(torch.tensor([30, 10]), {("image", "text"): term})
        >>> prototypes.positions(torch.tensor([10, 30, 30]))
        tensor([1, 0, 0])
    """

    def __init__(self, index: Tensor, terms: Mapping[tuple[str, str], PrototypeTerm]) -> None:
        check.integers("index", index)
        self.index = index
        self.terms = dict(terms)
        self.report: EpisodeReport | None = None
        for (student, teacher), term in self.terms.items():
            check.integers(f"labels of ({student}, {teacher})", term.labels, length=len(index), of=" as index")
        self._sorted, self._order = index.sort()
        if index.numel() == 0:
            raise ValueError("index must hold at least one sample, got none")
        repeated = self._sorted[1:] == self._sorted[:-1]
        if bool(repeated.any()):
            first = int(self._sorted[1:][repeated][0])
            raise ValueError(f"index must hold each sample once, got {int(repeated.sum())} repeats (sample {first}, for one)")

    def positions(self, index: Tensor, *, check_values: bool | None = None) -> Tensor:
        """Rows of the episode (B,) for sample indices (B,): what ``term.labels`` is indexed with.

        Raises:
            IndexError: a sample that is not in the episode. On CUDA it is raised asynchronously unless ``check_values=True``.
        """
        check.integers("index", index)
        if self._sorted.device != index.device:
            self._sorted, self._order = self._sorted.to(index.device), self._order.to(index.device)
        place = torch.searchsorted(self._sorted, index).clamp(max=self._sorted.shape[0] - 1)
        unknown = self._sorted[place] != index
        if check.values_are_checked(index, check_values):
            if bool(unknown.any()):
                first = int(index[unknown][0])
                raise IndexError(
                    f"index must name samples of the episode that was clustered: {int(unknown.sum())} of {index.numel()} are not "
                    f"in it (sample {first}, for one)"
                )
        else:
            torch._assert_async((~unknown).all())
        return self._order[place]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and strings; a teacher's labels are stored once however many students it has."""
        return {
            "index": self.index,
            "terms": [{"student": student, "teacher": teacher, **vars(term)} for (student, teacher), term in self.terms.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved."""
        names = ("prototypes", "teacher_centroids", "labels", "valid")
        terms = {(t["student"], t["teacher"]): PrototypeTerm(**{name: t[name] for name in names}) for t in state["terms"]}
        Prototypes.__init__(self, state["index"], terms)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Prototypes":
        """Prototypes from a saved state, for a process that has none yet."""
        self = cls.__new__(cls)
        self.load_state_dict(state)
        return self
