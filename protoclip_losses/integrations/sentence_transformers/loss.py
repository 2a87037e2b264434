"""The loss for ``SentenceTransformerTrainer``: ProtoLoss, the heads in front of it, and the teachers behind it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...distributed import active_group
from ...functional import info_nce, sigmoid_pair_loss
from ...heads import MAX_LOG_SCALE, ProjectionHeads
from ...losses import ProtoLoss
from ..teachers import Teacher, labels_or_features
from . import replicas

INDEX = "a column label of integer sample indices: train_dataset.add_column('label', range(len(train_dataset)))"


class LossHeads(ProjectionHeads):
    """The heads, and the scale of InfoNCE where the model has none."""

    def __init__(self, in_dim: int, dim: int, hidden_dim: int, norm: str, has_own_scale: bool) -> None:
        super().__init__(in_dim, dim, hidden_dim, norm)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07))) if has_own_scale else None

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The arguments of ProtoLoss that are parameters here, or made with them."""
        own = {} if self.logit_scale is None else {"logit_scale": self.logit_scale.exp()}
        return {**super().forward(image, text), **own}

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Clamp the scales to [1, 100]."""
        super().clamp_scale()
        if self.logit_scale is not None:
            self.logit_scale.clamp_(0, MAX_LOG_SCALE)


class ProtoCLIPLoss(nn.Module):
    """ProtoLoss as a loss of sentence-transformers: ``loss(sentence_features, labels)``, with projection heads.

    **Use it when:** you train an embedding model on pairs with ``SentenceTransformerTrainer``: pictures with captions, or texts
    with texts.
    **Not when:** you train a ``CLIPModel`` by transformers' own ``Trainer``: use
    :class:`~protoclip_losses.integrations.transformers.ProtoCLIPTrainer`.
    **Related:** :class:`ProtoCLIPCallback`, which goes with it; :class:`~protoclip_losses.ProtoLoss`.

    The first column takes the place of the image, the second that of the text, and ``labels`` that of the sample index. In
    evaluation the loss is InfoNCE of the local batch.

    The trainer optimises the parameters of a loss with those of the model, but neither synchronises nor saves them: on several
    processes the heads average their gradients themselves, and :class:`ProtoCLIPCallback` saves them.

    Args:
        model: the ``SentenceTransformer`` that is trained. Its ``logit_scale`` is trained if it has one, as CLIP has; else the
            loss has one.
        loss: the objective; default ``ProtoLoss()``.
        teachers: external teachers by name; row i belongs to the sample with label i. See :class:`ProtoCLIPCallback`.
        heads: ``dim``, ``hidden_dim`` and ``norm`` of :class:`~protoclip_losses.heads.ProjectionHeads`, and ``in_dim``, the
            width of the embeddings, where the model does not know it.

    Raises:
        ValueError: ``pair_loss="sigmoid"`` for a model without a ``logit_bias``; in a call, a number of columns that is not
            two, or labels missing where samples have to be known.
        TypeError: in a call, labels that are not integers.
    """

    def __init__(
        self,
        model: Any,
        loss: ProtoLoss | None = None,
        *,
        teachers: Mapping[str, Teacher] | None = None,
        heads: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss, self.teachers = loss or ProtoLoss(), teachers or {}
        options = {"in_dim": model.get_embedding_dimension(), "dim": 128, "hidden_dim": 2048, "norm": "batch", **(heads or {})}
        if options["in_dim"] is None:
            raise ValueError("heads must have in_dim, got None: the model does not know the width of its embeddings")
        self._scales = {key: own for key in ("logit_scale", "logit_bias") if (own := _name_of(model, key)) is not None}
        if self.loss.pair_loss == "sigmoid" and "logit_bias" not in self._scales:
            raise ValueError("loss must have pair_loss='info_nce', got 'sigmoid': the model has no logit_bias")
        self.heads = LossHeads(**options, has_own_scale="logit_scale" not in self._scales).to(model.device)
        self._is_joined = False

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of the loss, which the trainer adds up and logs.

        Args:
            sentence_features: the inputs of the first column and those of the second.
            labels: (B,) int64 sample indices; None in online mode without teachers, and in evaluation.
        """
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ValueError(f"sentence_features must have two columns, image and text, got {len(columns)}")
        model = unwrapped(self.model)
        if not model.training:
            image, text = (F.normalize(model(column)["sentence_embedding"], dim=-1) for column in columns)
            scale = self.heads.logit_scale if self.heads.logit_scale is not None else self._of_model("logit_scale")
            if self.loss.pair_loss == "sigmoid":
                return {"contrastive_loss": sigmoid_pair_loss(image, text, scale.exp(), self._of_model("logit_bias"))}
            return {"contrastive_loss": info_nce(image, text, scale.exp())}
        samples = self._samples(labels)
        self._check_wrapper()
        self.join()
        self.heads.clamp_scale()
        z = [self.model(column)["sentence_embedding"] for column in columns]
        parts: Any = self.loss(**self._arguments(*z), **samples, output_dict=True)
        return dict(parts)

    def join(self) -> None:
        """On several processes, begin with the heads of the first."""
        if not self._is_joined and (group := active_group(None)) is not None:
            replicas.copy_from_first(self.heads, group)
            self._is_joined = True

    def project(self, sentence_features: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """The projected features (B, D) of the two columns, L2-normalised: for extraction, without gradient."""
        model = unwrapped(self.model)
        out = self.heads(*(model(column)["sentence_embedding"] for column in sentence_features))
        return out["image_features_projected"], out["text_features_projected"]

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {"loss": repr(self.loss), "teachers": sorted(self.teachers), "heads": repr(self.heads)}

    @property
    def citation(self) -> str:
        """What the model card cites."""
        return """
@article{chen2023protoclip,
    author = {Delong Chen and Zhao Wu and Fan Liu and Zaiquan Yang and Shaoqiu Zheng and Ying Tan and Erjin Zhou},
    title = {{ProtoCLIP}: Prototypical Contrastive Language Image Pretraining},
    journal = {IEEE Transactions on Neural Networks and Learning Systems (TNNLS)},
    year = {2023},
    note = {arXiv:2206.10996},
}
"""

    def _arguments(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        out = {"image_features": F.normalize(image, dim=-1), "text_features": F.normalize(text, dim=-1)}
        if "logit_scale" in self._scales:
            out["logit_scale"] = self._of_model("logit_scale").exp()
        if "logit_bias" in self._scales:
            out["logit_bias"] = self._of_model("logit_bias")
        return {**out, **replicas.call(self.heads, active_group(None), image, text)}

    def _of_model(self, key: str) -> Tensor:
        own: Tensor = unwrapped(self.model).get_parameter(self._scales[key])
        return own

    def _samples(self, labels: Tensor | None) -> dict[str, Any]:
        """The arguments by which ProtoLoss knows samples."""
        has_rows = bool(self.teachers) and (not self.loss.needs_episodes or bool(self.loss.w_distill))
        is_needed = has_rows or (self.loss.needs_episodes and self.loss.prototypes is not None)
        if not is_needed and (labels is None or not self.loss.needs_episodes):
            return {}
        return labels_or_features(self.loss, self.teachers, checked_index(labels))

    def _check_wrapper(self) -> None:
        # Each call of the model would mark the other tower's parameters, and the scale, as without a gradient.
        if isinstance(self.model, DistributedDataParallel) and self.model.find_unused_parameters and self._scales:
            raise ValueError(
                "ddp_find_unused_parameters must be False for a model with two towers, got True, the trainer's default: "
                "SentenceTransformerTrainingArguments(..., ddp_find_unused_parameters=False)"
            )


def checked_index(labels: Tensor | None) -> Tensor:
    """Labels as sample indices (B,) int64."""
    if labels is None:
        raise ValueError(f"labels must be given, got None: the training set needs {INDEX}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integer sample indices, got {labels.dtype}: the training set needs {INDEX}")
    if labels.dim() != 1:
        raise ValueError(f"labels must be one sample index a row, got shape {tuple(labels.shape)}: use {INDEX}")
    return labels.long()


def unwrapped(model: Any) -> Any:
    """The ``SentenceTransformer`` itself, from under ``torch.compile``, DDP, or both."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def _name_of(model: nn.Module, key: str) -> str | None:
    """Of the one parameter that is called ``key``."""
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == key]
    return names[0] if len(names) == 1 else None
