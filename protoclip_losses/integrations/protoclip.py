"""megvii-research/protoclip, the paper's own code: its three imports from ``training.loss``, with the same calls.

In its ``src/training/train.py`` one line changes::

    - from training.loss import gather_features, ClipLoss, ProtoLoss
    + from protoclip_losses.integrations.protoclip import gather_features, ClipLoss, ProtoLoss

The loop gathers features by itself and then calls the losses on those of all processes, so the losses here stay local.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks as check
from ..distributed import RankRows, active_group
from ..functional.info_nce import info_nce
from ..functional.prototype_cross_entropy import check_finite_loss, check_term
from ..kernels.prototype_cross_entropy import label_nll_sum
from ..losses.prototype_loss import PrototypeLoss

PAIRS_CACHED = 8  # centroid pairs whose soft targets are cached: the loop has four


def gather_features(image_features: Tensor, text_features: Tensor, *flags: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Features of all processes, each with as many rows, in the order of ranks; gradients flow back to the rows' owner.

    ``local_loss``, ``gather_with_grad`` and whatever else the loop passes change nothing: after DDP's averaging, gradients are
    those of one process on the whole batch, which no setting of theirs gives.
    """
    group = active_group(None)
    if group is None:
        return image_features, text_features
    ranks = RankRows(group, [len(image_features)] * dist.get_world_size(group))
    image, text = ranks.gather_each_with_gradient(image_features, text_features)
    return image, text


class ClipLoss(nn.Module):
    """InfoNCE of features that :func:`gather_features` returned.

    Example:
        >>> import torch
        >>> from protoclip_losses.integrations.protoclip import ClipLoss
        >>> ClipLoss(local_loss=True, rank=1, world_size=4)(torch.eye(2), torch.eye(2), 1.0)
        tensor(0.3133)
    """

    def __init__(self, *flags: Any, **options: Any) -> None:
        super().__init__()

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        """The mean over the rows, a () tensor."""
        return info_nce(image_features, text_features, logit_scale)


class ProtoLoss(nn.Module):
    r"""The prototype term as the paper's code calls it, with six keywords.

    .. math::
        -\frac{1}{n} \sum_i \sum_j y_{ij} \log \mathrm{softmax}_j(s\, h_i \cdot P_j), \qquad
        y_i = \mathrm{softmax}_j(C_{a_i} \cdot C_j / \tau_y) \text{ or one-hot of } a_i

    Its values are those of that code, with two differences: a label of -1 is left out of a soft loss too, where the original
    reads the last centroid, and no B x K distribution of the teacher is built.

    Example:
        >>> import torch
        >>> from protoclip_losses.integrations.protoclip import ProtoLoss
        >>> prototypes = torch.eye(3)
        >>> ProtoLoss()(
        ...     student_features=prototypes[:2], student_centroids=prototypes, teacher_centroids=prototypes,
        ...     logit_scale_student=1.0, teacher_temperature=-1, labels=torch.tensor([0, 2]),
        ... )
        (tensor(1.0514), 50.0)

    Source:
        https://github.com/megvii-research/protoclip, ``src/training/loss.py``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._soft: dict[tuple[int, int, float], PrototypeLoss] = {}

    def forward(
        self,
        student_features: Tensor,
        student_centroids: Tensor,
        teacher_centroids: Tensor,
        logit_scale_student: Tensor | float,
        teacher_temperature: float,
        labels: Tensor,
    ) -> tuple[Tensor, float]:
        """The mean loss over rows with a label, and the percentage of all rows whose own prototype has the largest logit.

        Args:
            student_features: (B, D), L2-normalised.
            student_centroids: (K, D), the prototypes P in the student's space.
            teacher_centroids: (K, Dt), C; used by soft targets alone.
            logit_scale_student: already exponentiated.
            teacher_temperature: of the soft targets; not positive means hard targets.
            labels: (B,) int64 clusters; -1 is ignored.
        """
        temperature = None if teacher_temperature <= 0 else check.temperature("teacher_temperature", teacher_temperature)
        names = "student_features", "student_centroids"
        row_mask, safe = check_term(student_features, student_centroids, labels, None, -1, temperature is None, None, names)
        scale = check.scale("logit_scale_student", logit_scale_student, student_features, None)
        delta = None
        if temperature is not None:
            check.matrix("teacher_centroids", teacher_centroids, rows=len(student_centroids), of=" as student_centroids")
            key = id(student_centroids), id(teacher_centroids), temperature
            if key not in self._soft:
                self._soft = dict(list(self._soft.items())[1 - PAIRS_CACHED :])
                self._soft[key] = PrototypeLoss(temperature)
            delta = self._soft[key].target_delta(student_centroids, teacher_centroids, safe)
        terms = student_features, student_centroids, safe, row_mask, scale, delta
        loss, correct = label_nll_sum(*terms, with_accuracy=True, mean=True)
        inputs = {"student_features": student_features, "student_centroids": student_centroids}
        check_finite_loss(loss, row_mask, None, **inputs)
        return loss, 100 * float(correct) / len(labels)
