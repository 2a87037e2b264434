"""A small CLIP without and with prototypes, on synthetic pictures, in seconds: python examples/quickstart.py"""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from protoclip_losses import EpisodeSampler, EpisodicClusterer, FeatureBank, KMeans, ProjectionHeads, ProtoLoss, TeacherAdapter
from protoclip_losses.metrics import adjusted_mutual_info_score

SHAPES, COLOURS = ["disc", "ring", "square", "cross"], ["red", "green", "blue", "yellow", "pink", "white"]
RGB = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [1, 1, 1]])


def draw(n: int) -> tuple[Tensor, list[str], Tensor]:
    """Noisy pictures (n, 3, 16, 16), captions of which half the words say nothing of them, and kinds."""
    shape, colour = torch.randint(4, (n,)), torch.randint(6, (n,))
    x, y = ((torch.linspace(-2, 2, 16) + torch.rand(n, 1, 1) - 0.5).abs() for _ in range(2))
    radius, near, far = x.hypot(y.mT), torch.minimum(x, y.mT), torch.maximum(x, y.mT)
    masks = [radius < 1, (radius - 0.8).abs() < 0.25, far < 0.9, (near < 0.3) & (far < 1.2)]
    drawn = torch.stack(masks)[shape, torch.arange(n), None] * RGB[colour][:, :, None, None]
    words = zip(colour, shape, torch.randint(50, (n,)), torch.randint(50, (n,)), strict=True)
    captions = [f"{COLOURS[i]} {SHAPES[j]} artist{a} place{b}" for i, j, a, b in words]
    return drawn + 0.5 * torch.randn(n, 3, 16, 16), captions, 4 * colour + shape


class Clip(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
        self.image = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 64))
        self.text = nn.Sequential(nn.EmbeddingBag(vocabulary, 64), nn.ReLU(), nn.Linear(64, 64))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.proto = ProjectionHeads(64, 32, hidden_dim=128)

    def forward(self, pictures: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        image, text = self.image(pictures), self.text(tokens)
        clip = {"image_features": normalize(image), "text_features": normalize(text)}
        return {**clip, "logit_scale": self.logit_scale.exp(), **self.proto(image, text)}


def train(name: str, warmup: int) -> None:
    """Eight episodes, the first `warmup` with InfoNCE alone. AMI: are clusters of new pictures their kinds?"""
    torch.manual_seed(0)
    (pictures, captions, _), (new_pictures, _, new_kinds) = draw(1024), draw(1024)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(" ".join(captions).split()))}
    tokens = torch.tensor([[vocabulary[word] for word in caption.split()] for caption in captions])
    model = Clip(len(vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn, clusterer = ProtoLoss(), EpisodicClusterer(num_prototypes=50)
    teachers = {"words": TeacherAdapter.from_captions(captions, dim=32)} if find_spec("sklearn") else {}

    def ami() -> float:
        clusters = KMeans(num_clusters=24).fit(normalize(model.image(new_pictures).detach()))
        return adjusted_mutual_info_score(new_kinds, clusters.labels)

    print(f"{name}, before training: AMI {ami():.2f}")
    for episode in EpisodeSampler(len(captions), episode_size=len(captions), episodes=8):
        model.eval()
        with torch.no_grad():
            h = model(pictures[episode.index], tokens[episode.index])
        bank = FeatureBank.from_features(episode.index, h["image_features_projected"], h["text_features_projected"])
        loss_fn.set_prototypes(clusterer.build(bank, teachers) if episode.number >= warmup else None)
        model.train()
        for index in torch.split(episode.index, 32):
            losses: Any = loss_fn(**model(pictures[index], tokens[index]), index=index, output_dict=True)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            model.logit_scale.data.clamp_(0, math.log(100))
            model.proto.clamp_scale()
        print(f"episode {episode.number}: AMI {ami():.2f},", {k: round(v.item(), 2) for k, v in losses.items()})


torch.set_num_threads(1)  # the model is so small that threads would wait for each other
train("CLIP", warmup=8)
train("ProtoCLIP", warmup=1)
