"""Features of six kinds of samples, of which image and text both know something, each in its own way."""

import torch
from cases import unit

from protoclip_losses import EpisodicClusterer, FeatureBank, ProtoLoss

N, K = 240, 6
INDEX = torch.arange(N)
KINDS = INDEX % K
IMAGE, TEXT = (
    torch.nn.functional.normalize(unit(K, 8, seed, torch.float32)[KINDS] + 0.3 * unit(N, 8, seed + 1, torch.float32), dim=1)
    for seed in (1, 3)
)


def built():
    """A loss with prototypes of them."""
    loss = ProtoLoss()
    loss.set_prototypes(EpisodicClusterer(K).build(FeatureBank.from_features(INDEX, image=IMAGE, text=TEXT)))
    return loss


def train(loss, image, text, index, times=1):
    """Call the loss on all rows as often, in batches of 60."""
    for _ in range(times):
        for rows in index.split(60):
            loss(image[rows], text[rows], 10.0, index=rows)
