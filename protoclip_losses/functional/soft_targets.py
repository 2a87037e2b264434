"""Soft targets of a teacher clustering, pulled through to the student's prototypes."""

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import accumulation_dtype, assert_on_device
from ..kernels.blocks import LogitBlocks
from ..kernels.sizes import rows_per_block
from ._labels import valid_mask


def soft_targets(
    teacher_centroids: Tensor,
    prototypes: Tensor,
    temperature: float,
    *,
    valid: Tensor | None = None,
    check_values: bool | None = None,
) -> Tensor:
    r"""Soft targets of a teacher clustering, pulled through to the student's prototypes.

    .. math::
        M = \mathrm{softmax}(C C^\top / \tau_y)\, P

    where :math:`C` (K, Dt) are the teacher's centroids, :math:`P` (K, D) the prototypes in the student's space. The target of
    a sample depends on its label alone, so that these K rows are all the targets there are. Built in blocks of rows: K x K is
    never held. The result is a constant: no gradient flows through it.

    **Use it when:** clusters with near centroids should share a target.
    **Not when:** targets are hard: M is P, and :func:`prototype_cross_entropy` needs none.
    **Related:** :class:`protoclip_losses.ProtoLoss` makes and keeps them (``target_temperature``).

    Args:
        teacher_centroids: (K, Dt).
        prototypes: (K, D).
        temperature: :math:`\tau_y` > 0. As it falls to 0 the targets become hard, ``M = P`` (for centroids of equal norm).
        valid: (K,) bool; the softmax is over valid prototypes alone.
        check_values: read the values to check that valid rows are finite. None means on CPU in eager mode only; elsewhere a wrong
            value raises asynchronously.

    Returns:
        (K, D) in float32 (float64 if either input is float64).

    Raises:
        TypeError: inputs that are not floating-point tensors, a mask that is not bool.
        ValueError: different K, a temperature that is not positive, no valid prototype, a non-finite valid row.

    Example:
        >>> import torch
        >>> soft_targets(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])

    Source:
        ProtoCLIP section III-B, equation of the soft target, https://arxiv.org/abs/2206.10996; the factored form is ours.
    """
    check.matrix("prototypes", prototypes)
    check.matrix("teacher_centroids", teacher_centroids, rows=prototypes.shape[0], of=" as prototypes")
    check.same_device("teacher_centroids", teacher_centroids, "prototypes", prototypes)
    valid_mask(valid, prototypes.shape[0])
    check.temperature("temperature", temperature)
    if check.values_are_checked(prototypes, check_values, teacher_centroids, valid):
        if valid is not None and not bool(valid.any()):
            raise ValueError("valid must leave at least one prototype, got none")
        check.finite("teacher_centroids", teacher_centroids if valid is None else teacher_centroids[valid])
        check.finite("prototypes", prototypes if valid is None else prototypes[valid])
    else:
        finite = teacher_centroids.detach().isfinite().all(1) & prototypes.detach().isfinite().all(1)
        assert_on_device(finite if valid is None else torch.cat([finite | ~valid, valid.any()[None]]))
    labels = torch.arange(prototypes.shape[0], device=prototypes.device)
    return soft_target_rows(teacher_centroids, prototypes, temperature, labels, valid, relative=False)


@torch.no_grad()
def soft_target_rows(
    teacher_centroids: Tensor,
    prototypes: Tensor,
    temperature: float,
    labels: Tensor,
    valid: Tensor | None = None,
    *,
    relative: bool,
) -> Tensor:
    r"""Rows M_a of the soft targets for these labels, at the cost of these rows alone; or ``relative`` to their base prototypes,

    .. math::
        M_a - P_b = \sum_{j \ne b} y_{a j} P_j - \Big( \sum_{j \ne b} y_{a j} \Big) P_b

    formed by this sum and not by subtraction, so that the delta keeps all its digits as the targets become hard.
    """
    dtype = accumulation_dtype(torch.promote_types(teacher_centroids.dtype, prototypes.dtype))
    with torch.autocast(prototypes.device.type, enabled=False):
        centroids, columns = teacher_centroids.to(dtype), prototypes.to(dtype)
        keys = centroids
        if valid is not None:
            keys, columns = centroids.where(valid[:, None], 0), columns.where(valid[:, None], 0)
        base = base_prototypes(labels, valid)[:, None]
        rows = columns.new_empty((labels.shape[0], columns.shape[1]))
        step = rows_per_block(keys.shape[0], dtype, keys.device)
        blocks = LogitBlocks(keys, torch.full((), 1 / temperature, dtype=dtype, device=keys.device), min(step, labels.shape[0]))
        for start in range(0, labels.shape[0], step):
            block = slice(start, start + step)
            logits = blocks(centroids[labels[block]])
            if valid is not None:
                logits.masked_fill_(~valid, -torch.inf)
            targets = torch.softmax(logits, 1, out=logits)
            if relative:
                targets.scatter_(1, base[block], 0)
                targets.scatter_(1, base[block], -targets.sum(1, keepdim=True))
            torch.mm(targets, columns, out=rows[block])
    return rows


def base_prototypes(labels: Tensor, valid: Tensor | None) -> Tensor:
    """The prototype that each soft target is relative to: the label's own, or the first valid one where that is not valid."""
    return labels if valid is None else labels.where(valid[labels], valid.int().argmax())
