"""A training loop of your own for a small CLIP, on the embedded pictures: python examples/host_own_loop.py

The lines that ProtoCLIP adds are numbered.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from encoders import ConvNet, TextTransformer
from host_pairs import LENGTH, VOCABULARY, PicturePairs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from protoclip_losses import EpisodeSampler, EpisodicClusterer, FeatureBank, ProtoLoss  # 1
from protoclip_losses.episodes import WithIndex
from protoclip_losses.heads import ProjectionHeads


class Clip(nn.Module):
    def __init__(self, width: int = 64, dim: int = 32) -> None:
        super().__init__()
        self.image, self.text = ConvNet(width), TextTransformer(width, VOCABULARY, LENGTH)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.proto = ProjectionHeads(width, dim, hidden_dim=128)

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        image, text = self.image(images), self.text(texts)
        return {
            "image_features": F.normalize(image, dim=-1),
            "text_features": F.normalize(text, dim=-1),
            "logit_scale": self.logit_scale.exp(),
            **self.proto(image, text),
        }


def train(rows: int | None = None, num_episodes: int = 4) -> list[float]:
    torch.manual_seed(0)
    data = WithIndex(PicturePairs(rows))
    model = Clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []

    def batches(index: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for batch in DataLoader(data, batch_size=64, sampler=index.tolist()):
            yield batch["pixel_values"], batch["input_ids"], batch["index"]

    loss_fn = ProtoLoss(target_temperature=0.01)  # 2
    clusterer = EpisodicClusterer(num_prototypes=len(data) // 10)  # 3
    for episode in islice(EpisodeSampler(len(data), episode_size=len(data)), num_episodes):  # 4
        bank = FeatureBank(episode.index, dim=32)  # 5
        model.eval()  # 6
        for images, texts, index in batches(episode.index):  # 7
            with torch.no_grad():  # 8
                out = model(images, texts)  # 9
            bank.update(index, out["image_features_projected"], out["text_features_projected"])  # 10
        loss_fn.set_prototypes(clusterer.build(bank))  # 11
        model.train()
        for images, texts, index in batches(episode.index):
            loss: Any = loss_fn(**model(images, texts), index=index)  # 12
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.proto.clamp_scale()
            losses.append(float(loss))
        print(f"episode {episode.number}: loss {losses[-1]:.3f}", flush=True)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="pairs to train on; default: all")
    parser.add_argument("--episodes", type=int, default=4)
    options = parser.parse_args()
    train(options.rows, options.episodes)
