"""A device that is not there: its tensors are computed on the CPU, under autograd, by an accelerator's rules.

Devices must not be mixed, NumPy gets no memory, and what a GPU would wait for is counted. It is torch's device type for other
backends ("privateuseone"), named "pretended": operators that no accelerator has run all the same, each as exact as on a CPU.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "pretended"
# Their results, or the shapes of these, depend on values.
WAITS = {
    *("_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "linalg_eigh", "_linalg_eigh", "masked_select"),
    *("nonzero", "unique_consecutive", "unique_dim"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # whose indices may be on the CPU
RESIZING = ("arange", "eye", "linspace", "randperm", "tril_indices", "triu_indices")  # factories that resize an empty tensor
MOVES = {"_to_copy", "copy_", "_copy_from"}
seen = Counter()  # what a GPU would wait for
ran = Counter()  # operators
_registered = []  # keeps torch's registrations alive


class PretendTensor(torch.Tensor):
    """A tensor on the device, whose values a tensor on the CPU has."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=f"{NAME}:0", **layout)
        self.held = held
        return self

    def __init__(self, held):
        pass

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __repr__(self):
        return f"{self.held.__repr__().removesuffix(')')}, device={NAME!r})"

    def __reduce_ex__(self, protocol):  # saved as tensors of such devices are
        parts = self.held, self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, parts

    def tolist(self):
        seen["tolist"] += 1
        return self.held.tolist()


class _Module:
    """What torch asks of ``torch.pretended``."""

    @staticmethod
    def is_available():
        return True

    is_initialized = is_available

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.float16, torch.bfloat16]


def is_possible():
    """Whether this torch lets Python be a device: a CUDA build then cannot tell which of the two is its accelerator."""
    return (
        torch.version.cuda is None
        and hasattr(torch._C, "_acc")
        and hasattr(torch._C._acc, "register_python_privateuseone_device_guard")
    )


def register():
    """Make the device known to torch, for the rest of the process."""
    if _registered:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Module)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_local_scalar_dense", _local_scalar_dense, "PrivateUse1")
    for name in RESIZING:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            if "out" not in overload.split("_"):
                library.impl(getattr(packet, overload), _factory(getattr(packet, overload)), "PrivateUse1")
    _registered.append(library)


def waits():
    """Counts what a GPU would wait for in here, by operator."""
    return _counting(seen)


def operators():
    """Counts the operators that run in here on the device, by name."""
    return _counting(ran)


@contextmanager
def _counting(counter):
    before, counted = Counter(counter), Counter()
    yield counted
    counted.update(counter - before)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return PretendTensor(torch.empty(size, dtype=dtype, device="cpu"))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _local_scalar_dense(x):  # called where torch leaves Python's dispatch out: torch.tensor of tensors
    seen["_local_scalar_dense"] += 1
    return x.held.item()


def _factory(function):
    def made(*args, **kwargs):
        return PretendTensor(function(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": None}))

    return made


def _copy_from(source, target, non_blocking=False):
    _held(target).copy_(_held(source))
    return target


def _held(x):
    return x.held if isinstance(x, PretendTensor) else x


def _run(function, args, kwargs):
    name = function.overloadpacket.__name__
    flat, structure = tree_flatten((args, kwargs))
    own = [x for x in flat if isinstance(x, PretendTensor)]
    on_cpu = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) and x.dim()]
    if own and on_cpu and name not in MOVES and not (name in INDEXING and isinstance(args[0], PretendTensor)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got some on {NAME}:0 and some on cpu")
    target = kwargs.get("device")
    to_device = bool(own) if target is None else torch.device(target).type == NAME
    ran[name] += 1
    _count(name, args, kwargs, bool(own), to_device)
    held = [_held(x) for x in flat]
    held_args, held_kwargs = tree_unflatten(held, structure)
    if target is not None:
        held_kwargs["device"] = torch.device("cpu")
    held_kwargs.pop("pin_memory", None)
    out = function(*held_args, **held_kwargs)
    if name == "_to_copy" and to_device != bool(own):  # the other device has memory of its own
        out = out.clone() if out is held[0] else out
    given = {id(inner): outer for outer, inner in zip(flat, held, strict=True) if isinstance(inner, torch.Tensor)}

    def marked(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in given:
            if given[id(x)].shape != x.shape:
                raise NotImplementedError(f"{name} resizes a tensor, which cannot be pretended")
            return given[id(x)]
        return PretendTensor(x) if to_device else x

    return tree_map(marked, out)


def _count(name, args, kwargs, from_device, to_device):
    indices = [x for x in args[1] if isinstance(x, torch.Tensor)] if name in INDEXING else []
    if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        seen[name] += 1
    elif any(x.dtype == torch.bool for x in indices):
        seen["a mask as index"] += 1
    elif any(not isinstance(x, PretendTensor) for x in indices):
        seen["an index on the CPU"] += 1
    elif name == "_to_copy":
        seen["a copy"] += from_device != to_device and not kwargs.get("non_blocking")
    elif name == "copy_":
        target, source, *non_blocking = args
        seen["a copy"] += isinstance(target, PretendTensor) != isinstance(source, PretendTensor) and not (non_blocking or kwargs)
