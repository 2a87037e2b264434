"""The terms that ProtoLoss sums: what each needs of the prototypes, weighted and made from the loss's own settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prototypes.episode import Prototypes, PrototypeTerm
from ..prototypes.online import OnlinePrototypes
from .soft_target_cache import Offsets

if TYPE_CHECKING:
    from .proto_loss import ProtoLoss


@dataclass
class Term:
    """The constants of a term, and the part of the loss dict it is summed into with its weight.

    Prototypes P, the teacher's centroids C, labels, and the temperature of soft targets; None are hard targets, M = P.
    """

    student: str
    teacher: str
    part: str
    weight: float
    prototypes: Tensor
    centroids: Tensor
    labels: Tensor
    valid: Tensor | None
    temperature: float | None

    def __post_init__(self) -> None:
        self._offsets = None if self.temperature is None else Offsets(self.prototypes, self.centroids, self.temperature)

    def fill(self) -> None:
        """Build all targets now, not as labels ask for them."""
        self.offset_rows(torch.arange(len(self.prototypes), device=self.prototypes.device))

    def offset_rows(self, labels: Tensor) -> Tensor | None:
        """M - P of these labels; None for hard targets."""
        return None if self._offsets is None else self._offsets.rows(self.prototypes, self.centroids, labels, self.valid)

    def kept_targets(self, loss: "ProtoLoss") -> dict[str, Any]:
        """Rows M - P that labels have asked for, and what they depend on. Built anew in other groups, they round otherwise."""
        made_by = [self.student, self.teacher, self.temperature, loss.back_translation, loss.normalize_prototypes]
        rows = self._offsets
        return {"made_by": made_by, "rows": None if rows is None else {"values": rows.values, "missing": rows.missing}}

    def keep_targets(self, saved: Sequence[Mapping[str, Any]], loss: "ProtoLoss") -> None:
        """Take over the rows that were saved of this term, if the loss has the settings that they were made by."""
        made_by = self.kept_targets(loss)["made_by"]
        for targets in saved:
            if self._offsets is not None and targets["made_by"] == made_by:
                self._offsets.values, self._offsets.missing = (targets["rows"][name].clone() for name in ("values", "missing"))
                self._offsets.num_missing = int(self._offsets.missing.sum())

    def ignored(self, labels: Tensor) -> Tensor:
        """Labels, with -1 in place of those of prototypes that are not valid.

        A student whose own features of a cluster were all dropped has no prototype for it: that label is ignored, not wrong.
        """
        return labels if self.valid is None else labels.where(self.valid[labels.clamp(min=0)], -1)

    def to(self, device: torch.device) -> None:
        """Follow the features to their device."""
        if self.prototypes.device != device:
            for name in ("prototypes", "centroids", "labels", "valid"):
                x = getattr(self, name)
                setattr(self, name, None if x is None else x.to(device))
            if self._offsets is not None:
                self._offsets.values, self._offsets.missing = (
                    x.to(device) for x in (self._offsets.values, self._offsets.missing)
                )


def weighted_terms(prototypes: Prototypes | OnlinePrototypes, loss: "ProtoLoss") -> list[Term]:
    """The terms that have a weight under the settings of ``loss``, in the order of ``prototypes``.

    Targets of an episode are built here, once; in online mode as labels ask for them, so that no step waits for all.
    """
    external = prototypes.external_teachers
    groups = [teacher if teacher in external else None for _, teacher in prototypes.terms]
    terms = []
    for group, ((student, teacher), made) in zip(groups, prototypes.terms.items(), strict=True):
        part = "proto_loss" if group is None else "proto_external_loss"
        weight = (loss.w_proto if group is None else _external_weight(loss, group)) / groups.count(group)
        temperature = loss.target_temperature if group is None else loss.external_target_temperature
        if weight:
            term = Term(student, teacher, part, weight, *_constants(loss, student, teacher, made), temperature)
            if isinstance(prototypes, Prototypes):
                term.labels = term.ignored(term.labels)
                term.fill()
            terms.append(term)
    return terms


def _external_weight(loss: "ProtoLoss", teacher: str) -> float:
    if not isinstance(loss.w_external, Mapping):
        return loss.w_external
    if teacher not in loss.w_external:
        raise ValueError(f"w_external must have a weight for teacher {teacher!r}, got weights for {sorted(loss.w_external)}")
    return loss.w_external[teacher]


def _constants(
    loss: "ProtoLoss", student: str, teacher: str, term: PrototypeTerm
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """P, C, labels and the mask (None where every prototype is valid)."""
    prototypes, centroids = term.prototypes, term.teacher_centroids
    if not loss.back_translation:
        if centroids.shape[1] != prototypes.shape[1]:
            raise ValueError(
                f"back_translation=False uses the centroids of teacher {teacher!r} as prototypes of {student!r}: they have "
                f"width {centroids.shape[1]}, the student {prototypes.shape[1]}"
            )
        prototypes = centroids.to(prototypes.dtype)
    if loss.normalize_prototypes:
        prototypes, centroids = F.normalize(prototypes, dim=1), F.normalize(centroids, dim=1)
    return prototypes, centroids, term.labels, None if bool(term.valid.all()) else term.valid
