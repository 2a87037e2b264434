"""Tensors that say they are on CUDA and hold nothing: what a call would do on a GPU, without one.

Mixed devices raise, as does reading a value back, which on a GPU would wait for it. Autograd's backward does not run here.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CAN_PRETEND = torch.version.cuda is not None and torch.__version__ >= "2.10"
DEVICE = torch.device("cuda", 0)
# They make no launch, as prim.device makes none; tests make their inputs by ``empty``.
VIEWS = {
    "empty",
    *("alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "permute", "reshape", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias"),
}


class Operators(TorchDispatchMode):
    """Counts operators by name, also those inside autograd functions; views are left out."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.made_on_cpu = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and name not in VIEWS:
            tensors = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
            is_on_cpu = any(x.device.type == "cpu" for x in tensors)
            (self.made_on_cpu if is_on_cpu else self.counts)[name] += 1
        return out

    @property
    def total(self):
        return sum(self.counts.values())


@contextmanager
def pretended():
    """Within it, tensors can be made on a CUDA device that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def operators(call):
    """The operators of a call, gradients formed as far as the forward forms them."""
    with Operators() as seen:
        call()
    return seen


def rows(count, width, dtype=torch.float32, *, leaf=True):
    return torch.empty(count, width, device=DEVICE, dtype=dtype).requires_grad_(leaf)


def labels(*shape):
    return torch.empty(shape, device=DEVICE, dtype=torch.int64)
