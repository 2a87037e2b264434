"""The pair loss of the objective: InfoNCE, or SigLIP's sigmoid loss, over all ranks."""

from typing import Any

from torch import Tensor

from .. import _checks as check
from ..distributed import RankRows
from ..functional.info_nce import check_ids, check_pairs
from .info_nce import info_nce_share
from .settings import ObjectiveSettings, block_limit
from .sigmoid_pair_loss import sigmoid_pair_share


def check_pair_term(
    settings: ObjectiveSettings, image: Tensor, text: Tensor, logit_scale: Any, logit_bias: Any, ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check a batch of pairs; return scale and bias as 0-d tensors, None where no bias is used."""
    scale = check_pairs(image, text, logit_scale, settings.check_values if settings.w_clip else False)
    check_ids(ids, settings.repeats, image)
    if settings.pair_loss == "info_nce" or not settings.w_clip:
        return scale, None
    if logit_bias is None:
        raise ValueError("logit_bias must be given with pair_loss='sigmoid', as the model's outputs have it, got None")
    return scale, check.bias("logit_bias", logit_bias, image, settings.check_values)


def pair_share(
    settings: ObjectiveSettings,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    ranks: RankRows,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's share of the pair loss, and its metrics. Inputs have been checked."""
    limit = block_limit(settings)
    if bias is not None:
        return sigmoid_pair_share(image, text, scale, bias, ranks, limit)
    return info_nce_share(image, text, scale, ranks, limit, settings.gather_with_grad, ids, settings.repeats)
