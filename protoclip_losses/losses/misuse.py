"""Mistakes in a call that pass in silence and show in what a loss computes anyway: each is said once, with what to do."""

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import is_transformed, may_read_values
from ..clustering.files import checksum
from ..distributed import Group, RankRows, backends

LENGTHS = 1 / 3, 3.0  # of a row of features that are normalised, within reason


def warn_of_lengths(**features: Tensor | None) -> None:
    """Warn of features whose first row is far from length 1."""
    for name, x in features.items():
        if x is not None and len(x) and may_read_values(x):
            length = float(x[0].detach().float().norm())
            if not LENGTHS[0] <= length <= LENGTHS[1]:
                check.warn_once(
                    f"{name} have rows of length {length:.3g}, and the scale multiplies it: pass them L2-normalised "
                    "(torch.nn.functional.normalize(x, dim=1))",
                )


def warn_of_one_projection(image: Tensor | None, text: Tensor | None) -> None:
    """Warn if one modality is projected and the other is not."""
    if (image is None) != (text is None):
        given, missing = ("image", "text") if text is None else ("text", "image")
        check.warn_once(
            f"{given}_features_projected is given and {missing}_features_projected is not, so prototypes of {missing} are of its "
            "plain features: pass both, or neither",
        )


def digest(index: Any, features: Any) -> int:
    """A number of a batch's sample index, or of its features without one: equal on two ranks that hold the same samples."""
    rows = features if index is None else index.sort().values
    if torch.compiler.is_compiling() or is_transformed() or not len(rows):
        return 0
    return checksum(rows) or 1


def warn_of_equal_ranks(ranks: RankRows) -> None:
    """Warn if two ranks hold the same samples."""
    known = [x for x in ranks.digests if x]
    equal = [rank for rank, x in enumerate(ranks.digests) if x and known.count(x) > 1]
    if equal:
        check.warn_once(
            f"ranks {equal} of the process group hold the same samples, so that a sample is its own negative: pass the group of "
            "data parallelism (process_group=mesh['dp']) where ranks share a model by tensors or stages, and give each rank its "
            "own samples (DistributedSampler) where they do not",
        )


def warn_of_waiting(group: Group) -> None:
    """Warn of a group whose exchange of sizes and verdicts is one of the device, which has to be waited for."""
    served = backends(group)
    if "cpu" not in served:
        names = ",".join(f"{device}:{name}" for device, name in served.items())
        check.warn_once(
            f"process_group has collectives for {names} alone, so each step waits for the device to learn the batch sizes of "
            f"other ranks: init_process_group('cpu:gloo,{names}') exchanges them on the CPU, equal_batch_sizes=True not at all"
        )
