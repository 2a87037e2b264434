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


def shared_positives(image: Tensor, text: Tensor, ids: Tensor, ranks: RankRows) -> Tensor:
    r"""What own pairs (b,) lose, over the scale, if all pairs of an id are positives of equal mass, instead of the own one alone.

    .. math::
        \tfrac{1}{2} \left[ z^I_i \cdot (z^T_i - \bar z^T_i) + z^T_i \cdot (z^I_i - \bar z^I_i) \right]

    with means over the pairs of the id. Exact, as logits are linear in them; zero where an id occurs once.
    """
    dtype = accumulation_dtype(image.dtype)
    with torch.autocast(image.device.type, enabled=False):
        _, group, sizes = torch.unique(ranks.gather(ids), return_inverse=True, return_counts=True)
        own = torch.cat([image, text], 1).to(dtype)
        everything = ranks.gather_with_gradient(own) if not ranks.is_single else own
        sums = own.new_zeros((len(sizes), own.shape[1])).index_add(0, group, everything)
        image_mean, text_mean = (sums / sizes[:, None].to(dtype))[group[ranks.own]].chunk(2, 1)
        image, text = own.chunk(2, 1)
        lost: Tensor = (image * (text - text_mean)).sum(1) + (text * (image - image_mean)).sum(1)
        return lost / 2
