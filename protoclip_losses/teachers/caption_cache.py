"""Runs a text encoder once over all captions, into a .npy file that a killed run resumes.

With ``caps.npy`` come ``caps.npy.json``, the record of how far it is and of which captions, and ``caps.npy.lock`` while a
process writes. The record says that nothing is done before the file is made, and that rows are done once they are on the disk:
whenever a run is killed, the record promises no row that is not there.
"""

import errno
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from ..clustering.files import companion, naming, write_atomically
from ..distributed import Group, rank, validate_on_all_ranks
from .cache_record import REMEDY, Record, find_record, is_of_0_6, strings_digest
from .files import locked, open_rows, reserve

Encode = Callable[[list[str]], Tensor | np.ndarray[Any, Any]]
SAME_ENCODER = 0.05  # largest distance of two encodings of a caption, relative to their length; bfloat16 gives about 0.01


def call_encoder(encode: Encode, captions: list[str], width: int | None = None) -> "np.ndarray[Any, Any]":
    """Run the encoder and check what it returns: rows (n, width) in float32."""
    with torch.no_grad():
        out: Any = encode(captions)
    wanted = f"encode must return a tensor or an array ({len(captions)}, width), got {type(out).__name__}"
    if isinstance(out, Mapping):
        raise TypeError(f"{wanted} with {list(out)}: return one of its values, pooled to a row for each caption")
    if out is None:
        raise TypeError(wanted)
    try:
        if isinstance(out, (list, tuple)) and out and all(isinstance(row, Tensor) for row in out):
            out = torch.stack(tuple(out))
        rows = out.detach().float().cpu().numpy() if isinstance(out, Tensor) else np.asarray(out, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted} ({error})") from error
    if rows.ndim != 2 or len(rows) != len(captions) or rows.shape[1] == 0:
        raise ValueError(f"encode must return ({len(captions)}, width) for {len(captions)} captions, got shape {rows.shape}")
    if width is not None and rows.shape[1] != width:
        raise ValueError(f"encode must return rows of width {width} as it did before, got width {rows.shape[1]}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(1)).argmax())
        raise ValueError(f"encode must return finite features, got NaN or Inf for the caption {captions[bad]!r}")
    return rows


def open_cache(path: Path, texts: Sequence[str], dtype: str) -> "tuple[Record, np.memmap[Any, Any]] | None":
    """The record and the rows of a cache, each checked against the other and against what is asked for; None if there is none."""
    record = find_record(path, texts)
    if record is None:
        return None
    if record.dtype != dtype:
        raise ValueError(f"cache {path} was begun in {record.dtype}, got dtype={dtype!r}: {REMEDY}")
    try:
        rows = open_rows(path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cache {path} is damaged ({error}): {REMEDY}") from error
    shape = (len(texts), rows.shape[1] if record.width is None else record.width)
    if rows.shape != shape or rows.dtype != np.dtype(dtype) or not rows.flags.c_contiguous:
        raise ValueError(f"cache {path} must hold {shape} {dtype} as its record says, got {rows.shape} {rows.dtype}: {REMEDY}")
    return record, rows


def complete_cache(path: Path, texts: Sequence[str], dtype: str) -> "tuple[Record, np.memmap[Any, Any]]":
    """The record and the rows of a cache that has a row for each caption."""
    found = open_cache(path, texts, dtype)
    if found is None or found[0].done < len(texts):
        raise FileNotFoundError(errno.ENOENT, "no complete cache of these captions", str(path))
    return found


def encode_over_ranks(
    encode: Encode,
    texts: list[str],
    path: Path,
    batch_size: int,
    dtype: str,
    progress: bool | None,
    group: Group | None,
) -> "tuple[Record, np.memmap[Any, Any]]":
    """The first rank fills ``path``; all ranks open it, and raise together where one does not see the same file."""

    def fill() -> None:
        if rank(group) == 0:
            encode_to_file(encode, texts, path, batch_size, dtype, progress)

    validate_on_all_ranks(fill, group)
    # A node that does not see the files, or sees others, raises on all ranks.
    record, rows = validate_on_all_ranks(lambda: complete_cache(path, texts, dtype), group)
    cached = {"rows of the cache": (rows.shape, zlib.crc32(rows[0].tobytes()))}
    validate_on_all_ranks(lambda: None, group, signature=lambda: cached)
    return record, rows


def encode_to_file(encode: Encode, texts: Sequence[str], path: Path, batch_size: int, dtype: str, progress: bool | None) -> None:
    """Fill ``path`` with the encoder's rows of ``texts``, from where an earlier run stopped."""
    check.positive_int("batch_size", batch_size)
    if len(texts) == 0:
        raise ValueError("texts must hold at least one caption, got none")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}")
    found = open_cache(path, texts, dtype)
    if found is not None and found[0].done == len(texts):  # complete: nothing is written, so the folder may be read-only
        _check_encoder(encode, texts, path, found[1])
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        found = open_cache(path, texts, dtype)  # another process may have continued it meanwhile
        record = Record(strings_digest(texts), len(texts), 0, dtype, format=1)
        if found is None:
            companion(path, ".pca.npz").unlink(missing_ok=True)  # of rows that were here before
        else:
            _check_encoder(encode, texts, path, found[1])
            record = replace(record, done=found[0].done, width=found[1].shape[1])
        record.write(companion(path, ".json"))
        old = Record.read(path.with_suffix(".json"))
        if old is not None and is_of_0_6(old, texts):
            path.with_suffix(".json").unlink()  # it would say that rows are done which are written again
        _encode_rest(encode, texts, path, record, batch_size, progress)


def _check_encoder(encode: Encode, texts: Sequence[str], path: Path, rows: "np.ndarray[Any, Any]") -> None:
    """Encode the first caption again: a cache of the same captions may be another encoder's."""
    here, there = call_encoder(encode, [texts[0]])[0].astype(float), rows[0].astype(float)
    if here.shape != there.shape:
        raise ValueError(f"cache {path} holds rows of width {len(there)}, got an encoder of width {len(here)}: {REMEDY}")
    size = max(np.linalg.norm(here), np.linalg.norm(there))
    if (distance := np.linalg.norm(here - there)) > SAME_ENCODER * size:
        raise ValueError(
            f"cache {path} must hold what encode returns, got a row of the first caption that is {distance / size:.0%} of its "
            f"length away: it is another encoder's, or encode is not deterministic (a model in training mode): {REMEDY}"
        )


def _encode_rest(
    encode: Encode, texts: Sequence[str], path: Path, record: Record, batch_size: int, progress: bool | None
) -> None:
    total = len(texts)
    for start in show_progress(range(record.done, total, batch_size), progress, record.done, total, batch_size):
        block = call_encoder(encode, list(texts[start : start + batch_size]), record.width)
        if np.abs(block).max() > np.finfo(record.dtype).max:
            raise ValueError(f"encode returned {np.abs(block).max():.3g}, which overflows {record.dtype}: pass dtype='float32'")
        if record.width is None:
            record = replace(record, width=block.shape[1])
            _make_file(path, (total, block.shape[1]), record.dtype)
        data = block.astype(record.dtype)
        with naming(path), open(path, "r+b") as file:
            file.seek(open_rows(path).offset + start * data[0].nbytes)
            file.write(data.tobytes())
            file.flush()
            os.fsync(file.fileno())
        record = replace(record, done=start + len(block))
        record.write(companion(path, ".json"))


def _make_file(path: Path, shape: tuple[int, int], dtype: str) -> None:
    def write(file: BinaryIO) -> None:
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        reserve(file, file.tell() + shape[0] * shape[1] * np.dtype(dtype).itemsize)

    write_atomically(path, write)


def show_progress(starts: range, show: bool | None, done: int, total: int, batch_size: int) -> Iterator[int]:
    """The starts of batches, with a bar of the captions that are done; None shows it for several if tqdm is installed."""
    if show is False or (show is None and len(starts) == 1):
        yield from starts
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        if show:
            raise ImportError("progress=True needs tqdm: pip install 'protoclip-losses[progress]'") from error
        yield from starts
        return
    if len(starts) == 0:
        return
    with tqdm(desc="teacher", unit=" captions", initial=done, total=total) as bar:
        for start in starts:
            yield start
            bar.update(min(batch_size, total - start))
