"""What a loss tells a source of prototypes of one batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check


class BatchFeatures:
    """Features of one batch, one row per sample.

    **Use it when:** you write a :class:`~protoclip_losses.PrototypeSource`, or ask one for its ``labels``.
    **Not when:** you call a loss, which takes tensors by name and makes one.
    **Related:** :class:`~protoclip_losses.FeatureBank` holds the features of an episode.

    Args:
        students: projected features (B, D) by modality; each modality is a teacher of the others.
        teachers: features (B, D_E) of external teachers by name.
    """

    def __init__(self, students: Mapping[str, Tensor], teachers: Mapping[str, Tensor]) -> None:
        self.students, self.teachers = students, teachers

    @property
    def by_name(self) -> dict[str, Tensor]:
        """All of them."""
        return {**self.students, **self.teachers}

    @property
    def device(self) -> torch.device:
        """The students' device, where losses are computed."""
        return next(iter(self.students.values())).device

    def check(self, image_features: Tensor) -> None:
        """Raise if a student's features are no matrix, or of other rows or on another device than ``image_features``."""
        for name, h in self.students.items():
            check.matrix(f"projected features of {name!r}", h, rows=image_features.shape[0], of=" as image_features")
            check.same_device(f"projected features of {name!r}", h, "image_features", image_features)


def teachers_by_name(teacher_features: Any) -> Mapping[str, Tensor]:
    """Features of external teachers by name; 0.6 accepted a single tensor, and ignored it."""
    if isinstance(teacher_features, Tensor):
        check.warn_renamed("teacher_features as a single tensor", "a mapping of names to tensors")
        return {}
    if teacher_features is None or isinstance(teacher_features, Mapping):
        return teacher_features or {}
    raise TypeError(f"teacher_features must be a mapping of names to tensors, got {type(teacher_features).__name__}")
