"""Checks that every metric makes, and rows of length 1 from features of any finite scale."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import accumulation_dtype


def finite_rows(name: str, features: Tensor, like_name: str = "", like: Tensor | None = None) -> Tensor:
    """Check features, of the width of ``like``, and return them in float32 at least: low precision would round every mean."""
    check.matrix(name, features, width=None if like is None else like.shape[1], of=f" as {like_name}")
    if 0 in features.shape:
        raise ValueError(f"{name} must have at least one row and one column, got shape {check.shape(features)}")
    check.finite(name, features)
    return features.detach().to(accumulation_dtype(features.dtype))


def unit_rows(name: str, features: Tensor, like_name: str = "", like: Tensor | None = None) -> Tensor:
    """Check features, of the width and on the device of ``like``, and return them L2-normalised; a row of zeros stays one."""
    if like is not None and isinstance(features, Tensor):
        check.same_device(name, features, like_name, like)
    features = finite_rows(name, features, like_name, like)
    # The square of a large or small value leaves the range of the dtype; with the largest value at 1 the norm stays in it.
    largest = torch.maximum(features.amax(1, keepdim=True), -features.amin(1, keepdim=True))
    rows = features / largest.masked_fill(largest == 0, 1)
    return rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=0.5))  # below 1 only for a row of zeros


def class_numbers(name: str, labels: Tensor, features_name: str, features: Tensor) -> Tensor:
    """Check one class per row, of any integer dtype, and return them in int64 on the device of the features."""
    check.integers(name, labels, length=len(features), of=f" as {features_name} has rows", any_dtype=True)
    return labels.to(features.device).long()


def neighbour_counts(name: str, values: Sequence[int], most: int | None = None) -> None:
    """Check the k of recall@k or of top-k accuracy."""
    wanted = "of at least 1" if most is None else f"in [1, {most}]"
    if len(values) == 0 or any(not isinstance(k, Integral) or k < 1 or (most is not None and k > most) for k in values):
        raise ValueError(f"{name} must be one or more whole numbers {wanted}, got {tuple(values)}")
