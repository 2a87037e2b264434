"""Checkpoints that open_clip reads: what belongs to the heads is in an entry of its own, not among those of the model."""

import logging
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import _checks as check

ENTRY, HEADS = "protoclip", "proto."
EMA = "state_dict_ema"  # of open_clip 4.x
Names = Sequence[Sequence[str]]  # of the parameters of each group of an optimizer, in its order


def separate_heads(checkpoint: Mapping[str, Any], names: Names | None = None) -> dict[str, Any]:
    """An open_clip checkpoint in which all that belongs to the heads is under ``"protoclip"``, so that open_clip reads the rest.

    The launcher writes its checkpoints in this form. Use it for those of a loop of your own with :func:`add_heads`, and for the
    launcher's of 0.6 and 0.7.0, where the heads are among the model's entries. :func:`join_heads` is the inverse.

    Args:
        checkpoint: has the model's entries as ``"state_dict"``, and the optimizer's as ``"optimizer"`` if it is to be resumed.
        names: of the parameters in each group of the optimizer, see :func:`parameter_names`. Without them ``"optimizer"`` stays
            what it is, and open_clip's ``--resume`` refuses it.

    Example:
        >>> from protoclip_losses.integrations.open_clip import separate_heads
        >>> import torch
        >>> entries = {"visual.proj": torch.ones(2), "proto.logit_scale_proto": torch.ones(1)}
        >>> saved = separate_heads({"epoch": 2, "state_dict": entries})
        >>> list(saved["state_dict"]), list(saved["protoclip"]["heads"])
        (['visual.proj'], ['logit_scale_proto'])
    """
    own, heads = _split(checkpoint["state_dict"])
    beside: dict[str, Any] = {"format": 1, "heads": heads}
    result = {**checkpoint, "state_dict": own, ENTRY: beside}
    if EMA in checkpoint:
        result[EMA], beside["heads_ema"] = _split(checkpoint[EMA])
    if names is not None:
        result["optimizer"], beside["optimizer"] = _split_optimizer(checkpoint["optimizer"], names)
        beside["parameters"] = [list(group) for group in names]
    return result


def join_heads(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`separate_heads`: the heads are among the entries, where a model with heads has them.

    A checkpoint of 0.6 or 0.7.0, which has them there, and one of open_clip, which has none, come back as they are.

    Example:
        >>> from protoclip_losses.integrations.open_clip import join_heads
        >>> import torch
        >>> beside = {"format": 1, "heads": {"logit_scale_proto": torch.ones(1)}}
        >>> list(join_heads({"state_dict": {"module.visual.proj": torch.ones(2)}, "protoclip": beside})["state_dict"])
        ['module.visual.proj', 'module.proto.logit_scale_proto']
    """
    result = dict(checkpoint)
    beside = result.pop(ENTRY, None)
    if beside is None:
        return result
    check.state_format("the heads", beside)
    check.state_has("heads", beside, ["heads"])
    result["state_dict"] = with_heads(checkpoint["state_dict"], beside["heads"])
    if "heads_ema" in beside:
        result[EMA] = with_heads(checkpoint[EMA], beside["heads_ema"])
    if "parameters" in beside:
        states = {**_by_name(checkpoint["optimizer"], _of_model(beside["parameters"])), **beside["optimizer"]}
        result["optimizer"] = _optimizer_state(checkpoint["optimizer"], states, beside["parameters"])
    return result


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in each group of the optimizer, those of the model inside DDP and ``torch.compile``."""
    names = {id(p): name for name, p in unwrapped(model).named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile`` and DDP, in either order."""
    for name in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, name, model)
    return model


def with_heads(entries: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's entries with those of heads, under the prefix that DDP gives them if the others have it."""
    result = OrderedDict({**entries, **{_prefix(entries) + name: x for name, x in heads.items()}})
    result._metadata = getattr(entries, "_metadata", {})  # type: ignore[attr-defined]
    return result


def heads_among(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads' entries among a model's."""
    return _split(entries)[1]


def without_heads(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's entries without those of heads."""
    return _split(entries)[0]


def load_pretrained_heads(proto: nn.Module, path: str) -> None:
    """``--pretrained``: the heads of a checkpoint file if it has some that fit; otherwise, says the log, they start fresh."""
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True) if zipfile.is_zipfile(path) else {}
    heads = checkpoint[ENTRY]["heads"] if ENTRY in checkpoint else heads_among(checkpoint.get("state_dict", checkpoint))
    wrong = _misfits(heads, proto) if heads else ["it has none"]
    if not wrong:
        proto.load_state_dict(heads)
    logging.info(f"Heads: those of {path}" if not wrong else f"Heads: not those of {path} ({wrong[0]}), they start fresh")


def checkpoint_to_resume(checkpoint: Mapping[str, Any], proto: nn.Module, path: str) -> dict[str, Any]:
    """``--resume``: a checkpoint of any form as a model with heads loads it; heads that it does not have start fresh.

    Raises:
        ValueError: heads of other sizes.
    """
    is_of_a_run = "epoch" in checkpoint  # open_clip's own question; otherwise the file is a model's entries
    result = join_heads(checkpoint if is_of_a_run else {"state_dict": checkpoint})
    heads = heads_among(result["state_dict"])
    if not heads:
        logging.info(f"Heads: {path} has none, they start fresh")
        result["state_dict"] = with_heads(result["state_dict"], proto.state_dict())
    elif wrong := _misfits(heads, proto):
        raise ValueError(
            f"--resume: {path} must have heads of this run's sizes, got others ({wrong[0]}): give the --proto-head- arguments "
            "of that run, or --pretrained FILE in place of --resume FILE for its weights with fresh heads"
        )
    if "optimizer" in result:
        result["optimizer"] = ResumedOptimizer(result["optimizer"], checkpoint.get(ENTRY, {}).get("parameters"))
    return result if is_of_a_run else result["state_dict"]


def _misfits(heads: Mapping[str, Tensor], proto: nn.Module) -> list[str]:
    shapes, own = ({name: tuple(x.shape) for name, x in part.items()} for part in (heads, proto.state_dict()))
    different = [name for name in {**own, **shapes} if shapes.get(name) != own.get(name)]
    return [f"{name} is {shapes.get(name)}, here {own.get(name)}" for name in different]


class ResumedOptimizer(dict[str, Any]):
    """An optimizer's state from a checkpoint, with the names of the parameters it is of; others may be trained now."""

    def __init__(self, state: Mapping[str, Any], names: Names | None) -> None:
        super().__init__(state)
        self.names = names

    def of(self, names: Names) -> dict[str, Any]:
        """The state for an optimizer of these parameters; those that the checkpoint does not have start anew.

        Raises:
            ValueError: a checkpoint without names, of an optimizer of other parameters.
        """
        sizes = [len(group["params"]) for group in self["param_groups"]]
        # 0.6 and 0.7.0 saved no names, and open_clip saves none: the same parameters, with heads or without.
        saved = self.names or next((own for own in (names, _of_model(names)) if [len(group) for group in own] == sizes), None)
        if saved is None:
            raise ValueError(
                f"--resume: the optimizer must be of the {sum(map(len, names))} parameters trained here, got one of "
                f"{sum(sizes)}: give the arguments of that run (--lock-image, --lock-text, --proto-weight), or --pretrained FILE "
                "in place of --resume FILE for its weights alone"
            )
        if len(saved) != len(names):
            return self  # of another --opt: torch says so
        known, trained = ({name for group in groups for name in group} for groups in (saved, names))
        for what, which in (("have none in the checkpoint", trained - known), ("in it are not trained now", known - trained)):
            if which:
                logging.info(f"Optimizer state: {len(which)} parameters {what} ({', '.join(sorted(which)[:3])}, ...)")
        return _optimizer_state(self, _by_name(self, saved), names)


def _prefix(entries: Mapping[str, Tensor]) -> str:
    return ("module." if next(iter(entries), "").startswith("module.") else "") + HEADS


def _split(entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    prefix = _prefix(entries)
    own = OrderedDict((name, x) for name, x in entries.items() if not name.startswith(prefix))
    metadata: Mapping[str, Any] = getattr(entries, "_metadata", {})  # versions of modules, by name
    own._metadata = {name: x for name, x in metadata.items() if not f"{name}.".startswith(prefix)}  # type: ignore[attr-defined]
    return own, {name.removeprefix(prefix): x for name, x in entries.items() if name.startswith(prefix)}


def _by_name(state: Mapping[str, Any], names: Names) -> dict[str, Any]:
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = zip(numbers, (name for group in names for name in group), strict=True)
    return {name: state["state"][number] for number, name in by_number if number in state["state"]}


def _optimizer_state(state: Mapping[str, Any], states: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """``state`` with its groups' settings, of the parameters ``names``, numbered one after the other as torch does."""
    number = {name: i for i, name in enumerate(name for group in names for name in group)}
    groups = [
        {**group, "params": [number[name] for name in own], **({"param_names": list(own)} if "param_names" in group else {})}
        for group, own in zip(state["param_groups"], names, strict=True)
    ]
    return {**state, "state": {number[name]: x for name, x in states.items() if name in number}, "param_groups": groups}


def _split_optimizer(state: Mapping[str, Any], names: Names) -> tuple[dict[str, Any], dict[str, Any]]:
    states = _by_name(state, names)
    return _optimizer_state(state, states, _of_model(names)), {name: x for name, x in states.items() if name.startswith(HEADS)}


def _of_model(names: Names) -> Names:
    return [[name for name in group if not name.startswith(HEADS)] for group in names]
