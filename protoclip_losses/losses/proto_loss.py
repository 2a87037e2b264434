"""The whole objective: InfoNCE plus a sum over prototype terms."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..distributed import Group, RankRows, active_group, check_process_group, validate_rows
from ..functional.info_nce import check_pairs
from ..kernels.autograd import keep_in_graph
from ..kernels.prototype_cross_entropy import label_nll_sum
from ..prototypes.source import BatchFeatures, PrototypeSource
from .info_nce import collective_signature, info_nce_share, num_rows
from .terms import ObjectiveSettings, WeightedTerm, weighted_terms

SETTINGS = frozenset(f.name for f in fields(ObjectiveSettings))


class ProtoLoss(nn.Module):
    r"""The ProtoCLIP objective: InfoNCE and a sum over prototype terms.

    Use it when: you train a CLIP and want all of it in one module.
    Not when: you need one part alone (:class:`InfoNCE`, :class:`PrototypeLoss`), or want to learn prototypes
    (:func:`protoclip_losses.functional.prototype_cross_entropy`).
    Related: :class:`EpisodicClusterer`, :class:`OnlinePrototypes`, :class:`TeacherAdapter`.

    .. math::
        \mathcal{L} = w_\mathrm{clip}\, \mathcal{L}_\mathrm{InfoNCE} + w_\mathrm{proto}\, \mathcal{L}_\mathrm{proto}
        + \sum_{t} w_t\, \mathcal{L}_t

    where :math:`\mathcal{L}_\mathrm{proto}` is the mean over terms whose teacher is another modality (image from text and text
    from image: the paper's half sum) and :math:`\mathcal{L}_t` the mean over students of the terms of external teacher t. Every
    term, soft or hard, back-translated or not, internal or external, is
    :func:`protoclip_losses.functional.prototype_cross_entropy` with its own constants P, M and labels.

    Under torch.distributed InfoNCE is that of all ranks' rows, prototype terms are those of local rows, and the loss is this
    rank's share: the mean over ranks is the loss of the whole batch, and after DDP's averaging so are the gradients, also for
    unequal batches and ignored labels.

    Args:
        w_clip: weight of InfoNCE.
        w_proto: weight of the internal prototype terms.
        w_external: weight of external teachers: one for all, or a mapping with a weight for each by name.
        target_temperature: :math:`\tau_y` of internal soft targets; None, 0 or -1 means hard targets.
        external_target_temperature: likewise for external teachers; hard by default, as in the paper's code.
        back_translation: prototypes are back-translated into the student's space; False uses the teacher's centroids, which
            must then have the student's width.
        normalize_prototypes: L2-normalise prototypes and centroids. The paper does not: its student softmax favours prototypes
            of large norm, that is of tight clusters.
        process_group: None for the default group, ``False`` to stay local, or a group.
        gather_with_grad: of InfoNCE, see :class:`InfoNCE`; prototype terms are exact in either case.
        chunk_size: rows worked on at a time; any value gives the same answer.
        check_values: read values to check them each step. None means on CPU in eager mode only; ``True`` forces it.

    Attributes:
        metrics: detached tensors of the last forward, over this rank's rows: ``contrastive_accuracy``, and
            ``prototype_accuracy/STUDENT/TEACHER`` of each term.
        settings: the frozen :class:`~protoclip_losses.losses.terms.ObjectiveSettings`; each is an attribute of the loss too.

    Prototypes are constants, not parameters and not buffers: DDP does not broadcast them and ``.half()`` does not touch them.
    They are saved in ``state_dict()`` as extra state.

    Example:
        >>> import torch
        >>> from protoclip_losses import EpisodicClusterer, FeatureBank
        >>> h = torch.nn.functional.normalize(torch.arange(12.0).reshape(6, 2).sin(), dim=1)
        >>> bank = FeatureBank(torch.arange(6), dim=2)
        >>> bank.update(torch.arange(6), h, h)
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
        target_temperature: float | None = 0.01,
        external_target_temperature: float | None = None,
        back_translation: bool = True,
        normalize_prototypes: bool = False,
        process_group: Group | bool | None = None,
        gather_with_grad: bool = True,
        chunk_size: int | None = None,
        check_values: bool | None = None,
    ) -> None:
        super().__init__()
        self.settings = ObjectiveSettings(
            w_clip=w_clip,
            w_proto=w_proto,
            w_external=w_external,
            target_temperature=target_temperature,
            external_target_temperature=external_target_temperature,
            back_translation=back_translation,
            normalize_prototypes=normalize_prototypes,
            gather_with_grad=gather_with_grad,
            chunk_size=chunk_size,
            check_values=check_values,
        )
        self.process_group = check_process_group(process_group)
        self.metrics: dict[str, Tensor] = {}
        self._is_set = False
        self._prototypes: PrototypeSource | None = None
        self._version = 0
        self._terms: list[WeightedTerm] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name) if name in SETTINGS else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A changed setting is checked; temperatures and weights of prototype terms hold from the next :meth:`set_prototypes`."""
        if name in SETTINGS:
            name, value = "settings", replace(self.settings, **{name: value})
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{self.settings.as_arguments()}, prototypes={self._prototypes if self._is_set else 'not set'}"

    @property
    def prototypes(self) -> PrototypeSource | None:
        """The prototypes that are set."""
        return self._prototypes

    def set_prototypes(self, prototypes: PrototypeSource | None) -> None:
        """Use these from now on; None means InfoNCE only, on purpose (warm-up, LiT). Each M is built once, here.

        Args:
            prototypes: :class:`Prototypes` of an episode, :class:`OnlinePrototypes`, or another :class:`PrototypeSource`.

        Raises:
            TypeError: no source of prototypes.
            ValueError: no weight for an external teacher, a weight for an unknown one, or without back translation a teacher of
                another width.
        """
        if prototypes is not None and not isinstance(prototypes, PrototypeSource):
            raise TypeError(f"prototypes must be Prototypes, OnlinePrototypes or None, got {type(prototypes).__name__}")
        terms = [] if prototypes is None else weighted_terms(prototypes, self.settings)
        for term in terms:
            term.fill()
        self._take(prototypes, terms)

    def _take(self, prototypes: PrototypeSource | None, terms: list[WeightedTerm]) -> None:
        self._prototypes, self._terms, self._is_set = prototypes, terms, True
        self._version = 0 if prototypes is None else prototypes.version

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
        teacher_features: Mapping[str, Tensor] | None = None,
        features: Mapping[str, Tensor] = {},
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, a () tensor, or its three parts, already weighted, whose sum it is.

        Args:
            image_features: (B, d) this rank's rows, L2-normalised.
            text_features: (B, d) this rank's rows, L2-normalised.
            logit_scale: of InfoNCE, already exponentiated: a float, () or (1,).
            logit_bias: accepted, and given an exact zero gradient: a softmax does not depend on it.
            image_features_projected: (B, D) the head's output, L2-normalised; default ``image_features``.
            text_features_projected: (B, D) the head's output, L2-normalised; default ``text_features``.
            logit_scale_proto: scale of the prototype terms; default ``logit_scale``.
            index: (B,) int64 sample indices, needed while an episode's prototypes are set; None in online mode.
            teacher_features: (B, D_E) of external teachers by name, for online mode; an episode's labels come from ``index``.
            features: projected features of further modalities by name.
            output_dict: return ``{"contrastive_loss", "proto_loss", "proto_external_loss"}``.

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
        batch = BatchFeatures({"image": image, "text": text, **features}, _by_name(teacher_features))
        self._refresh()

        def prepare() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            scale = self._check(image_features, text_features, logit_scale, batch, index)
            scales = self._check_terms(batch, proto_scale)
            return scale, scales, self._label(batch, index)

        (scale, scales, labels), ranks = validate_rows(
            prepare,
            active_group(self.process_group),
            num_rows(image_features),
            signature=lambda: (
                collective_signature(image_features, text_features, scale=logit_scale),
                [(term.student, term.teacher) for term in self._terms],
                [(name, x.shape[1:]) for name, x in batch.by_name.items()],
            ),
        )
        zero = scale.detach().new_zeros(())
        parts = {"contrastive_loss": zero, "proto_loss": zero, "proto_external_loss": zero}
        self.metrics = {}
        self._add_contrastive(parts, image_features, text_features, scale, ranks)
        self._add_terms(parts, batch, scales, labels, ranks)
        if self._prototypes is not None and torch.is_grad_enabled():
            self._prototypes.observe(batch, labels, ranks)
        given = image_features, text_features, logit_scale, logit_bias, proto_scale, teacher_features, *batch.by_name.values()
        parts = {name: keep_in_graph(value, *given) for name, value in parts.items()}
        return parts if output_dict else parts["contrastive_loss"] + parts["proto_loss"] + parts["proto_external_loss"]

    def _refresh(self) -> None:
        """Follow prototypes that have changed. Their targets are computed when labels need them: no step waits for all."""
        if self._prototypes is not None and self._prototypes.version != self._version:
            self._take(self._prototypes, weighted_terms(self._prototypes, self.settings))

    def _check(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, batch: BatchFeatures, index: Tensor | None
    ) -> Tensor:
        """Check the inputs; return InfoNCE's scale as a () tensor."""
        if not self._is_set:
            raise RuntimeError(
                "prototypes are not set: call set_prototypes(clusterer.build(bank)), or set_prototypes(None) for InfoNCE only"
            )
        scale = check_pairs(image, text, logit_scale, self.settings.check_values if self.settings.w_clip else False)
        for name, h in batch.students.items():
            check.matrix(f"projected features of {name!r}", h, rows=image.shape[0], of=" as image_features")
            check.same_device(f"projected features of {name!r}", h, "image_features", image)
        if index is not None:
            check.integers("index", index, length=image.shape[0], of=" as image_features has rows")
        return scale

    def _check_terms(self, batch: BatchFeatures, proto_scale: Tensor | float) -> dict[str, Tensor]:
        """Check the students of the terms, and move the terms to their device; return each student's scale."""
        scales: dict[str, Tensor] = {}
        for student in dict.fromkeys(term.student for term in self._terms):
            if student not in batch.students:
                raise ValueError(f"features must hold the projected features of {student!r}, got {sorted(batch.students)}")
            h = batch.students[student]
            if check.values_are_checked(h, self.settings.check_values):
                check.finite(f"projected features of {student!r}", h)
            scales[student] = check.scale("logit_scale_proto", proto_scale, h, self.settings.check_values)
        for term in self._terms:
            h, width = batch.students[term.student], term.prototypes.shape[1]
            check.matrix(f"projected features of {term.student!r}", h, width=width, of=" as its prototypes")
            term.to(h.device)
        return scales

    def _label(self, batch: BatchFeatures, index: Tensor | None) -> dict[str, Tensor]:
        """This batch's labels by teacher."""
        if self._prototypes is None:
            return {}
        return self._prototypes.labels(batch, index, check_values=self.settings.check_values)

    def _add_contrastive(self, parts: dict[str, Tensor], image: Tensor, text: Tensor, scale: Tensor, ranks: RankRows) -> None:
        if self.settings.w_clip:
            chunk_size, gather_with_grad = self.settings.chunk_size, self.settings.gather_with_grad
            share, self.metrics = info_nce_share(image, text, scale, ranks, chunk_size, gather_with_grad)
            parts["contrastive_loss"] = self.settings.w_clip * share

    def _add_terms(
        self,
        parts: dict[str, Tensor],
        batch: BatchFeatures,
        scales: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        ranks: RankRows,
    ) -> None:
        if not self._terms:
            return
        usable = [term.usable(labels[term.teacher]) for term in self._terms]
        row_masks = [x != -1 for x in usable]
        own_counts = torch.stack([mask.sum() for mask in row_masks])
        counts = ranks.sum(own_counts).clamp(min=1)
        for i, term in enumerate(self._terms):
            h, scale = batch.students[term.student], scales[term.student]
            safe = usable[i].where(row_masks[i], 0)
            total, correct = label_nll_sum(
                h,
                term.prototypes,
                safe,
                row_masks[i],
                scale,
                term.target_delta(safe),
                term.valid,
                self.settings.chunk_size,
                with_accuracy=True,
            )
            parts[term.part] = parts[term.part] + term.weight * ranks.world_size * total / counts[i]
            self.metrics[f"prototype_accuracy/{term.student}/{term.teacher}"] = correct / own_counts[i].clamp(min=1)

    def get_extra_state(self) -> dict[str, Any]:
        """The prototypes as plain tensors: what ``state_dict()`` saves. In online mode with the queue of this rank."""
        source = self._prototypes
        # After the last step of an online cycle the terms here are still those of the prototypes before.
        terms = self._terms if source is not None and source.version == self._version else []
        return {
            "format": 1,
            "is_set": self._is_set,
            "prototypes": None if source is None else source.state_dict(),
            "targets": [term.state_dict(self.settings) for term in terms],
        }

    def set_extra_state(self, state: Any) -> None:
        """Set the prototypes that were saved."""
        if check.state_format("ProtoLoss", state) == 0:
            state = _from_0_6(state)
        source = None if state["prototypes"] is None else PrototypeSource.of_state(state["prototypes"])
        terms = [] if source is None else weighted_terms(source, self.settings)
        for term in terms:
            term.load_state_dict(state["targets"], self.settings)
        self._take(source, terms)
        self._is_set = state["is_set"]


def _by_name(teacher_features: Any) -> Mapping[str, Tensor]:
    """Features of external teachers by name; 0.6 accepted a single tensor, and ignored it."""
    if isinstance(teacher_features, Tensor):
        check.warn_renamed("teacher_features as a single tensor", "a mapping of names to tensors", stacklevel=4)
        return {}
    if teacher_features is None or isinstance(teacher_features, Mapping):
        return teacher_features or {}
    raise TypeError(f"teacher_features must be a mapping of names to tensors, got {type(teacher_features).__name__}")


def _from_0_6(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of 0.6 in today's form."""
    if state.get("online") is not None:
        return {**state, "prototypes": {**state["online"], "kind": "online"}}
    saved = state["prototypes"]
    if saved is None:
        return {**state, "targets": []}
    targets = [{"made_by": [term["student"], term["teacher"]], "rows": "all"} for term in saved["terms"]]
    return {**state, "prototypes": {**saved, "kind": "episode"}, "targets": targets}
