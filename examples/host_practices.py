"""Training steps that do more than call the loss once; each is tested against a plain step on the whole batch.

``model(images, texts)`` returns the arguments of ``ProtoLoss`` by name, as in ``host_own_loop.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from protoclip_losses import GradCache, ProtoLoss

Batch = tuple[Tensor, Tensor, Tensor]  # images, texts, index


def accumulate(model: nn.Module, loss_fn: ProtoLoss, batches: Sequence[Batch]) -> None:
    """Each batch has its own negatives. Prototype terms have no negatives: their gradient is that of one large batch."""
    for images, texts, index in batches:
        loss: Any = loss_fn(**model(images, texts), index=index)
        (loss / len(batches)).backward()


def grad_cache(model: nn.Module, loss_fn: ProtoLoss, batch: Batch, chunk_size: int = 64) -> Tensor:
    """The gradient of one large batch, in the memory of a chunk. It runs backward; ``optimizer.step()`` is yours."""
    images, texts, index = batch
    loss: Tensor = GradCache(loss_fn, chunk_size)(model, images, texts, index=index)
    return loss


def with_another_pair_loss(model: nn.Module, pair_loss: Callable[..., Tensor], prototype_loss: ProtoLoss, batch: Batch) -> None:
    """``prototype_loss = ProtoLoss(w_clip=0.0)`` has the prototype terms only; the pair loss is your own."""
    images, texts, index = batch
    out = model(images, texts)
    terms: Any = prototype_loss(**out, index=index)
    (pair_loss(out["image_features"], out["text_features"], out["logit_scale"]) + terms).backward()


def lock_image_tower(model: Any) -> None:
    """LiT: the image tower is locked and its head still trained. The paper's last episodes also have ``set_prototypes(None)``."""
    model.image.requires_grad_(False)
    model.image.eval()  # again after each model.train(), for towers with BatchNorm or dropout
