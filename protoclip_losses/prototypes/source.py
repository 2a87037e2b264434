"""What a prototype term is made of, and the interface through which ProtoLoss gets it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

from torch import Tensor

from .. import _checks as check
from ..distributed import RankRows
from ..functional._labels import check_labels, valid_mask
from .batch_features import BatchFeatures
from .clustering import Clustering

Pair = tuple[str, str]  # (student, teacher)


def nearest_label(labels: Tensor) -> Tensor:
    """(N,), the first of several labels (N, L) of each sample."""
    return labels if labels.dim() == 1 else labels[:, 0]


def several_labels(labels: Tensor) -> Tensor:
    """(N, L), also where each sample has one label (N,)."""
    return labels[:, None] if labels.dim() == 1 else labels


@dataclass(frozen=True)
class PrototypeTerm:
    """One (student, teacher) pair: K prototypes in the student's space, for the clusters of a teacher.

    **Use it when:** you look at what a loss is trained on, or write a :class:`PrototypeSource`.
    **Not when:** prototypes of an episode or online ones will do: they hold their terms.
    **Related:** :class:`Clustering`, the teacher's part of it.

    Attributes:
        prototypes: (K, D), back-translated into the student's space; the row of a prototype that is not valid is zero.
        valid: (K,) bool, False where the cluster has no sample with finite features of both.
        clustering: the teacher's :class:`Clustering`.

    Example:
        >>> import torch
        >>> clustering = Clustering(torch.eye(2), torch.tensor([0, 1, 1]))
        >>> PrototypeTerm(torch.eye(2), torch.tensor([True, True]), clustering).labels
        tensor([0, 1, 1])
    """

    prototypes: Tensor
    valid: Tensor
    clustering: Clustering

    def __post_init__(self) -> None:
        check.matrix("prototypes", self.prototypes)
        num = self.prototypes.shape[0]
        check.matrix("teacher_centroids", self.teacher_centroids, rows=num, of=" as prototypes")
        valid_mask(self.valid, num)
        if not bool(self.valid.any()):
            raise ValueError("valid must leave at least one prototype, got none")
        if self.labels is not None:
            check_labels("labels", self.labels)
        check.finite("prototypes", self.prototypes[self.valid])
        check.finite("teacher_centroids", self.teacher_centroids[self.valid])

    @property
    def teacher_centroids(self) -> Tensor:
        """(K, Dt), the centroids of the clustering."""
        return self.clustering.centroids

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64, the labels of the clustering."""
        return self.clustering.labels


def _accepts_form_of_0_6(init: Callable[..., None]) -> Callable[..., None]:
    """PrototypeTerm(prototypes, teacher_centroids, labels, valid) with a FutureWarning."""

    @wraps(init)
    def wrapper(self: PrototypeTerm, prototypes: Tensor, *args: Any, **kwargs: Any) -> None:
        if len(args) + len(kwargs) == 3:
            check.warn_renamed(
                "PrototypeTerm(prototypes, teacher_centroids, labels, valid)",
                "PrototypeTerm(prototypes, valid, Clustering(centroids, labels))",
            )
            given = dict(zip(("teacher_centroids", "labels", "valid"), args, strict=False), **kwargs)
            check.integers("labels", given["labels"])
            centroids = given["teacher_centroids"]
            check.matrix("teacher_centroids", centroids, rows=len(prototypes), of=" as prototypes")
            args, kwargs = (given["valid"], Clustering(centroids, given["labels"])), {}
        init(self, prototypes, *args, **kwargs)

    return wrapper


PrototypeTerm.__init__ = _accepts_form_of_0_6(PrototypeTerm.__init__)  # type: ignore[method-assign]


class PrototypeSource(ABC):
    """Where :class:`~protoclip_losses.ProtoLoss` gets terms and labels from.

    **Use it when:** you write a source of your own, and subclass it with a ``kind``, the name that its saved states carry.
    **Not when:** an episode's clustering (:class:`Prototypes`) or a queue of features (:class:`OnlinePrototypes`) will do.
    **Related:** :class:`PrototypeTerm`, :class:`Clustering`.

    Attributes:
        terms: the :class:`PrototypeTerm` of each (student, teacher); empty while there are none, in warm-up.
        version: changes whenever ``terms`` does.
        num_samples: of the episode that the terms are of; None where they keep themselves up to date.
        calls_per_step: calls of the loss for the same samples, see :class:`OnlinePrototypes`.
        needs_episodes: False if :meth:`observe` keeps the terms up to date, so that a host has nothing to cluster.

    A teacher that is also a student of some term is internal; any other is external.
    """

    terms: Mapping[Pair, PrototypeTerm]
    version: int = 0
    num_samples: int | None = None
    calls_per_step: int = 1
    needs_episodes: ClassVar[bool] = True
    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type["PrototypeSource"]]] = {}

    def __init_subclass__(cls, kind: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        PrototypeSource._kinds[kind] = cls

    @abstractmethod
    def labels(self, features: BatchFeatures, index: Tensor | None, *, check_values: bool | None = None) -> dict[str, Tensor]:
        """Labels (B,) int64 of a batch for each teacher, -1 for none; by sample ``index`` (B,) or by the features."""

    def observe(self, features: BatchFeatures, labels: Mapping[str, Tensor], ranks: RankRows) -> None:  # noqa: B027
        """Take in a training batch with its labels. Does nothing unless overridden: an episode's prototypes are constant."""

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Detached () tensors by name, which ``ProtoLoss.metrics`` reports; none unless overridden."""
        return {}

    def signature(self) -> dict[str, object]:
        """What must be equal on all ranks, by name."""
        return {"prototypes": (self.kind, self.version, list(self.terms))}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings, with ``"kind"`` and ``"format"``."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state."""

    @classmethod
    @abstractmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "PrototypeSource":
        """The source of a saved state, for a process that has none yet."""

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> "PrototypeSource":
        """The source of a saved state, of the class that its ``"kind"`` names."""
        kinds = PrototypeSource._kinds
        if state.get("kind") not in kinds:
            raise ValueError(f"state_dict must have a kind of {', '.join(sorted(kinds))}, got {state.get('kind')!r}")
        return kinds[state["kind"]].from_state_dict(state)

    @property
    def students(self) -> set[str]:
        """Modalities that are trained."""
        return {student for student, _ in self.terms}

    @property
    def external_teachers(self) -> set[str]:
        """Teachers that are not themselves trained."""
        return {teacher for _, teacher in self.terms} - self.students

    @property
    def clusterings(self) -> dict[str, Clustering]:
        """The clustering of each teacher, which is the same for all its students."""
        return {teacher: term.clustering for (_, teacher), term in self.terms.items()}
