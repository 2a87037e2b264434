"""Steps of a training loop that do more than call the loss once. ``tests/integrations/test_practices.py`` runs each of them.

``model(images, texts)`` returns the arguments of ``ProtoLoss`` by name, as in ``host_own_loop.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip_losses import ProtoLoss

Batch = tuple[Tensor, Tensor, Tensor]  # index, images, texts
SCALES = ("logit_scale", "logit_scale_proto")


def accumulate(model: nn.Module, loss_fn: ProtoLoss, batches: Sequence[Batch]) -> None:
    """Each batch has its own negatives. The prototype terms have none, and get the gradient of all batches as one."""
    for index, images, texts in batches:
        loss: Any = loss_fn(**model(images, texts), index=index)
        (loss / len(batches)).backward()


def grad_cache(model: nn.Module, loss_fn: ProtoLoss, batches: Sequence[Batch]) -> None:
    """All batches are each other's negatives, at the memory of one: the gradient of the whole (GradCache, arXiv:2101.06983)."""
    with torch.no_grad():
        outputs = [model(images, texts) for _, images, texts in batches]
    joined = {name: torch.cat([out[name] for out in outputs]) for name in outputs[0] if name not in SCALES}
    joined |= {name: outputs[0][name] for name in SCALES}
    leaves = {name: x.detach().requires_grad_() for name, x in joined.items()}
    loss: Any = loss_fn(**leaves, index=torch.cat([index for index, _, _ in batches]))
    loss.backward()
    start = 0
    for number, (index, images, texts) in enumerate(batches):
        rows = slice(start, start := start + len(index))
        out = model(images, texts)
        # The scales are the same in each batch: their gradient goes back once.
        names = [name for name in out if name not in SCALES or number == 0]
        gradients = [leaves[name].grad if name in SCALES else leaves[name].grad[rows] for name in names]  # type: ignore[index]
        torch.autograd.backward([out[name] for name in names], gradients)


def with_another_pair_loss(model: nn.Module, pair_loss: Callable[..., Tensor], prototype_loss: ProtoLoss, batch: Batch) -> None:
    """``prototype_loss = ProtoLoss(w_clip=0.0)`` has the prototype terms alone; the pair loss is your own."""
    index, images, texts = batch
    out = model(images, texts)
    terms: Any = prototype_loss(**out, index=index)
    (pair_loss(out["image_features"], out["text_features"], out["logit_scale"]) + terms).backward()


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: float = -10.0) -> Tensor:
    """SigLIP's loss over the batch (arXiv:2303.15343)."""
    own = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    return -F.logsigmoid(own * (scale * image @ text.T + bias)).sum() / len(image)


def lock_image_tower(model: Any) -> None:
    """LiT: the image tower stands still, its head goes on learning. ``set_prototypes(None)`` for the paper's last episodes."""
    model.image.requires_grad_(False)
    model.image.eval()  # after each model.train(), for towers with BatchNorm or dropout
