"""What the prototype terms need on a host's model: both projection heads and their scale."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import ProjectionHead

MAX_LOG_SCALE = math.log(100)


class ProjectionHeads(nn.Module):
    r"""The paper's heads and ``logit_scale_proto``, to be assigned to an attribute of the model.

    A host's optimizer, DDP and checkpoint see the parameters of the model and no others, so that is where these belong.

    Args:
        in_dim: width of the encoders' output z.
        out_dim: width D of the projected features.
        hidden_dim: hidden width of the heads.
        norm: of the heads, see :class:`protoclip_losses.ProjectionHead`.

    Example:
        >>> import torch
        >>> from protoclip_losses.integrations.heads import ProjectionHeads
        >>> heads = ProjectionHeads(in_dim=8, out_dim=4, hidden_dim=16, norm="layer")
        >>> {name: tuple(x.shape) for name, x in heads(torch.randn(3, 8), torch.randn(3, 8)).items()}
        {'image_features_projected': (3, 4), 'text_features_projected': (3, 4), 'logit_scale_proto': (1,)}

    Source:
        ProtoCLIP section IV-A, https://arxiv.org/abs/2206.10996: the image head starts as a copy of the text head.
    """

    def __init__(self, in_dim: int, out_dim: int = 128, hidden_dim: int = 2048, norm: str = "batch") -> None:
        super().__init__()
        self.text = ProjectionHead(in_dim, out_dim, hidden_dim, norm=norm)
        self.image = copy.deepcopy(self.text)
        # (1,) and not (): FSDP2 shards no scalar, and gradient accumulation in open_clip concatenates every output.
        self.logit_scale_proto = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The encoders' outputs z (B, in_dim), not normalised, to the arguments of ``ProtoLoss`` with these names."""
        return {
            "image_features_projected": F.normalize(self.image(image.to(self.logit_scale_proto.dtype)), dim=-1),
            "text_features_projected": F.normalize(self.text(text.to(self.logit_scale_proto.dtype)), dim=-1),
            "logit_scale_proto": self.logit_scale_proto.exp(),
        }

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale at 100 at most and 1 at least, as CLIP's own: to be called after each step of the optimizer."""
        self.logit_scale_proto.clamp_(0, MAX_LOG_SCALE)
