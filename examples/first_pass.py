"""Indexes the pairs of a fixed set of files: WebDataset shards, a TSV of path and caption, or a folder.

Every picture is decoded once. Broken samples are dropped, counted by reason and named in the log. The others are numbered
in the order of the source. The index is kept in the run folder and gives training random access to the pairs.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from captions import CAPTION_BYTES, SampleError, clean_caption, read_caption, read_table
from files import changed_files, file_marks, find_files, replacing
from pairs import FilePictures, Pairs, Strings, concept_number, decode, read_bytes
from shards import PICTURES, group_samples, members, picture_and_text
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

log = logging.getLogger("train")
ROWS_PER_PART = 1000
INDEX_FORMAT = 1
WANTED = (
    "a pattern of tar shards ('cc3m/{00000..00331}.tar', with KEY.jpg and KEY.txt inside), a .tsv of lines "
    "'path<TAB>caption' with paths relative to its folder, or a folder of pictures with a KEY.txt for each KEY.jpg"
)


class Member(NamedTuple):
    """One pair of the source; `problem` says why it cannot be used, if so."""

    name: str
    path: str = ""
    offset: int = 0
    size: int = 0
    caption: str = ""
    problem: str = ""
    checksum: int = 0


Part = tuple[str, ...]


class Source(NamedTuple):
    """How to scan a part of the source, its parts, the files that the index depends on, and what was found broken already."""

    scan: Callable[[Part], Iterator[Member]]
    parts: list[Part]
    files: list[str]
    broken: Sequence[Member] = ()


def number_pairs(source: str, cache: Path, side: int, workers: int = 0, resume: bool = False, current: bool = False) -> Pairs:
    """The usable pairs of `source`, from `cache` if the same files were indexed before.

    Files that have changed since are indexed again. With `resume` it is an error if their pairs are not the same as before. With
    `current` another process has just made the index, perhaps on a machine that has its own copies of the files.
    Raises SystemExit if a file of the source does not exist or no pair is usable.
    """
    stamp = json.dumps([INDEX_FORMAT, source])
    before: dict[str, Any] = {}
    if cache.exists():
        with np.load(cache) as kept:
            if str(kept["stamp"]) == stamp:
                before = {name: kept[name] for name in kept.files}
    if before and current:
        return _pairs(before, side)
    found = _open(source)
    marks = file_marks(found.files)
    changed = changed_files(found.files, before.pop("marks").tolist(), marks) if before else ""
    if before and not changed:
        return _pairs(before, side)
    if changed:
        log.warning("%s has changed since it was indexed (%s): indexing it again", source, changed)
    arrays = _index(source, found, workers)
    if resume and not all(np.array_equal(array, before.get(name, array)) for name, array in arrays.items()):
        raise SystemExit(f"--resume must find the pairs of {source} as the run began with them, got others; changed: {changed}")
    with replacing(cache) as partial:
        np.savez(partial, stamp=np.array(stamp), marks=np.array(marks, np.int64), **arrays)
    return _pairs(arrays, side)


def _index(source: str, found: Source, workers: int) -> dict[str, Any]:
    usable: list[Member] = []
    dropped: Counter[str] = Counter()
    # A part (a shard, a thousand files) is one item: workers scan parts in parallel, and the order is that of the source.
    loader = DataLoader(_Scan(found), batch_size=None, num_workers=workers, generator=torch.Generator())
    for part in tqdm(loader, desc="indexing pairs", unit="part"):
        for member in part:
            if member.problem:
                dropped[member.problem] += 1
                log.warning("dropped %s: %s", member.name, member.problem)
            else:
                usable.append(member)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    log.info("%s: %d usable pairs, %d dropped (%s)", source, len(usable), dropped.total(), reasons)
    if not usable:
        raise SystemExit(f"{source} must have usable pairs, got none; dropped: {reasons}; a source is {WANTED}")
    paths = {path: number for number, path in enumerate(dict.fromkeys(member.path for member in usable))}
    captions, names = Strings.of(member.caption for member in usable), Strings.of(paths)
    return {
        "path_bytes": names.data,
        "path_end": names.end,
        "file_number": np.array([paths[member.path] for member in usable]),
        "offset": np.array([member.offset for member in usable]),
        "size": np.array([member.size for member in usable]),
        "checksum": np.array([member.checksum for member in usable]),
        "caption_bytes": captions.data,
        "caption_end": captions.end,
        # The concept of a file is its caption: pairs with equal captions are one concept.
        "concept": np.array([concept_number(member.caption) for member in usable]),
    }


def _pairs(arrays: Mapping[str, Any], side: int) -> Pairs:
    def strings(name: str) -> Strings:
        end = arrays[f"{name}_end"]
        return Strings(arrays[f"{name}_bytes"], np.concatenate([np.zeros(1, np.int64), end[:-1]]), end)

    pictures = FilePictures(strings("path"), arrays["file_number"], arrays["offset"], arrays["size"], side)
    return Pairs(pictures, strings("caption"), torch.from_numpy(arrays["concept"]))


class _Scan(Dataset[Sequence[Member]]):
    """The parts of a source, scanned; the last item is what was found broken before."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.parts) + 1

    def __getitem__(self, number: int) -> Sequence[Member]:
        if number == len(self.source.parts):
            return self.source.broken
        return [_checked(member) for member in self.source.scan(self.source.parts[number])]


def _checked(member: Member) -> Member:
    if member.problem:
        return member
    try:
        data = read_bytes(member.path, member.offset, member.size)
        decode(data, 32)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more on broken files
        return member._replace(problem="picture does not decode", name=f"{member.name} ({error})")
    return member._replace(checksum=zlib.crc32(data))


def _open(source: str) -> Source:
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in (".tsv", ".txt", ".csv"):
        return _open_table(path)
    if ".tar" not in source:
        raise SystemExit(f"--train-data and --val-data must be {WANTED}, got {source!r}")
    from webdataset.shardlists import expand_urls

    shards = [str(shard) for shard in expand_urls(source)]
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise SystemExit(f"{len(missing)} of the {len(shards)} shards of {source} do not exist on this disk: {named}")
    return Source(_scan_shard, [(shard,) for shard in shards], shards)


def _open_folder(path: Path) -> Source:
    pictures, problems = find_files(str(path), PICTURES)
    if not pictures and not problems:
        raise SystemExit(f"{path} must contain pictures ({', '.join(PICTURES)}), got none; a source is {WANTED}")
    texts = [str(Path(picture).with_suffix(".txt")) for picture in pictures]
    broken = [Member(name, problem=problem) for name, problem in problems]
    return Source(_scan_folder, _parts(pictures), pictures + texts, broken)


def _scan_folder(part: Part) -> Iterator[Member]:
    for picture in part:
        text = Path(picture).with_suffix(".txt")
        try:
            caption = _caption_at(text, 0, os.path.getsize(text))
            yield Member(picture, picture, 0, os.path.getsize(picture), caption)
        except FileNotFoundError:
            yield Member(picture, problem="missing .txt")
        except OSError as error:
            yield Member(f"{picture} ({error})", problem="unreadable .txt")
        except SampleError as error:
            yield Member(picture, problem=str(error))


def _open_table(path: Path) -> Source:
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; a source is {WANTED}")
    rows: list[str] = []
    broken: list[Member] = []
    pictures: list[str] = []
    for line, cells in read_table(path):
        name = f"{path}, line {line}"
        try:
            if cells is None:
                raise SampleError("quotes do not close")
            if len(cells) != 2:
                raise SampleError("not two columns")
            picture = str(path.parent / cells[0].strip())
            # One string and not three, as there are millions; NUL is in none of them.
            rows.append(f"{name}\0{picture}\0{clean_caption(cells[1])}")
            pictures.append(picture)
        except SampleError as error:
            broken.append(Member(name, problem=str(error)))
    return Source(_scan_table, _parts(rows), [str(path), *dict.fromkeys(pictures)], broken)


def _scan_table(part: Part) -> Iterator[Member]:
    for row in part:
        name, picture, caption = row.split("\0")
        if os.path.isfile(picture):
            yield Member(f"{name} ({picture})", picture, 0, os.path.getsize(picture), caption)
        else:
            yield Member(f"{name} ({picture})", problem="missing picture file")


def _scan_shard(part: Part) -> Iterator[Member]:
    shard = part[0]
    broken: list[Member] = []

    def files() -> Iterator[tuple[str, tuple[int, int]]]:
        # The offset of each member and not its bytes: that gives random access afterwards.
        try:
            with tarfile.open(shard, "r:") as tar:
                for info in members(tar):
                    yield info.name, (info.offset_data, info.size)
        except tarfile.TarError as error:
            broken.append(Member(f"{shard} ({error})", problem="shard is cut short or no plain tar"))
        except OSError as error:
            broken.append(Member(f"{shard} ({error})", problem="shard is unreadable"))

    for sample in group_samples(files()):
        name = f"{shard}: {sample['__key__']}"
        try:
            (offset, size), text = picture_and_text(sample)
            yield Member(name, shard, offset, size, _caption_at(shard, *text))
        except SampleError as error:
            yield Member(name, problem=str(error))
    yield from broken


def _caption_at(path: str | Path, offset: int, size: int) -> str:
    return read_caption(read_bytes(path, offset, size) if size <= CAPTION_BYTES else None)


def _parts(rows: list[str]) -> list[Part]:
    return [tuple(rows[i : i + ROWS_PER_PART]) for i in range(0, len(rows), ROWS_PER_PART)]
