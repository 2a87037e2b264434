"""Projection heads for the dual encoders of transformers."""

import inspect
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require
from ...heads import ProjectionHeads, mix_in

require("transformers", "transformers")
from safetensors import safe_open  # noqa: E402

PREFIX = "proto."
WANTED = ("get_image_features", "get_text_features", "logit_scale")


class _Projected:
    """A mixin before a dual encoder: in training, forward returns the arguments of ProtoLoss and builds no logits."""

    _positional: tuple[str, ...]
    _image_inputs: tuple[str, ...]
    _text_inputs: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Names of the inputs, which differ between models: ``forward`` has the signature of the model's own."""
        super().__init_subclass__(**kwargs)
        own: Any = super()
        signature = inspect.signature(own.forward)
        cls._positional = _names(own.forward)[1:]
        cls._text_inputs = _names(own.get_text_features)[1:]
        cls._image_inputs = tuple(name for name in _names(own.get_image_features)[1:] if name not in cls._text_inputs)

        def forward(self: Any, *args: Any, **inputs: Any) -> Any:
            if not self.training:
                inputs.pop("index", None)
                return super().forward(*args, **inputs)  # type: ignore[misc]
            return self.features(**dict(zip(self._positional, args, strict=False)), **inputs)

        forward.__signature__ = signature  # type: ignore[attr-defined]  # Trainer drops the columns that are not named there
        forward.__doc__ = own.forward.__doc__
        cls.forward = forward  # type: ignore[attr-defined]

    def features(self: Any, **inputs: Any) -> dict[str, Any]:
        """The arguments of ProtoLoss, from the model's inputs by name, in training and in eval mode."""
        given = {name: x for name, x in inputs.items() if x is not None}
        image, text = (
            _pooled(encode(**{name: given[name] for name in names if name in given}), type(self).__name__)
            for encode, names in ((self.get_image_features, self._image_inputs), (self.get_text_features, self._text_inputs))
        )
        out = {"image_features": F.normalize(image, dim=-1), "text_features": F.normalize(text, dim=-1)}
        out["logit_scale"] = self.logit_scale.exp()
        if isinstance(getattr(self, "logit_bias", None), Tensor):
            out["logit_bias"] = self.logit_bias
        return {**out, **self.proto(image, text)}


def _names(function: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds)


def _pooled(out: Any, model: str) -> Tensor:
    """z (B, width) of a tower: a tensor, a model's output, or with ``return_dict=False`` a tuple."""
    z: Tensor = out if isinstance(out, Tensor) else out[1] if isinstance(out, tuple) else out.pooler_output
    if z.dim() != 2:
        raise ValueError(f"features of {model} must be one vector for each sample, got shape {tuple(z.shape)}")
    return z


def add_heads(model: Any, dim: int = 128, hidden_dim: int = 2048, norm: str = "batch", in_dim: int | None = None) -> Any:
    """Give a dual encoder :class:`~protoclip_losses.heads.ProjectionHeads` as ``model.proto``.

    A dual encoder has ``get_image_features``, ``get_text_features`` and ``logit_scale``: CLIP, SigLIP, SigLIP 2, ChineseCLIP,
    MetaCLIP 2, AltCLIP, CLIPSeg, ``VisionTextDualEncoderModel`` and others. In training mode its forward then returns the
    arguments of :class:`~protoclip_losses.ProtoLoss`, in eval mode the usual output. The model stays an instance of its class;
    its ``state_dict()`` gains the entries under ``proto``.

    Args:
        model: the model itself. ``torch.compile`` and PEFT come afterwards, PEFT with ``modules_to_save=["proto"]``.
        dim: width of the projected features.
        hidden_dim: hidden width of the heads.
        norm: of the heads, see :class:`~protoclip_losses.heads.ProjectionHead`.
        in_dim: width of the model's features; default what its configuration says.

    Raises:
        TypeError: a model that is no dual encoder, or one that is compiled or wrapped already.
        ValueError: a width that is not in the configuration.
    """
    check_model(model)
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    width = in_dim or getattr(config, "projection_dim", None) or getattr(text, "projection_size", None)
    if width is None:
        raise ValueError(f"in_dim must be given, got None: the configuration of {type(model).__name__} has no projection_dim")
    weight = next(model.parameters())
    model.proto = ProjectionHeads(width, dim, hidden_dim, norm).to(weight.device)
    mix_in(model, _Projected)
    return model


def load_heads(model: Any, folder: str | Path) -> Any:
    """Give a dual encoder the heads that were saved with it, by ``Trainer`` or ``save_pretrained``, in a folder of this machine.

    ``CLIPModel.from_pretrained(folder)`` reads the model and leaves the heads out.

    Raises:
        ValueError: a folder without heads.
        TypeError: as :func:`add_heads`.
    """
    saved = saved_heads(folder)
    if not saved:
        raise ValueError(f"{folder} must hold a model that was saved with heads, got none under {PREFIX!r}")
    hidden_dim, in_dim = saved["text.0.weight"].shape
    dim = [x for name, x in saved.items() if name.startswith("text.") and x.dim() == 2][-1].shape[0]
    add_heads(model, dim, hidden_dim, "batch" if "text.1.running_mean" in saved else "layer", in_dim)
    model.proto.load_state_dict(saved)
    return model


def saved_heads(folder: str | Path) -> dict[str, Tensor] | None:
    """The entries of the heads among the weights in a folder; None if the weights are in another form."""
    files, found = sorted(Path(folder).glob("*.safetensors")), {}
    for file in files:
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if PREFIX in name]  # noqa: SIM118
            found.update({name.rpartition(PREFIX)[2]: weights.get_tensor(name) for name in names})
    return dict(sorted(found.items())) if files else None


def check_model(model: Any) -> None:
    """Raise TypeError unless heads can be added: to a dual encoder, before anything wraps it."""
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model must not be compiled yet, got {name}: add the heads to the model itself, then compile that; for Trainer, "
            "pass the model itself and TrainingArguments(torch_compile=True)"
        )
    if isinstance(getattr(model, "module", None), nn.Module):
        raise TypeError(f"model must not be wrapped yet, got {name}: add the heads to the model in it, then wrap that")
    if hasattr(model, "peft_config"):
        raise TypeError(
            f"model must get its heads before PEFT, got {name}: call add_heads(model), then "
            "get_peft_model(model, LoraConfig(..., modules_to_save=['proto']))"
        )
    if missing := [attribute for attribute in WANTED if not hasattr(model, attribute)]:
        raise TypeError(f"model must be a dual encoder such as CLIPModel, with {', '.join(WANTED)}, got {name} without {missing}")
    if "forward" in vars(model):
        raise TypeError(
            f"model must have the forward of its class, got a {name} whose forward was replaced (mixed precision or hooks of "
            "accelerate): pass accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )


def check_heads(model: Any) -> None:
    """Raise if a model's heads cannot be trained and saved by Trainer: under PEFT they have to be named."""
    if hasattr(model, "_orig_mod"):
        check_model(model)
    if hasattr(model, "peft_config") and not model.proto.logit_scale_proto.requires_grad:
        raise ValueError(
            "modules_to_save must name the heads, or PEFT keeps them frozen and does not save them: "
            "LoraConfig(..., modules_to_save=['proto'])"
        )
