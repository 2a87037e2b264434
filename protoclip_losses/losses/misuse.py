"""Mistakes that pass in silence and show in what a loss computes anyway: each is said once, as a warning that says what to do."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import is_transformed, may_read_values
from ..distributed import Group, RankRows, backends

LENGTHS = 1 / 3, 3.0  # of a row of features that are normalised, within reason
PER_PROTOTYPE = 10  # samples for each prototype after which an accuracy at chance is no chance
EPISODES = 3  # how often an episode's prototypes may be used


def warn_of_lengths(**features: Tensor | None) -> None:
    """Warn of features whose first row is far from length 1."""
    for name, x in features.items():
        if x is not None and len(x) and may_read_values(x):
            length = float(x[0].detach().float().norm())
            if not LENGTHS[0] <= length <= LENGTHS[1]:
                check.warn(
                    f"{name} have rows of length {length:.3g}, and the scale multiplies it: pass them L2-normalised "
                    "(torch.nn.functional.normalize(x, dim=1))",
                    once=True,
                )


def warn_of_one_projection(image: Tensor | None, text: Tensor | None) -> None:
    """Warn if one modality is projected and the other is not."""
    if (image is None) != (text is None):
        given, missing = ("image", "text") if text is None else ("text", "image")
        check.warn(
            f"{given}_features_projected is given and {missing}_features_projected is not, so prototypes of {missing} are of its "
            "plain features: pass both, or neither",
            once=True,
        )


def digest(index: Any, features: Any) -> int:
    """A number of a batch's sample index, or of its features without one: equal on two ranks that hold the same samples."""
    rows = features if index is None else index.sort().values
    if torch.compiler.is_compiling() or is_transformed() or not len(rows):
        return 0
    return zlib.crc32(rows.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()) or 1


def warn_of_equal_ranks(ranks: RankRows) -> None:
    """Warn if two ranks hold the same samples."""
    known = [x for x in ranks.digests if x]
    equal = [rank for rank, x in enumerate(ranks.digests) if x and known.count(x) > 1]
    if equal:
        check.warn(
            f"ranks {equal} of the process group hold the same samples, so that a sample is its own negative: pass the group of "
            "data parallelism (process_group=mesh['dp']) where ranks share a model by tensors or stages, and give each rank its "
            "own samples (DistributedSampler) where they do not",
            once=True,
        )


def warn_of_waiting(group: Group) -> None:
    """Warn of a group whose exchange of sizes and verdicts is one of the device, which has to be waited for."""
    served = backends(group)
    if "cpu" not in served:
        names = ",".join(f"{device}:{name}" for device, name in served.items())
        check.warn(
            f"process_group has collectives for {names} alone, so each step waits for the device to learn the batch sizes of "
            f"other ranks: init_process_group('cpu:gloo,{names}') exchanges them on the CPU, equal_batch_sizes=True not at all",
            once=True,
        )


class UseOfPrototypes:
    """Counts of what prototypes were used for, until it is clear that they fit.

    Args:
        num_samples: of the episode that they were built of; None for prototypes that keep themselves up to date.
        num_prototypes: the largest number of any term.
    """

    def __init__(self, num_samples: int | None, num_prototypes: int) -> None:
        self.num_samples, self.num_prototypes = num_samples, num_prototypes
        self.rows = self.own_rows = 0
        self.sums: Tensor | None = None  # (2, terms): samples with a label, and those whose prototype is first
        self.names: Sequence[str] = ()
        self.is_known = False

    def see(self, names: Sequence[str], counts: Tensor, correct: Sequence[Tensor], own_rows: int, rows: int) -> None:
        """A batch of ``rows`` on all ranks, with (terms,) labelled samples and hits of this one."""
        if torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled():
            return
        self.rows += rows
        if self.num_samples is not None and self.rows - rows > EPISODES * self.num_samples:
            check.warn(
                f"the same prototypes have been used for more than {EPISODES} times the samples of their episode: features have "
                "moved since, so build and set them again (or None for InfoNCE only)",
                once=True,
            )
        if self.is_known:
            return
        self.own_rows += own_rows
        batch = torch.stack([counts.float(), torch.stack([x.detach().float() for x in correct])])
        self.sums = batch if self.sums is None else self.sums.to(batch.device) + batch
        if self.own_rows >= PER_PROTOTYPE * self.num_prototypes:
            self.is_known, self.names = True, names
            if may_read_values(self.sums):
                self.tell()

    def tell(self) -> None:
        """Warn of accuracies at chance, if there have been samples enough. A step on an accelerator would wait to know them."""
        if not self.is_known or self.sums is None:
            return
        sums, self.sums = self.sums, None
        for name, (seen, hits) in zip(self.names, sums.T.tolist(), strict=True):
            by_chance = seen / self.num_prototypes
            if by_chance >= PER_PROTOTYPE / 2 and hits <= by_chance + 2 * math.sqrt(by_chance):
                check.warn(
                    f"{name} is at chance: are image and text swapped, or is index that of another data set? Features that have "
                    "collapsed look the same, and so does a training that has only begun",
                    once=True,
                )
