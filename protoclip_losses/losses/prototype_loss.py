"""The prototype loss on a pair of centroid tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._dtypes import is_transformed
from ..functional.prototype_cross_entropy import check_finite_loss, check_term
from ..functional.soft_targets import base_prototypes, soft_target_rows
from ..kernels.prototype_cross_entropy import label_nll_sum, made_in_inference_mode
from ..kernels.sizes import BlockLimit
from .soft_target_cache import SoftTargetCache, every_target, target_rows_operator


class PrototypeLoss(nn.Module):
    r"""Cross-entropy of student features against student-space prototypes, with the teacher's prototypes as targets.

    .. math::
        \mathcal{L} = -\frac{1}{n} \sum_i \sum_j y_{a_i j} \log p_{ij}, \qquad
        p_i = \mathrm{softmax}_j(s\, h_i \cdot P_j), \qquad y_a = \mathrm{softmax}_j(C_a \cdot C_j / \tau_y)

    **Use it when:** you have a clustering of your own, on one process, and want its prototypes as targets.
    **Not when:** you want the whole objective over ranks (:class:`ProtoLoss`), or prototypes with gradients
    (:func:`protoclip_losses.functional.prototype_cross_entropy`).
    **Related:** :func:`protoclip_losses.functional.soft_targets`, :class:`PrototypicalBackTranslation`.

    The targets enter through :math:`M = Y P` (K, D), so that soft targets cost what hard ones do. A row of M is computed
    when a label first needs it (on an accelerator all rows at once, as it would be waited for to know which), and cached
    while both centroid tensors stay the same objects at the same version; writing to either in place, or passing another,
    clears the cache.

    Args:
        target_temperature: :math:`\tau_y`; None, 0 or -1 means hard targets (one-hot of the label).
        chunk_size: rows worked on at a time; any value gives the same answer.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read values to check them each step. None means on CPU in eager mode only.

    Example:
        >>> import torch
        >>> loss = PrototypeLoss(target_temperature=0.01)
        >>> prototypes = torch.eye(3)
        >>> loss(prototypes, prototypes, prototypes, torch.tensor([0, 1, 2]), 1.0)
        tensor(0.5514)

    Source:
        ProtoCLIP section III-B, https://arxiv.org/abs/2206.10996.
    """

    def __init__(
        self,
        target_temperature: float | None = 0.01,
        *,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        check_values: bool | None = None,
    ) -> None:
        super().__init__()
        self.target_temperature = check.optional_temperature("target_temperature", target_temperature)
        BlockLimit(chunk_size, memory_budget)
        self.chunk_size, self.memory_budget, self.check_values = chunk_size, memory_budget, check_values
        self._cache: SoftTargetCache | None = None

    def extra_repr(self) -> str:
        return f"target_temperature={self.target_temperature}, chunk_size={self.chunk_size}, memory_budget={self.memory_budget}"

    def forward(
        self,
        student_features: Tensor,
        student_centroids: Tensor,
        teacher_centroids: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        *,
        valid: Tensor | None = None,
        ignore_index: int = -1,
    ) -> Tensor:
        """Return the mean loss over rows that are not ignored, a () tensor.

        Args:
            student_features: (B, D), L2-normalised.
            student_centroids: (K, D), the prototypes P in the student's space.
            teacher_centroids: (K, Dt), the teacher's centroids C; another width than D is fine.
            labels: (B,) int64, the teacher's cluster of each row.
            logit_scale: already exponentiated: a float, () or (1,).
            valid: (K,) bool; prototypes that are not valid take no mass.
            ignore_index: rows with this label are left out.

        Raises:
            TypeError: wrong dtypes.
            ValueError: shapes that do not match, labels out of range, a hard label of an invalid prototype, non-finite input,
                centroids that require gradient.
        """
        hard = self.target_temperature is None
        check.integers("labels", labels)
        names = "student_features", "student_centroids"
        row_mask, safe = check_term(
            student_features, student_centroids, labels, valid, ignore_index, hard, self.check_values, names
        )
        check.matrix("teacher_centroids", teacher_centroids, rows=student_centroids.shape[0], of=" as student_centroids")
        check.same_device("teacher_centroids", teacher_centroids, "student_features", student_features)
        scale = check.scale("logit_scale", logit_scale, student_features, self.check_values)
        if torch.is_grad_enabled() and (student_centroids.requires_grad or teacher_centroids.requires_grad):
            raise ValueError(
                "student_centroids and teacher_centroids are constants here, pass them detached; prototypes that are learned "
                "go to functional.prototype_cross_entropy"
            )
        delta = None if hard else self.target_delta(student_centroids, teacher_centroids, safe, valid)
        base = base_prototypes(safe, valid)
        limit = BlockLimit(self.chunk_size, self.memory_budget)
        loss, _ = label_nll_sum(student_features, student_centroids, base, row_mask, scale, delta, valid, limit, mean=True)
        inputs = {
            "student_features": student_features,
            "student_centroids": student_centroids,
            "teacher_centroids": teacher_centroids,
        }
        check_finite_loss(loss, row_mask, self.check_values, **inputs)
        return loss

    def target_delta(self, student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
        """M - P of these labels (B,), from the cache where it can be used."""
        temperature = self.target_temperature
        assert temperature is not None
        if torch.compiler.is_compiling() and student.device.type == "cpu":  # CUDA graphs would replay what was kept once
            kept: Tensor = target_rows_operator(student, teacher, labels, valid, temperature)
            return kept
        # A cache keyed by identity and version cannot be part of a traced graph, and inference tensors have no version.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or made_in_inference_mode(student, teacher):
            return soft_target_rows(teacher, student, temperature, labels, valid, relative=True)
        if is_transformed():
            return every_target(student, teacher, temperature, valid).index_select(0, labels)
        if self._cache is None or not self._cache.matches(student, teacher, valid, temperature):
            self._cache = SoftTargetCache(student, teacher, valid, temperature)
        return self._cache.rows(student, teacher, labels, valid)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}
