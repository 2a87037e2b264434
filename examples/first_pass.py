"""Indexes the pairs of a fixed set of files: WebDataset shards, a TSV of path and caption, or a folder.

Every picture is decoded once. Broken samples are dropped, counted by reason and named in the log. The others are numbered
in the order of the source. The index is kept in the run folder and gives training random access to the pairs.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pairs import FilePictures, Pairs, Strings, concept_number, decode, read_bytes
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

log = logging.getLogger("train")
PICTURES = ("jpg", "jpeg", "png", "webp")
LINES_PER_PART = 1000
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


Part = tuple[str, ...]


def number_pairs(source: str, cache: Path, side: int, workers: int = 0) -> Pairs:
    """The usable pairs of `source`, from `cache` if the same files were indexed before.

    Raises SystemExit if a file of the source does not exist or no pair is usable.
    """
    scan, parts = _open(source)
    stamp = json.dumps([source, concept_number(repr([(part, os.path.getsize(part[0])) for part in parts]))])
    if cache.exists():
        with np.load(cache) as kept:
            if str(kept["stamp"]) == stamp:
                return _pairs(kept, side)
    members: list[Member] = []
    dropped: Counter[str] = Counter()
    # A part (a shard, a thousand files) is one item: workers scan parts in parallel, and the order is that of the source.
    loader = DataLoader(_Scan(scan, parts), batch_size=None, num_workers=workers, generator=torch.Generator())
    for found in tqdm(loader, desc="indexing pairs", unit="part"):
        for member in found:
            if member.problem:
                dropped[member.problem] += 1
                log.warning("dropped %s: %s", member.name, member.problem)
            else:
                members.append(member)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    log.info("%s: %d usable pairs, %d dropped (%s)", source, len(members), dropped.total(), reasons)
    if not members:
        raise SystemExit(f"{source} must have usable pairs, got none; dropped: {reasons}; a source is {WANTED}")
    paths = {path: number for number, path in enumerate(dict.fromkeys(member.path for member in members))}
    captions, names = Strings.of(member.caption for member in members), Strings.of(paths)
    arrays = {
        "stamp": np.array(stamp),
        "path_bytes": names.data,
        "path_end": names.end,
        "file_number": np.array([paths[member.path] for member in members]),
        "offset": np.array([member.offset for member in members]),
        "size": np.array([member.size for member in members]),
        "caption_bytes": captions.data,
        "caption_end": captions.end,
        # The concept of a file is its caption: pairs with equal captions are one concept.
        "concept": np.array([concept_number(member.caption) for member in members]),
    }
    partial = cache.with_suffix(".partial.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    partial.replace(cache)
    return _pairs(arrays, side)


def _pairs(arrays: Mapping[str, Any], side: int) -> Pairs:
    def strings(name: str) -> Strings:
        end = arrays[f"{name}_end"]
        return Strings(arrays[f"{name}_bytes"], np.concatenate([np.zeros(1, np.int64), end[:-1]]), end)

    pictures = FilePictures(strings("path"), arrays["file_number"], arrays["offset"], arrays["size"], side)
    return Pairs(pictures, strings("caption"), torch.from_numpy(arrays["concept"]))


class _Scan(Dataset[list[Member]]):
    def __init__(self, scan: Callable[[Part], Iterator[Member]], parts: list[Part]) -> None:
        self.scan, self.parts = scan, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> list[Member]:
        return [_checked(member) for member in self.scan(self.parts[number])]


def _checked(member: Member) -> Member:
    if member.problem:
        return member
    if not member.caption.strip():
        return member._replace(problem="empty caption")
    try:
        decode(read_bytes(member.path, member.offset, member.size), 32)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more on broken files
        return member._replace(problem="picture does not decode", name=f"{member.name} ({error})")
    return member._replace(caption=" ".join(member.caption.split()))


def _open(source: str) -> tuple[Callable[[Part], Iterator[Member]], list[Part]]:
    """How to scan a part of the source, and the parts: tuples of strings, the first of which is a file on disk."""
    path = Path(source)
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.suffix[1:].lower() in PICTURES)
        if not files:
            raise SystemExit(f"{source} must contain pictures ({', '.join(PICTURES)}), got none; a source is {WANTED}")
        return _scan_folder, [tuple(files[i : i + LINES_PER_PART]) for i in range(0, len(files), LINES_PER_PART)]
    if path.suffix in (".tsv", ".txt", ".csv"):
        if not path.is_file():
            raise SystemExit(f"{source} does not exist; a source is {WANTED}")
        lines = path.read_text(encoding="utf-8").splitlines()
        numbered = [f"{number}\t{line}" for number, line in enumerate(lines, 1) if line.strip()]
        if numbered and numbered[0].split("\t")[1].strip().lower() in ("filepath", "path", "image", "file"):
            numbered = numbered[1:]
        chunks = [numbered[i : i + LINES_PER_PART] for i in range(0, len(numbered), LINES_PER_PART)]
        return _scan_table, [(str(path), *chunk) for chunk in chunks]
    if ".tar" not in source:
        raise SystemExit(f"--train-data and --val-data must be {WANTED}, got {source!r}")
    from webdataset.shardlists import expand_urls

    shards = [str(shard) for shard in expand_urls(source)]
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise SystemExit(f"{len(missing)} of the {len(shards)} shards of {source} do not exist on this disk: {named}")
    return _scan_shard, [(shard,) for shard in shards]


def _scan_folder(part: Part) -> Iterator[Member]:
    for picture in part:
        text = Path(picture).with_suffix(".txt")
        if text.is_file():
            yield Member(picture, picture, 0, os.path.getsize(picture), text.read_text(encoding="utf-8", errors="replace"))
        else:
            yield Member(picture, problem="missing .txt")


def _scan_table(part: Part) -> Iterator[Member]:
    table = Path(part[0])
    for line in part[1:]:
        number, *cells = line.split("\t")
        name = f"{table}, line {number}"
        if len(cells) != 2:
            yield Member(name, problem="not two columns")
            continue
        picture = str(table.parent / cells[0].strip())
        if os.path.isfile(picture):
            yield Member(f"{name} ({picture})", picture, 0, os.path.getsize(picture), cells[1])
        else:
            yield Member(f"{name} ({picture})", problem="missing picture file")


def _scan_shard(part: Part) -> Iterator[Member]:
    from webdataset.tariterators import group_by_keys

    shard = part[0]
    broken: list[Member] = []

    def files() -> Iterator[dict[str, Any]]:
        # The offset of each member and not its bytes: that gives random access afterwards.
        try:
            with tarfile.open(shard, "r:") as tar:
                for info in tar:
                    if info.isreg() and not info.name.startswith("__"):
                        yield {"fname": info.name, "data": (info.offset_data, info.size), "__url__": shard}
        except tarfile.TarError as error:
            broken.append(Member(f"{shard} ({error})", problem="shard is cut short or no plain tar"))

    def skip(error: Exception) -> bool:
        broken.append(Member(f"{shard} ({error})", problem="member does not fit its key"))
        return True

    for sample in group_by_keys(files(), handler=skip):
        name = f"{shard}: {sample['__key__']}"
        picture = next((sample[suffix] for suffix in PICTURES if suffix in sample), None)
        if picture is None:
            yield Member(name, problem="missing picture")
        elif "txt" not in sample:
            yield Member(name, problem="missing .txt")
        else:
            caption = read_bytes(shard, *sample["txt"]).decode("utf-8", errors="replace")
            offset, size = picture
            yield Member(name, shard, offset, size, caption)
    yield from broken
