"""Relational distillation: a student learns which samples of the batch a teacher finds alike."""

import torch
from torch import Tensor

from .. import _checks as check
from ..kernels.relational_distillation import relation_kl_rows, relation_kl_sum
from ..kernels.sizes import BlockLimit


def relational_distillation(
    features: Tensor,
    teacher_features: Tensor,
    logit_scale: Tensor | float,
    temperature: float,
    *,
    reduction: str = "mean",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    check_values: bool | None = None,
) -> Tensor:
    r"""Divergence of the student's similarities within a batch from the teacher's, without a B x B tensor.

    .. math::
        \mathcal{L} = \frac{1}{n} \sum_i \mathrm{KL}\bigl(p_i \,\|\, q_i\bigr), \qquad
        p_{ij} = \mathop{\mathrm{softmax}}_{j \ne i} \Bigl(\frac{t_i \cdot t_j}{\tau}\Bigr), \quad
        q_{ij} = \mathop{\mathrm{softmax}}_{j \ne i} \bigl(s\, h_i \cdot h_j\bigr)

    where :math:`h_i` are the student's features, :math:`t_i` the teacher's, L2-normalised here, :math:`s` the exponentiated scale
    and :math:`\tau` the temperature. The widths may differ: only similarities are compared. A row of zeros, of which the teacher
    knows nothing, is left out as a row and as a neighbour; n counts the others. With fewer than two the loss is 0.

    **Use it when:** a teacher's features come with the batch, on one process.
    **Not when:** the batch is small beside the number of concepts: few rows then are alike.
    **Related:** :class:`protoclip_losses.RelationalDistillation` gathers over processes.

    Args:
        features: (B, D) student features, L2-normalised by the caller. They set the dtype of the student's product.
        teacher_features: (B, D_E) of the same samples, constants.
        logit_scale: :math:`s`, already exponentiated: a float, () or (1,). Gradients flow to it.
        temperature: :math:`\tau > 0`.
        reduction: ``"mean"`` over the rows that count, ``"sum"``, or ``"none"``: the divergence of each row, 0 where it does not
            count, whose logits are computed again in backward.
        chunk_size: rows of B worked on at a time; any value gives the same answer. None lets the library choose.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read the values to check that they are finite. None means on CPU in eager mode only.

    Returns:
        The loss in float32 (float64 for float64 features): a () tensor, or (B,) with ``reduction="none"``.

    Raises:
        TypeError: features that are not floating-point tensors.
        ValueError: shapes that do not match, a temperature that is not positive, a non-finite input, an unknown reduction.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> relational_distillation(teacher, teacher, 10.0, temperature=0.1) < 1e-3
        tensor(True)
        >>> relational_distillation(teacher.flip(0), teacher, 10.0, temperature=0.1) > 1
        tensor(True)

    Source:
        Fang et al., SEED, https://arxiv.org/abs/2101.04731, section 3.2, with the batch in place of a queue; Park et al.,
        Relational Knowledge Distillation, https://arxiv.org/abs/1904.05068.
    """
    scale, temperature = check_relations(features, teacher_features, logit_scale, temperature, check_values)
    limit = BlockLimit(chunk_size, memory_budget)
    check.reduction(reduction)
    teacher, known = unit_rows(teacher_features.to(scale.dtype))
    if reduction == "none":
        return relation_kl_rows(features, teacher, scale, known, temperature, limit)
    total = relation_kl_sum(features, teacher, scale, known, slice(0, len(features)), temperature, limit)
    return total if reduction == "sum" else total / known.sum().clamp(min=1)


def check_relations(
    features: Tensor, teacher_features: Tensor, logit_scale: Tensor | float, temperature: float, check_values: bool | None
) -> tuple[Tensor, float]:
    """Check the arguments; return the scale as a 0-d tensor, and the temperature."""
    check.matrix("features", features)
    check.matrix("teacher_features", teacher_features, rows=features.shape[0], of=" as features")
    check.same_device("teacher_features", teacher_features, "features", features)
    scale = check.scale("logit_scale", logit_scale, features, check_values)
    if check.values_are_checked(features, check_values, teacher_features):
        check.finite("features", features)
        check.finite("teacher_features", teacher_features)
    return scale, check.temperature("temperature", temperature)


def unit_rows(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's rows L2-normalised, constants, and which of them are not zero."""
    teacher = teacher.detach()
    return torch.nn.functional.normalize(teacher, dim=1), teacher.any(1)
