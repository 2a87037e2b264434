"""The private parts of the library that the benchmarks use, all in this file: a rename there is a change here only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from protoclip_losses import OnlinePrototypes
from protoclip_losses.kernels import blocks

__all__ = ["fill_queue", "rows_per_block", "without_logits_budget"]


def _module(name: str) -> Any:
    """A module of the library; None in a version without it."""
    try:
        return import_module(f"protoclip_losses.{name}")
    except ImportError:
        return None


# So that the benchmark also measures earlier versions: 0.7.2 kept sizes in kernels.blocks, 0.6 the budget elsewhere.
_sizes = _module("kernels.sizes")
_budget: Any = blocks if hasattr(blocks, "LOGITS_BUDGET") else _module("functional.contrastive")


def rows_per_block(columns: int, dtype: torch.dtype, device: str | torch.device) -> int:
    """Rows of a block of logits, as the library chooses them."""
    rows: int
    if _sizes is None:
        rows = _module("kernels.blocks").rows_per_block(columns, dtype, None)
    else:
        rows = _sizes.rows_per_block(columns, dtype, torch.device(device))
    return rows


@contextmanager
def without_logits_budget() -> Iterator[None]:
    """InfoNCE as it runs beyond its memory budget for logits: none are kept between the passes."""
    if _sizes is None:
        before, _budget.LOGITS_BUDGET = _budget.LOGITS_BUDGET, 0
    else:
        before = dict(_sizes.SIZES)
        _sizes.SIZES.update({name: replace(x, memory_budget=0) for name, x in before.items()})
    try:
        yield
    finally:
        if _sizes is None:
            _budget.LOGITS_BUDGET = before
        else:
            _sizes.SIZES.update(before)


def fill_queue(prototypes: OnlinePrototypes, image: Tensor, text: Tensor) -> None:
    """Take these features in as one step: with ``warmup=1`` they are clustered at once."""
    from protoclip_losses.distributed import RankRows  # not in 0.6, which the benchmark of the losses can measure
    from protoclip_losses.prototypes import BatchFeatures

    prototypes.observe(BatchFeatures({"image": image, "text": text}, {}), {}, RankRows(None, [len(image)]))
