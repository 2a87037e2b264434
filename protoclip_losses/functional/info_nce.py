"""InfoNCE between two modalities."""

from torch import Tensor

from .. import _checks as check
from ..kernels.info_nce import pair_nll_rows, pair_nll_sum
from ..kernels.sizes import BlockLimit


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    repeats: str = "mask",
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    check_values: bool | None = None,
) -> Tensor:
    r"""InfoNCE: symmetric cross-entropy of matching each image with its text and each text with its image.

    .. math::
        \mathcal{L} = \tfrac{1}{2} \left[ \mathrm{CE}(s Z^I {Z^T}^\top, \mathrm{diag})
        + \mathrm{CE}(s Z^T {Z^I}^\top, \mathrm{diag}) \right]

    where :math:`Z^I, Z^T` are the features of the two modalities, row i of one belonging to row i of the other, and
    :math:`s` is the exponentiated logit scale. No B x B tensor is held where logits do not fit the memory budget (by
    default 512 MiB on a CPU, 1 GiB on an accelerator); they are computed twice then and memory is linear in B. This
    function runs on one process; :class:`protoclip_losses.InfoNCE` gathers over processes.

    **Use it when:** the pairs of one process are the whole batch.
    **Not when:** processes share the batch: :class:`protoclip_losses.InfoNCE` gathers.
    **Related:** :func:`caption_ids` for captions that repeat.

    Args:
        image_features: (B, d), L2-normalised by the caller.
        text_features: (B, d), likewise; row i is the pair of image row i.
        logit_scale: :math:`s`, already exponentiated: a float, () or (1,). Gradients flow to it.
        ids: (B,) int64 of captions that repeat, such as :func:`caption_ids` makes; None: every pair is alone.
        repeats: what pairs with equal ids are to each other: ``"mask"`` no negatives, their logits are left out; ``"share"``
            positives, all of equal mass.
        reduction: ``"mean"`` over the batch, ``"sum"``, or ``"none"``: :math:`\tfrac{1}{2}(\ell^I_i + \ell^T_i)` of each pair,
            whose logits are computed again in backward.
        chunk_size: rows of B worked on at a time; any value gives the same answer. None lets the library choose.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read the values to check that they are finite. None means on CPU in eager mode only.

    Returns:
        The loss in float32 (float64 for float64 features): a () tensor, or (B,) with ``reduction="none"``.

    Raises:
        TypeError: features that are not floating-point tensors.
        ValueError: shapes that do not match, an empty batch, a non-finite scale or feature, an unknown reduction or repeats.

    Example:
        >>> import torch
        >>> features = torch.eye(2)
        >>> info_nce(features, features, 1.0)  # log(1 + 1/e)
        tensor(0.3133)

    Source:
        van den Oord et al., https://arxiv.org/abs/1807.03748; the symmetric form of CLIP, https://arxiv.org/abs/2103.00020,
        figure 3; ProtoCLIP section III-A, https://arxiv.org/abs/2206.10996.
    """
    scale = check_pairs(image_features, text_features, logit_scale, check_values)
    limit = BlockLimit(chunk_size, memory_budget)
    check.reduction(reduction)
    check_ids(ids, repeats, image_features)
    if reduction == "none":
        return pair_nll_rows(image_features, text_features, scale, limit, ids, repeats)
    total, _ = pair_nll_sum(image_features, text_features, scale, limit, ids=ids, repeats=repeats)
    return total if reduction == "sum" else total / image_features.shape[0]


def check_pairs(image: Tensor, text: Tensor, logit_scale: Tensor | float, check_values: bool | None) -> Tensor:
    """Check a batch of pairs; return the scale as a 0-d tensor."""
    check.matrix("image_features", image)
    check.matrix("text_features", text, rows=image.shape[0], width=image.shape[1], of=" as image_features")
    check.same_device("text_features", text, "image_features", image)
    if image.shape[0] == 0:
        raise ValueError(f"image_features must have at least one row, got shape {check.shape(image)}")
    scale = check.scale("logit_scale", logit_scale, image, check_values)
    if check.values_are_checked(image, check_values, text):
        check.finite("image_features", image)
        check.finite("text_features", text)
    return scale


def check_ids(ids: Tensor | None, repeats: str | None, image: Tensor) -> None:
    """Check the ids of a batch, and what is to be done with them."""
    check_repeats(repeats)
    if ids is not None:
        if repeats is None:
            raise ValueError(
                "ids need repeats='mask' or 'share', which says what pairs with equal ids are to each other, got None"
            )
        check.integers("ids", ids, length=image.shape[0], of=" as image_features has rows")
        check.same_device("ids", ids, "image_features", image)


def check_repeats(repeats: str | None) -> None:
    """Check what pairs of equal ids are to be."""
    if repeats not in ("mask", "share", None):
        raise ValueError(f"repeats must be 'mask', 'share' or None, got {repeats!r}")
