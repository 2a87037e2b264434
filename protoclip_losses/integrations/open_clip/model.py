"""Projection heads for open_clip's models, and ProtoLoss with the signature of open_clip's losses."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require
from ...heads import ProjectionHeads, mix_in
from ...losses import ProtoLoss
from ..teachers import Teacher, labels_or_features
from .data import IndexedBatches


class _Projected:
    """A mixin before CLIP or CustomTextCLIP: the same forward, with the heads' outputs added."""

    def forward(
        self: Any, image: Tensor | None = None, text: Tensor | None = None, index: Tensor | None = None
    ) -> dict[str, Any]:
        """``index`` is not used: open_clip 4.x passes all that a batch has when it accumulates."""
        z = [None if image is None else self.encode_image(image), None if text is None else self.encode_text(text)]
        unit = [None if x is None else F.normalize(x, dim=-1) for x in z]
        out = {"image_features": unit[0], "text_features": unit[1], "logit_scale": self.logit_scale.exp()}
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        if z[0] is not None and z[1] is not None:
            out |= self.proto(*z)
        return out


def add_heads(model: Any, dim: int = 128, hidden_dim: int = 2048, norm: str = "batch") -> Any:
    """Give an open_clip model :class:`~protoclip_losses.heads.ProjectionHeads` as ``model.proto``.

    Its forward then also returns what :class:`~protoclip_losses.ProtoLoss` takes, always as a dict. The model stays an instance
    of its class, with every attribute it had; ``state_dict()`` gains the entries under ``proto``.
    """
    open_clip = require("open_clip", "open-clip")
    if type(model) not in (open_clip.CLIP, open_clip.CustomTextCLIP):
        raise TypeError(
            "model must be open_clip's CLIP or CustomTextCLIP, without heads and not yet compiled, wrapped or sharded, got "
            f"{type(model).__name__}{' with heads' if hasattr(model, 'proto') else ''}"
        )
    weight = next(model.parameters())
    with torch.no_grad():
        width = model.encode_text(torch.zeros(1, model.context_length, dtype=torch.int64, device=weight.device)).shape[1]
    model.proto = ProjectionHeads(width, dim, hidden_dim, norm).to(weight.device)
    mix_in(model, _Projected)
    return model


class OpenClipLoss(nn.Module):
    """ProtoLoss as open_clip's loop calls a loss: with the model's outputs by name, and no index.

    **Use it when:** open_clip's training loop calls the loss.
    **Not when:** your own loop does: call :class:`~protoclip_losses.ProtoLoss`.
    **Related:** :func:`add_heads`, :class:`Launcher`.

    Args:
        proto: the objective; with ``w_clip=0`` if ``pair`` is given.
        pair: open_clip's own loss, which then computes the contrastive part.
    """

    def __init__(self, proto: ProtoLoss, pair: nn.Module | None = None) -> None:
        super().__init__()
        self.proto, self.pair = proto, pair
        self.batches: IndexedBatches | None = None  # set for an epoch whose samples have to be known by their index
        self.teachers: Mapping[str, Teacher] = {}  # of online mode

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = True, **outputs: Any
    ) -> dict[str, Tensor]:
        """The parts of the loss, each already weighted."""
        teacher = {name: outputs.pop(name) for name in [*outputs] if name.startswith("dist_")}  # of open_clip's distillation
        scale = outputs.pop("logit_scale_proto").mean()  # under --accum-freq one entry per batch, all equal
        known: dict[str, Any] = {}
        if self.batches is not None:
            known = labels_or_features(self.proto, self.teachers, self.batches.index().to(image_features.device))
        features = (image_features, text_features, logit_scale)
        parts: Any = self.proto(*features, logit_scale_proto=scale, output_dict=True, **known, **outputs)
        if self.pair is not None:
            bias = {"logit_bias": outputs["logit_bias"]} if "logit_bias" in outputs else {}
            pair = self.pair(*features, output_dict=True, **bias, **teacher)
            parts |= {**pair, "contrastive_loss": parts["contrastive_loss"] + pair["contrastive_loss"]}
        result: dict[str, Tensor] = parts
        return result
