"""ProtoLoss under DeepSpeed's ZeRO stages 0 to 3 on CPU, compared with one process: the weights are the same.

pip install deepspeed
DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 examples/host_deepspeed.py
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip_losses import EpisodicClusterer, FeatureBank, ProtoLoss

SAMPLES, BATCH, STEPS = 40, 12, 3


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(12, 8), nn.Linear(10, 8)
        # Shape (1,), because DeepSpeed 0.19 cannot broadcast a 0-d parameter on CPU.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1), self.logit_scale.exp()


def new_model() -> Clip:
    torch.manual_seed(0)
    return Clip()


def new_loss(pairs: tuple[Tensor, Tensor], **settings: Any) -> ProtoLoss:
    """A loss with the same prototypes on every rank."""
    bank = FeatureBank(torch.arange(SAMPLES), dim=8)
    with torch.no_grad():
        bank.update(bank.index, *new_model()(*pairs)[:2])
    loss = ProtoLoss(**settings)
    loss.set_prototypes(EpisodicClusterer(5, process_group=False).build(bank))
    return loss


def one_process(pairs: tuple[Tensor, Tensor]) -> Clip:
    model, loss = new_model(), new_loss(pairs, process_group=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in torch.split(torch.arange(STEPS * BATCH), BATCH):
        optimizer.zero_grad()
        loss(*model(*(x[index] for x in pairs)), index=index).backward()
        optimizer.step()
    return model


def zero(deepspeed: Any, pairs: tuple[Tensor, Tensor], stage: int) -> dict[str, Tensor]:
    """The weights after the same steps, with each batch split over the ranks."""
    model, loss = new_model(), new_loss(pairs)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default is 1
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for whole in torch.split(torch.arange(STEPS * BATCH), BATCH):
        index = whole[rank::world_size]
        engine.backward(loss(*engine(*(x[index] for x in pairs)), index=index))
        engine.step()
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        return {name: x.detach().clone() for name, x in parameters.items()}


def main() -> None:
    deepspeed = import_module("deepspeed")
    deepspeed.init_distributed(dist_backend="gloo")
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(SAMPLES, 12, generator=generator), torch.randn(SAMPLES, 10, generator=generator)
    expected = dict(one_process(pairs).named_parameters())
    for stage in range(4):
        weights = zero(deepspeed, pairs, stage)
        difference = max(float((weights[name] - x).abs().max()) for name, x in expected.items())
        if dist.get_rank() == 0:
            print(f"ZeRO stage {stage}: weights differ from one process by at most {difference:.1e}")
        assert difference < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
