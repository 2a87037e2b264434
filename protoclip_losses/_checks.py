"""Input checks shared by every public call. Each error names the argument, what was wanted and what was given."""

import math
import operator
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ._dtypes import FLOATS, INTEGERS, accumulation_dtype, may_read_values


def shape(x: Tensor) -> str:
    """The shape of a tensor as it is written in messages."""
    return str(tuple(x.shape))


def values_are_checked(like: Tensor, check_values: bool | None, *others: Tensor | None) -> bool:
    """Whether this call reads the *values* of these tensors to check them: by default where it is free."""
    return may_read_values(like, *(x for x in others if x is not None)) if check_values is None else check_values


def matrix(name: str, x: Tensor, *, rows: int | None = None, width: int | None = None, of: str = "") -> None:
    """Check that ``x`` is a floating-point (rows, width) matrix; ``of`` says where the expected size comes from."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions (rows, width), got shape {shape(x)}")
    if rows is not None and x.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows{of}, got shape {shape(x)}")
    if width is not None and x.shape[1] != width:
        raise ValueError(f"{name} must have width {width}{of}, got shape {shape(x)}")


def integers(name: str, x: Tensor, *, length: int | None = None, of: str = "", any_dtype: bool = False) -> None:
    """Check that ``x`` is an int64 vector, or with ``any_dtype`` one of any integer dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in (INTEGERS if any_dtype else (torch.int64,)):
        raise TypeError(f"{name} must be {'of an integer dtype' if any_dtype else 'int64'}, got {x.dtype}")
    if x.dim() != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {shape(x)}")
    if length is not None and x.shape[0] != length:
        raise ValueError(f"{name} must have {length} entries{of}, got {x.shape[0]}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors live on the same device."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device} but {other_name} is on {other.device}; move one of them")


def reduction(value: str) -> None:
    """Check how the losses of rows are put together."""
    if value not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {value!r}")


def at_least(name: str, value: int, least: int) -> int:
    """Check a whole number, of Python or of NumPy; return it as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(value)


def positive_int(name: str, value: int) -> int:
    """Check a count."""
    return at_least(name, value, 1)


def seed(name: str, value: int) -> int:
    """Check a seed; any size will do."""
    return at_least(name, value, 0)


def strings(name: str, texts: Sequence[str]) -> list[str]:
    """Check a sequence of strings; one string alone would be taken for a sequence of characters."""
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"{name} must be a list of strings, got a single {type(texts).__name__}")
    texts = list(texts)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a list of strings, got {type(text).__name__} at position {place}")
    return texts


def finite(name: str, x: Tensor, what: str = "rows") -> None:
    """Raise if ``x`` holds NaN or Inf, with the number of rows that do."""
    # A sum is finite only if every entry is; the entries are looked at one by one only where it is not.
    x = x.detach()
    if math.isfinite((x.sum() if x.dim() else x).item()):
        return
    good = torch.isfinite(x).reshape(x.shape[0], -1).all(1)
    if not bool(good.all()):
        raise ValueError(
            f"{name} must be finite, got NaN or Inf: {int((~good).sum())} of {good.numel()} {what}, "
            f"the first at {int((~good).int().argmax())}"
        )


def scale(name: str, value: Tensor | float, like: Tensor, check_values: bool | None) -> Tensor:
    """Return the exponentiated logit scale as a 0-d tensor in the accumulation dtype of ``like``; gradients flow through."""
    if isinstance(value, torch.nn.Parameter):
        warn_once(f"{name} is a Parameter, so probably the logarithm of the scale: pass {name}.exp()")
    tensor, number = _scalar(name, value, like, check_values, " (the exponentiated scale, not its log)")
    if number is not None and number <= 0:
        warn_once(f"{name} is not positive, so probably the logarithm of the scale: pass {name}.exp()")
    return tensor


def bias(name: str, value: Tensor | float, like: Tensor, check_values: bool | None) -> Tensor:
    """Return the logit bias as a 0-d tensor in the accumulation dtype of ``like``; gradients flow through."""
    if isinstance(value, bool):  # an output_dict, given where the bias belongs
        raise TypeError(f"{name} must be a float or a tensor of shape () or (1,), got bool")
    return _scalar(name, value, like, check_values)[0]


def _scalar(
    name: str, value: Tensor | float, like: Tensor, check_values: bool | None, what: str = ""
) -> tuple[Tensor, float | None]:
    """A number as a 0-d tensor in the accumulation dtype of ``like``; and its value, None where it is not to be read."""
    dtype = accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a float or a tensor of shape () or (1,), got shape {shape(value)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        tensor = (value.reshape(()) if value.dim() else value).to(device=like.device, dtype=dtype)
    elif isinstance(value, (int, float)):
        tensor = torch.full((), float(value), dtype=dtype, device=like.device)
    else:
        raise TypeError(f"{name} must be a float or a tensor of shape () or (1,), got {type(value).__name__}")
    if not values_are_checked(like, check_values, tensor):
        return tensor, None
    if not math.isfinite(number := tensor.item()):
        raise ValueError(f"{name} must be finite{what}, got {number}")
    return tensor, number


def temperature(name: str, value: float) -> float:
    """Check the temperature of soft targets."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def optional_temperature(name: str, value: float | None) -> float | None:
    """A temperature, or None for hard targets: None, 0, or the -1 of the paper's code. Another negative value is an error."""
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value in (0, -1)):
        return None
    if isinstance(value, (int, float)) and value < 0:
        raise ValueError(f"{name} must be positive, or None, 0 or -1 for hard targets, got {value}")
    return temperature(name, value)


def weight(name: str, value: float) -> None:
    """Check the weight of a term."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def state_format(owner: str, state: Mapping[str, Any]) -> int:
    """The format number of a saved state; 0 for a state of 0.6 or earlier, which had none."""
    number = state.get("format", 0)
    if number not in (0, 1):
        raise ValueError(
            f"state_dict of {owner} must have format 1 or earlier, got {number!r}: it needs a newer protoclip-losses"
        )
    return int(number)


def state_has(owner: str, state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError if a saved state lacks one of these entries."""
    for name in names:
        if name not in state:
            raise ValueError(f"state_dict must be that of {owner}, got one without {name!r} (it has {sorted(map(str, state))})")


def state_matches(owner: str, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state was made with other settings than those of the object that is to take it over."""
    state_has(owner, state, own)
    for name, value in own.items():
        if state[name] != value:
            raise ValueError(f"state_dict has {name}={state[name]} but this {owner} has {name}={value}")


SAID: set[str] = set()  # what was said once
PAGE = 'see "Warnings" in docs/dropin.rst'


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called this package, through torch or not."""
    if torch.compiler.is_compiling():  # a warning would break the graph
        return
    depth = 1
    while str(sys._getframe(depth).f_globals.get("__name__")).split(".")[0] in (__package__, "torch"):
        depth += 1
    warnings.warn(message, category, stacklevel=depth + 1)


def warn_once(message: str, subject: str | None = None) -> None:
    """Warn that training goes wrong: of each ``subject`` (the message itself by default) once in this process."""
    subject = message if subject is None else subject
    if not torch.compiler.is_compiling() and subject not in SAID:
        SAID.add(subject)
        warn(f"{message} ({PAGE})")


def warn_renamed(old: str, new: str) -> None:
    """Warn that ``old`` is deprecated, and name its replacement."""
    warn(f"{old} is deprecated and goes after 0.7.x: use {new}", FutureWarning)


def require(module: str, extra: str) -> Any:
    """Import an optional dependency, or say what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        install = f"pip install 'protoclip-losses[{extra}]'"
        raise ImportError(f"this needs {module}, which cannot be imported ({error}): {install}") from error
