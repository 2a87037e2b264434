"""Runs a text encoder once over all captions, into a .npy file that a killed run resumes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check

Encode = Callable[[list[str]], "Tensor | np.ndarray[Any, Any]"]


def call_encoder(encode: Encode, captions: list[str]) -> "np.ndarray[Any, Any]":
    """Run the encoder and check what it returns."""
    with torch.no_grad():
        out = encode(captions)
    rows = out.detach().float().cpu().numpy() if isinstance(out, Tensor) else np.asarray(out, dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(captions):
        raise ValueError(f"encode must return ({len(captions)}, width) for {len(captions)} captions, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(1)).argmax())
        raise ValueError(f"encode must return finite features, got NaN or Inf for the caption {captions[bad]!r}")
    return rows


def encode_to_file(encode: Encode, texts: Sequence[str], path: Path, batch_size: int, dtype: str, progress: bool | None) -> None:
    """Fill ``path`` with the encoder's rows of ``texts``, from where an earlier run stopped."""
    check.positive_int("batch_size", batch_size)
    if len(texts) == 0:
        raise ValueError("texts must hold at least one caption, got none")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}")
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    record = path.with_suffix(".json")
    done = 0
    if record.exists() and path.exists():
        state = json.loads(record.read_text())
        if state["texts"] != digest:
            raise ValueError(f"cache {path} was made from other texts ({state['count']} of them): delete it or name another file")
        done = int(state["done"])
        if 0 < done < len(texts) and state["dtype"] != dtype:
            raise ValueError(f"cache {path} was begun in {state['dtype']}, got dtype={dtype!r}: delete it or name another file")
    if done == len(texts):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.lib.format.open_memmap(path, mode="r+") if done else None
    for start in _progress(range(done, len(texts), batch_size), progress, done, len(texts), batch_size):
        block = call_encoder(encode, list(texts[start : start + batch_size]))
        if rows is None:
            rows = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(len(texts), block.shape[1]))
        if np.abs(block).max() > np.finfo(dtype).max:
            raise ValueError(f"encode returned {np.abs(block).max():.3g}, which overflows {dtype}: pass dtype='float32'")
        rows[start : start + len(block)] = block
        rows.flush()
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps({"texts": digest, "count": len(texts), "done": start + len(block), "dtype": dtype}))
        temporary.replace(record)


def _progress(starts: range, show: bool | None, done: int, total: int, batch_size: int) -> Iterator[int]:
    if show is False:
        yield from starts
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        if show:
            raise ImportError("progress=True needs tqdm: pip install 'protoclip-losses[progress]'") from error
        yield from starts
        return
    with tqdm(desc="teacher", unit=" captions", initial=done, total=total) as bar:
        for start in starts:
            yield start
            bar.update(min(batch_size, total - start))
