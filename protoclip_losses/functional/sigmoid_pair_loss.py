"""The sigmoid loss between two modalities."""

from torch import Tensor

from .. import _checks as check
from ..kernels.sigmoid_pair_loss import sigmoid_pair_rows, sigmoid_pair_sum
from ..kernels.sizes import BlockLimit
from .info_nce import check_pairs


def sigmoid_pair_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    check_values: bool | None = None,
) -> Tensor:
    r"""SigLIP's loss: for each pair of an image and a text, whether they belong together.

    .. math::
        \mathcal{L} = -\frac{1}{B} \sum_{i,j} \log \sigma\bigl(z_{ij} (s\, x_i \cdot y_j + b)\bigr),
        \qquad z_{ij} = 1 \text{ if } i = j \text{, else } -1

    where :math:`x, y` are the features of images and texts, :math:`s` is the exponentiated logit scale and :math:`b` the logit
    bias. The sum of all pairs is divided by B, not by their number. No B x B tensor is held, and memory is linear in B: loss and
    gradients are formed together, in three products over blocks of rows. This function runs on one process;
    :class:`protoclip_losses.SigmoidPairLoss` gathers over processes.

    Args:
        image_features: (B, d), L2-normalised by the caller.
        text_features: (B, d), likewise; row i is the pair of image row i.
        logit_scale: :math:`s`, already exponentiated: a float, () or (1,). Gradients flow to it. SigLIP starts from 10.
        logit_bias: :math:`b`: a float, () or (1,). Gradients flow to it. SigLIP starts from -10.
        reduction: ``"mean"`` over the images, ``"sum"``, or ``"none"``: the sum over the texts for each image, whose logits are
            computed again in backward.
        chunk_size: rows of B worked on at a time; any value gives the same answer. None lets the library choose.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read the values to check that they are finite. None means on CPU in eager mode only.

    Returns:
        The loss in float32 (float64 for float64 features): a () tensor, or (B,) with ``reduction="none"``.

    Raises:
        TypeError: features that are not floating-point tensors, a scale or bias that is no number.
        ValueError: shapes that do not match, an empty batch, a non-finite scale, bias or feature, an unknown reduction.

    Example:
        >>> import torch
        >>> features = torch.eye(2)
        >>> sigmoid_pair_loss(features, features, 10.0, -5.0)  # 2 log(1 + exp(-5))
        tensor(0.0134)

    Source:
        Zhai et al., SigLIP, https://arxiv.org/abs/2303.15343, section 3.2.
    """
    scale = check_pairs(image_features, text_features, logit_scale, check_values)
    bias = check.bias("logit_bias", logit_bias, image_features, check_values)
    limit = BlockLimit(chunk_size, memory_budget)
    check.reduction(reduction)
    if reduction == "none":
        return sigmoid_pair_rows(image_features, text_features, scale, bias, limit)
    total, _ = sigmoid_pair_sum(image_features, text_features, scale, bias, limit)
    return total if reduction == "sum" else total / image_features.shape[0]
