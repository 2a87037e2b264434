"""Training steps that do more than call the loss once; each is tested against a plain step on the whole batch.

``model(images, texts)`` returns the arguments of ``ProtoLoss`` by name, as in ``host_own_loop.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip_losses import ProtoLoss

Batch = tuple[Tensor, Tensor, Tensor]  # images, texts, index
SCALES = ("logit_scale", "logit_scale_proto")


def accumulate(model: nn.Module, loss_fn: ProtoLoss, batches: Sequence[Batch]) -> None:
    """Each batch has its own negatives. Prototype terms have no negatives: their gradient is that of one large batch."""
    for images, texts, index in batches:
        loss: Any = loss_fn(**model(images, texts), index=index)
        (loss / len(batches)).backward()


def grad_cache(model: nn.Module, loss_fn: ProtoLoss, batches: Sequence[Batch]) -> None:
    """The gradient of one large batch, at the memory of a small one (GradCache, arXiv:2101.06983)."""
    with torch.no_grad():
        outputs = [model(images, texts) for images, texts, _ in batches]
    joined = {name: torch.cat([out[name] for out in outputs]) for name in outputs[0] if name not in SCALES}
    joined |= {name: outputs[0][name] for name in SCALES}
    leaves = {name: x.detach().requires_grad_() for name, x in joined.items()}
    loss: Any = loss_fn(**leaves, index=torch.cat([index for _, _, index in batches]))
    loss.backward()
    start = 0
    for number, (images, texts, index) in enumerate(batches):
        rows = slice(start, start := start + len(index))
        out = model(images, texts)
        # The scales are shared by all batches, so their gradient is propagated once.
        names = [name for name in out if name not in SCALES or number == 0]
        gradients = [leaves[name].grad if name in SCALES else leaves[name].grad[rows] for name in names]  # type: ignore[index]
        torch.autograd.backward([out[name] for name in names], gradients)


def with_another_pair_loss(model: nn.Module, pair_loss: Callable[..., Tensor], prototype_loss: ProtoLoss, batch: Batch) -> None:
    """``prototype_loss = ProtoLoss(w_clip=0.0)`` has the prototype terms only; the pair loss is your own."""
    images, texts, index = batch
    out = model(images, texts)
    terms: Any = prototype_loss(**out, index=index)
    (pair_loss(out["image_features"], out["text_features"], out["logit_scale"]) + terms).backward()


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: float = -10.0) -> Tensor:
    """SigLIP's loss over the batch (arXiv:2303.15343)."""
    sign = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / len(image)


def lock_image_tower(model: Any) -> None:
    """LiT: the image tower is locked and its head still trained. The paper's last episodes also have ``set_prototypes(None)``."""
    model.image.requires_grad_(False)
    model.image.eval()  # again after each model.train(), for towers with BatchNorm or dropout
