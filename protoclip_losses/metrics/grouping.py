"""Grouping: how well the clusters of the features are the classes."""

from numbers import Integral

import torch
from torch import Tensor

from .. import _checks as check
from ..clustering.agreement import adjusted_agreement
from ._features import class_numbers, unit_rows
from ._threads import few_threads


def grouping(features: Tensor, labels: Tensor, num_clusters: int | None = None, seed: int = 0) -> dict[str, float]:
    r"""How well K-means on the features finds the classes: adjusted Rand index and adjusted mutual information.

    .. math::
        \mathrm{ARI} = \frac{\mathrm{R} - \mathbb{E}[\mathrm{R}]}{\max \mathrm{R} - \mathbb{E}[\mathrm{R}]}, \qquad
        \mathrm{AMI} = \frac{I - \mathbb{E}[I]}{\tfrac12 (H_a + H_b) - \mathbb{E}[I]}

    of clusters and classes, as in :func:`adjusted_rand_score` and :func:`adjusted_mutual_info_score`. Both are about 0 for a
    chance grouping and 1 for a perfect one, whatever the number of clusters.

    **Use it when:** the question is whether features fall into the classes on their own, as prototypes presuppose.
    **Not when:** classes are fine, or are not what the features vary by most: :func:`linear_probe` finds them nonetheless.
    **Related:** :func:`adjusted_rand_score` and :func:`adjusted_mutual_info_score` for labelings that exist already.

    Args:
        features: (N, d), encoder features of any finite scale; L2-normalised before clustering.
        labels: (N,), any integer dtype: the class of each row. Every value is a class, -1 too.
        num_clusters: number of clusters, in [1, N]. None: the number of classes in `labels`.
        seed: seeds the K-means starts (the best of 10 by objective is taken).

    Returns:
        ``{"ari": ..., "ami": ...}``.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: features that are not a floating-point tensor, labels that are not integers.
        ValueError: shapes that do not match, a value that is not finite, `num_clusters` outside [1, N].

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> grouping(features, torch.tensor([5, 5, 7, 7]))
        {'ari': 1.0, 'ami': 1.0}

    Source:
        Hubert, Arabie, "Comparing partitions", Journal of Classification 2 (1985); Vinh, Epps, Bailey, "Information Theoretic
        Measures for Clusterings Comparison", JMLR 11 (2010).
    """
    unit = unit_rows("features", features).cpu()
    classes, numbers = torch.unique(class_numbers("labels", labels, "features", unit), return_inverse=True)
    clusters = len(classes) if num_clusters is None else num_clusters
    if not isinstance(clusters, Integral) or not 1 <= clusters <= len(unit):
        raise ValueError(f"num_clusters must be a whole number in [1, {len(unit)}] as features has rows, got {num_clusters}")
    with few_threads(unit.numel()):
        k_means = check.require("sklearn.cluster", "metrics").KMeans(clusters, n_init=10, random_state=seed)
        found = torch.from_numpy(k_means.fit_predict(unit.double().numpy())).long()
    rand, information = adjusted_agreement(numbers, found)
    return {"ari": rand, "ami": information}
