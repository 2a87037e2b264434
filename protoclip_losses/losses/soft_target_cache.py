"""Soft targets relative to their base prototypes, kept between steps."""

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..functional.soft_targets import soft_target_rows


class Offsets:
    """Rows M - P for one pair of centroid tensors and one temperature, filled in as labels ask for them, or all at once."""

    def __init__(self, student: Tensor, teacher: Tensor, temperature: float) -> None:
        self.temperature = temperature
        dtype = accumulation_dtype(torch.promote_types(teacher.dtype, student.dtype))
        self.values = torch.zeros_like(student, dtype=dtype, requires_grad=False)  # it may be saved
        self.missing = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
        self.num_missing = student.shape[0]

    def rows(self, student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
        """The rows of these labels; student, teacher and valid are the same in each call."""
        if self.num_missing:
            wanted = torch.unique(labels[self.missing[labels]])
            self.values[wanted] = soft_target_rows(teacher, student, self.temperature, wanted, valid, relative=True)
            self.missing[wanted] = False
            self.num_missing -= wanted.shape[0]
        return self.values.index_select(0, labels)
