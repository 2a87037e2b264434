"""open_clip 4.x, not yet released: its CLIPTask with ProtoLoss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._checks import require
from ...heads import mix_in
from ...losses import ProtoLoss
from ..teachers import Teacher, labels_or_features
from .checkpoint import unwrapped


class _PrototypeTask:
    """A mixin before CLIPTask: the batch's index reaches the loss, and both scales are clamped."""

    def training_forward(self: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        out = self.trainable_module(image=batch["image"], text=batch["text"])
        losses = self._losses(out, [batch])
        # open_clip sums what ends in _loss: the parts, so there must be no total among them.
        return {**losses, "loss": sum(losses.values())}, self._report(out)

    def compute_accum_loss(
        self: Any, inputs: Mapping[str, Tensor], inputs_no_accum: Mapping[str, Tensor], accum_batches: list[Mapping[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self._losses({**inputs, **inputs_no_accum}, accum_batches), self._report(inputs_no_accum)

    def _losses(self: Any, out: Mapping[str, Tensor], batches: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        known: dict[str, Any] = {}
        if "index" in batches[0]:
            known = labels_or_features(self.loss, self.teachers, torch.cat([batch["index"] for batch in batches]))
        out = {**out, "logit_scale_proto": out["logit_scale_proto"].mean()}  # under accumulation one entry a batch, all equal
        losses: dict[str, Tensor] = self.loss(**out, **known, output_dict=True)
        return losses

    def clamp_logit_scale(self: Any, *args: Any, **kwargs: Any) -> None:
        super().clamp_logit_scale(*args, **kwargs)  # type: ignore[misc]
        unwrapped(self.trainable_module).proto.clamp_scale()


def prototype_task(model: Any, loss: ProtoLoss, teachers: Mapping[str, Teacher] | None = None, **options: Any) -> Any:
    """A ``CLIPTask`` of open_clip 4.x that trains with prototypes.

    It is an instance of open_clip's class, for its ``train_one_epoch``, ``save_checkpoint`` and the rest. A batch may have an
    ``"index"`` (B,) beside ``"image"`` and ``"text"``: :class:`~protoclip_losses.WithIndex` of open_clip's csv data set adds it.
    It is needed for an episode's prototypes, and for external teachers online.

    Args:
        model: with heads, by :func:`add_heads`.
        loss: the objective, in which prototypes are set, or None.
        teachers: external teachers of online mode by name, with a row for each sample index.
        options: of ``CLIPTask``, such as ``device``.

    Raises:
        ImportError: open_clip is not installed, or is 3.x.
        TypeError: a model without heads, or a loss that is no ProtoLoss.
    """
    if not hasattr(model, "proto"):
        raise TypeError(f"model must have heads, see add_heads, got a {type(model).__name__} without")
    if not isinstance(loss, ProtoLoss):
        raise TypeError(f"loss must be a ProtoLoss, got {type(loss).__name__}")
    task = require("open_clip.task", "open-clip").CLIPTask(model, loss=loss, **options)
    task.teachers = dict(teachers or {})
    mix_in(task, _PrototypeTask)
    return task
