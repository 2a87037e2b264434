"""The example's data: the embedded emoji, and files with broken members among them."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from augment import Inputs
from encoders import WordHash
from first_pass import number_pairs
from pair_files import NUM, write_folder, write_shards, write_table
from pairs import Pairs, Strings, concept_number, decode, emoji_pairs, hold_out, load_batches
from PIL import Image


@pytest.fixture(scope="module")
def emoji() -> Pairs:
    return emoji_pairs(40, styles=("twemoji",))


FORMS = {
    "shards": (write_shards, {"picture does not decode": "000000005", "empty caption": "000000007", "missing .txt": "000000063"}),
    "table": (
        lambda folder, pairs: write_table(folder, pairs, header=False),
        {
            "picture does not decode": "line 4",
            "empty caption": "line 5",
            "missing picture file": "nowhere.jpg",
            "not two columns": "line 7",
        },
    ),
    "table with header": (
        lambda folder, pairs: write_table(folder, pairs, header=True),
        {
            "picture does not decode": "line 5",
            "empty caption": "line 6",
            "missing picture file": "nowhere.jpg",
            "not two columns": "line 8",
        },
    ),
    "folder": (write_folder, {"picture does not decode": "008.jpg", "missing .txt": "009.jpg"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_files_are_numbered_and_broken_members_named(
    form: str, emoji: Pairs, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, problems = FORMS[form]
    folder = tmp_path / "data"
    folder.mkdir()
    source, good = write(folder, emoji)
    # A run of the example in the same process stops the logger from passing records on.
    monkeypatch.setattr(logging.getLogger("train"), "propagate", True)
    with caplog.at_level(logging.INFO, "train"):
        pairs = number_pairs(source, tmp_path / "pairs.npz", side=40)
    assert list(pairs.captions) == [" ".join(caption.split()) for caption in good]
    dropped = [record.message for record in caplog.records if record.message.startswith("dropped")]
    assert len(dropped) == len(problems)
    for problem, name in problems.items():
        assert [name in line for line in dropped if line.endswith(problem)] == [True], (problem, dropped)
        assert f"1 {problem}" in caplog.text
    # Read at random: each number's picture is the picture of its caption.
    index = torch.tensor([len(pairs) - 1, 0, 17])
    originals = [list(emoji.captions).index(good[int(i)]) for i in index]
    distance = (pairs.pictures[index].float() - emoji.pictures[originals].float()).abs().mean((1, 2, 3))
    assert distance.max() < 12, distance
    assert pairs.concepts[0] == concept_number(pairs.captions[0])
    # A second call reads the index and decodes nothing.
    caplog.clear()
    again = number_pairs(source, tmp_path / "pairs.npz", side=40)
    assert list(again.captions) == list(pairs.captions)
    assert "dropped" not in caplog.text


def test_a_shard_that_is_cut_short_keeps_what_came_before(emoji: Pairs, tmp_path: Path) -> None:
    source, good = write_shards(tmp_path, emoji)
    last = tmp_path / "00001.tar"
    last.write_bytes(last.read_bytes()[: last.stat().st_size * 2 // 3])
    (tmp_path / "00000.tar").write_bytes(b"this is no tar file")
    pairs = number_pairs(source, tmp_path / "pairs.npz", side=40)
    assert 20 < len(pairs) < NUM
    assert list(pairs.captions) == good[NUM - 2 :][: len(pairs)]


def test_workers_and_one_process_number_alike(emoji: Pairs, tmp_path: Path) -> None:
    source, _ = write_shards(tmp_path, emoji)
    one = number_pairs(source, tmp_path / "one.npz", side=40)
    two = number_pairs(source, tmp_path / "two.npz", side=40, workers=2)
    assert list(one.captions) == list(two.captions)
    order = list(torch.split(torch.randperm(len(one), generator=torch.Generator().manual_seed(0)), 16))
    before = torch.get_rng_state()
    tokenize = WordHash()
    for a, b in zip(load_batches(one, tokenize, order, 0), load_batches(two, tokenize, order, 2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/{000..002}.tar", "3 of the 3 shards"),
        ("nowhere.tsv", "does not exist"),
        ("nowhere", "must be a pattern of tar shards .*, got 'nowhere'"),
        (".", "must contain pictures"),
    ],
)
def test_a_bad_path_says_what_is_wanted(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        number_pairs(source, tmp_path / "pairs.npz", side=40)


def test_no_usable_pair_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("a small cat\thttps://example.org/cat.jpg\n" * 3)
    with pytest.raises(SystemExit, match="3 missing picture file"):
        number_pairs(str(tmp_path / "pairs.tsv"), tmp_path / "pairs.npz", side=40)


def test_emoji_have_names_groups_and_two_drawings(emoji: Pairs) -> None:
    assert 1890 <= len(emoji) <= 1903
    assert [len(emoji.label_names[kind]) for kind in ("group", "subgroup")] == [9, 99]
    captions = list(emoji.captions)
    assert any(caption.startswith("bus, car, vehicle") for caption in captions)
    assert emoji.pictures.dtype == torch.uint8
    # No picture is blank, and no caption is empty.
    assert emoji.pictures.float().flatten(1).std(1).min() > 0
    assert min(len(caption) for caption in captions) > 2


def test_concepts_are_held_out_whole_and_always_the_same() -> None:
    concepts = torch.tensor([concept_number(str(i // 2)) for i in range(2000)])
    pairs = Pairs(torch.zeros(2000, 3, 1, 1, dtype=torch.uint8), Strings.of(map(str, range(2000))), concepts)
    train, held_out = hold_out(pairs, 0.2)
    assert not set(train.concepts.tolist()) & set(held_out.concepts.tolist())
    assert len(train) + len(held_out) == 2000
    assert 340 < len(held_out) < 460
    assert list(hold_out(pairs, 0.2)[1].captions) == list(held_out.captions)


def test_augmentation_depends_on_the_sample_and_not_on_the_batch(emoji: Pairs) -> None:
    inputs = Inputs(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), WordHash())
    index = torch.arange(200, 264)
    whole = inputs.augment(emoji.pictures[index], index, seed=1, episode=2, phase=0)
    some = torch.tensor([40, 3, 11])
    part = inputs.augment(emoji.pictures[index[some]], index[some], seed=1, episode=2, phase=0)
    torch.testing.assert_close(part, whole[some])
    assert torch.isfinite(whole).all()
    assert whole.abs().max() <= 1 + 1e-5
    for other in ({"seed": 2}, {"episode": 3}, {"phase": 1}):
        changed = inputs.augment(emoji.pictures[index], index, **{"seed": 1, "episode": 2, "phase": 0, **other})
        assert ((changed - whole).abs().amax((1, 2, 3)) > 0.01).float().mean() > 0.95


def test_transparency_is_drawn_on_white_and_palettes_are_read() -> None:
    clear = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    for picture in (clear, clear.convert("P"), clear.convert("LA"), Image.new("L", (20, 10), 255), Image.new("CMYK", (8, 9))):
        data = io.BytesIO()
        picture.save(data, "TIFF" if picture.mode == "CMYK" else "PNG")
        assert (decode(data.getvalue(), 6) == 255).all(), picture.mode


def test_word_hash_knows_words_and_pads_with_zero() -> None:
    tokens = WordHash(vocabulary=1000, length=4)(["Red bus", "bus", "", "a b c d e f"])
    assert tokens.shape == (4, 4)
    assert tokens[0, 1] == tokens[1, 0]
    assert (tokens[1, 1:] == 0).all()
    assert tokens[2, 0] != 0
    assert tokens.max() < 1000


def test_strings_behave_like_a_list() -> None:
    strings = Strings.of(["eins", "", "zwei äöü"])
    assert list(strings) == ["eins", "", "zwei äöü"]
    with pytest.raises(IndexError):
        strings[3]
    assert list(Strings.of([])) == []


def test_help_shows_the_run_lines() -> None:
    script = Path(__file__).parents[2] / "examples" / "train_cc3m.py"
    shown = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "torchrun --standalone" in shown
    assert "--target-temperature" in shown
