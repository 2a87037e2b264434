"""What makes a model's forward run again as it ran before: the random state, and its buffers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .row_chunks import Chunk, tensors_of


def devices_of(model: Callable[..., Any], chunks: Iterable[Chunk]) -> list[torch.device]:
    """The accelerators on which a model draws random numbers: those of its inputs and parameters."""
    tensors = [x for chunk in chunks for x in tensors_of((chunk.inputs, chunk.keywords))]
    tensors += list(model.parameters()) if isinstance(model, nn.Module) else []
    return list(dict.fromkeys(x.device for x in tensors if x.device.type not in ("cpu", "meta")))


class RandomState:
    """torch's random state as it is now, of the CPU and of these devices."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = {device: _of(device, "get_rng_state")() for device in devices}

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            _of(device, "set_rng_state")(state)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Random numbers in here are those that were drawn from this state; afterwards the present state goes on."""
        present = RandomState(self.devices)
        self._set()
        try:
            yield
        finally:
            present._set()


def _of(device: torch.device, name: str) -> Callable[..., Any]:
    function = getattr(torch.get_device_module(device), name)
    if device.type == "mps":  # it is one device, which its functions do not name
        return function  # type: ignore[no-any-return]
    return lambda *state: function(*state, device)


class Buffers:
    """The buffers of a model as they are now, such as running statistics. A function has none."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self._saved = {name: x.detach().clone() for name, x in _buffers(model)}

    def restore(self, model: Callable[..., Any]) -> None:
        """Give them these values again."""
        with torch.no_grad():
            for name, x in _buffers(model):
                if name in self._saved and self._saved[name].shape == x.shape:
                    x.copy_(self._saved[name])


def _buffers(model: Callable[..., Any]) -> Iterator[tuple[str, Tensor]]:
    """Those that can change: a tensor made in inference mode cannot."""
    if isinstance(model, nn.Module):
        yield from ((name, x) for name, x in model.named_buffers() if not x.is_inference())
