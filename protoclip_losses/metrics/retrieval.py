"""Retrieval by cosine similarity: recall@k."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.sizes import rows_per_block
from ._features import class_numbers, neighbour_counts, unit_rows


def retrieval_recall(
    image: Tensor,
    text: Tensor,
    concepts: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    *,
    text_concepts: Tensor | None = None,
) -> dict[str, float]:
    r"""Share of queries that find a positive among their k nearest, image to text and text to image.

    .. math::
        \mathrm{recall@}k = \frac{1}{N} \sum_i
        \big[\, \#\{ j \notin P_i : s_{ij} \ge \max_{p \in P_i} s_{ip} \} < k \,\big]

    where :math:`s_{ij}` is the cosine similarity of query i and gallery row j, and :math:`P_i` holds the gallery rows of the
    same concept as query i. A tie counts against the query, so that an encoder that maps everything to one point scores 0.
    Similarities are formed for a block of queries at a time.

    **Use it when:** pairs, or pairs with concepts, are all you have: no class names and no training set are needed.
    **Not when:** captions repeat and `concepts` is None: a right answer under another index counts as wrong.
    **Related:** :func:`zero_shot_accuracy` for a gallery of classes.

    Args:
        image: (N, d), image features of any finite scale.
        text: (M, d), text features.
        concepts: (N,), any integer dtype: the concept of each image. Any text of the same concept is a positive. None: image i
            and text i are the only positives of each other (then M = N).
        ks: the numbers of neighbours to look at, each at least 1.
        text_concepts: (M,), any integer dtype: the concept of each text. None: `concepts` (then M = N).

    Returns:
        ``{"image_to_text_recall@k": ..., "text_to_image_recall@k": ...}`` for every k, each between 0 and 1.

    Raises:
        TypeError: features that are not floating-point tensors, concepts that are not integer tensors.
        ValueError: shapes or devices that do not match, a k below 1, a value that is not finite, a row without any positive.

    Example:
        >>> import torch
        >>> image = torch.eye(3)
        >>> text = torch.eye(3)[[0, 2, 1]]
        >>> retrieval_recall(image, text, ks=(1, 3))["image_to_text_recall@3"]
        1.0
        >>> retrieval_recall(image, text, torch.tensor([0, 1, 1]), ks=(1,))["image_to_text_recall@1"]
        1.0

    Source:
        Recall@k as reported for COCO in Radford et al., https://arxiv.org/abs/2103.00020; positives by concept as ProtoCLIP's
        grouping calls for, https://arxiv.org/abs/2206.10996.
    """
    image = unit_rows("image", image)
    text = unit_rows("text", text, "image", image)
    neighbour_counts("ks", ks)
    if concepts is None:
        if text_concepts is not None:
            raise ValueError("concepts must be given where text_concepts is, got None")
        concepts = torch.arange(len(image), device=image.device)
    concepts = class_numbers("concepts", concepts, "image", image)
    if text_concepts is None:
        if len(text) != len(image):
            raise ValueError(f"text must have {len(image)} rows as image, or text_concepts be given, got {len(text)} rows")
        text_concepts = concepts
    text_concepts = class_numbers("text_concepts", text_concepts, "text", text)
    result = {}
    for way, query, gallery in (
        ("image_to_text", (image, concepts), (text, text_concepts)),
        ("text_to_image", (text, text_concepts), (image, concepts)),
    ):
        ranks = best_ranks(*query, *gallery)
        if bool((ranks < 0).any()):
            raise ValueError(f"concepts must give each query a positive, got {int((ranks < 0).sum())} ({way}) without one")
        result.update({f"{way}_recall@{k}": hit_share(ranks, k) for k in ks})
    return result


def best_ranks(queries: Tensor, query_classes: Tensor, gallery: Tensor, gallery_classes: Tensor) -> Tensor:
    """Rows of the gallery that are of another class than the query and at least as similar to it as the best of its own class.

    Args:
        queries: (n, d), unit rows.
        query_classes: (n,) int64.
        gallery: (m, d), unit rows.
        gallery_classes: (m,) int64.

    Returns:
        (n,) int64, from 0 on; -1 for a query that has no row of its own class.
    """
    dtype = torch.promote_types(queries.dtype, gallery.dtype)
    queries, gallery, originals = queries.to(dtype), gallery.to(dtype), _first_copies(gallery)
    ranks = []
    step = rows_per_block(2 * len(gallery), dtype, gallery.device)  # similarities, and those of positives alone
    with torch.autocast(queries.device.type, enabled=False):
        for query, query_class in zip(torch.split(queries, step), torch.split(query_classes, step), strict=True):
            similarity = query @ gallery.T
            if originals is not None:
                similarity = similarity[:, originals]
            positive = query_class[:, None] == gallery_classes
            best = similarity.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
            rank = ((similarity >= best) & ~positive).sum(1)
            ranks.append(rank.masked_fill(~positive.any(1), -1))
    return torch.cat(ranks)


def hit_share(ranks: Tensor, k: int) -> float:
    """Share of ranks below k."""
    return int((ranks < k).sum()) / len(ranks)


def _first_copies(gallery: Tensor) -> Tensor | None:
    """For each row the first one that equals it, (m,) int64; None if all are different.

    A matrix product may round the columns of equal rows differently, and their tie would be decided by chance.
    """
    unique, inverse = torch.unique(gallery.cpu(), dim=0, return_inverse=True)  # not every device has it by rows
    if len(unique) == len(gallery):
        return None
    row = torch.arange(len(gallery), device="cpu")
    first = torch.full((len(unique),), len(gallery), device="cpu").scatter_reduce(0, inverse, row, "amin")
    return first[inverse].to(gallery.device)
