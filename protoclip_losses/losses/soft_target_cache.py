"""Soft targets relative to their base prototypes, M - P, kept between steps."""

import weakref
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._dtypes import accumulation_dtype, is_transformed, may_read_values
from ..functional.soft_targets import soft_target_rows
from ..kernels.autograd import constants


class SoftTargetCache:
    """Rows of :math:`M - P` (K, D) for one pair of centroid tensors, computed when a label first needs them, or all at once.

    The tensors themselves are not kept alive: each call passes them, and :meth:`matches` says whether they are the same.

    Args:
        student: (K, D), the prototypes P.
        teacher: (K, Dt), the teacher's centroids C.
        valid: (K,) bool or None.
        temperature: of the soft targets.
    """

    def __init__(self, student: Tensor, teacher: Tensor, valid: Tensor | None, temperature: float) -> None:
        self.temperature = temperature
        self._made_from = [(weakref.ref(x), _version(x)) for x in (student, teacher, valid) if x is not None]
        dtype = accumulation_dtype(torch.promote_types(teacher.dtype, student.dtype))
        self.values = torch.zeros_like(student, dtype=dtype, requires_grad=False)
        self.missing = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
        self.num_missing = student.shape[0]
        self.is_filled_at_once = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy matches no tensors: references to them cannot be pickled."""
        return {**self.__dict__, "_made_from": []}

    def rows(self, student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
        """The rows (B, D) of these labels (B,)."""
        return self.with_rows(student, teacher, labels, valid).index_select(0, labels)

    def with_rows(self, student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
        """All rows (K, D), of which those of these labels, of any shape, are computed."""
        if self.num_missing and is_transformed():  # what is computed under torch.func cannot be kept
            return every_target(student, teacher, self.temperature, valid)
        if self.num_missing:
            self._compute(student, teacher, labels, valid)
        return self.values

    def _compute(self, student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor | None) -> None:
        """Compute the rows of these labels that are missing; all rows where to know these would be to wait for the device."""
        with constants():
            if not may_read_values(labels):
                self.is_filled_at_once, self.num_missing = True, 0
                self.values.copy_(every_target(student, teacher, self.temperature, valid))
                self.missing.zero_()
                return
            missing = self.missing[labels]
            if not bool(missing.any()):
                return
            wanted = torch.unique(labels[missing])
            self.values[wanted] = soft_target_rows(teacher, student, self.temperature, wanted, valid, relative=True)
            self.missing[wanted] = False
            self.num_missing -= wanted.shape[0]

    def fill(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> None:
        """Compute all rows now, so that no step has to."""
        self.is_filled_at_once = self.num_missing == len(self.values)
        self.rows(student, teacher, torch.arange(len(self.values), device=self.values.device), valid)

    def matches(self, student: Tensor, teacher: Tensor, valid: Tensor | None, temperature: float) -> bool:
        """Whether this was made from the same tensor objects, unchanged since, at the same temperature."""
        current = [(x, _version(x)) for x in (student, teacher, valid) if x is not None]
        return (
            temperature == self.temperature
            and len(current) == len(self._made_from)
            and all(ref() is x and version == now for (ref, version), (x, now) in zip(self._made_from, current, strict=True))
        )

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.values, self.missing = self.values.to(device), self.missing.to(device)

    def state_dict(self) -> dict[str, Any] | str:
        """The rows computed so far: a row rounds differently if it is computed with other rows. ``"all"`` if :meth:`fill` did."""
        return "all" if self.is_filled_at_once else {"values": self.values, "missing": self.missing}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved rows."""
        self.values, self.missing = (state[name].to(self.values.device, copy=True) for name in ("values", "missing"))
        self.num_missing = int(self.missing.sum())


def every_target(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None) -> Tensor:
    """All rows of M - P (K, D)."""
    labels = torch.arange(len(student), device=student.device)
    return soft_target_rows(teacher, student, temperature, labels, valid, relative=True)


# Of prototypes, for as long as they live.
_kept_of_graphs: MutableMapping[Tensor, SoftTargetCache] = WeakIdKeyDictionary()


def target_rows_in_graph(student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
    """The rows of M - P (B, D) of these labels, as what ``torch.compile`` traced asks for them: opaque, so that they are kept.

    A graph has no objects of Python's, only tensors: rows are kept by the prototypes, the last teacher's and temperature's alone.
    What a graph makes itself, such as prototypes that it normalises, is new in each call.
    """
    tensors = [x for x in (student, teacher, valid) if x is not None]
    if torch.is_inference_mode_enabled() or any(x.is_inference() for x in tensors):
        return soft_target_rows(teacher, student, temperature, labels, valid, relative=True)
    cache = _kept_of_graphs.get(student)
    if cache is None or not cache.matches(student, teacher, valid, temperature):
        cache = _kept_of_graphs[student] = SoftTargetCache(student, teacher, valid, temperature)
    return cache.rows(student, teacher, labels, valid)


target_rows_operator = torch.library.custom_op(
    "protoclip_losses::target_rows",
    target_rows_in_graph,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor labels, Tensor? valid, float temperature) -> Tensor",
)


@target_rows_operator.register_fake
def _fake(student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
    dtype = accumulation_dtype(torch.promote_types(teacher.dtype, student.dtype))
    return student.new_empty((labels.shape[0], student.shape[1]), dtype=dtype)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
