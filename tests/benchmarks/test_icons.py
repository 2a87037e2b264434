"""The icons of the comparison: names, licences, copies and splits, on a small archive; and a run that is judged on them."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.comparison.icon_metrics import COLUMNS, consecutive
from benchmarks.comparison.icon_names import Namer, family
from benchmarks.comparison.icons import LICENCES, draw, icons_of, is_usable, load, splits
from benchmarks.comparison.stats import read_table

ROOT = Path(benchmarks.__file__).parents[1]


def square(colour, size=12):
    return {"body": f'<rect x="2" y="2" width="{size}" height="{size}" fill="{colour}"/>'}


def collection(prefix, icons, licence="MIT", category="UI 24px", **more):
    info = {"name": prefix.title(), "author": {"name": "A. Author"}, "license": {"spdx": licence}, "category": category}
    return {"prefix": prefix, "info": info, "icons": icons, **more}


def archive_of(path, collections):
    with tarfile.open(path, "w:gz") as tar:
        for one in collections:
            data = json.dumps(one).encode()
            member = tarfile.TarInfo(f"package/json/{one['prefix']}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("declared", "icon", "found"),
    [
        ({}, "home-outline", ("home", "outline")),
        ({}, "home-24", ("home", "")),
        ({}, "access-time-24-filled", ("access time", "filled")),
        ({}, "traffic-light", ("traffic light", "")),
        ({"suffixes": {"": "Regular", "light": "Light"}}, "home-light", ("home", "light")),
        ({"suffixes": {"bold-duotone": "Bold Duotone", "bold": "Bold"}}, "home-bold-duotone", ("home", "bold duotone")),
        ({"prefixes": {"baseline": "Baseline"}}, "baseline-home", ("home", "baseline")),
        ({"prefixes": {"baseline": "Baseline"}}, "baseline", ("baseline", "")),
        ({}, "outline", ("outline", "")),
        ({}, "Arrow_Left", ("arrow left", "")),
    ],
)
def test_names_lose_what_they_say_of_style(declared, icon, found):
    assert Namer(declared)(icon) == found


def test_a_family_is_the_words_in_any_order():
    assert family("arrow left") == family("left arrow 2") != family("arrow right")
    assert family("24") != family("25")


def test_icons_of_a_set():
    own = collection(
        "one",
        {
            "home": square("red"),
            "home-outline": square("blue"),
            "home-sharp": square("green"),
            "home-duotone": square("black"),
            "cat": square("red") | {"hidden": True},
            "dog": {"body": '<circle r="2"><animate/></circle>'},
            **{f"star-{word}": square("red") for word in "abcdefghij"},
        },
        aliases={"house": {"parent": "home"}, "turned": {"parent": "home", "rotate": 1}},
        categories={
            "All": ["home", *(f"star-{w}" for w in "abcdefghij")],
            "Stars": [f"star-{w}" for w in "abcdefghij"],
            "Few": ["home"],
        },
    )
    icons = list(icons_of(own))
    home = [icon for icon in icons if icon.concept == family("home")]
    assert [icon.caption for icon in home] == ["home, house"] * 3  # of four drawings, the plainest first
    assert [next(c for c in ("red", "green", "blue", "black") if c in icon.body) for icon in home] == ["red", "green", "black"]
    assert [icon.category for icon in home] == ["All", "", ""]
    assert {icon.category for icon in icons if icon.caption.startswith("star")} == {"Stars"}  # the smaller of the two
    assert not [icon for icon in icons if icon.caption in ("cat", "dog", "turned")]


def test_an_icon_lies_in_the_middle_of_a_square():
    (icon,) = icons_of(collection("one", {"flag": square("red")}, width=32, height=16))
    assert icon.box == "0 -8 32 32"


def test_what_is_left_out():
    def usable(**about):
        one = collection(**{"prefix": "one", "icons": {}, **about})
        return is_usable(one["info"], one["prefix"])

    assert usable()
    assert not usable(licence="GPL-3.0")
    assert not usable(licence="CC-BY-NC-4.0")
    assert not usable(category="Logos")
    assert not usable(prefix="mdi-light")
    assert usable(prefix="mdi")
    assert not [licence for licence in LICENCES if "NC" in licence or "GPL" in licence]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two training sets and one test set: red or blue by category, with a shade for each name."""
    folder = tmp_path_factory.mktemp("icons")

    names = [f"thing-{spelled(i)}-{'ab'[i % 2]}x" for i in range(240)]

    def icons(size, shift):
        colours = [f"rgb({200 * (i % 2)},{(i + shift) % 250},{200 - 200 * (i % 2)})" for i in range(240)]
        return {name: square(colour, size) for name, colour in zip(names, colours, strict=True)}

    kinds = {"Even": names[::2], "Odd": names[1::2]}
    judged = collection("mdi", icons(12, 0) | {"thing-copy": square("rgb(1,2,3)")}, categories=kinds)
    trained = [collection(prefix, icons(size, 40)) for prefix, size in (("one", 10), ("two", 8))]
    trained[0]["icons"]["thing-copied"] = square("rgb(1,2,3)")
    trained[0]["icons"]["blank"] = {"body": ""}
    trained[0]["icons"] |= {"again": square("rgb(9,9,9)"), "again-2": square("rgb(9,9,9)")}
    path = archive_of(folder / "archive.tgz", [judged, *trained, collection("bad", icons(10, 0), licence="GPL-3.0")])
    command = [sys.executable, "-m", "benchmarks.comparison.icons", str(path), str(folder / "icons.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    return folder / "icons.npz", done.stdout


def spelled(number):
    """A word for each number: names that differ in digits alone are one family."""
    return str(number).translate(str.maketrans("0123456789", "qwertyuiop"))


def test_pictures_are_drawn_and_copies_left_out(file):
    path, said = file
    pairs = load(path)
    captions = list(pairs.captions)
    assert "thing copied" not in captions  # drawn as one of the set that is judged on
    assert "blank" not in captions
    assert len([caption for caption in captions if caption.startswith("again")]) == 1
    assert len(pairs) == 240 * 3 + 2
    assert "1 not drawn" in said
    assert pairs.pictures[0].min() < 255 == pairs.pictures[0].max()
    about = path.with_suffix(".csv").read_text().splitlines()
    assert about[0] == "set,name,author,licence,url,judged,pictures"
    assert [line.split(",")[0] for line in about[1:]] == ["mdi", "one", "two"]
    assert about[1] == "mdi,Mdi,A. Author,MIT,,True,241"


def test_parts_share_no_name_that_they_should_not(file):
    pairs = load(file[0])
    rows = splits(pairs)
    names = {part: set(pairs.concepts[index].tolist()) for part, index in rows.items()}
    sets = {part: {pairs.label_names["style"][i] for i in pairs.labels["style"][index]} for part, index in rows.items()}
    assert sets == {
        "train": {"one", "two"},
        "validation": {"one", "two"},
        "test": {"one", "two"},
        "fit": {"mdi"},
        "unseen_validation": {"mdi"},
        "unseen": {"mdi"},
    }
    for parts in (("train", "validation", "test"), ("fit", "unseen_validation", "unseen")):
        assert sum(len(names[part]) for part in parts) == len(set.union(*(names[part] for part in parts)))
    assert sum(len(index) for index in rows.values()) == len(pairs)
    assert len(names["train"]) / 241 == pytest.approx(0.88, abs=0.06)
    assert len(names["fit"]) / 241 == pytest.approx(0.5, abs=0.08)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(SystemExit, match="npm pack"):
        load(tmp_path / "none.npz")
    with pytest.raises(SystemExit, match="npm pack"):
        draw(tmp_path / "none.tgz", 1)


def test_classes_are_numbered_from_0():
    classes, labels = consecutive({"train": torch.tensor([7, 3]), "test": torch.tensor([9, 7])})
    assert classes == [3, 7, 9]
    assert {part: own.tolist() for part, own in labels.items()} == {"train": [1, 0], "test": [2, 1]}


@pytest.mark.slow
def test_arms_train_on_icons_and_are_judged_on_them(file, tmp_path):
    plan, table = tmp_path / "plan.json", tmp_path / "table.csv"
    words = {"method": "episodic", "features": "training", "teacher": "words", "teacher_clusters": "whole", "w_external": 1.0}
    arms = {
        "clip": {},
        "words": {**words, "w_proto": 0.0, "num_prototypes": 4, "external_target_temperature": 0.1},
        "tuned": {"judged_on": "validation", "repeats": "mask", "samples": 200},
    }
    common = {"passes": 2, "batch_size": 64, "side": 16, "head_width": 32, "episode_size": 100, "warmup_passes": 0.5}
    plan.write_text(
        json.dumps({"data": "icons", "common": common, "arms": {name: {"seeds": 1, "settings": s} for name, s in arms.items()}})
    )
    command = [sys.executable, "-m", "benchmarks.comparison", str(plan), str(table), "--data", str(file[0]), "--jobs", "2"]
    subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, cwd=ROOT)
    runs = {arm: seeds[0] for arm, seeds in read_table(table).items()}
    assert set(runs["clip"][-1]) >= set(COLUMNS)
    assert runs["clip"][-1]["test/linear_probe_group"] > 0.9  # a category is a colour
    assert not [name for name in runs["tuned"][-1] if name.startswith(("test", "unseen"))]
    assert [row["pass"] for row in runs["tuned"]] == [1, 2, 4]
    assert runs["words"][-1]["cpu_clustering_s"] > 0 == runs["words"][-1]["cpu_extraction_s"]
