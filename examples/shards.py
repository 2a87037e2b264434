"""The samples of a tar shard, the same for the first pass over fixed files and for a stream."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, TypeVar

from captions import SampleError

PICTURES = ("jpg", "jpeg", "png", "webp")
T = TypeVar("T")


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a shard but for WebDataset's metadata, without keeping those that were seen."""
    for info in tar:
        if info.isreg() and not re.match(r"__[^/]*__($|/)", info.name):
            yield info
        tar.members = []  # type: ignore[attr-defined]


def group_samples(files: Iterable[tuple[str, T]]) -> Iterator[dict[str, Any]]:
    """Samples as mappings from suffix to value, with `__key__`; `__problem__` in one that cannot be used.

    `files` are (name, value) in the order of the shard. As in WebDataset the members of a sample follow each other, and the key
    ends at the first dot of the file name. But a picture and a text whose names differ only behind the last dot are a sample
    too: `22.05.jpg` and `22.05.txt`.
    """
    based = ((found[0], name, value) for name, value in files if (found := re.match(r"(?:.*/|)[^.]+(?=[.][^/]*$)", name)))
    for key, group in groupby(based, key=lambda member: member[0]):
        yield from _samples(key, ((name, value) for _, name, value in group))


def picture_and_text(sample: dict[str, Any]) -> tuple[Any, Any]:
    """The values of the picture and of the text of a sample; SampleError if it lacks one."""
    if "__problem__" in sample:
        raise SampleError(sample["__problem__"])
    picture = next((suffix for suffix in PICTURES if suffix in sample), None)
    if picture is None:
        raise SampleError("missing picture")
    if "txt" not in sample:
        raise SampleError("missing .txt")
    return sample[picture], sample["txt"]


def _samples(key: str, files: Iterator[tuple[str, T]]) -> Iterator[dict[str, Any]]:
    """The samples among members of one key in WebDataset's sense: that of the key, and those with further dots in their names."""
    plain: dict[str, Any] = {}
    dotted: dict[str, Any] = {}
    incomplete: list[dict[str, Any]] = []
    found_pairs = False
    for name, value in files:
        stem, _, suffix = name.rpartition(".")
        suffix = suffix.lower()
        if suffix != "txt" and suffix not in PICTURES:
            continue
        if stem != key and dotted and dotted["__key__"] != stem:
            if _is_pair(dotted):
                found_pairs = True
                yield dotted
            else:  # without its bytes: all samples of a shard may have a key that begins alike
                incomplete.append({**dict.fromkeys(dotted), "__key__": dotted["__key__"]})
            dotted = {}
        sample = plain if stem == key else dotted
        sample.setdefault("__key__", stem)
        if suffix in sample:
            yield {"__key__": stem, "__problem__": "two members of one name"}
        else:
            sample[suffix] = value
    if _is_pair(dotted):
        found_pairs = True
        yield dotted
    elif dotted:
        incomplete.append(dotted)
    if plain:  # 000.seg.png is a further member of the sample 000
        yield plain
    elif incomplete:
        yield from incomplete
    elif not found_pairs:
        yield {"__key__": key}


def _is_pair(sample: dict[str, Any]) -> bool:
    return "txt" in sample and any(suffix in sample for suffix in PICTURES)
