"""Files that a kill or a full disk leaves complete or not at all, and tensors in them: the safetensors format, memory-mapped."""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 2**20


def companion(path: Path, suffix: str) -> Path:
    """``caps.npy`` and ``.json`` make ``caps.npy.json``: the whole name, as ``caps.train`` and ``caps.val`` share a stem."""
    return path.with_name(path.name + suffix)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the file system, such as a full disk, names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make a file that is complete and on the disk, or not there at all under its name."""
    temporary = companion(path, ".tmp")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    with suppress(OSError):  # not every system opens folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def bytes_of(x: Tensor) -> Any:
    """The entries of a tensor as they lie in memory."""
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data if x.numel() else b""


def checksum(*tensors: Tensor, start: int = 0) -> int:
    """A CRC of 32 bits, which differs between tensors of different bits; ``start`` is that of tensors before these."""
    for x in tensors:
        start = zlib.crc32(bytes_of(x), start)
    return start


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, and facts as JSON, as a safetensors file of exactly this name."""
    # The widest entries first: each tensor then begins at a multiple of its entries' size.
    arrays = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, Any] = {"__metadata__": {name: json.dumps(value) for name, value in facts.items()}}
    end = 0
    for name, x in arrays.items():
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in arrays.values():
            file.write(bytes_of(x))

    write_atomically(path, write)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, memory-mapped, and its facts. They may be written to: the file does not change.

    Raises:
        ValueError: a file of another kind, or one that is cut short.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 0 < length <= LARGEST_HEADER else b""
    try:
        header = json.loads(text)
        facts = {name: json.loads(value) for name, value in header.pop("__metadata__", {}).items()}
        found = facts["kind"]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = None
    if found != kind:
        raise ValueError(f"{path} must be a file of {kind}, got {'one of ' + str(found) if found else 'another kind of file'}")
    if facts.get("format") != 1:
        raise ValueError(f"{path} must have format 1, got {facts.get('format')!r}: it needs a newer protoclip-losses")
    if (needed := 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)) > size:
        raise ValueError(f"{path} must have {needed} bytes, got {size}: it is cut short")
    # A private mapping: torch warns of an array that it may not write to.
    content = torch.from_numpy(np.memmap(path, np.uint8, "c"))[8 + length :]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = content[start:end].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, facts
