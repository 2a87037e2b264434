"""Real pictures and captions written as shards, a table or a folder, with broken members among them."""

import functools
import io
import json
import tarfile
from pathlib import Path

import torch
from pairs import Pairs, emoji_pairs
from PIL import Image
from torch import Tensor

NUM = 60


def jpeg(pairs: Pairs, i: int, side: int = 80) -> bytes:
    picture = Image.fromarray(pairs.pictures[i].permute(1, 2, 0).numpy()).resize((side, side))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=92)
    return data.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, pairs: Pairs) -> tuple[str, list[str]]:
    """Two shards in img2dataset's layout with a truncated jpeg, an empty caption, a missing txt; the captions that are left."""
    good = []
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * NUM, (shard + 1) * NUM):
                key, data, caption = f"{i:09d}", jpeg(pairs, i), pairs.captions[i]
                if i == 5:
                    data = data[: len(data) // 2]
                elif i == 7:
                    caption = "  \n"
                elif i != NUM + 3:
                    good.append(caption)
                add(tar, f"{key}.jpg", data)
                if i != NUM + 3:
                    add(tar, f"{key}.txt", caption.encode())
                add(tar, f"{key}.json", json.dumps({"caption": caption, "key": key}).encode())
    return str(folder / "{00000..00001}.tar"), good


def write_table(folder: Path, pairs: Pairs, header: bool) -> tuple[str, list[str]]:
    good, lines = [], ["filepath\ttitle"] if header else []
    (folder / "pictures").mkdir()
    for i in range(NUM):
        data, caption, name = jpeg(pairs, i), pairs.captions[i], f"pictures/{i}.jpg"
        if i == 3:
            data = data[:-200]
        elif i == 4:
            caption = ""
        elif i == 5:
            name = "pictures/nowhere.jpg"
        elif i == 6:
            caption = "one\ttoo many"
        else:
            good.append(caption)
        (folder / "pictures" / f"{i}.jpg").write_bytes(data)
        lines.append(f"{name}\t{caption}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.tsv"), good


def write_folder(folder: Path, pairs: Pairs) -> tuple[str, list[str]]:
    good = []
    for i in range(NUM):
        place = folder / f"part{i % 2}"
        place.mkdir(exist_ok=True)
        (place / f"{i:03d}.jpg").write_bytes(b"no picture" if i == 8 else jpeg(pairs, i))
        if i != 9:
            (place / f"{i:03d}.txt").write_text(pairs.captions[i])
        if i not in (8, 9):
            good.append((i % 2, i, pairs.captions[i]))
    return str(folder), [caption for _, _, caption in sorted(good)]


@functools.cache
def emoji_with_groups() -> tuple[Pairs, Tensor]:
    """Every third Twemoji picture with its caption, and the group of each."""
    pairs = emoji_pairs(40, styles=("twemoji",))
    pairs = pairs.subset(torch.arange(0, len(pairs), 3))
    return pairs, pairs.labels["group"]
