"""Modality gap: how far apart the two modalities lie."""

from torch import Tensor

from .._dtypes import sum_dtype
from ._features import unit_rows


def modality_gap(image: Tensor, text: Tensor) -> float:
    r"""Distance between the mean image feature and the mean text feature.

    .. math::
        \Big\lVert \frac{1}{N} \sum_i \frac{z^I_i}{\lVert z^I_i \rVert_2}
        - \frac{1}{M} \sum_j \frac{z^T_j}{\lVert z^T_j \rVert_2} \Big\rVert_2

    **Use it when:** you want to see whether training closes the gap between the two modalities.
    **Not when:** you compare how good encoders are: a small gap does not imply good retrieval, nor a large one bad.
    **Related:** :func:`retrieval_recall` measures what the gap may cost; :func:`~protoclip_losses.plots.modality_map` draws it.

    Args:
        image: (N, d), image features of any finite scale.
        text: (M, d), text features. M need not be N.

    Returns:
        The gap, between 0 (the means coincide) and 2 (each modality is one point, on opposite sides).

    Raises:
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a shape that is not (rows, d), no row, widths or devices that differ, a value that is not finite.

    Example:
        >>> import torch
        >>> image, text = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        >>> round(modality_gap(image, text), 4)
        1.4142

    Source:
        Liang et al., "Mind the Gap: Understanding the Modality Gap in Multi-modal Contrastive Representation Learning",
        NeurIPS 2022, https://arxiv.org/abs/2203.02053, section 2.
    """
    image = unit_rows("image", image)
    text = unit_rows("text", text, "image", image)
    dtype = sum_dtype(image.device)
    return float((image.mean(0, dtype=dtype) - text.mean(0, dtype=dtype)).norm())
