"""The state of a module as one tensor, which is what codebases expect to find in a ``state_dict``."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What averages of weights do with every entry of a state_dict; a state has no average.
_AVERAGING = {"copy_", "lerp_", "lerp", "mul", "mul_", "add", "add_", "sub", "sub_", "__mul__", "__rmul__", "__add__", "__radd__"}


class StateTensor(Tensor):
    """A nested state as its bytes, (n,) uint8: safetensors, ``accelerator.save_model`` and ``torch.save`` write it as a tensor.

    A running average of weights (an EMA over ``state_dict()``) leaves it alone: its length changes with the state, and copying
    or averaging bytes would make no state. ``torch.distributed.checkpoint`` writes it whole, as an object of any length.
    ``state["name"]`` reads an entry.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _AVERAGING:
            return next((x for x in args if isinstance(x, StateTensor)), args[0])
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and getattr(func, "__name__", "") in ("detach", "clone", "deepcopy", "to", "cpu"):
            return result.as_subclass(StateTensor)
        return result

    def __getitem__(self, key: Any) -> Any:
        return unpack(self)[key] if isinstance(key, str) else super().__getitem__(key)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __create_write_items__(self, name: str, _: Any) -> list[Any]:
        """One object, for ``torch.distributed.checkpoint``: a tensor could only be read into one of the same length."""
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

        return [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)]


def pack(state: Mapping[str, Any]) -> StateTensor:
    """A nested state of tensors, numbers and strings as one tensor."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return torch.from_numpy(np.frombuffer(bytearray(buffer.getbuffer()), dtype=np.uint8)).as_subclass(StateTensor)


def unpack(state: Any) -> dict[str, Any]:
    """The state in such a tensor; a state that is a mapping, as 0.6 and 0.7.0 saved it, is returned as it is."""
    if isinstance(state, Mapping):
        return dict(state)
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        got = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise TypeError(f"_extra_state must be a uint8 tensor or a mapping, got {got}")
    with torch._C.DisableTorchFunctionSubclass():
        data = state.detach().cpu().numpy().tobytes()
    loaded: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return loaded
