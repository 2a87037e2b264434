"""The whole objective: a pair loss plus a sum over prototype terms."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import _checks as check
from .._dtypes import is_transformed
from ..distributed import Group
from ..kernels.autograd import keep_all_in_graph
from ..prototypes.batch_features import BatchFeatures, teachers_by_name
from .info_nce import collective_signature, num_rows, own_gradients
from .misuse import digest, warn_of_equal_ranks, warn_of_lengths, warn_of_one_projection
from .module import untraced_if
from .pair_term import check_pair_term, pair_share
from .prototype_module import PrototypeModule
from .relational_distillation import check_distillation, distillation_share
from .settings import ObjectiveSettings


class ProtoLoss(PrototypeModule):
    r"""The ProtoCLIP objective: InfoNCE, or SigLIP's sigmoid loss, and a sum over prototype terms.

    **Use it when:** you train a CLIP and want all of it in one module.
    **Not when:** you need one part alone (:class:`InfoNCE`, :class:`PrototypeLoss`), or want to learn prototypes
    (:func:`protoclip_losses.functional.prototype_cross_entropy`).
    **Related:** :class:`EpisodicClusterer`, :class:`OnlinePrototypes`, :class:`TeacherAdapter`.

    .. math::
        \mathcal{L} = w_\mathrm{clip}\, \mathcal{L}_\mathrm{InfoNCE} + w_\mathrm{proto}\, \mathcal{L}_\mathrm{proto}
        + \sum_{t} w_t\, \mathcal{L}_t + w_\mathrm{distill}\, \mathcal{L}_\mathrm{distill}

    where :math:`\mathcal{L}_\mathrm{proto}` is the mean over terms whose teacher is another modality (image from text and text
    from image: the paper's half sum) and :math:`\mathcal{L}_t` the mean over students of the terms of external teacher t. Every
    term, soft or hard, back-translated or not, internal or external, is
    :func:`protoclip_losses.functional.prototype_cross_entropy` with its own constants P, M and labels.
    Under torch.distributed the loss is this rank's share: the mean over ranks is the loss of the whole batch, and after DDP's
    averaging so are the gradients, also for unequal batches and ignored labels.

    Args:
        w_clip: weight of the pair loss.
        w_proto: weight of the internal prototype terms.
        w_external: weight of external teachers: one for all, or a mapping with a weight for each by name.
        w_distill: weight of relational distillation of the teachers whose ``teacher_features`` are passed, in warm-up too: the
            mean over teachers and students of :func:`protoclip_losses.functional.relational_distillation`, over all ranks.
        distill_temperature: of the teachers in it.
        repeats: what pairs with equal ``ids`` are to each other in InfoNCE, see :class:`InfoNCE`.
        target_temperature: :math:`\tau_y` of internal soft targets; None, 0 or -1 means hard targets.
        external_target_temperature: likewise for external teachers; hard by default, as in the paper's code.
        back_translation: prototypes are back-translated into the student's space; False uses the teacher's centroids, which
            must then have the student's width.
        normalize_prototypes: L2-normalise prototypes and centroids. The paper does not: its student softmax favours prototypes
            of large norm, that is of tight clusters.
        process_group: None for the default group, ``False`` to stay local, or a group.
        equal_batch_sizes: a promise that saves the exchange of each step, see :class:`InfoNCE`. Settings and prototypes are
            compared in the first call, and in the first after :meth:`set_prototypes`, which all ranks must call together.
        gather_with_grad: of InfoNCE, see :class:`InfoNCE`; prototype terms are exact in either case.
        pair_loss: ``"info_nce"``, or ``"sigmoid"`` for models with a logit bias, see :class:`SigmoidPairLoss`.
        chunk_size: rows worked on at a time; any value gives the same answer.
        memory_budget: bytes that the logits worked on may take, in place of ``chunk_size``; any value gives the same answer.
        check_values: read values to check them each step. None means on CPU in eager mode only; ``True`` forces it.

    Attributes:
        metrics: detached tensors of the last forward: ``contrastive_accuracy`` and ``prototype_accuracy/STUDENT/TEACHER``.
        settings: the frozen :class:`~protoclip_losses.losses.settings.ObjectiveSettings`; each is an attribute of the loss too.

    Prototypes are neither parameters nor buffers: DDP and ``.half()`` leave them alone, and ``state_dict()`` saves them.

    Example:
        >>> import torch
        >>> from protoclip_losses import EpisodicClusterer, FeatureBank
        >>> h = torch.nn.functional.normalize(torch.arange(12.0).reshape(6, 2).sin(), dim=1)
        >>> bank = FeatureBank.from_features(torch.arange(6), image=h, text=h)
        >>> loss = ProtoLoss(target_temperature=0.1)
        >>> loss.set_prototypes(EpisodicClusterer(num_prototypes=2).build(bank))
        >>> sorted(loss(h, h, 10.0, index=torch.arange(6), output_dict=True))
        ['contrastive_loss', 'proto_external_loss', 'proto_loss']

    Source:
        ProtoCLIP, https://arxiv.org/abs/2206.10996.
    """

    def __init__(
        self,
        *,
        w_clip: float = 1.0,
        w_proto: float = 1.0,
        w_external: float | Mapping[str, float] = 1.0,
        w_distill: float = 0.0,
        distill_temperature: float = 0.1,
        repeats: str | None = None,
        target_temperature: float | None = 0.01,
        external_target_temperature: float | None = None,
        back_translation: bool = True,
        normalize_prototypes: bool = False,
        process_group: Group | bool | None = None,
        equal_batch_sizes: bool = False,
        gather_with_grad: bool = True,
        pair_loss: str = "info_nce",
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        check_values: bool | None = None,
    ) -> None:
        settings = ObjectiveSettings(
            w_clip,
            w_proto,
            w_external,
            target_temperature,
            external_target_temperature,
            back_translation,
            normalize_prototypes,
            gather_with_grad,
            w_distill,
            distill_temperature,
            repeats,
            equal_batch_sizes,
            chunk_size,
            memory_budget,
            check_values,
            pair_loss,
        )
        super().__init__(settings, process_group)

    @untraced_if(
        lambda loss: not loss.needs_episodes,
        "prototypes that follow training change from step to step: compile without fullgraph=True, and the loss runs uncompiled",
    )
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Any = None,
        *,
        image_features_projected: Tensor | None = None,
        text_features_projected: Tensor | None = None,
        logit_scale_proto: Tensor | float | None = None,
        index: Tensor | None = None,
        ids: Tensor | None = None,
        teacher_features: Mapping[str, Tensor] | None = None,
        features: Mapping[str, Tensor] = {},
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, a () tensor, or its three parts, already weighted, whose sum it is.

        Args:
            image_features, text_features: (B, d) this rank's rows, L2-normalised.
            logit_scale: of the pair loss, already exponentiated: a float, () or (1,).
            logit_bias: of ``pair_loss="sigmoid"``. InfoNCE accepts it too, and gives it an exact zero gradient.
            image_features_projected, text_features_projected: (B, D) the heads' outputs, L2-normalised; default the plain ones.
            logit_scale_proto: scale of the prototype terms; default ``logit_scale``.
            index: (B,) int64 sample indices, needed while an episode's prototypes are set; None in online mode.
            ids: (B,) int64 of captions that repeat; needs ``repeats``.
            teacher_features: (B, D_E) of external teachers by name, for online mode and distillation; an episode's labels come
                from ``index``.
            features: projected features of further modalities by name.
            output_dict: return ``{"contrastive_loss", "proto_loss", "proto_external_loss"}``, and ``"distillation_loss"`` where
                ``w_distill`` is given.

        Every tensor passed in gets a gradient, an exact zero where a term is absent, so that DDP finds all parameters used.

        Raises:
            RuntimeError: :meth:`set_prototypes` was never called.
            ValueError: shapes, widths or values that do not fit; ``index`` missing; a modality missing; an unknown teacher.
            IndexError: a sample that is not in the episode.
            TypeError: wrong dtypes.
        """
        proto_scale = logit_scale if logit_scale_proto is None else logit_scale_proto
        image = image_features if image_features_projected is None else image_features_projected
        text = text_features if text_features_projected is None else text_features_projected
        batch = BatchFeatures({"image": image, "text": text, **features}, teachers_by_name(teacher_features))
        terms, first = self._begin(batch)

        def prepare() -> "tuple[tuple[Tensor, Tensor | None], dict[str, Tensor], dict[str, Tensor]]":  # torch 2.4 traces no types
            self._check_set()
            pair_scales = check_pair_term(self.settings, image_features, text_features, logit_scale, logit_bias, ids)
            batch.check(image_features)
            if index is not None:
                check.integers("index", index, length=image_features.shape[0], of=" as image_features has rows")
            source, check_values = self._prototypes, self.settings.check_values
            if self.settings.w_distill:
                check_distillation(batch, proto_scale, self.settings)
            if first is None:
                # Labels of an episode come from the index: teachers are there to be distilled, and need not be clustered.
                is_distilled_only = self.settings.w_distill and self.needs_episodes
                own = BatchFeatures(batch.students, {}) if is_distilled_only else batch
                labels = {} if source is None else source.labels(own, index, check_values=check_values)
            else:
                labels = dict(first.labels)
            return pair_scales, terms.check(batch, proto_scale), labels

        exchanges_gradients = self.settings.w_distill or self.settings.repeats == "share"
        (pair_scales, scales, labels), ranks = self._validate_rows(
            prepare,
            num_rows(image_features),
            signature=lambda: {
                **collective_signature(image_features, text_features, scale=logit_scale, bias=logit_bias),
                "features": [(name, x.shape[1:]) for name, x in batch.by_name.items()],
                "settings": self.settings.signature,
                "ids": ids is not None,
                **(own_gradients(image_features, text_features, *batch.students.values()) if exchanges_gradients else {}),
                **({"prototypes": None} if self._prototypes is None else self._prototypes.signature()),
            },
            like=image_features,
            digest=None if self.was_called else lambda: digest(index, image_features),
        )
        if not self.was_called:
            self.was_called = True
            projected = {"image_features_projected": image_features_projected, "text_features_projected": text_features_projected}
            warn_of_equal_ranks(ranks)
            warn_of_lengths(image_features=image_features, text_features=text_features, **projected)
            warn_of_one_projection(image_features_projected, text_features_projected)
        # A zero each: torch.compile traces no function of one tensor given twice.
        zero = pair_scales[0].detach()
        parts = {name: zero.new_zeros(()) for name in ("contrastive_loss", "proto_loss", "proto_external_loss")}
        metrics: dict[str, Tensor] = {}
        if self.settings.w_clip:
            share, metrics = pair_share(self.settings, image_features, text_features, *pair_scales, ids, ranks)
            parts["contrastive_loss"] = self.settings.w_clip * share
        if self.settings.w_distill:
            parts["distillation_loss"] = self.settings.w_distill * distillation_share(batch, proto_scale, self.settings, ranks)
        terms.add_to(parts, metrics, batch, scales, labels, ranks)
        given = image_features, text_features, logit_scale, logit_bias, proto_scale, teacher_features, *batch.by_name.values()
        parts = dict(zip(parts, keep_all_in_graph(list(parts.values()), *given), strict=True))
        self._end(first, batch, labels, ranks, metrics, parts.values())
        if output_dict:
            return parts
        total = parts["contrastive_loss"] + parts["proto_loss"] + parts["proto_external_loss"]
        return total + parts["distillation_loss"] if "distillation_loss" in parts else total

    def _check_set(self) -> None:
        if not self._is_set:
            raise RuntimeError(
                "prototypes are not set: call set_prototypes(clusterer.build(bank)), or set_prototypes(None) to have none"
            )
        if is_transformed() and not self.needs_episodes:
            raise NotImplementedError(
                "online prototypes take each batch in, which no function that torch.func transforms may do: call backward(), or "
                "set the prototypes of an episode"
            )
