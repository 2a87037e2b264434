"""Signs that training with prototypes goes wrong: each is said once, as a warning that names what to do and the page to read.

What a sign is seen by is summed where the loss is computed, and read where that waits for no accelerator: on a CPU at once,
otherwise when the next prototypes are set or the state is saved. No rank asks another: what is equal on all ranks is said by the
first of them, the rest by each rank that sees it in its own samples.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import is_transformed, may_read_values
from ..distributed import Group, RankRows, rank
from ..kernels.autograd import in_backward
from ..prototypes.source import PrototypeSource, several_labels

PER_PROTOTYPE = 10  # samples for each prototype: of the paper's episodes, and of a window where there are none
BEGUN = 100  # training calls before which a training looks like one that goes wrong
WHOLE = 0.9  # of an episode, which loses its last batch
TIMES = 3  # how often an episode's prototypes may be used
NEAR = 0.01  # of log K: how far from it the loss of a model that knows nothing stays
EMPTY = 0.5  # of the clusters
# The share of all samples that one cluster may hold, and how often the mean one where K is small. An eighth is no fault:
# of the example's emoji as many are flags, and the words of their captions make one cluster.
LARGE, TIMES_MEAN = 0.2, 5


def warn_of_clusters(source: PrototypeSource | None, group: Group | None) -> None:
    """Warn of clusterings by sample index of which most clusters are empty, or one is large."""
    if source is None or rank(group) > 0:
        return
    for teacher, clustering in source.clusterings.items():
        if clustering.labels is None:
            continue
        labels, number = several_labels(clustering.labels), len(clustering.centroids)
        sizes = torch.bincount(labels.flatten() + 1, minlength=number + 1)[1:]
        samples, in_use, largest = torch.stack([(labels >= 0).any(1).sum(), (sizes > 0).sum(), sizes.max()]).tolist()
        most = min(number, samples)  # of clusters that can be in use: a clustering of the whole data set may have more
        if in_use < (1 - EMPTY) * most:
            check.warn_once(
                f"{teacher}: only {in_use} of {number} clusters have samples of the {samples} that were clustered: its features "
                "have collapsed or repeat each other, or num_prototypes is too large (about a tenth of the samples is usual)",
                f"empty clusters of {teacher}",
            )
        if largest > samples * max(LARGE, TIMES_MEAN / max(most, 1)):
            check.warn_once(
                f"{teacher}: one of {number} clusters holds {largest} of {samples} samples: its features have collapsed, or many "
                "samples are alike, which plots.cluster_grid shows",
                f"large cluster of {teacher}",
            )


class PrototypeWatch:
    """What prototypes were used for: sums over windows, each of as many samples as an episode has.

    Args:
        source: of the prototypes.
        before: the watch of the loss's prototypes before.
    """

    def __init__(self, source: PrototypeSource | None, before: "PrototypeWatch | None" = None) -> None:
        self.calls: int = 0 if before is None else before.calls  # of training steps with prototypes
        self.num_samples = None if source is None else source.num_samples
        self.calls_per_step = 1 if source is None else source.calls_per_step
        self.names: Sequence[str] = ()
        self.num_prototypes = 0
        self.log_k = torch.empty(0, device="cpu")
        self.used = self.rows = 0.0  # since the prototypes were set, and in the window
        self.sums: Tensor | None = None  # (4, terms) of the window: samples, hits, distances of losses from log K, log K
        self.windows: list[Tensor] = []  # the last one that is complete
        self.at_chance: set[str] = set() if before is None else before.at_chance  # terms, in the window before

    def follow(self, names: Sequence[str], prototypes: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """The terms from now on: their names, and the prototypes (K, D) with the mask of valid ones (K,) of each."""
        if names != self.names:  # a term has lost its weight, or gained one
            self.sums, self.rows, self.windows = None, 0.0, []
        self.names, self.num_prototypes = names, max((len(p) for p, _ in prototypes), default=0)
        sizes = [torch.full((), len(p), device=p.device) if valid is None else valid.sum() for p, valid in prototypes]
        self.log_k = torch.stack(sizes).float().log() if sizes else torch.empty(0, device="cpu")

    def see(self, counts: Tensor, hits: Sequence[Tensor], totals: Sequence[Tensor], ranks: RankRows) -> None:
        """A batch of all ranks: of this one's rows, labelled samples (terms,), and hits and the sum of losses of each term."""
        if torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled() or in_backward():
            return
        if self.num_samples is not None and self.used > TIMES * self.num_samples and rank(ranks.group) == 0:
            check.warn_once(
                f"the same prototypes have been used for more than {TIMES} times the samples of their episode: features have "
                "moved since, so build and set them again (or None for InfoNCE only)"
            )
        self.calls += 1
        rows = ranks.total / self.calls_per_step
        self.used, self.rows = self.used + rows, self.rows + rows
        if self.log_k.device != counts.device:
            self.log_k = self.log_k.to(counts.device)
        hit, total = (torch.stack([x.detach().float() for x in values]) for values in (hits, totals))
        count = counts.float()
        wanted = count * self.log_k
        batch = torch.stack([count, hit, (total - wanted).abs(), wanted])
        self.sums = batch if self.sums is None else self.sums.to(batch.device) + batch
        if self.rows >= WHOLE * (self.num_samples or PER_PROTOTYPE * self.num_prototypes):
            self.windows, self.sums, self.rows = [self.sums], None, 0.0
            if may_read_values(*self.windows):
                self.tell()

    def tell(self) -> None:
        """Warn of what the last window showed. A step on an accelerator would wait to know it."""
        has_begun = self.calls >= BEGUN
        while self.windows:
            before, self.at_chance = self.at_chance, set()
            for name, (samples, hits, distance, log_k) in zip(self.names, self.windows.pop().T.tolist(), strict=True):
                by_chance = samples * math.exp(-log_k / max(samples, 1))
                is_enough = by_chance >= PER_PROTOTYPE / 2 and (has_begun or self.num_samples is not None)
                if is_enough and hits <= by_chance + 2 * math.sqrt(by_chance):
                    self.at_chance.add(name)
                if name in before & self.at_chance:  # in one window it may be a training that has only begun
                    check.warn_once(
                        f"prototype_accuracy/{name} has been at chance for two episodes: are image and text swapped, or is index "
                        "that of another data set? Features that have collapsed look the same"
                    )
                if has_begun and log_k > 0 and distance <= NEAR * log_k:
                    check.warn_once(
                        f"the prototype loss of {name} has stayed within {NEAR:.0%} of log K for a whole episode, as if all "
                        "prototypes were equal: have features collapsed, is logit_scale_proto near 1, or are soft targets "
                        "nearly uniform (a high target_temperature)?"
                    )
