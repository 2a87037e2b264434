"""The projection heads between the encoders and the prototype losses."""

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _checks as check
from .distributed import active_group

NORMS = ("batch", "layer", "sync")
MAX_LOG_SCALE = math.log(100)


class ProjectionHead(nn.Sequential):
    r"""MLP that maps the encoder's un-normalised output z to the projected h.

    .. math::
        h = W_2\, \mathrm{ReLU}(\mathrm{norm}(W_1 z + b_1)) + b_2

    **Use it when:** prototype terms are to be computed on a projection of the encoder's output, as in the paper.
    **Not when:** features are used as they are: leave the ``..._projected`` arguments of the loss out.
    **Related:** :class:`ProjectionHeads`, both heads and their scale in one module.

    h is not normalised here: pass ``F.normalize(head(z), dim=-1)`` to the loss and to the bank. In the paper the image head
    starts as a copy of the text head: ``image_head.load_state_dict(text_head.state_dict())``.

    Args:
        in_dim: width of z.
        out_dim: width D of h.
        hidden_dim: width of the hidden layers.
        num_layers: hidden layers, each Linear, norm, ReLU; 0 makes the head one Linear.
        norm: ``"batch"`` as in the paper, whose statistics differ from rank to rank and between extraction (eval mode) and
            training, so that the clustered h and the student's h are not quite the same; ``"layer"`` has neither problem;
            ``"sync"`` is BatchNorm over all ranks, which PyTorch has for GPUs only.

    One row has no batch statistics. In training BatchNorm normalises such a batch, the last one of an epoch for example, by its
    running statistics, as in eval mode, and does not update them.

    Example:
        >>> import torch
        >>> ProjectionHead(in_dim=16, out_dim=4, hidden_dim=8, norm="layer")(torch.zeros(3, 16)).shape
        torch.Size([3, 4])

    Source:
        ProtoCLIP section IV-A (Linear to 2048, BatchNorm, ReLU, Linear to 128), https://arxiv.org/abs/2206.10996.
    """

    def __init__(self, in_dim: int, out_dim: int = 128, hidden_dim: int = 2048, num_layers: int = 1, norm: str = "batch") -> None:
        for name, value in (("in_dim", in_dim), ("out_dim", out_dim), ("hidden_dim", hidden_dim)):
            check.positive_int(name, value)
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 0:
            raise ValueError(f"num_layers must be an int of at least 0, got {num_layers!r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        make: Any = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "sync": nn.SyncBatchNorm}[norm]
        layers: list[nn.Module] = []
        width = in_dim
        for _ in range(num_layers):
            layers += [nn.Linear(width, hidden_dim), make(hidden_dim), nn.ReLU()]
            width = hidden_dim
        super().__init__(*layers, nn.Linear(width, out_dim))

    def forward(self, input: Tensor) -> Tensor:
        """h (B, out_dim) of z (B, in_dim)."""
        if input.shape[0] < 2:
            for layer in self:
                input = _by_running_statistics(layer, input) if _is_local_batch_norm(layer) else layer(input)
            return input
        out: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return out


def _is_local_batch_norm(layer: nn.Module) -> bool:
    # A converted model has SyncBatchNorm here: it counts the rows of all ranks, and every rank has to call it.
    if isinstance(layer, nn.SyncBatchNorm):
        return active_group(layer.process_group) is None
    return isinstance(layer, _BatchNorm)


def _by_running_statistics(norm: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)


class ProjectionHeads(nn.Module):
    r"""The paper's heads and ``logit_scale_proto``, to be assigned to an attribute of the model.

    **Use it when:** you add prototype terms to a model: optimizer, DDP and checkpoint see its parameters and no others.
    **Not when:** the modalities need heads of different widths: use two :class:`ProjectionHead`.
    **Related:** :class:`ProtoLoss`, which takes what :meth:`forward` returns.

    Args:
        in_dim: width of the encoders' output z.
        out_dim: width D of the projected features.
        hidden_dim: hidden width of the heads.
        norm: of the heads, see :class:`protoclip_losses.ProjectionHead`.

    Example:
        >>> import torch
        >>> from protoclip_losses.heads import ProjectionHeads
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
        """Clamp the scale to [1, 100], as CLIP does its own: to be called after each step of the optimizer."""
        self.logit_scale_proto.clamp_(0, MAX_LOG_SCALE)


def mix_in(model: nn.Module, mixin: type) -> None:
    """Put the methods of ``mixin`` before those of the model's class, for this model alone.

    The model stays an instance of its class, under the same name. It can be copied, pickled and saved whole like any other.
    """
    base: Any = type(model)
    model.__class__ = _mixed_class(mixin, base)


@functools.cache
def _mixed_class(mixin: type, base: type) -> Any:
    def reduce_ex(self: Any, protocol: Any) -> Any:
        reduced = super(mixed, self).__reduce_ex__(protocol)
        if type(self) is not mixed:  # a class that was made of this one, such as FSDP's
            return reduced
        return (_new_mixed, (mixin, base), *reduced[2:])  # pickle finds a class by its name, and this one has that of the base

    own = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "__reduce_ex__": reduce_ex}
    mixed: Any = type(base.__name__, (mixin, base), own)
    return mixed


def _new_mixed(mixin: type, base: type) -> Any:
    mixed = _mixed_class(mixin, base)
    return mixed.__new__(mixed)
