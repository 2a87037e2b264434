"""The whole objective: InfoNCE plus a sum over prototype terms."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..distributed import Group, active_group, check_process_group, validate_rows
from ..functional.info_nce import check_pairs
from ..functional.prototype_cross_entropy import prototype_sum
from ..kernels.autograd import keep_in_graph
from ..prototypes.episode import Prototypes
from ..prototypes.online import OnlinePrototypes
from .info_nce import collective_signature, info_nce_share
from .terms import Term, weighted_terms


class ProtoLoss(nn.Module):
    r"""The ProtoCLIP objective.

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
        w_external: weight of external teachers: one for all, or a mapping by name.
        target_temperature: :math:`\tau_y` of internal soft targets; None or not positive means hard targets.
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
        metrics: detached tensors of the last forward, over this rank's rows.

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
        for name, weight in (("w_clip", w_clip), ("w_proto", w_proto), *_named("w_external", w_external)):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"{name} must be a float, got {type(weight).__name__}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {weight}")
        check.chunk_rows(chunk_size)
        self.w_clip, self.w_proto, self.w_external = w_clip, w_proto, w_external
        self.target_temperature = check.optional_temperature("target_temperature", target_temperature)
        self.external_target_temperature = check.optional_temperature("external_target_temperature", external_target_temperature)
        self.back_translation, self.normalize_prototypes = back_translation, normalize_prototypes
        self.process_group, self.gather_with_grad = check_process_group(process_group), gather_with_grad
        self.chunk_size, self.check_values = chunk_size, check_values
        self.metrics: dict[str, Tensor] = {}
        self._is_set = False
        self._prototypes: Prototypes | OnlinePrototypes | None = None
        self._version = 0
        self._terms: list[Term] = []

    @property
    def prototypes(self) -> Prototypes | OnlinePrototypes | None:
        """Those that are set."""
        return self._prototypes

    def set_prototypes(self, prototypes: Prototypes | OnlinePrototypes | None) -> None:
        """Use these from now on; None means InfoNCE only, on purpose (warm-up, LiT). Each M is built once, here.

        Raises:
            TypeError: neither Prototypes, nor OnlinePrototypes, nor None.
            ValueError: no weight for an external teacher, or without back translation a teacher of another width.
        """
        if prototypes is not None and not isinstance(prototypes, (Prototypes, OnlinePrototypes)):
            raise TypeError(f"prototypes must be Prototypes, OnlinePrototypes or None, got {type(prototypes).__name__}")
        self._terms = [] if prototypes is None else weighted_terms(prototypes, self)
        self._prototypes, self._is_set = prototypes, True
        self._version = prototypes.version if isinstance(prototypes, OnlinePrototypes) else 0

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
        teacher_features: Any = None,
        features: Mapping[str, Tensor] = {},
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, a () tensor, or its three parts, already weighted, whose sum it is.

        Args:
            image_features: (B, d) this rank's rows, L2-normalised.
            text_features: (B, d) likewise.
            logit_scale: of InfoNCE, already exponentiated: a float, () or (1,).
            logit_bias: accepted, and given an exact zero gradient: a softmax does not see it.
            image_features_projected: (B, D) the head's output, L2-normalised; default ``image_features``.
            text_features_projected: (B, D) likewise; default ``text_features``.
            logit_scale_proto: scale of the prototype terms; default ``logit_scale``.
            index: (B,) int64 sample indices, needed while an episode's prototypes are set; None in online mode.
            teacher_features: (B, D_E) of external teachers by name, for online mode; an episode's labels come from ``index``.
            features: projected features of further modalities by name.
            output_dict: return ``{"contrastive_loss", "proto_loss", "proto_external_loss"}``.

        Every tensor passed in gets a gradient, an exact zero where a term is absent, so that DDP finds all parameters used.

        Raises:
            RuntimeError: :meth:`set_prototypes` was never called.
            ValueError: shapes, widths or values that do not fit; ``index`` missing; a modality missing.
            IndexError: a sample that is not in the episode.
            TypeError: wrong dtypes.
        """
        projected = {
            "image": image_features if image_features_projected is None else image_features_projected,
            "text": text_features if text_features_projected is None else text_features_projected,
            **features,
        }
        proto_scale = logit_scale if logit_scale_proto is None else logit_scale_proto
        online = self._prototypes if isinstance(self._prototypes, OnlinePrototypes) else None
        if online is not None and online.version != self._version:
            self.set_prototypes(online)
        teachers = teacher_features if isinstance(teacher_features, Mapping) else {}
        group = active_group(self.process_group)
        rows = image_features.shape[0] if isinstance(image_features, Tensor) and image_features.dim() else 0
        (scale, scales, labels, found), ranks = validate_rows(
            lambda: self._check(image_features, text_features, logit_scale, projected, proto_scale, index, teachers),
            group,
            rows,
            signature=lambda: (
                collective_signature(image_features, text_features, scale=logit_scale),
                [(t.student, t.teacher) for t in self._terms],
                online and [(name, x.shape[1]) for name, x in {**projected, **teachers}.items()],
            ),
        )
        zero = scale.detach().new_zeros(())
        parts = {"contrastive_loss": zero, "proto_loss": zero, "proto_external_loss": zero}
        metrics: dict[str, Tensor] = {}
        if self.w_clip:
            share, metrics = info_nce_share(image_features, text_features, scale, ranks, self.chunk_size, self.gather_with_grad)
            parts["contrastive_loss"] = self.w_clip * share
        if self._terms:
            keeps = [a != -1 for a in labels]
            own = torch.stack([keep.sum() for keep in keeps])
            counts = ranks.sum(own).clamp(min=1)
            for i, term in enumerate(self._terms):
                h = projected[term.student]
                safe = labels[i].where(keeps[i], 0)
                scale_of, offsets = scales[term.student], term.offset_rows(safe)
                total, correct = prototype_sum(
                    h, term.prototypes, safe, keeps[i], scale_of, offsets, term.valid, self.chunk_size, with_accuracy=True
                )
                share = term.weight * ranks.world_size * total / counts[i]
                parts[term.part] = parts[term.part] + share
                metrics[f"prototype_accuracy/{term.student}/{term.teacher}"] = correct / own[i].clamp(min=1)
        self.metrics = metrics
        if online is not None and torch.is_grad_enabled():
            online.update(projected, teachers, ranks.group, ranks.sizes, found)
        given = (image_features, text_features, logit_scale, logit_bias, proto_scale, *projected.values())
        given += tuple(teacher_features.values()) if isinstance(teacher_features, Mapping) else (teacher_features,)
        parts = {name: keep_in_graph(value, *given) for name, value in parts.items()}
        return parts if output_dict else parts["contrastive_loss"] + parts["proto_loss"] + parts["proto_external_loss"]

    def _check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        projected: dict[str, Tensor],
        proto_scale: Tensor | float,
        index: Tensor | None,
        teachers: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor], list[Tensor], Mapping[str, Tensor]]:
        """Check the inputs; return InfoNCE's scale, students' scales, and this batch's labels: by term, and by online teacher."""
        if not self._is_set:
            raise RuntimeError(
                "prototypes are not set: call set_prototypes(clusterer.build(bank)), or set_prototypes(None) for InfoNCE only"
            )
        scale = check_pairs(image_features, text_features, logit_scale, self.check_values if self.w_clip else False)
        batch = image_features.shape[0]
        for name, h in projected.items():
            check.matrix(f"projected features of {name!r}", h, rows=batch, of=" as image_features")
            check.same_device(f"projected features of {name!r}", h, "image_features", image_features)
        if index is not None:
            check.integers("index", index, length=batch, of=" as image_features has rows")
        labels_of, found = self._labels_of(projected, teachers, index)
        scales: dict[str, Tensor] = {}
        for student in dict.fromkeys(term.student for term in self._terms):
            if student not in projected:
                raise ValueError(f"features must hold the projected features of {student!r}, got {sorted(projected)}")
            h = projected[student]
            if check.values_are_checked(h, self.check_values):
                check.finite(f"projected features of {student!r}", h)
            scales[student] = check.scale("logit_scale_proto", proto_scale, h, self.check_values)
        for term in self._terms:
            h, width = projected[term.student], term.prototypes.shape[1]
            check.matrix(f"projected features of {term.student!r}", h, width=width, of=" as its prototypes")
            term.to(h.device)
        return scale, scales, [labels_of(term) for term in self._terms], found

    def _labels_of(
        self, projected: Mapping[str, Tensor], teachers: Mapping[str, Tensor], index: Tensor | None
    ) -> tuple[Callable[[Term], Tensor], Mapping[str, Tensor]]:
        """How a term's labels of this batch are found: by sample index, or in online mode, where there are some by teacher."""
        if isinstance(self._prototypes, OnlinePrototypes):
            if index is not None:
                raise ValueError("index must be None with OnlinePrototypes: labels come from the nearest centroid")
            sources = {**projected, **teachers}
            for name, x in teachers.items():
                check.matrix(f"teacher_features[{name!r}]", x, rows=projected["image"].shape[0], of=" as image_features")
            self._prototypes.check(sources)
            online = self._prototypes
            found = {name: online.labels(name, sources[name]) for name in dict.fromkeys(t.teacher for t in self._terms)}
            return (lambda term: term.ignored(found[term.teacher])), found
        if self._prototypes is None or not self._terms:
            return (lambda term: term.labels), {}
        if index is None:
            raise ValueError("index must be given while prototypes are set: it tells which cluster each sample is in")
        positions = self._prototypes.positions(index.to(projected["image"].device), check_values=self.check_values)
        return (lambda term: term.labels[positions]), {}

    def get_extra_state(self) -> dict[str, Any]:
        """The prototypes, as plain tensors: what ``state_dict()`` saves. In online mode with the queue of this rank."""
        saved = None if self._prototypes is None else self._prototypes.state_dict()
        if not isinstance(self._prototypes, OnlinePrototypes):
            return {"is_set": self._is_set, "prototypes": saved}
        # After the last step of a cycle the terms here are still those of the prototypes before.
        terms = self._terms if self._version == self._prototypes.version else []
        return {"is_set": self._is_set, "online": saved, "targets": [term.kept_targets(self) for term in terms]}

    def set_extra_state(self, state: Any) -> None:
        """Set the prototypes that were saved."""
        if state.get("online") is not None:
            self.set_prototypes(OnlinePrototypes.from_state_dict(state["online"]))
            for term in self._terms:
                term.keep_targets(state["targets"], self)
        else:
            saved = state["prototypes"]
            self.set_prototypes(None if saved is None else Prototypes.from_state_dict(saved))
        self._is_set = state["is_set"]


def _named(name: str, weights: float | Mapping[str, float]) -> list[tuple[str, float]]:
    return [(f"{name}[{k!r}]", v) for k, v in weights.items()] if isinstance(weights, Mapping) else [(name, weights)]
