"""A small model that returns what the losses take, for tests of training under DDP."""

import torch
import torch.nn.functional as F
from torch import nn

from protoclip_losses import ProjectionHead


class Towers(nn.Module):
    """Two encoders with LayerNorm, heads, both scales and a bias."""

    def __init__(self, heads):
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2))
        self.heads = nn.ModuleList(ProjectionHead(6, 5, 8, norm="layer") for _ in range(2)) if heads else None
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))
        if heads:
            self.logit_scale_proto = nn.Parameter(torch.tensor(1.5))

    def forward(self, images, texts):
        z = self.image(images), self.text(texts)
        out = dict(zip(("image_features", "text_features"), (F.normalize(x, dim=1) for x in z), strict=True))
        out |= {"logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias}
        if self.heads:
            h = [F.normalize(head(x), dim=1) for head, x in zip(self.heads, z, strict=True)]
            out |= {"image_features_projected": h[0], "text_features_projected": h[1]}
            out["logit_scale_proto"] = self.logit_scale_proto.exp()
        return out


def towers(heads, dtype, lit=False):
    torch.manual_seed(0)
    model = Towers(heads).to(dtype)
    if lit:
        model.image.requires_grad_(False)
        if heads:
            model.heads[0].requires_grad_(False)
    return model
