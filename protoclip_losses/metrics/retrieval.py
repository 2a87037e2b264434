"""Evaluation on frozen encoder features: modality gap, retrieval, zero-shot, linear probe, grouping.

Features are the encoder's own output z, not the projected h that the prototype losses see. Every function
L2-normalises what has to be normalised, so plain encoder outputs can be passed. `linear_probe` and `grouping` need
scikit-learn, which is imported when they are called: ``pip install 'protoclip-losses[metrics]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["grouping", "linear_probe", "modality_gap", "retrieval_recall", "zero_shot_accuracy", "zero_shot_classifier"]

# Rows of queries compared with the whole gallery at a time: bounds memory at this many rows of similarities.
_BLOCK_ROWS = 1024
# Inverse penalties that `linear_probe` chooses from; the features are standardised, so one grid fits every encoder.
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def modality_gap(image: Tensor, text: Tensor) -> float:
    r"""Distance between the mean image feature and the mean text feature.

    .. math:: \Big\lVert \tfrac1N \sum_i \frac{z^I_i}{\lVert z^I_i \rVert_2}
              - \tfrac1M \sum_j \frac{z^T_j}{\lVert z^T_j \rVert_2} \Big\rVert_2

    Args:
        image: Image features, shape (N, d), any floating dtype.
        text: Text features, shape (M, d). M need not be N.

    Returns:
        The gap, between 0 (the means coincide) and 2 (each modality is one point, on opposite sides).

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: A shape is not (rows, d), the widths differ, or a value is not finite.

    Example:
        >>> image, text = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        >>> round(modality_gap(image, text), 4)
        1.4142

    Source:
        Liang et al., "Mind the Gap: Understanding the Modality Gap in Multi-modal Contrastive Representation
        Learning", NeurIPS 2022, arXiv:2203.02053, section 2.
    """
    image = _unit_rows("image", image)
    text = _unit_rows("text", text, image.shape[1])
    return float((image.double().mean(0) - text.double().mean(0)).norm())


def retrieval_recall(
    image: Tensor,
    text: Tensor,
    concepts: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    *,
    text_concepts: Tensor | None = None,
) -> dict[str, float]:
    r"""Share of queries that find a positive among their k nearest, image to text and text to image.

    .. math:: \mathrm{recall@}k = \tfrac1N \sum_i
              \big[\, \#\{ j \notin P_i : s_{ij} \ge \max_{p \in P_i} s_{ip} \} < k \,\big]

    where :math:`s_{ij}` is the cosine similarity of query i and gallery row j, and :math:`P_i` holds the gallery rows
    of the same concept as query i. A tie counts against the query, so an encoder that maps everything to one point
    scores 0. Similarities are formed for a block of queries at a time.

    Args:
        image: Image features, shape (N, d), any floating dtype.
        text: Text features, shape (M, d).
        concepts: Concept of each image, integer tensor of shape (N,). Any text of the same concept is a positive.
            None: image i and text i are the only positives of each other (then M = N).
        ks: The numbers of neighbours to look at, each at least 1.
        text_concepts: Concept of each text, shape (M,). None: `concepts` (then M = N).

    Returns:
        ``{"image_to_text_recall@k": ..., "text_to_image_recall@k": ...}`` for every k, each between 0 and 1.

    Raises:
        TypeError: Features are not floating-point tensors, or concepts are not integer tensors.
        ValueError: A shape does not fit, a k is below 1, a value is not finite, or a row has no positive at all.

    Example:
        >>> image = torch.eye(3)
        >>> text = torch.eye(3)[[0, 2, 1]]
        >>> retrieval_recall(image, text, ks=(1, 3))["image_to_text_recall@3"]
        1.0
        >>> retrieval_recall(image, text, torch.tensor([0, 1, 1]), ks=(1,))["image_to_text_recall@1"]
        1.0

    Source:
        Recall@k as reported for COCO in Radford et al., arXiv:2103.00020; positives by concept as ProtoCLIP's
        grouping calls for (arXiv:2206.10996).
    """
    image = _unit_rows("image", image)
    text = _unit_rows("text", text, image.shape[1])
    if not ks or any(k < 1 for k in ks):
        raise ValueError(f"ks: got {tuple(ks)}, wanted one or more whole numbers of at least 1")
    if concepts is None:
        if text_concepts is not None:
            raise ValueError("concepts: got None beside text_concepts, wanted the concept of each image")
        concepts = torch.arange(len(image), device=image.device)
    concepts = _labels("concepts", concepts, len(image)).to(image.device)
    if text_concepts is None:
        if len(text) != len(image):
            raise ValueError(f"text: got {len(text)} rows for {len(image)} images, wanted one text per image, or text_concepts")
        text_concepts = concepts
    text_concepts = _labels("text_concepts", text_concepts, len(text)).to(image.device)
    result = {}
    for way, query, gallery, query_concepts, gallery_concepts in (
        ("image_to_text", image, text, concepts, text_concepts),
        ("text_to_image", text, image, text_concepts, concepts),
    ):
        ranks = torch.cat(
            [
                _rank(query[start : start + _BLOCK_ROWS] @ gallery.T, concept[:, None] == gallery_concepts)
                for start in range(0, len(query), _BLOCK_ROWS)
                for concept in (query_concepts[start : start + _BLOCK_ROWS],)
            ]
        )
        if bool((ranks < 0).any()):
            raise ValueError(f"concepts: {int((ranks < 0).sum())} queries ({way}) have no positive in the gallery")
        result.update({f"{way}_recall@{k}": float((ranks < k).double().mean()) for k in ks})
    return result


def zero_shot_classifier(prompt_embeddings: Sequence[Tensor]) -> Tensor:
    r"""One unit vector per class from the embeddings of its prompts.

    .. math:: w_c = \frac{m_c}{\lVert m_c \rVert_2}, \qquad
              m_c = \tfrac{1}{n_c} \sum_{i=1}^{n_c} \frac{e_{c,i}}{\lVert e_{c,i} \rVert_2}

    Args:
        prompt_embeddings: One tensor per class, shape (n_c, d) with n_c at least 1; text features of its prompts.

    Returns:
        The classifier, shape (C, d), in the dtype of the embeddings.

    Raises:
        TypeError: An element is not a floating-point tensor.
        ValueError: No class, a class without a prompt, widths that differ, or prompts of a class that cancel out.

    Example:
        >>> zero_shot_classifier([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])])
        tensor([[1., 0.],
                [0., 1.]])

    Source:
        Radford et al., arXiv:2103.00020, section 3.1.4 (ensembling over the embedding space).
    """
    if len(prompt_embeddings) == 0:
        raise ValueError("prompt_embeddings: got no class, wanted one (n_c, d) tensor per class")
    width, rows = None, []
    for number, embeddings in enumerate(prompt_embeddings):
        unit = _unit_rows(f"prompt_embeddings[{number}]", embeddings, width)
        width = unit.shape[1]
        rows.append(unit.mean(0))
    means = torch.stack(rows)
    lengths = means.norm(dim=1, keepdim=True)
    if bool((lengths < 1e-12).any()):
        raise ValueError("prompt_embeddings: the prompts of a class average to zero, so it has no direction")
    return means.div(lengths)


def zero_shot_accuracy(image: Tensor, labels: Tensor, classifier: Tensor, topk: Sequence[int] = (1,)) -> dict[str, float]:
    r"""Share of images whose class is among the k classes with the highest cosine similarity.

    .. math:: \mathrm{top}k = \tfrac1N \sum_i \big[\, \#\{ c \ne y_i : \hat z_i^\top w_c \ge
              \hat z_i^\top w_{y_i} \} < k \,\big]

    Args:
        image: Image features, shape (N, d), any floating dtype.
        labels: Class of each image, integer tensor of shape (N,), values in [0, C).
        classifier: One row per class, shape (C, d); see :func:`zero_shot_classifier`.
        topk: The numbers of classes to look at, each in [1, C].

    Returns:
        ``{"top1": ..., ...}``, each between 0 and 1. A tie counts against the image.

    Raises:
        TypeError: Features are not floating-point tensors, or labels are not integers.
        ValueError: A shape does not fit, a label is outside [0, C), or a k is outside [1, C].

    Example:
        >>> zero_shot_accuracy(torch.eye(2), torch.tensor([0, 0]), torch.eye(2), topk=(1, 2))
        {'top1': 0.5, 'top2': 1.0}

    Source:
        Radford et al., arXiv:2103.00020, section 3.1.2.
    """
    image = _unit_rows("image", image)
    classifier = _unit_rows("classifier", classifier, image.shape[1])
    labels = _labels("labels", labels, len(image)).to(image.device)
    classes = len(classifier)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels: got values from {int(labels.min())} to {int(labels.max())}, wanted them in [0, {classes})")
    if not topk or any(not 1 <= k <= classes for k in topk):
        raise ValueError(f"topk: got {tuple(topk)}, wanted numbers from 1 to the {classes} classes")
    ranks = _rank(image @ classifier.T, F.one_hot(labels, classes).bool())
    return {f"top{k}": float((ranks < k).double().mean()) for k in topk}


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> dict[str, float]:
    r"""Accuracy of logistic regression on frozen features.

    .. math:: \min_{W, b}\; \tfrac12 \lVert W \rVert_F^2
              + C \sum_i \mathrm{CE}\big(W \tilde z_i + b,\; y_i\big)

    where :math:`\tilde z` is z standardised with the mean and deviation of the training rows. C is chosen on a fifth
    of the *training* rows, taken from every class, then the probe is fitted again on all of them. The test rows are
    looked at once, at the end.

    Args:
        train_x: Features to fit on, shape (N, d), any floating dtype.
        train_y: Their classes, integer tensor of shape (N,), at least two different ones.
        test_x: Features to score, shape (M, d).
        test_y: Their classes, shape (M,). A class that is not in `train_y` can only be missed.
        seed: Decides which training rows choose C.

    Returns:
        ``{"accuracy": test accuracy between 0 and 1, "C": the inverse penalty that was chosen}``.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: Features are not floating-point tensors, or classes are not integers.
        ValueError: A shape does not fit, a value is not finite, or `train_y` holds fewer than two classes.

    Example:
        >>> x = torch.cat([torch.randn(20, 2) + 4, torch.randn(20, 2) - 4])
        >>> y = torch.arange(40) // 20
        >>> linear_probe(x, y, x, y)["accuracy"]
        1.0

    Source:
        The linear probe of Radford et al., arXiv:2103.00020, appendix A.3, and of ProtoCLIP, arXiv:2206.10996.
    """
    linear_model, preprocessing = _sklearn("linear_model"), _sklearn("preprocessing")
    train_x = _finite_rows("train_x", train_x)
    test_x = _finite_rows("test_x", test_x, train_x.shape[1])
    train_y = _labels("train_y", train_y, len(train_x)).cpu()
    test_y = _labels("test_y", test_y, len(test_x)).cpu()
    present = sorted(set(train_y.tolist()))
    if len(present) < 2:
        raise ValueError(f"train_y: got {len(present)} class, wanted at least 2")
    generator = torch.Generator().manual_seed(seed)
    validation = torch.zeros(len(train_y), dtype=torch.bool)
    for label in present:
        rows = (train_y == label).nonzero()[:, 0]
        # A class with one row stays in the fitted part: a probe that never saw it could not be judged on it.
        held = max(1, len(rows) // 5) if len(rows) > 1 else 0
        validation[rows[torch.randperm(len(rows), generator=generator)[:held]]] = True
    fit_x, fit_y, held_x, held_y = (
        part.double().cpu().numpy() if part.is_floating_point() else part.numpy()
        for part in (train_x[~validation], train_y[~validation], train_x[validation], train_y[validation])
    )

    def score(c: float, x: Any, y: Any, other_x: Any, other_y: Any) -> float:
        with _few_threads(train_x.numel()):
            return fit_and_score(c, x, y, other_x, other_y)

    def fit_and_score(c: float, x: Any, y: Any, other_x: Any, other_y: Any) -> float:
        scaler = preprocessing.StandardScaler().fit(x)
        probe = linear_model.LogisticRegression(C=c, max_iter=300, tol=1e-3).fit(scaler.transform(x), y)
        return float(probe.score(scaler.transform(other_x), other_y))

    best = _PENALTIES[0]
    if len(held_y):
        best = max(_PENALTIES, key=lambda c: score(c, fit_x, fit_y, held_x, held_y))
    accuracy = score(best, train_x.double().cpu().numpy(), train_y.numpy(), test_x.double().cpu().numpy(), test_y.numpy())
    return {"accuracy": accuracy, "C": best}


def grouping(features: Tensor, labels: Tensor, num_clusters: int | None = None, seed: int = 0) -> dict[str, float]:
    r"""How well K-means on the features finds the classes: adjusted Rand index and adjusted mutual information.

    .. math:: \mathrm{ARI} = \frac{\mathrm{RI} - \mathbb E[\mathrm{RI}]}{\max \mathrm{RI} - \mathbb E[\mathrm{RI}]},
              \qquad \mathrm{AMI} = \frac{\mathrm{MI} - \mathbb E[\mathrm{MI}]}
              {\tfrac12 (H(\text{clusters}) + H(\text{classes})) - \mathbb E[\mathrm{MI}]}

    Both are 0 for a chance grouping and 1 for a perfect one, whatever the number of clusters.

    Args:
        features: Encoder features, shape (N, d), any floating dtype; L2-normalised before clustering.
        labels: Class of each row, integer tensor of shape (N,).
        num_clusters: Number of clusters, in [1, N]. None: the number of classes in `labels`.
        seed: Seeds the K-means starts (the best of 10 by objective is taken).

    Returns:
        ``{"ari": ..., "ami": ...}``.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: Features are not a floating-point tensor, or labels are not integers.
        ValueError: A shape does not fit, a value is not finite, or `num_clusters` is outside [1, N].

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> grouping(features, torch.tensor([5, 5, 7, 7]))
        {'ari': 1.0, 'ami': 1.0}

    Source:
        Hubert and Arabie, "Comparing partitions", 1985; Vinh, Epps and Bailey, JMLR 11, 2010.
    """
    cluster, scores = _sklearn("cluster"), _sklearn("metrics")
    unit = _unit_rows("features", features)
    labels = _labels("labels", labels, len(unit)).cpu()
    clusters = len(set(labels.tolist())) if num_clusters is None else num_clusters
    if not 1 <= clusters <= len(unit):
        raise ValueError(f"num_clusters: got {clusters}, wanted a number from 1 to the {len(unit)} rows")
    with _few_threads(unit.numel()):
        found = cluster.KMeans(clusters, n_init=10, random_state=seed).fit_predict(unit.double().cpu().numpy())
    return {
        "ari": float(scores.adjusted_rand_score(labels.numpy(), found)),
        "ami": float(scores.adjusted_mutual_info_score(labels.numpy(), found)),
    }


def _rank(similarity: Tensor, positive: Tensor) -> Tensor:
    """Negatives at least as similar as the best positive, per row; -1 for a row without a positive."""
    best = similarity.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    rank = ((similarity >= best) & ~positive).sum(1)
    return rank.masked_fill(~positive.any(1), -1)


def _finite_rows(name: str, features: Tensor, width: int | None = None) -> Tensor:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name}: got {kind}, wanted a floating-point tensor")
    wanted = "(rows, d)" if width is None else f"(rows, {width})"
    if features.ndim != 2 or 0 in features.shape or (width is not None and features.shape[1] != width):
        raise ValueError(f"{name}: got shape {tuple(features.shape)}, wanted {wanted} with at least one row")
    if not bool(features.isfinite().all()):
        broken = int((~features.isfinite().all(1)).sum())
        raise ValueError(f"{name}: {broken} of {len(features)} rows hold NaN or Inf, wanted finite features")
    # Low-precision features would round every similarity and mean; the arithmetic is done in float32 at least.
    return features.detach().to(torch.promote_types(features.dtype, torch.float32))


def _unit_rows(name: str, features: Tensor, width: int | None = None) -> Tensor:
    return F.normalize(_finite_rows(name, features, width), dim=1)


def _labels(name: str, labels: Tensor, rows: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: got {kind}, wanted an integer tensor")
    if labels.shape != (rows,):
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, wanted ({rows},), one per row of the features")
    return labels.long()


def _few_threads(numbers: int) -> AbstractContextManager[Any]:
    """One thread for small problems: there BLAS threads wait for each other longer than they work (30 times, measured)."""
    # threadpoolctl comes with scikit-learn.
    limits: AbstractContextManager[Any] = import_module("threadpoolctl").threadpool_limits(1 if numbers < 2**22 else None)
    return limits


def _sklearn(module: str) -> Any:
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "this metric needs scikit-learn, which is not installed: pip install 'protoclip-losses[metrics]'"
        ) from error
