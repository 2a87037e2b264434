"""The record of a caption cache, ``caps.npy.json``: of which captions it is, and how far."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..clustering.files import companion, write_atomically

RECORD_BYTES = 4096  # more than any record has; a larger file of its name is somebody's captions
REMEDY = "delete it or name another file"


def strings_digest(texts: Sequence[str]) -> str:
    """A hash of strings and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def joined_digest(texts: Sequence[str]) -> str:
    """The hash that 0.6 took: of the strings joined by NUL."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Record:
    """What a cache was made from, and how many of its rows are done; ``width`` is None and ``format`` 0 in one of 0.6."""

    texts: str
    count: int
    done: int
    dtype: str
    width: int | None = None
    format: int = 0

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """The record in a file; None if there is no file, or one that is something else."""
        if not path.is_file() or path.stat().st_size > RECORD_BYTES:
            return None
        try:
            record = cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            return None
        fits = isinstance(record.done, int) and isinstance(record.count, int) and 0 <= record.done <= record.count
        return record if fits and record.format in (0, 1) else None

    def write(self, path: Path) -> None:
        """Replace the record in the file."""
        write_atomically(path, lambda file: file.write(json.dumps(asdict(self)).encode()))


def find_record(path: Path, texts: Sequence[str]) -> Record | None:
    """The record of these captions; None where there is no cache, or none of its rows is done.

    0.6 gave the record of ``caps.npy`` the name ``caps.json``, which other caches and other files can have too.
    """
    name, name_of_0_6 = companion(path, ".json"), path.with_suffix(".json")
    # In the reverse of the order in which they are written: another process may do so now.
    has_rows, old, has_record, own = path.exists(), Record.read(name_of_0_6), name.exists(), Record.read(name)
    if has_record if own is None else own.format == 0 and name != name_of_0_6:
        raise ValueError(f"{name} must be the record of the cache {path}, got another file: name the cache otherwise")
    if not has_rows or (own is not None and own.done == 0):
        return None
    record = own or old
    if record is None or (own is None and record.format > 0):
        raise ValueError(f"cache {path} must have its record {name.name} with it, got the file alone: {REMEDY}")
    if not (is_of_0_6(record, texts) if record.format == 0 else record.texts == strings_digest(texts)):
        raise ValueError(f"cache {path} was made from other texts ({record.count} of them): {REMEDY}")
    return record if record.done else None


def is_of_0_6(record: Record, texts: Sequence[str]) -> bool:
    """Whether 0.6 wrote this record, of these captions. Those that hold NUL have the digest of others that were joined by it."""
    return record.format == 0 and record.texts == joined_digest(texts) and not any("\0" in text for text in texts)
