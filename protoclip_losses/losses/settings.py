"""The settings of the objective."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from .. import _checks as check
from ..functional.info_nce import check_repeats
from ..kernels.sizes import BlockLimit

OF_ONE_RANK = ("chunk_size", "memory_budget", "check_values")  # may differ between ranks


@dataclass(frozen=True)
class ObjectiveSettings:
    """What :class:`~protoclip_losses.ProtoLoss` was constructed with; see there."""

    w_clip: float
    w_proto: float
    w_external: float | Mapping[str, float]
    target_temperature: float | None
    external_target_temperature: float | None
    back_translation: bool
    normalize_prototypes: bool
    gather_with_grad: bool
    w_distill: float
    distill_temperature: float
    repeats: str | None
    equal_batch_sizes: bool
    chunk_size: int | None
    memory_budget: int | None
    check_values: bool | None
    pair_loss: str = "info_nce"

    def __post_init__(self) -> None:
        external = self.w_external
        weights = {"w_clip": self.w_clip, "w_proto": self.w_proto, "w_distill": self.w_distill}
        weights |= (
            {f"w_external[{k!r}]": v for k, v in external.items()} if isinstance(external, Mapping) else {"w_external": external}
        )
        for name, weight in weights.items():
            check.weight(name, weight)
        BlockLimit(self.chunk_size, self.memory_budget)
        check.temperature("distill_temperature", self.distill_temperature)
        check_repeats(self.repeats)
        self._check_pair_loss()
        for name in ("target_temperature", "external_target_temperature"):
            object.__setattr__(self, name, check.optional_temperature(name, getattr(self, name)))

    def _check_pair_loss(self) -> None:
        if self.pair_loss not in ("info_nce", "sigmoid"):
            raise ValueError(f"pair_loss must be 'info_nce' or 'sigmoid', got {self.pair_loss!r}")
        if self.pair_loss == "sigmoid" and self.repeats is not None:
            raise ValueError(f"repeats must be None with pair_loss='sigmoid', they are InfoNCE's, got {self.repeats!r}")
        if self.pair_loss == "sigmoid" and not self.gather_with_grad:
            raise ValueError("gather_with_grad must be True with pair_loss='sigmoid', which is always exact, got False")

    @cached_property
    def signature(self) -> str:
        """The settings that must be equal on all ranks."""
        left_out: dict[str, Any] = dict.fromkeys(OF_ONE_RANK)
        return replace(self, **left_out).as_arguments()

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

    def check_teachers(self, external: set[str]) -> None:
        """Raise ValueError if a weight is given for a teacher that is not among these."""
        if isinstance(self.w_external, Mapping) and (unknown := self.w_external.keys() - external):
            raise ValueError(f"w_external must name external teachers, which are {sorted(external)}, got {sorted(unknown)}")


def block_limit(settings: ObjectiveSettings) -> BlockLimit:
    """How large blocks of logits may be."""
    return BlockLimit(settings.chunk_size, settings.memory_budget)
