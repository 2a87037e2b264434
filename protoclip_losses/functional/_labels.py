"""Checks of labels, and of the mask that says which prototypes exist."""

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import assert_on_device


def valid_mask(valid: Tensor | None, num_prototypes: int) -> None:
    """Check the (K,) bool mask of prototypes that exist."""
    if valid is None:
        return
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        got = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid must be a bool tensor, got {got}")
    if valid.shape != (num_prototypes,):
        raise ValueError(f"valid must have shape ({num_prototypes},) as prototypes has rows, got {check.shape(valid)}")


def labels_within(labels: Tensor, num_prototypes: int, ignore_index: int) -> bool:
    """Whether all labels are in [0, num_prototypes) and none is ignored, as far as their range tells."""
    if labels.numel() == 0:
        return True
    lowest, highest = labels.aminmax()
    low, high = lowest.item(), highest.item()
    return low >= 0 and high < num_prototypes and not low <= ignore_index <= high


def label_range(name: str, labels: Tensor, num_prototypes: int, hint: str = "") -> None:
    """Raise if a label is outside [0, num_prototypes)."""
    if labels.numel() == 0:
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= num_prototypes:
        bad = (labels < 0) | (labels >= num_prototypes)
        first = int(bad.int().argmax())
        raise ValueError(
            f"{name} must lie in [0, {num_prototypes}){hint}, got {int(labels[first])} at position {first} "
            f"({int(bad.sum())} of {labels.numel()} out of range)"
        )


def labels_valid(name: str, labels: Tensor, row_mask: Tensor | None, valid: Tensor, hard: bool) -> None:
    """Raise if no prototype is valid, or with hard targets if the label of a row that counts names one that is not."""
    if not bool(valid.any()):
        raise ValueError("valid must leave at least one prototype, got none")
    wrong = ~valid[labels] if row_mask is None else row_mask & ~valid[labels]
    if hard and bool(wrong.any()):
        first = int(wrong.int().argmax())
        raise ValueError(
            f"{name} must not name an invalid prototype with hard targets: {int(wrong.sum())} rows do, the first at position "
            f"{first} (valid[{int(labels[first])}] is False)"
        )


def check_labels(name: str, x: Tensor, *, rows: int | None = None, of: str = "") -> Tensor:
    """Check that ``x`` is int64 (N,) or (N, L), a label or several for each row; return it."""
    check.integers(name, x[:, 0] if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] else x, length=rows, of=of)
    return x


def mixture_weights(
    labels: Tensor, weights: Tensor | None, kept: Tensor | None, dtype: torch.dtype, check_values: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (B, L) of labels (B, L) that sum to 1 over those that are ``kept`` (None: all), and rows (B,) that keep any."""
    if weights is None:
        weights = torch.ones(labels.shape, dtype=dtype, device=labels.device)
    else:
        check.matrix("label_weights", weights, rows=labels.shape[0], width=labels.shape[1], of=" as labels")
        check.same_device("label_weights", weights, "labels", labels)
        if not check.values_are_checked(weights, check_values):
            assert_on_device((weights >= 0) & (weights < torch.inf))
        elif weights.numel():
            low, high = (float(x) for x in weights.aminmax())
            if not 0 <= low <= high < torch.inf:
                raise ValueError(f"label_weights must not be negative, NaN or Inf, got values from {low} to {high}")
        weights = weights.detach().to(dtype)
    weights = weights if kept is None else weights.where(kept, 0)
    total = weights.sum(1, keepdim=True)
    return weights / total.where(total > 0, 1), total[:, 0] > 0


def heaviest(labels: Tensor, weights: Tensor) -> Tensor:
    """The label (B,) of each mixture that has the largest weight, the first among equals."""
    return labels.gather(1, weights.argmax(1, keepdim=True))[:, 0]


def mixed(rows: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mixtures (B, D) of ``rows`` (K, D) by labels and weights (B, L), in the dtype of the weights; no B x L x D tensor."""
    return torch.nn.functional.embedding_bag(labels, rows.to(weights.dtype), per_sample_weights=weights, mode="sum")
