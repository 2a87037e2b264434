"""How a teacher's files are read, written and locked, so that a kill or a full disk leaves nothing that looks complete."""

import errno
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..clustering.files import companion

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What file systems say that cannot reserve space or lock.
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)


def open_rows(path: str | os.PathLike[str]) -> "np.memmap[Any, Any]":
    """A .npy file of floats (samples, width), memory-mapped and read-only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a damaged one, an array that is not 2-dimensional.
        TypeError: an array of anything but floats.
    """
    name = os.fspath(path)
    wanted = f"{name} must be a .npy file with a 2-dimensional array of floats (samples, width), as numpy.save writes it"
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        with open(path, "rb") as file:
            start = file.read(20)
        if not start:
            got = "an empty file"
        elif start.startswith(np.lib.format.MAGIC_PREFIX):
            got = f"a file that is cut short or of another kind of array ({error})"
        else:
            got = f"a file that begins with {start!r}"
        raise ValueError(f"{wanted}, got {got}") from error
    if not isinstance(rows, np.memmap):
        with rows as archive:
            raise ValueError(f"{wanted}, got an archive (.npz or .pt) with {archive.files[:4]}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must hold a 2-dimensional array (samples, width), got shape {rows.shape}")
    if rows.dtype.kind != "f" or rows.dtype.itemsize > 8:
        raise TypeError(f"{name} must hold floats of 16, 32 or 64 bits, got {rows.dtype}")
    return rows


def reserve(file: BinaryIO, size: int) -> None:
    """Give an open file its size now: a disk that is too small says so before the work and not in the middle of it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    file.truncate(size)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, after waiting for a process that holds it. A lock ends with its process, even a killed one."""
    if fcntl is None:
        yield
        return
    name = companion(path, ".lock")
    while True:
        lock = open(name, "ab")  # noqa: SIM115
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warnings.warn(f"{path} is being written by another process: waiting until it is complete", stacklevel=2)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
            # The process that was waited for has removed the file, and a third may hold a new one of the same name.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), name.stat()):
                    break
        except BaseException:
            lock.close()
            raise
        lock.close()
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        lock.close()
