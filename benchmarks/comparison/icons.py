"""The second data set of the comparison: icons of 200 sets by as many designers, with the names that the designers gave them.

    mkdir -p runs/icons
    npm pack --pack-destination runs/icons @iconify/json@2.2.535
    python -m benchmarks.comparison.icons runs/icons/iconify-json-2.2.535.tgz runs/icons.npz

One npm archive holds all sets. Beside the file of the pictures a table is written, with author, licence and number of pictures of
each set. Every picture is a drawing, mostly in one colour, and its caption a name of one to four words: not a photograph and no
sentence. Sets with a licence that forbids commercial use, or of the GPL, are left out, and so are logos of brands.
"""

import argparse
import csv
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pairs import Pairs
from torch import Tensor
from tqdm import tqdm

from .emoji_styles import box_of, rendered
from .icon_names import Namer, family
from .pairs_file import read_pairs

SIDE = 32
LICENCES = (
    "MIT",
    "Apache-2.0",
    "BSD-3-Clause",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC0-1.0",
    "ISC",
    "MPL-2.0",
    "OFL-1.1",
    "Unlicense",
)
# Sets that no encoder is trained on, and the sets that share drawings or concepts with one of them, which are left out.
UNSEEN = ("twemoji", "openmoji", "mdi", "icon-park", "fa7-solid", "healthicons", "iconoir", "la")
RELATED = (
    *("*emoji*", "noto*"),  # other drawings of the concepts of twemoji and openmoji
    *("mdi-*", "material-symbols*", "ic", "zmdi", "memory"),  # mdi began as Google's Material icons
    *("icon-park-*", "fa", "fa-*", "fa6-*", "fa7-*"),
)
# A hash maps each name to [0, 1): below 0.88 it is trained on, below 0.92 settings are chosen on it.
SHARES = {"train": (0.0, 0.88), "validation": (0.88, 0.92), "test": (0.92, 1.0)}
# Likewise in the sets that are not trained on, whatever the name: probes are fitted, chosen and judged on other names.
UNSEEN_SHARES = {"fit": (0.0, 0.5), "unseen_validation": (0.5, 0.7), "unseen": (0.7, 1.0)}
FEWEST = 10  # icons of a category; smaller ones are no class
DRAWINGS = 3  # of a name in a set, in different styles


class Icon(NamedTuple):
    """A picture to be drawn: view box and body of the SVG, caption, number of the name, and the set's category of it or ""."""

    box: str
    body: str
    caption: str
    concept: int
    category: str


def icons_of(collection: dict[str, Any]) -> Iterator[Icon]:
    """The icons of a set: of each name up to :data:`DRAWINGS`, in different styles, the plainest first."""
    namer = Namer(collection)
    by_name: dict[str, dict[str, str]] = {}  # name -> style -> icon
    for icon, body in collection["icons"].items():
        name, style = namer(icon)
        if name and not body.get("hidden") and "<animate" not in body["body"]:  # the first frame of a movement shows little
            by_name.setdefault(name, {}).setdefault(style, icon)
    aliases: dict[str, list[str]] = {}
    for alias, own in collection.get("aliases", {}).items():
        if own.keys() == {"parent"}:  # others turn or mirror the drawing
            aliases.setdefault(namer(own["parent"])[0], []).append(namer(alias)[0])
    categories = _category_of_each(collection)
    for name, styles in by_name.items():
        names = [name, *(other for other in aliases.get(name, []) if other)]
        caption = ", ".join(dict.fromkeys(names))
        for style in sorted(styles, key=lambda style: (len(style), style))[:DRAWINGS]:
            icon = styles[style]
            box, body = _square(collection, collection["icons"][icon]), collection["icons"][icon]["body"]
            yield Icon(box, body, caption, family(name), categories.get(icon, ""))


def _category_of_each(collection: dict[str, Any]) -> dict[str, str]:
    """The smallest of an icon's categories, which says most; categories of fewer than :data:`FEWEST` icons are none."""
    large = {name: icons for name, icons in collection.get("categories", {}).items() if len(icons) >= FEWEST}
    found: dict[str, str] = {}
    for name in sorted(large, key=lambda name: (-len(large[name]), name)):
        found |= dict.fromkeys(large[name], name)
    return found


def _square(collection: dict[str, Any], icon: dict[str, Any]) -> str:
    """The view box that has the icon in the middle of a square."""
    left, top, width, height = box_of(collection, icon)
    side = max(width, height)
    return f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"


def drawn(box: str, body: str) -> NDArray[np.uint8] | None:
    """The picture (3, SIDE, SIDE), on white, or None where it cannot be drawn or nothing is on it."""
    try:
        picture: NDArray[np.uint8] = rendered(box, body, SIDE).numpy()
    except (OSError, ValueError):
        return None
    return picture if picture.min() < picture.max() else None


def is_usable(info: dict[str, Any], prefix: str) -> bool:
    """Whether a set is trained on or judged on."""
    related = prefix not in UNSEEN and any(fnmatch(prefix, pattern) for pattern in RELATED)
    return info["license"].get("spdx") in LICENCES and info.get("category") != "Logos" and not related


def draw(archive: Path, jobs: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The arrays that :func:`load` reads, and a row about each set."""
    icons: list[Icon] = []
    sets: list[int] = []
    about: list[dict[str, Any]] = []
    for collection in _collections(archive):
        info, prefix = collection["info"], collection["prefix"]
        if not is_usable(info, prefix):
            continue
        own = list(icons_of(collection))
        icons += own
        sets += [len(about)] * len(own)
        names = {"set": prefix, "name": info["name"], "author": info["author"]["name"], "licence": info["license"]["spdx"]}
        about.append({**names, "url": info["author"].get("url", ""), "judged": prefix in UNSEEN})
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(drawn, [icon.box for icon in icons], [icon.body for icon in icons], chunksize=500)
        pictures = list(tqdm(found, total=len(icons), desc="drawing", unit="icon"))
    is_unseen = torch.tensor([about[number]["judged"] for number in sets])
    kept = _without_copies(pictures, [icon.concept for icon in icons], is_unseen)
    print(f"{len(icons):,} icons, {sum(x is None for x in pictures):,} not drawn, {len(kept):,} left without copies")
    categories = [f"{about[sets[row]]['set']}/{icons[row].category}" if icons[row].category else "" for row in kept]
    classes = {name: number for number, name in enumerate(sorted({*categories} - {""}))}
    for number, row in Counter(sets[row] for row in kept).items():
        about[number]["pictures"] = row
    return {
        "pictures": np.stack([picture for row in kept if (picture := pictures[row]) is not None]),
        "captions": np.array([icons[row].caption for row in kept]),
        "concepts": np.array([icons[row].concept for row in kept]),
        "style": np.array([sets[row] for row in kept]),
        "style_names": np.array([row["set"] for row in about]),
        "group": np.array([classes.get(name, -1) for name in categories]),
        "group_names": np.array(list(classes)),
    }, about


def _collections(archive: Path) -> Iterator[dict[str, Any]]:
    """Every set of the archive, by name."""
    if not archive.exists():
        raise SystemExit(f"{archive} does not exist. {__doc__}")
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar if fnmatch(member.name, "package/json/*.json")}
        for name in sorted(members):
            file = tar.extractfile(members[name])
            assert file is not None
            yield json.load(file)


def _without_copies(pictures: list[NDArray[np.uint8] | None], concepts: list[int], is_unseen: Tensor) -> list[int]:
    """Rows that were drawn, but not twice for one name, and not for training what is also in a set that is judged on."""
    data = [None if picture is None else picture.tobytes() for picture in pictures]
    judged = {data[row] for row in is_unseen.nonzero()[:, 0].tolist()}
    kept: dict[tuple[bytes, int, bool], int] = {}
    for row, (picture, concept, unseen) in enumerate(zip(data, concepts, is_unseen.tolist(), strict=True)):
        if picture is not None and (unseen or picture not in judged):
            kept.setdefault((picture, concept, unseen), row)
    return list(kept.values())


def load(path: Path) -> Pairs:
    """The pairs in the file that this script wrote; a missing file raises SystemExit with the commands that make it."""
    return read_pairs(path, ("group", "style"), made_by=__doc__)


def splits(pairs: Pairs) -> dict[str, Tensor]:
    """Rows of each part, fixed by hashes of the name and by the set, independent of any seed.

    ``train``, ``validation`` and ``test`` have the sets that are trained on and no name in common; ``fit``,
    ``unseen_validation`` and ``unseen`` have the other sets.
    """
    is_unseen = torch.tensor([name in UNSEEN for name in pairs.label_names["style"]])[pairs.labels["style"]]
    parts: dict[str, Tensor] = {}
    for shares, shift, where in ((SHARES, 0, ~is_unseen), (UNSEEN_SHARES, 20, is_unseen)):
        position = (pairs.concepts >> shift & 0xFFFFF).double() / 2**20
        parts |= {name: (where & (low <= position) & (position < high)).nonzero()[:, 0] for name, (low, high) in shares.items()}
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="the npm archive")
    parser.add_argument("file", type=Path, help="NPZ file to write, and next to it a CSV file with the licence of each set")
    parser.add_argument("--jobs", type=int, default=2, help="processes that draw")
    args = parser.parse_args()
    arrays, about = draw(args.archive, args.jobs)
    np.savez(args.file, **arrays)
    with args.file.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("set", "name", "author", "licence", "url", "judged", "pictures"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(about)
    pairs = load(args.file)
    print(*(f"{name} {len(rows):,}" for name, rows in splits(pairs).items()), sep=", ")
    train = pairs.subset(splits(pairs)["train"])
    print(f"train: {len(set(train.concepts.tolist())):,} names, {len(set(train.captions)):,} different captions")


if __name__ == "__main__":
    main()
