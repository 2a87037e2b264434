"""Captions that repeat in a batch: pairs of the same id are no negatives of each other, or positives."""

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..distributed import RankRows


def repeated(ids: Tensor, own: slice, rows: slice) -> Tensor:
    """For a block of own rows, which columns (b, N) are other pairs with the id of the row. ``ids`` (N,) are of all ranks."""
    first = own.start + rows.start
    same = ids[first : min(own.start + rows.stop, own.stop), None] == ids
    same.diagonal(first).fill_(False)
    return same


def numbered(ids: Tensor) -> Tensor:
    """Numbers from 0 on (N,), equal for equal ids (N,). How many there are is not asked: an accelerator would be waited for."""
    ordered, order = ids.sort()
    is_next = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0))
    return torch.empty_like(ids).scatter_(0, order, is_next.cumsum(0))


def shared_positives(image: Tensor, text: Tensor, ids: Tensor, ranks: RankRows) -> Tensor:
    r"""What own pairs (b,) lose, over the scale, if all pairs of an id are positives of equal mass, instead of the own one alone.

    .. math::
        \tfrac{1}{2} \left[ z^I_i \cdot (z^T_i - \bar z^T_i) + z^T_i \cdot (z^I_i - \bar z^I_i) \right]

    with means over the pairs of the id. Exact, as logits are linear in them; zero where an id occurs once.
    """
    dtype = accumulation_dtype(image.dtype)
    with torch.autocast(image.device.type, enabled=False):
        own = torch.cat([image, text], 1).to(dtype)
        everything, all_ids = ranks.gather_each_with_gradient(own, ids)
        group = numbered(all_ids)
        sums = own.new_zeros((len(group), own.shape[1])).index_add(0, group, everything)
        sizes = own.new_zeros(len(group)).index_add(0, group, torch.ones_like(group, dtype=dtype))
        of_own = group[ranks.own]
        image_mean, text_mean = (sums[of_own] / sizes[of_own, None]).chunk(2, 1)
        image, text = own.chunk(2, 1)
        lost: Tensor = (image * (text - text_mean)).sum(1) + (text * (image - image_mean)).sum(1)
        return lost / 2
