"""The terms that ProtoLoss sums: the constants of a prototype term under the settings of the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from ..prototypes.source import PrototypeSource, PrototypeTerm
from .soft_target_cache import SoftTargetCache


@dataclass(frozen=True)
class ObjectiveSettings:
    """What :class:`ProtoLoss` was constructed with; see there."""

    w_clip: float
    w_proto: float
    w_external: float | Mapping[str, float]
    target_temperature: float | None
    external_target_temperature: float | None
    back_translation: bool
    normalize_prototypes: bool
    gather_with_grad: bool
    chunk_size: int | None
    check_values: bool | None

    def __post_init__(self) -> None:
        external = self.w_external
        weights = {"w_clip": self.w_clip, "w_proto": self.w_proto}
        weights |= (
            {f"w_external[{k!r}]": v for k, v in external.items()} if isinstance(external, Mapping) else {"w_external": external}
        )
        for name, weight in weights.items():
            check.weight(name, weight)
        check.chunk_rows(self.chunk_size)
        for name in ("target_temperature", "external_target_temperature"):
            object.__setattr__(self, name, check.optional_temperature(name, getattr(self, name)))

    def as_arguments(self) -> str:
        """The settings as they are written in a constructor call."""
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))

    def weight_of(self, teacher: str, *, is_external: bool) -> float:
        """The weight of all terms of a teacher."""
        if not is_external:
            return self.w_proto
        if not isinstance(self.w_external, Mapping):
            return self.w_external
        if teacher not in self.w_external:
            raise ValueError(f"w_external must have a weight for teacher {teacher!r}, got weights for {sorted(self.w_external)}")
        return self.w_external[teacher]


@dataclass
class WeightedTerm:
    """A prototype term with its weight, and the part of the loss dict it is added to.

    Prototypes P (K, D), the teacher's centroids C (K, Dt), the mask of valid prototypes (None: all), and the temperature of
    soft targets (None: hard targets, M = P).
    """

    student: str
    teacher: str
    part: str
    weight: float
    prototypes: Tensor
    centroids: Tensor
    valid: Tensor | None
    temperature: float | None
    targets: SoftTargetCache | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.temperature is not None:
            self.targets = SoftTargetCache(self.prototypes, self.centroids, self.valid, self.temperature)

    def fill(self) -> None:
        """Compute all targets now, not when labels need them."""
        if self.targets is not None:
            self.targets.fill(self.prototypes, self.centroids, self.valid)

    def target_delta(self, labels: Tensor) -> Tensor | None:
        """M - P of these labels; None for hard targets."""
        return None if self.targets is None else self.targets.rows(self.prototypes, self.centroids, labels, self.valid)

    def usable(self, labels: Tensor) -> Tensor:
        """Labels, with -1 instead of those of prototypes that are not valid.

        A student whose own features of a cluster were all dropped has no prototype for it: that label is ignored, not wrong.
        """
        return labels if self.valid is None else labels.where(self.valid[labels.clamp(min=0)], -1)

    def to(self, device: torch.device) -> None:
        """Follow the features to their device."""
        if self.prototypes.device != device:
            self.prototypes, self.centroids = self.prototypes.to(device), self.centroids.to(device)
            self.valid = None if self.valid is None else self.valid.to(device)
            if self.targets is not None:
                self.targets.to(device)

    def state_dict(self, settings: ObjectiveSettings) -> dict[str, Any]:
        """The targets computed so far, and the settings they depend on."""
        made_by = [self.student, self.teacher, self.temperature, settings.back_translation, settings.normalize_prototypes]
        return {"made_by": made_by, "rows": None if self.targets is None else self.targets.state_dict()}

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]], settings: ObjectiveSettings) -> None:
        """Take over the targets that were saved of this term, if they were computed under the same settings."""
        own = self.state_dict(settings)["made_by"]
        for state in saved:
            if state["made_by"][:2] != own[:2]:
                continue
            if state["rows"] == "all":
                self.fill()
            elif self.targets is not None and state["made_by"] == own:
                self.targets.load_state_dict(state["rows"])


def weighted_terms(source: PrototypeSource, settings: ObjectiveSettings) -> list[WeightedTerm]:
    """The terms of ``source`` that have a weight, in its order.

    Raises:
        ValueError: no weight for an external teacher, a weight for a teacher that there is not, or without back translation
            a teacher of another width than the student.
    """
    external = source.external_teachers
    if isinstance(settings.w_external, Mapping) and source.terms and (unknown := settings.w_external.keys() - external):
        raise ValueError(f"w_external must name external teachers, which are {sorted(external)}, got {sorted(unknown)}")
    groups = [teacher if teacher in external else None for _, teacher in source.terms]
    terms = []
    for group, ((student, teacher), term) in zip(groups, source.terms.items(), strict=True):
        is_external = group is not None
        weight = settings.weight_of(teacher, is_external=is_external) / groups.count(group)
        if weight:
            part = "proto_external_loss" if is_external else "proto_loss"
            temperature = settings.external_target_temperature if is_external else settings.target_temperature
            terms.append(WeightedTerm(student, teacher, part, weight, *_constants(settings, student, teacher, term), temperature))
    return terms


def _constants(
    settings: ObjectiveSettings, student: str, teacher: str, term: PrototypeTerm
) -> tuple[Tensor, Tensor, Tensor | None]:
    """P, C and the mask (None where every prototype is valid)."""
    prototypes, centroids = term.prototypes, term.teacher_centroids
    if not settings.back_translation:
        if centroids.shape[1] != prototypes.shape[1]:
            raise ValueError(
                f"back_translation=False uses the centroids of teacher {teacher!r} as prototypes of {student!r}: they have "
                f"width {centroids.shape[1]}, the student {prototypes.shape[1]}"
            )
        prototypes = centroids.to(prototypes.dtype)
    if settings.normalize_prototypes:
        prototypes, centroids = F.normalize(prototypes, dim=1), F.normalize(centroids, dim=1)
    return prototypes, centroids, None if bool(term.valid.all()) else term.valid
