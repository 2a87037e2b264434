"""The prototype loss on a pair of centroid tensors."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..functional.prototype_cross_entropy import check_term, made_in_inference_mode, mean_of_kept, prototype_sum
from ..functional.soft_targets import base_prototypes, soft_target_rows
from .soft_target_cache import Offsets


class PrototypeLoss(nn.Module):
    r"""Cross-entropy of student features against student-space prototypes, with the teacher's prototypes as targets.

    .. math::
        \mathcal{L} = -\frac{1}{n} \sum_i \sum_j y_{a_i j} \log p_{ij}, \qquad
        p_i = \mathrm{softmax}_j(s\, h_i \cdot P_j), \qquad y_a = \mathrm{softmax}_j(C_a \cdot C_j / \tau_y)

    The targets enter through :math:`M = Y P` (K, D), so that soft targets cost what hard ones do. A row of M is built when a
    label first needs it and kept while both centroid tensors stay the same objects at the same version; writing to either in
    place, or passing another, starts anew.

    Args:
        target_temperature: :math:`\tau_y`; None or not positive means hard targets (one-hot of the label).

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
        self, target_temperature: float | None = 0.01, *, chunk_size: int | None = None, check_values: bool | None = None
    ) -> None:
        super().__init__()
        self.target_temperature = check.optional_temperature("target_temperature", target_temperature)
        check.chunk_rows(chunk_size)
        self.chunk_size, self.check_values = chunk_size, check_values
        self._cache: _OffsetCache | None = None

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
        names = "student_features", "student_centroids"
        keep, safe = check_term(student_features, student_centroids, labels, valid, ignore_index, hard, self.check_values, names)
        check.matrix("teacher_centroids", teacher_centroids, rows=student_centroids.shape[0], of=" as student_centroids")
        check.same_device("teacher_centroids", teacher_centroids, "student_features", student_features)
        scale = check.scale("logit_scale", logit_scale, student_features, self.check_values)
        if torch.is_grad_enabled() and (student_centroids.requires_grad or teacher_centroids.requires_grad):
            raise ValueError(
                "student_centroids and teacher_centroids are constants here, pass them detached; prototypes that are learned "
                "go to functional.prototype_cross_entropy"
            )
        offsets = None if hard else self._offsets(student_centroids, teacher_centroids, safe, valid)
        base = base_prototypes(safe, valid)
        total, _ = prototype_sum(student_features, student_centroids, base, keep, scale, offsets, valid, self.chunk_size)
        inputs = {
            "student_features": student_features,
            "student_centroids": student_centroids,
            "teacher_centroids": teacher_centroids,
        }
        return mean_of_kept(total, keep, self.check_values, **inputs)

    def _offsets(self, student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
        temperature = self.target_temperature
        assert temperature is not None
        # A cache keyed by identity and version has no place in a traced graph, and inference tensors keep no version.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or made_in_inference_mode(student, teacher):
            return soft_target_rows(teacher, student, temperature, labels, valid, relative=True)
        if self._cache is None or not self._cache.matches(student, teacher, valid, temperature):
            self._cache = _OffsetCache(student, teacher, valid, temperature)
        return self._cache.rows(student, teacher, labels, valid)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}


class _OffsetCache(Offsets):
    """Soft targets that know which centroid tensors they were made from."""

    def __init__(self, student: Tensor, teacher: Tensor, valid: Tensor | None, temperature: float) -> None:
        super().__init__(student, teacher, temperature)
        self.keys = [(weakref.ref(x), x._version) for x in (student, teacher, valid) if x is not None]

    def matches(self, student: Tensor, teacher: Tensor, valid: Tensor | None, temperature: float) -> bool:
        current = [(x, x._version) for x in (student, teacher, valid) if x is not None]
        return (
            temperature == self.temperature
            and len(current) == len(self.keys)
            and all(ref() is x and version == now for (ref, version), (x, now) in zip(self.keys, current, strict=True))
        )
