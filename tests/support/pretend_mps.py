"""Tensors that say they are on MPS and are computed on the CPU, with MPS's rules: no float64, no mixture of devices.

Which operators MPS has cannot be known here; which dtypes and devices the library uses there is.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
MPS, CPU = torch.device("mps", 0), torch.device("cpu")


class PretendTensor(torch.Tensor):
    """Made by ``x.to("mps")`` and by factories with ``device="mps"`` in a :class:`PretendMPS`."""

    device = MPS

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __deepcopy__(self, memo):
        return self.clone()


class PretendMPS(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _is_mps(x):
    return isinstance(x, (str, torch.device)) and str(x).split(":")[0] == "mps"


def _run(function, args, kwargs):
    name = getattr(function, "__name__", "")
    flat, structure = tree_flatten((args, kwargs))
    on_mps = [x for x in flat if isinstance(x, PretendTensor)]
    on_cpu = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) and x.dim()]
    moves = name in ("to", "copy_", "cpu", "type_as", "__setitem__", "__get__")
    if on_mps and on_cpu and not moves:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got some on mps:0 and some on cpu")
    if on_mps and name == "numpy":
        raise TypeError(
            "can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )
    named = [x for x in flat if _is_mps(x)]
    to_cpu = name == "cpu" or (name == "to" and any(x == CPU or x == "cpu" for x in flat if isinstance(x, (str, torch.device))))
    if name in ("to", "type_as") and len(flat) > 1 and isinstance(flat[1], torch.Tensor):  # x.to(other)
        named, to_cpu = [flat[1]] * isinstance(flat[1], PretendTensor), not isinstance(flat[1], PretendTensor)
    to_mps = (bool(on_mps) or bool(named)) and not to_cpu
    args, kwargs = tree_unflatten([CPU if _is_mps(x) else x for x in flat], structure)
    with torch._C.DisableTorchFunctionSubclass():
        result = function(*args, **kwargs)

    def marked(x):
        if not isinstance(x, torch.Tensor):
            return x
        if to_mps and x.dtype == torch.float64:
            raise TypeError(NO_FLOAT64)
        given = next((y for y in flat if y is x), None)
        if given is not None and isinstance(x, PretendTensor) == to_mps:
            return x
        return x.as_subclass(PretendTensor if to_mps else torch.Tensor)

    with torch._C.DisableTorchFunctionSubclass():
        return tree_map(marked, result)
