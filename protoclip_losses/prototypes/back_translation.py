"""Prototypical Back Translation as a module that also streams."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._dtypes import accumulation_dtype, sum_dtype
from ..clustering.points import finite_rows, segment_means_and_counts, segment_sums_and_counts
from ..distributed import Group, sum_over_ranks
from ..functional.back_translation import back_translate, segment_mean, segment_sum
from .extra_state import StateTensor, pack, unpack
from .source import several_labels


class PrototypicalBackTranslation(nn.Module):
    r"""Prototypical Back Translation (PBT), at once or streamed.

    .. math::
        P_k = \frac{1}{n_k} \sum_{i : a_i = k} h_i

    **Use it when:** you have a teacher's labels and want prototypes in a student's space, at once or batch by batch.
    **Not when:** you cluster episodes: :meth:`EpisodicClusterer.build` back-translates every pair, over all ranks.
    **Related:** :func:`protoclip_losses.functional.back_translate`, which a call of the module is.

    For features that do not fit in memory, pass them batch by batch to :meth:`update` and get the same answer from
    :meth:`compute`; a streamed sum is kept in float64, but on MPS, which has none.

    Args:
        num_prototypes: number K of teacher clusters.

    Attributes:
        counts: (K,) int64, samples of each label in the last call or since :meth:`reset`; a row with none is zero.

    Example:
        >>> import torch
        >>> pbt = PrototypicalBackTranslation(num_prototypes=2)
        >>> pbt.update(torch.tensor([0]), torch.tensor([[1.0, 3.0]]))
        >>> pbt.update(torch.tensor([0]), torch.tensor([[3.0, 5.0]]))
        >>> pbt.compute(), pbt.counts
        (tensor([[2., 4.],
                [0., 0.]]), tensor([2, 0]))

    Source:
        ProtoCLIP section III-C, https://arxiv.org/abs/2206.10996.
    """

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.num_prototypes = check.positive_int("num_prototypes", num_prototypes)
        self.reset()

    def extra_repr(self) -> str:
        return f"num_prototypes={self.num_prototypes}, streamed={int(self._counts.sum())}"

    def forward(self, labels: Tensor, features: Tensor) -> Tensor:
        """Prototypes (K, D) of labels (N,) and features (N, D); streamed features are not used."""
        prototypes, self.counts = back_translate(labels, features, self.num_prototypes)
        return prototypes

    def reset(self) -> None:
        """Forget what was streamed."""
        self.counts = torch.zeros(self.num_prototypes, dtype=torch.int64, device="cpu")
        self._sums: Tensor | None = None
        self._counts = self.counts
        self._dtype = torch.float32

    def update(self, labels: Tensor, features: Tensor) -> None:
        """Add a batch: labels (n,) int64, features (n, D)."""
        check.matrix("features", features, width=None if self._sums is None else self._sums.shape[1], of=" as before")
        sums, counts = segment_sum(labels, features, self.num_prototypes)
        if self._sums is None:
            self._dtype = accumulation_dtype(features.dtype)
            self._sums, self._counts = sums.to(sum_dtype(sums.device)), counts
        else:
            self._sums, self._counts = self._sums + sums, self._counts + counts
        self.counts = self._counts

    def compute(self) -> Tensor:
        """Prototypes (K, D) of everything passed to :meth:`update`."""
        if self._sums is None:
            raise ValueError("compute needs at least one update(labels, features) before it")
        return segment_mean(self._sums, self._counts).to(self._dtype)

    def get_extra_state(self) -> StateTensor:
        dtype = str(self._dtype).removeprefix("torch.")
        return pack({"format": 1, "sums": self._sums, "counts": self._counts, "dtype": dtype})

    def set_extra_state(self, state: Any) -> None:
        state = unpack(state)
        check.state_format("PrototypicalBackTranslation", state)
        counts = state["counts"]
        check.integers("state_dict counts", counts, length=self.num_prototypes, of=" as num_prototypes")
        self._sums, self._counts, self._dtype = state["sums"], counts, getattr(torch, state["dtype"])
        self.counts = counts


def back_translate_over_ranks(
    labels: Tensor, features: Tensor, num_prototypes: int, group: Group | None
) -> tuple[Tensor, Tensor]:
    """Prototypes (K, D) and counts (K,) from the labels (n,) or (n, L) and features (n, D) of all ranks; sums are in float64.

    Rows that are not finite are left out, as are labels of -1; a row with several labels counts for each of them.
    """
    columns = several_labels(labels).where(finite_rows(features)[:, None], -1).unbind(1)
    sums = torch.stack([segment_sums_and_counts(column, features, num_prototypes) for column in columns]).sum(0)
    sums = sum_over_ranks(sums, group)
    prototypes, counts = segment_means_and_counts(sums)
    return prototypes.to(torch.promote_types(features.dtype, torch.float32)), counts
