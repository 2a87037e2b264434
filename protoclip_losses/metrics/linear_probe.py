"""Linear probe: logistic regression on frozen features."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ._features import class_numbers, finite_rows
from ._threads import few_threads

# Inverse penalties to choose from; the features are standardised, so that one grid fits every encoder.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0) -> dict[str, float]:
    r"""Accuracy of logistic regression on frozen features.

    .. math::
        \min_{W, b}\; \tfrac12 \lVert W \rVert_F^2 + C \sum_i \mathrm{CE}\big(W \tilde z_i + b,\; y_i\big)

    where :math:`\tilde z` is z standardised with the mean and deviation of the training rows. C is chosen on a fifth of the
    *training* rows, taken from every class, then the probe is fitted again on all of them. The test rows are used once, at the
    end.

    **Use it when:** labelled training features exist and the question is what one modality's features contain.
    **Not when:** image and text have to agree (:func:`zero_shot_accuracy`), or no label may be used to fit
    (:func:`grouping`).
    **Related:** :func:`grouping` asks for the same classes without labels.

    Args:
        train_x: (N, d), features to fit on, of any finite scale.
        train_y: (N,), any integer dtype: their classes, at least two different ones.
        test_x: (M, d), features to score.
        test_y: (M,), any integer dtype: their classes. A class that is not in `train_y` can only be missed.
        seed: decides which training rows choose C.

    Returns:
        ``{"accuracy": test accuracy between 0 and 1, "C": the inverse penalty that was chosen}``.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: features that are not floating-point tensors, classes that are not integers.
        ValueError: shapes that do not match, a value that is not finite, fewer than two classes in `train_y`.

    Example:
        >>> import torch
        >>> x = torch.cat([torch.randn(20, 2) + 4, torch.randn(20, 2) - 4])
        >>> y = torch.arange(40) // 20
        >>> linear_probe(x, y, x, y)["accuracy"]
        1.0

    Source:
        The linear probe of Radford et al., https://arxiv.org/abs/2103.00020, appendix A.3, and of ProtoCLIP,
        https://arxiv.org/abs/2206.10996.
    """
    train_x = finite_rows("train_x", train_x).cpu()
    test_x = finite_rows("test_x", test_x, "train_x", train_x).cpu()
    train_y = class_numbers("train_y", train_y, "train_x", train_x)
    test_y = class_numbers("test_y", test_y, "test_x", test_x)
    if len(torch.unique(train_y)) < 2:
        raise ValueError("train_y must have at least 2 classes, got 1")
    x, other = _scaled(train_x, test_x)
    y, held = train_y.numpy(), _held_out(train_y, seed).numpy()
    best = PENALTIES[0]
    if held.any():
        best = max(PENALTIES, key=lambda c: _accuracy(c, x[~held], y[~held], x[held], y[held]))
    return {"accuracy": _accuracy(best, x, y, other, test_y.numpy()), "C": best}


def _scaled(train_x: Tensor, test_x: Tensor) -> tuple[Any, Any]:
    """Both in float64, each column divided by a power of two: exact, and squares stay in the range of the dtype."""
    train, test = (x.double().numpy() for x in (train_x, test_x))
    _, exponents = np.frexp(np.abs(train).max(0))
    return np.ldexp(train, -exponents), np.ldexp(test, -exponents)


def _held_out(train_y: Tensor, seed: int) -> Tensor:
    """Which training rows choose C, (N,) bool."""
    generator = torch.Generator("cpu").manual_seed(seed)
    held_out = torch.zeros(len(train_y), dtype=torch.bool, device="cpu")
    for label in torch.unique(train_y):
        rows = (train_y == label).nonzero()[:, 0]
        # A class with one row stays in the fitted part: a probe that never saw it could not be judged on it.
        count = max(1, len(rows) // 5) if len(rows) > 1 else 0
        held_out[rows[torch.randperm(len(rows), generator=generator, device="cpu")[:count]]] = True
    return held_out


def _accuracy(c: float, x: Any, y: Any, other_x: Any, other_y: Any) -> float:
    linear_model, preprocessing = (check.require(f"sklearn.{name}", "metrics") for name in ("linear_model", "preprocessing"))
    with few_threads(x.size):
        scaler = preprocessing.StandardScaler().fit(x)
        probe = linear_model.LogisticRegression(C=c, max_iter=300, tol=1e-3).fit(scaler.transform(x), y)
        return float(probe.score(scaler.transform(other_x), other_y))
