"""Relational distillation as a module that gathers over processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from ..distributed import Group, RankRows
from ..functional.relational_distillation import check_relations, unit_rows
from ..kernels.relational_distillation import relation_kl_sum
from ..kernels.sizes import BlockLimit
from ..prototypes.batch_features import BatchFeatures
from .info_nce import collective_signature, num_rows, own_gradients
from .module import BatchLoss
from .settings import ObjectiveSettings, block_limit

Features = Sequence[Tensor]


class RelationalDistillation(BatchLoss):
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
        equal_batch_sizes: a promise that saves the exchange of each step, see :class:`InfoNCE`.
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
        equal_batch_sizes: bool = False,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        check_values: bool | None = None,
    ) -> None:
        super().__init__(process_group, equal_batch_sizes, chunk_size, memory_budget, check_values)
        self.temperature = check.temperature("temperature", temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, {super().extra_repr()}"

    def forward(self, features: Tensor, teacher_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Return the loss, a () tensor.

        Args:
            features: (B, D) this rank's rows, L2-normalised.
            teacher_features: (B, D_E) of the same samples; a row of zeros is left out.
            logit_scale: already exponentiated: a float, () or (1,).
        """
        (scale, _), ranks = self._validate_rows(
            lambda: check_relations(features, teacher_features, logit_scale, self.temperature, self.check_values),
            num_rows(features),
            signature=lambda: {
                **collective_signature(features, teacher_features, scale=logit_scale),
                "temperature": self.temperature,
                "equal_batch_sizes": self.equal_batch_sizes,
                **own_gradients(features),
            },
            like=features,
            settings=self.temperature,
        )
        return relation_shares([features], [teacher_features], [scale], self.temperature, ranks, self.block_limit())[0]


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
    students = list(batch.students.values())
    scales = [check.scale("logit_scale_proto", logit_scale, h, False) for h in students]
    limit, temperature = block_limit(settings), settings.distill_temperature
    return torch.stack(relation_shares(students, list(batch.teachers.values()), scales, temperature, ranks, limit)).mean()


def relation_shares(
    students: Features,
    teachers: Features,
    scales: Sequence[Tensor],
    temperature: float,
    ranks: RankRows,
    limit: BlockLimit,
) -> list[Tensor]:
    """This rank's share of relational distillation over all ranks' rows, by teacher and student. Inputs have been checked."""
    own = slice(0, len(students[0])) if ranks.is_single else ranks.own
    students, teachers = (students, teachers) if ranks.is_single else _gathered(students, teachers, ranks)
    shares = []
    for teacher in teachers:
        for h, scale in zip(students, scales, strict=True):
            unit, known = unit_rows(teacher.to(scale.dtype))
            total = relation_kl_sum(h, unit, scale, known, own, temperature, limit)
            shares.append(total * ranks.world_size / known.sum().clamp(min=1))
    return shares


@torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives of a kernel have no place in a traced graph
def _gathered(students: Features, teachers: Features, ranks: RankRows) -> tuple[Features, Features]:
    """All ranks' rows, together: with the gradients of students, which ranks exchange once in backward."""
    everything = ranks.gather_each_with_gradient(*students, *(x.detach() for x in teachers))
    return everything[: len(students)], everything[len(students) :]
