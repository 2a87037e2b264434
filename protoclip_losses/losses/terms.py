"""The terms that ProtoLoss sums: the constants of each prototype term under the settings of the loss, and their sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from ..distributed import RankRows
from ..functional._labels import heaviest, mixed, mixture_weights
from ..kernels.prototype_cross_entropy import label_nll_sum
from ..prototypes.batch_features import BatchFeatures
from ..prototypes.source import PrototypeSource, PrototypeTerm
from .settings import ObjectiveSettings, block_limit
from .soft_target_cache import SoftTargetCache
from .warning_signs import PrototypeWatch


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

    @property
    def name(self) -> str:
        """Under which its metrics are reported."""
        return f"{self.student}/{self.teacher}"

    def fill(self) -> None:
        """Compute all targets now, not when labels need them."""
        if self.targets is not None:
            self.targets.fill(self.prototypes, self.centroids, self.valid)

    def target_delta(self, labels: Tensor) -> Tensor | None:
        """M - P of these labels (B,); None for hard targets."""
        return None if self.targets is None else self.targets.rows(self.prototypes, self.centroids, labels, self.valid)

    def mixture(self, labels: Tensor, kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first label (B,) of each mixture of labels (B, L) that are ``kept``, and the mixture of M less its P."""
        weights, _ = mixture_weights(labels, None, kept, dtype)
        first = heaviest(labels, weights)
        delta = mixed(self.prototypes, labels, weights) - self.prototypes.index_select(0, first).to(dtype)
        if self.targets is not None:
            delta += mixed(self.targets.with_rows(self.prototypes, self.centroids, labels, self.valid), labels, weights)
        return first, delta

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


class WeightedTerms:
    """The terms of a source that have a weight, in its order.

    Args:
        source: of the terms; None for no terms.
        settings: of the loss.
        watch: of the terms, if that of the ones before goes on.

    Raises:
        ValueError: no weight for an external teacher, a weight for a teacher that there is not, or without back translation
            a teacher of another width than the student.
    """

    def __init__(self, source: PrototypeSource | None, settings: ObjectiveSettings, watch: PrototypeWatch | None = None) -> None:
        self.terms: list[WeightedTerm] = []
        self.settings, self.version = settings, 0 if source is None else source.version
        self.watch = PrototypeWatch(source) if watch is None else watch
        if source is None or not source.terms:
            return
        external = source.external_teachers
        settings.check_teachers(external)
        groups = [teacher if teacher in external else None for _, teacher in source.terms]
        for group, ((student, teacher), term) in zip(groups, source.terms.items(), strict=True):
            is_external = group is not None
            weight = settings.weight_of(teacher, is_external=is_external) / groups.count(group)
            if weight:
                part = "proto_external_loss" if is_external else "proto_loss"
                temperature = settings.external_target_temperature if is_external else settings.target_temperature
                self.terms.append(
                    WeightedTerm(student, teacher, part, weight, *_constants(settings, student, teacher, term), temperature)
                )
        self.watch.follow([term.name for term in self.terms], [(term.prototypes, term.valid) for term in self.terms])

    def fill(self) -> None:
        """Compute all targets now, not when labels need them."""
        for term in self.terms:
            term.fill()

    def check(self, batch: BatchFeatures, logit_scale: Tensor | float) -> dict[str, Tensor]:
        """Check the students' features, move the terms to their device, and return each student's scale."""
        scales: dict[str, Tensor] = {}
        for student in dict.fromkeys(term.student for term in self.terms):
            if student not in batch.students:
                raise ValueError(f"features must hold the projected features of {student!r}, got {sorted(batch.students)}")
            h = batch.students[student]
            if check.values_are_checked(h, self.settings.check_values):
                check.finite(f"projected features of {student!r}", h)
            scales[student] = check.scale("logit_scale_proto", logit_scale, h, self.settings.check_values)
        for term in self.terms:
            h, width = batch.students[term.student], term.prototypes.shape[1]
            check.matrix(f"projected features of {term.student!r}", h, width=width, of=" as its prototypes")
            term.to(h.device)
        return scales

    def add_to(
        self,
        parts: dict[str, Tensor],
        metrics: dict[str, Tensor],
        batch: BatchFeatures,
        scales: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        ranks: RankRows,
    ) -> None:
        """Add this rank's share of each term to its part of the loss, and its accuracy to the metrics."""
        if not self.terms:
            return
        usable = [term.usable(labels[term.teacher]) for term in self.terms]
        masks = [x != -1 for x in usable]
        row_masks = [mask if mask.dim() == 1 else mask.any(1) for mask in masks]
        own_counts = torch.stack([mask.sum() for mask in row_masks])
        counts = ranks.sum(own_counts).clamp(min=1)
        hits, totals, own_at_least_one = [], [], own_counts.clamp(min=1)
        for i, term in enumerate(self.terms):
            safe = usable[i] * masks[i]
            h, scale = batch.students[term.student], scales[term.student]
            delta: Tensor | None
            if safe.dim() == 2:
                safe, delta = term.mixture(safe, masks[i], scale.dtype)
            else:
                delta = term.target_delta(safe)
            total, correct = label_nll_sum(
                h,
                term.prototypes,
                safe,
                row_masks[i],
                scale,
                delta,
                term.valid,
                block_limit(self.settings),
                with_accuracy=True,
            )
            parts[term.part] = parts[term.part] + term.weight * ranks.world_size * total / counts[i]
            # The share of samples whose own prototype has the largest logit.
            metrics[f"prototype_accuracy/{term.name}"] = correct / own_at_least_one[i]
            hits.append(correct)
            totals.append(total)
        self.watch.see(own_counts, hits, totals, ranks)

    def state_dict(self) -> list[dict[str, Any]]:
        """The targets of each term."""
        return [term.state_dict(self.settings) for term in self.terms]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]] | None) -> None:
        """Take over the targets that were saved; None if they were computed at once (0.6 did not save those)."""
        if saved is None:
            self.fill()
        for term in self.terms:
            term.load_state_dict(saved or (), self.settings)


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
