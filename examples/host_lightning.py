"""A small CLIP as a LightningModule, trained with ProtoLoss on the embedded pictures:

python examples/host_lightning.py --output runs/lightning
python examples/host_lightning.py --output runs/lightning --epochs 6 --resume
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from encoders import ConvNet, TextTransformer
from host_pairs import LENGTH, VOCABULARY, PicturePairs
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from protoclip_losses import EpisodeSampler, ProtoLoss
from protoclip_losses.episodes import EpisodeOrder, WithIndex
from protoclip_losses.heads import ProjectionHeads
from protoclip_losses.integrations.lightning import ProtoCLIPCallback


class Clip(LightningModule):  # type: ignore[misc]
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.image, self.text = ConvNet(width), TextTransformer(width, VOCABULARY, LENGTH)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.proto = ProjectionHeads(width, 32, hidden_dim=128, norm="layer")  # new, as are the loss, project() and the index
        self.loss = ProtoLoss()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, text = self.image(batch["pixel_values"]), self.text(batch["input_ids"])
        return {
            "image_features": F.normalize(image, dim=-1),
            "text_features": F.normalize(text, dim=-1),
            "logit_scale": self.logit_scale.exp(),
            **self.proto(image, text),
        }

    def project(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        out = self(batch)
        return batch["index"], out["image_features_projected"], out["text_features_projected"]

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        parts: Any = self.loss(**self(batch), index=batch["index"], output_dict=True)
        self.log_dict(parts)
        total: Tensor = sum(parts.values())
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rows", type=int, help="pairs to train on; default: all")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = WithIndex(PicturePairs(options.rows))
    order = EpisodeOrder(EpisodeSampler(len(data), len(data)))  # the order of an epoch depends on its number only
    trainer = Trainer(max_epochs=options.epochs, default_root_dir=options.output, callbacks=[ProtoCLIPCallback()])
    trainer.fit(Clip(), DataLoader(data, 64, sampler=order), ckpt_path="last" if options.resume else None)
    trainer.save_checkpoint(f"{options.output}/last.ckpt")


if __name__ == "__main__":
    main()
