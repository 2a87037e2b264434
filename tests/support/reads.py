"""What a call reads back from tensors, and which collectives it takes part in: seen by torch's modes, with nothing replaced."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import protoclip_losses

PACKAGE = Path(protoclip_losses.__file__).parent
# On an accelerator these wait for it. The first are seen as functions alone: a tensor on the CPU gives its memory away.
FUNCTIONS = {"tolist", "numpy", "__array__"}
OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
}


class Seen(TorchDispatchMode):
    """``reads``: (file, function of the package) of each; ``collectives``: the function of the package of each."""

    def __init__(self):
        super().__init__()
        self.reads, self.collectives = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.collectives.append(caller())
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        if name in OPERATORS or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
            self.reads.append(caller())
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in FUNCTIONS:
            self.seen.reads.append(caller())
        return func(*args, **(kwargs or {}))


def caller():
    """The function of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    return None if frame is None else (Path(frame.f_code.co_filename).stem, frame.f_code.co_name)


@contextmanager
def seen():
    with Seen() as found, _Functions(found):
        yield found
