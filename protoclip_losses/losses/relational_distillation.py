"""Relational distillation as a module that gathers over processes."""

from typing import cast

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import Group, RankRows, active_group, check_process_group, validate_rows
from ..functional.relational_distillation import check_relations, unit_rows
from ..kernels.relational_distillation import relation_kl_sum
from ..kernels.sizes import BlockLimit
from ..prototypes.batch_features import BatchFeatures
from .info_nce import collective_signature, num_rows, own_gradients
from .module import LossModule
from .settings import ObjectiveSettings, block_limit


class RelationalDistillation(LossModule):
    r"""Relational distillation over the batch of all processes.

    .. math::
        \mathcal{L} = \frac{1}{n} \sum_i \mathrm{KL}\Bigl(\mathop{\mathrm{softmax}}_{j \ne i} \frac{t_i \cdot t_j}{\tau}
        \,\Big\|\, \mathop{\mathrm{softmax}}_{j \ne i} s\, h_i \cdot h_j\Bigr)

    **Use it when:** a teacher's features are there, such as those of the captions' own words, and the student should find the
    same samples alike.
    **Not when:** you train with :class:`ProtoLoss`: its ``w_distill`` is this, for every student and teacher.
    **Related:** :func:`protoclip_losses.functional.relational_distillation`, of given rows alone; :class:`TeacherAdapter`.

    When torch.distributed is initialised, features are gathered here, with gradients, as :class:`InfoNCE` does: the loss is this
    rank's share, and the mean over ranks that of the whole batch. Ranks may hold different numbers of rows.

    Args:
        temperature: :math:`\tau` of the teacher.
        process_group: None for the default group, ``False`` to stay local, or a group.
        chunk_size: rows worked on at a time; any value gives the same answer.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read values to check them each step. None means on CPU in eager mode only.

    Example:
        >>> import torch
        >>> loss = RelationalDistillation(temperature=0.1)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> loss(teacher, teacher, 10.0) < 1e-3
        tensor(True)

    Source:
        Fang et al., SEED, https://arxiv.org/abs/2101.04731, section 3.2, with the batch in place of a queue.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        process_group: Group | bool | None = None,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        check_values: bool | None = None,
    ) -> None:
        super().__init__()
        BlockLimit(chunk_size, memory_budget)
        self.temperature = check.temperature("temperature", temperature)
        self.process_group = check_process_group(process_group)
        self.chunk_size, self.memory_budget, self.check_values = chunk_size, memory_budget, check_values

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, chunk_size={self.chunk_size}, memory_budget={self.memory_budget}"

    def forward(self, features: Tensor, teacher_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Return the loss, a () tensor.

        Args:
            features: (B, D) this rank's rows, L2-normalised.
            teacher_features: (B, D_E) of the same samples; a row of zeros is left out.
            logit_scale: already exponentiated: a float, () or (1,).
        """
        (scale, _), ranks = validate_rows(
            lambda: check_relations(features, teacher_features, logit_scale, self.temperature, self.check_values),
            active_group(self.process_group),
            num_rows(features),
            signature=lambda: {
                **collective_signature(features, teacher_features, scale=logit_scale),
                "temperature": self.temperature,
                **own_gradients(features),
            },
            like=features,
        )
        return relation_share(
            features, teacher_features, scale, self.temperature, ranks, BlockLimit(self.chunk_size, self.memory_budget)
        )


def relation_share(
    features: Tensor, teacher: Tensor, scale: Tensor, temperature: float, ranks: RankRows, limit: BlockLimit
) -> Tensor:
    """This rank's share of relational distillation over all ranks' rows. Inputs have been checked."""
    teacher, known = unit_rows(teacher.to(scale.dtype))
    if ranks.is_single:
        total = relation_kl_sum(features, teacher, scale, known, slice(0, len(features)), temperature, limit)
        return total / known.sum().clamp(min=1)
    return cast(Tensor, _share_over_ranks(features, teacher, scale, known, temperature, ranks, limit))


def check_distillation(batch: BatchFeatures, logit_scale: Tensor | float, settings: ObjectiveSettings) -> None:
    """Check the teachers' features of a batch, against each student's."""
    if not batch.teachers:
        raise ValueError("teacher_features must be given while w_distill is: they are what is distilled")
    for name, teacher in batch.teachers.items():
        for h in batch.students.values():
            check.matrix(f"teacher_features[{name!r}]", teacher, rows=h.shape[0], of=" as image_features")
            check_relations(h, teacher, logit_scale, settings.distill_temperature, settings.check_values)


def distillation_share(batch: BatchFeatures, logit_scale: Tensor | float, settings: ObjectiveSettings, ranks: RankRows) -> Tensor:
    """This rank's share of the mean over teachers and students. Inputs have been checked."""
    shares = []
    for teacher in batch.teachers.values():
        for h in batch.students.values():
            scale = check.scale("logit_scale_proto", logit_scale, h, False)
            shares.append(relation_share(h, teacher, scale, settings.distill_temperature, ranks, block_limit(settings)))
    return torch.stack(shares).mean()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives of a kernel have no place in a traced graph
def _share_over_ranks(
    features: Tensor,
    teacher: Tensor,
    scale: Tensor,
    known: Tensor,
    temperature: float,
    ranks: RankRows,
    limit: BlockLimit,
) -> Tensor:
    gathered, teachers, knowns = ranks.gather_with_gradient(features), ranks.gather(teacher), ranks.gather(known)
    total = relation_kl_sum(gathered, teachers, scale, knowns, ranks.own, temperature, limit)
    return total * ranks.world_size / knowns.sum().clamp(min=1)
