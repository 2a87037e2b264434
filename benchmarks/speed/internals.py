"""The private parts of the library that the benchmarks use, all in this file: a rename there is a change here only."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

from protoclip_losses import OnlinePrototypes
from protoclip_losses.kernels import blocks
from protoclip_losses.kernels.blocks import rows_per_block

__all__ = ["fill_queue", "rows_per_block", "without_logits_budget"]

# 0.6 kept the budget elsewhere; with this line the benchmark also measures that version.
_budget: Any = blocks if hasattr(blocks, "LOGITS_BUDGET") else import_module("protoclip_losses.functional.contrastive")


@contextmanager
def without_logits_budget() -> Iterator[None]:
    """InfoNCE as it runs beyond its memory budget for logits: none are kept between the passes."""
    before, _budget.LOGITS_BUDGET = _budget.LOGITS_BUDGET, 0
    try:
        yield
    finally:
        _budget.LOGITS_BUDGET = before


def fill_queue(prototypes: OnlinePrototypes, image: Tensor, text: Tensor) -> None:
    """Take these features in as one step: with ``warmup=1`` they are clustered at once."""
    from protoclip_losses.distributed import RankRows  # not in 0.6, which the benchmark of the losses can measure
    from protoclip_losses.prototypes import BatchFeatures

    prototypes.observe(BatchFeatures({"image": image, "text": text}, {}), {}, RankRows(None, [len(image)]))
