"""The state of a module as one tensor, which is what codebases expect to find in a ``state_dict``."""

import copy
import io
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

# What a state answers without its bytes: an average of weights asks for it in every step.
_WITHOUT_BYTES = frozenset([Tensor.dtype.__get__, Tensor.device.__get__, Tensor.is_floating_point, Tensor.is_complex])  # type: ignore[attr-defined]
_ARITHMETIC = frozenset(["lerp", "mul", "add", "sub", "__mul__", "__rmul__", "__add__", "__radd__"])
_ARITHMETIC_IN_PLACE = frozenset(f"{name}_" for name in ("lerp", "mul", "add", "sub"))
_SAME_STATE = frozenset(["detach", "contiguous", "cpu", "requires_grad_"])


if TYPE_CHECKING or torch.__version__ >= "2.5" or not torch.distributed.is_available():

    class _Checkpointable:
        """What torch.distributed.checkpoint asks: nothing, from torch 2.5 on."""
else:
    from torch.distributed.checkpoint.planner import _Checkpointable


class StateTensor(Tensor, _Checkpointable):
    """A nested state that is a uint8 tensor to whoever takes it for one, and ``state["name"]`` to whoever reads it.

    * safetensors, ``accelerator.save_model`` and tensor operations see its bytes, written when they are first asked for.
    * ``torch.save`` writes the nested state, and so does ``torch.distributed.checkpoint``: as one object of any size, which a
      fresh module can read.
    * A running average of weights leaves it alone (timm's ModelEma and others go over all of ``state_dict()``): a state has no
      average. ``copy_`` takes over another state, whatever its length.
    """

    _state: Mapping[str, Any] | None
    _bytes: Tensor | None

    @staticmethod
    def of(state: Mapping[str, Any] | None, data: Tensor | None = None) -> "StateTensor":
        """A state, or one that is given by its bytes (n,) uint8."""
        self = torch.empty(0, dtype=torch.uint8, device="cpu").as_subclass(StateTensor)
        self._state, self._bytes, self._version_written = state, data, 0
        return self

    @property
    def data_bytes(self) -> Tensor:
        """The state as bytes, (n,) uint8: a plain tensor, which may be written to."""
        if self._bytes is None:
            buffer = io.BytesIO()
            torch.save(OrderedDict(self.nested), buffer)
            self._bytes = torch.from_numpy(np.frombuffer(buffer.getbuffer(), dtype=np.uint8))
            self._version_written = self._bytes._version
        return self._bytes

    @property
    def nested(self) -> Mapping[str, Any]:
        """The state by name."""
        if self._state is None or (self._bytes is not None and self._bytes._version != self._version_written):
            assert self._bytes is not None
            self._state, self._version_written = _read(self._bytes), self._bytes._version
        return self._state

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SAME_STATE or name in _ARITHMETIC_IN_PLACE:
            return args[0]
        if name in _ARITHMETIC:
            return [x for x in args if isinstance(x, StateTensor)][-1]
        if name == "copy_" and isinstance(args[0], StateTensor):
            return args[0]._take_over(args[1])
        given = (args, kwargs or {}) if func in _WITHOUT_BYTES else _with_bytes((args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*given[0], **given[1])
        return StateTensor.of(None, result) if name in ("clone", "to") and result.dtype == torch.uint8 else result

    def _take_over(self, other: Tensor) -> "StateTensor":
        if isinstance(other, StateTensor):
            self._state, self._bytes = other._state, other._bytes
            self._version_written = other._version_written
        else:
            self._state, self._bytes = None, other.detach().clone()
        return self

    def __getitem__(self, key: Any) -> Any:
        return self.nested[key] if isinstance(key, str) else self.data_bytes[key]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StateTensor({', '.join(self.nested)})"

    def __deepcopy__(self, memo: Any) -> "StateTensor":
        return StateTensor.of(copy.deepcopy(self.nested, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (list(self.nested.items()),)  # the one mapping with a constructor that weights_only allows

    def __create_write_items__(self, name: str, _: Any) -> list[Any]:
        """One object, for ``torch.distributed.checkpoint``: a tensor could only be read into one of the same length."""
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

        return [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)]

    # What torch 2.4 calls in its place.
    _create_write_items = __create_write_items__

    def _get_tensor_shard(self, tensor: Tensor, _: Any) -> Tensor:
        return tensor


def pack(state: Mapping[str, Any]) -> StateTensor:
    """A nested state of tensors, numbers and strings as one tensor."""
    return StateTensor.of(state)


def unpack(state: Any) -> dict[str, Any]:
    """The state in such a tensor, or in the bytes that safetensors has read; one that is a mapping is returned as it is."""
    if isinstance(state, StateTensor):
        return dict(state.nested)
    if isinstance(state, Mapping):
        return dict(state)
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        got = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise TypeError(f"_extra_state must be a uint8 tensor or a mapping, got {got}")
    return _read(state)


def _read(data: Tensor) -> dict[str, Any]:
    """The state in these bytes."""
    content = data.detach().cpu().numpy().tobytes()
    try:
        loaded: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"_extra_state must be the bytes of a whole state, got {len(content)} bytes that are not: read the checkpoint as a "
            "whole, and not into tensors of another state"
        ) from error
    return loaded


def _with_bytes(x: Any) -> Any:
    """Arguments of a function with each state in them as its bytes."""
    if isinstance(x, StateTensor):
        return x.data_bytes
    if isinstance(x, (list, tuple)):
        return [_with_bytes(item) for item in x] if isinstance(x, list) else tuple(_with_bytes(item) for item in x)
    return {name: _with_bytes(item) for name, item in x.items()} if isinstance(x, dict) else x
