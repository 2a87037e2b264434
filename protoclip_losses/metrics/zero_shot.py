"""Zero-shot classification: a classifier from the embeddings of prompts, and its accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype, sum_dtype
from ..functional._labels import label_range
from ._features import class_numbers, neighbour_counts, unit_rows
from .retrieval import best_ranks, hit_share


def zero_shot_classifier(prompt_embeddings: Sequence[Tensor]) -> Tensor:
    r"""One unit vector per class from the embeddings of its prompts.

    .. math::
        w_c = \frac{m_c}{\lVert m_c \rVert_2}, \qquad
        m_c = \frac{1}{n_c} \sum_{i=1}^{n_c} \frac{e_{c,i}}{\lVert e_{c,i} \rVert_2}

    **Use it when:** classes have names, or several prompts each.
    **Not when:** labelled features are at hand to fit on: :func:`linear_probe`.
    **Related:** :func:`zero_shot_accuracy` scores what this returns.

    Args:
        prompt_embeddings: one tensor per class, (n_c, d) with n_c at least 1: text features of its prompts, of any finite scale.

    Returns:
        The classifier, (C, d) in float32 (float64 if an embedding is float64).

    Raises:
        TypeError: an element that is not a floating-point tensor.
        ValueError: no class, a class without a prompt, widths or devices that differ, a value that is not finite, prompts of a
            class that cancel out.

    Example:
        >>> import torch
        >>> zero_shot_classifier([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])])
        tensor([[1., 0.],
                [0., 1.]])

    Source:
        Radford et al., https://arxiv.org/abs/2103.00020, section 3.1.4 (ensembling over the embedding space).
    """
    if len(prompt_embeddings) == 0:
        raise ValueError("prompt_embeddings must have one (n_c, d) tensor per class, got no class")
    first, dtype, rows = prompt_embeddings[0], torch.float32, []
    for number, embeddings in enumerate(prompt_embeddings):
        name = f"prompt_embeddings[{number}]"
        unit = unit_rows(name, embeddings, "prompt_embeddings[0]", first if number else None)
        mean = unit.mean(0, dtype=sum_dtype(unit.device))
        length = mean.norm()
        # Means of prompts that cancel out are as long as the rounding of the embeddings, and point anywhere.
        if float(length) < torch.finfo(embeddings.dtype).eps:
            raise ValueError(f"{name} must have a mean other than zero, got prompts that cancel out")
        dtype = torch.promote_types(dtype, accumulation_dtype(embeddings.dtype))
        rows.append(mean / length)
    return torch.stack(rows).to(dtype)


def zero_shot_accuracy(image: Tensor, labels: Tensor, classifier: Tensor, topk: Sequence[int] = (1,)) -> dict[str, float]:
    r"""Share of images whose class is among the k classes with the highest cosine similarity.

    .. math::
        \mathrm{top}k = \frac{1}{N} \sum_i \big[\, \#\{ c \ne y_i : \hat z_i \cdot w_c \ge \hat z_i \cdot w_{y_i} \} < k \,\big]

    Similarities are formed for a block of images at a time: (N, C) is never held.

    **Use it when:** classes can be named: it measures image and text encoder together.
    **Not when:** the image encoder alone is to be judged: :func:`linear_probe` or :func:`grouping`.
    **Related:** :func:`zero_shot_classifier` makes the classifier.

    Args:
        image: (N, d), image features of any finite scale.
        labels: (N,), any integer dtype: the class of each image, in [0, C).
        classifier: (C, d), one row per class; see :func:`zero_shot_classifier`.
        topk: the numbers of classes to look at, each in [1, C].

    Returns:
        ``{"top1": ..., ...}``, each between 0 and 1. A tie counts against the image.

    Raises:
        TypeError: features that are not floating-point tensors, labels that are not integers.
        ValueError: shapes or devices that do not match, a label outside [0, C), a k outside [1, C], a value that is not finite.

    Example:
        >>> import torch
        >>> zero_shot_accuracy(torch.eye(2), torch.tensor([0, 0]), torch.eye(2), topk=(1, 2))
        {'top1': 0.5, 'top2': 1.0}

    Source:
        Radford et al., https://arxiv.org/abs/2103.00020, section 3.1.2.
    """
    image = unit_rows("image", image)
    classifier = unit_rows("classifier", classifier, "image", image)
    labels = class_numbers("labels", labels, "image", image)
    label_range("labels", labels, len(classifier), " as classifier has rows")
    neighbour_counts("topk", topk, len(classifier))
    ranks = best_ranks(image, labels, classifier, torch.arange(len(classifier), device=image.device))
    return {f"top{k}": hit_share(ranks, k) for k in topk}
