"""Texts, pictures and shards as people have them: each is read as it is meant, or counted, or an error that names it."""

import csv
import io
import logging
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from first_pass import number_pairs
from pair_files import add
from pairs import Pairs, Strings, concept_number, decode
from PIL import Image
from torch import Tensor

COLOURS = ["red", "lime", "blue", "white"]


def picture_bytes(form: str = "PNG", **save: object) -> bytes:
    """A picture whose quarters have four colours."""
    picture = Image.new("RGB", (64, 64))
    for i, colour in enumerate(COLOURS):
        picture.paste(Image.new("RGB", (32, 32), colour), (i % 2 * 32, i // 2 * 32))
    data = io.BytesIO()
    picture.save(data, form, **save)
    return data.getvalue()


PICTURE = picture_bytes()


def number(source: Path | str, **how: object) -> Pairs:
    cache = Path(source).with_name("index.npz")
    return number_pairs(str(source), cache, 32, **how)  # type: ignore[arg-type]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("train"), "propagate", True)
    caplog.set_level(logging.INFO, "train")
    return caplog


def table(folder: Path, data: bytes) -> Path:
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(PICTURE)
    (folder / "pairs.tsv").write_bytes(data)
    return folder / "pairs.tsv"


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\r"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_a_table_ends_at_a_line_feed_only(mark: str, end: str, tmp_path: Path) -> None:
    text = f"a.png\tone{mark}two{end}b.png\tthree{end}"
    assert list(number(table(tmp_path, text.encode())).captions) == ["one two", "three"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("header", ["", "filepath\ttitle\n"])
def test_a_byte_order_mark_names_the_encoding(encoding: str, header: str, tmp_path: Path) -> None:
    text = header + "a.png\tein schönes Bild\nb.png\tzwei\n"
    assert list(number(table(tmp_path, text.encode(encoding))).captions) == ["ein schönes Bild", "zwei"]


def test_a_table_is_quoted_as_pandas_quotes_it(tmp_path: Path) -> None:
    captions = ['a "stop" sign', "two\nlines", "a\ttab", 'it is 5" long', "plain"]
    with open(table(tmp_path, b""), "w", newline="", encoding="utf-8") as file:  # what DataFrame.to_csv(sep="\t") writes
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(zip("abcab", captions, strict=True))
    data = (tmp_path / "pairs.tsv").read_text().replace("\t", ".png\t", 1)
    for name in "bcab":
        data = data.replace(f"\n{name}\t", f"\n{name}.png\t", 1)
    (tmp_path / "pairs.tsv").write_text('"a.png"' + data.removeprefix("a.png"))
    assert list(number(tmp_path / "pairs.tsv").captions) == ['a "stop" sign', "two lines", "a tab", 'it is 5" long', "plain"]


def test_quotes_that_do_not_close_cost_their_own_line_alone(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    source = table(tmp_path, b'a.png\t"open\nb.png\ta 5" pipe\na.png\t"stop" sign\nc.png\tlast\n')
    assert list(number(source).captions) == ['a 5" pipe', "last"]
    assert [f"line {i}: quotes do not close" in lines.text for i in (1, 2, 3, 4)] == [True, False, True, False]
    assert "2 quotes do not close" in lines.text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "surrogatepass"])
def test_a_table_in_another_encoding_is_an_error_with_file_and_line(encoding: str, tmp_path: Path) -> None:
    text = "a.png\teins\nb.png\tschön\n"
    data = b"a.png\teins\nb.png\t\xed\xa0\x80\n" if encoding == "surrogatepass" else text.encode(encoding)
    line = 1 if encoding == "utf-16-le" else 2
    with pytest.raises(SystemExit, match=rf"pairs.tsv, line {line}: a table must be in UTF-8.*iconv"):
        number(table(tmp_path, data))


# ---- captions --------------------------------------------------------------------------------------------------------


def write_one(form: str, folder: Path, text: bytes) -> str:
    """A pair with this caption and one with an ordinary one."""
    if form == "folder":
        for name, data in (("a", text), ("b", b"plain")):
            (folder / f"{name}.png").write_bytes(PICTURE)
            (folder / f"{name}.txt").write_bytes(data)
        return str(folder)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in (("a", text), ("b", b"plain")):
            add(tar, f"{name}.png", PICTURE)
            add(tar, f"{name}.txt", data)
    return str(folder / "0.tar")


def stream_captions(source: str) -> tuple[list[str], list[str]]:
    """What the stream makes of a shard: captions, and why samples were left out."""
    from train_stream import decode_sample, read_shard

    captions, problems = [], []
    for sample in read_shard(source):
        try:
            captions.append(decode_sample(sample, 32)[1])
        except ValueError as error:
            problems.append(str(error))
    return captions, problems


@pytest.mark.parametrize("form", ["folder", "shard"])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\ufeffein Schloß".encode(), "ein Schloß"),
        ("ein Schloß".encode("utf-16"), "ein Schloß"),
        ("ein Schloß".encode("latin-1"), "caption is not in UTF-8"),
        ("ein Schloß".encode("utf-16-be"), "caption is not in UTF-8"),
        ("\ufeff ".encode(), "empty caption"),
        (b"word " * 20_000, "caption is longer than 64 KiB"),
    ],
)
def test_a_caption_is_read_as_it_is_meant_or_counted(
    form: str, text: bytes, wanted: str, tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    source = write_one(form, tmp_path / "data", text)
    captions = list(number_pairs(source, tmp_path / "index.npz", 32).captions)
    is_problem = "caption" in wanted
    assert captions == ([] if is_problem else [wanted]) + ["plain"]
    assert (f"1 dropped (1 {wanted})" in lines.text) == is_problem
    if form == "shard":
        assert stream_captions(source) == (captions, [wanted] if is_problem else [])


def test_a_long_cell_of_a_table_is_no_caption(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    source = table(tmp_path, b"a.png\t" + b"word " * 20_000 + b"\nb.png\tplain\n")
    assert list(number(source).captions) == ["plain"]
    assert "line 1: caption is longer than 64 KiB" in lines.text


def test_surrogates_of_captions_and_of_names_are_kept_in_the_index(tmp_path: Path) -> None:
    texts = ["half \ud83d", "Bild\udce9.png"]
    assert list(Strings.of(texts)) == texts
    assert concept_number(texts[0]) != concept_number(texts[1])
    folder = tmp_path / "data"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"Bild\xe9.png")).write_bytes(PICTURE)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    (folder / os.fsdecode(b"Bild\xe9.txt")).write_text("a picture")
    pairs = number_pairs(str(folder), tmp_path / "index.npz", 32)
    assert list(pairs.captions) == ["a picture"]
    assert torch.equal(pairs.pictures[torch.tensor([0])][0], decode(PICTURE, 32))


# ---- pictures --------------------------------------------------------------------------------------------------------

# How the four quarters of the stored picture are to be seen, by orientation.
QUARTERS = {1: [0, 1, 2, 3], 2: [1, 0, 3, 2], 3: [3, 2, 1, 0], 4: [2, 3, 0, 1], 5: [0, 2, 1, 3], 6: [2, 0, 3, 1]}
QUARTERS |= {7: [3, 1, 2, 0], 8: [1, 3, 0, 2]}


def quarters(picture: Tensor) -> list[int]:
    """The number of the nearest colour in the middle of each quarter."""
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])
    middles = picture[:, 8::16, 8::16].permute(1, 2, 0).reshape(-1, 3).long()
    return torch.cdist(middles.float(), colours.float()).argmin(1).tolist()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert quarters(decode(picture_bytes(form, exif=exif), 32)) == QUARTERS[orientation]


def test_a_broken_orientation_is_none() -> None:
    assert quarters(decode(picture_bytes("JPEG", exif=b"Exif\0\0no TIFF header"), 32)) == QUARTERS[1]


@pytest.mark.parametrize("values", [np.uint16, np.int32, np.float32])
def test_grey_of_more_than_eight_bits_is_scaled(values: type) -> None:
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    array = ramp.astype(np.float32) if values is np.float32 else (ramp * 65535).astype(values)
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG" if values is np.uint16 else "TIFF")
    got = decode(data.getvalue(), 64)[0].float()
    assert (got - torch.from_numpy(ramp * 255).float()).abs().max() <= 2


def test_grey_of_16_bits_with_a_transparent_value() -> None:
    array = np.full((8, 8), 20_000, np.uint16)
    array[:, :4] = 7
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    chunk = b"tRNS" + (7).to_bytes(2, "big")  # older versions of Pillow read it and do not write it
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    header = 33  # of a PNG: its signature and the chunk with its size
    assert decode(data.getvalue()[:header] + chunk + data.getvalue()[header:], 8)[0, 0].tolist() == [255] * 4 + [20_000 >> 8] * 4


def test_values_of_unknown_range_are_no_picture() -> None:
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8), 3000.0, np.float32)).save(data, "TIFF")
    with pytest.raises(OSError, match=r"must be in \[0, 1\]"):
        decode(data.getvalue(), 8)


# ---- keys of shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "wanted", "dropped"),
    [
        (["22.05.png", "22.05.txt", "22.05.json", "22.06.png", "22.06.txt"], ["22.05.txt", "22.06.txt"], {}),
        (["a.1.png", "a.1.txt", "a.2.png", "a.3.png", "a.3.txt"], ["a.1.txt", "a.3.txt"], {"missing .txt": 1}),
        (["0.png", "0.seg.png", "0.txt", "0.json"], ["0.txt"], {}),  # as WebDataset has it
        (["a.1.PNG", "a.1.TXT", "a.png", "a.txt", "b.txt", "c.json"], ["a.1.TXT", "a.txt"], {"missing picture": 2}),
        (["v.1/0.png", "v.1/0.txt", "v.1/1.2.png", "v.1/1.2.txt"], ["v.1/0.txt", "v.1/1.2.txt"], {}),
        (["a.png", "a.txt", "a.txt", "__meta__/b.png"], ["a.txt"], {"two members of one name": 1}),
    ],
)
def test_keys_with_dots(
    names: list[str], wanted: list[str], dropped: dict[str, int], tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            add(tar, name, PICTURE if name.lower().endswith("png") else name.encode())
    pairs = number(tmp_path / "0.tar")
    assert list(pairs.captions) == wanted
    for problem, count in dropped.items():
        assert f"{count} {problem}" in lines.text
    assert f"{sum(dropped.values())} dropped" in lines.text
    captions, problems = stream_captions(str(tmp_path / "0.tar"))
    assert captions == wanted
    assert sorted(problems) == sorted(problem for problem, count in dropped.items() for _ in range(count))


# ---- links, and what cannot be read ----------------------------------------------------------------------------------


def write_pair(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(PICTURE)
    (folder / f"{name}.txt").write_text(name)


def test_links_are_followed_and_dangling_ones_counted(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_pair(data, "own")
    write_pair(elsewhere, "linked")
    write_pair(tmp_path / "third", "file")
    (data / "folder").symlink_to(elsewhere, target_is_directory=True)
    (data / "again").symlink_to(data, target_is_directory=True)  # a circle
    (data / "file.png").symlink_to(tmp_path / "third" / "file.png")
    (data / "file.txt").symlink_to(tmp_path / "third" / "file.txt")
    (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (data / "away").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    os.mkfifo(data / "pipe.png")
    assert sorted(number_pairs(str(data), tmp_path / "index.npz", 32).captions) == ["file", "linked", "own"]
    assert "3 dropped (2 dangling link, 1 no regular file)" in lines.text


def test_an_unreadable_folder_is_counted(
    tmp_path: Path, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path / "data", "own")
    write_pair(tmp_path / "data" / "secret", "hidden")
    scandir: Callable[[str], object] = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # permissions do not hold for the superuser
    assert list(number_pairs(str(tmp_path / "data"), tmp_path / "index.npz", 32).captions) == ["own"]
    assert "1 unreadable folder" in lines.text


# ---- files that change -----------------------------------------------------------------------------------------------


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Other bytes, the same size, another date."""
    data, found = path.read_bytes(), path.stat()
    path.write_bytes(data.replace(old, new))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


@pytest.mark.parametrize("form", ["shard", "folder"])
def test_files_that_have_changed_are_indexed_again(form: str, tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    source, cache = write_one(form, tmp_path / "data", b"a worse one"), tmp_path / "index.npz"
    number_pairs(source, cache, 32)
    changed = tmp_path / "data" / ("0.tar" if form == "shard" else "a.txt")
    rewrite(changed, b"-", b"-")
    number_pairs(source, cache, 32, resume=True)  # the same pairs under another date
    assert f"has changed since it was indexed ({changed})" in lines.text
    rewrite(changed, b"worse", b"finer")
    assert list(number_pairs(source, cache, 32, current=True).captions) == ["a worse one", "plain"]
    with pytest.raises(SystemExit, match=rf"--resume must find the pairs .*changed: .*{changed.name}"):
        number_pairs(source, cache, 32, resume=True)
    assert list(number_pairs(source, cache, 32).captions) == ["a finer one", "plain"]
    assert list(number_pairs(source, cache, 32, resume=True).captions) == ["a finer one", "plain"]


def test_a_stream_notices_shards_that_have_changed(tmp_path: Path) -> None:
    from sources import check_shards

    shards = [str(tmp_path / "0.tar"), "pipe:cat somewhere.tar"]
    (tmp_path / "0.tar").write_bytes(b"worse")
    check_shards(shards, tmp_path / "shards.npy", resume=False)
    check_shards(shards, tmp_path / "shards.npy", resume=True)
    rewrite(tmp_path / "0.tar", b"worse", b"finer")
    with pytest.raises(SystemExit, match=r"--resume needs the shards .*0.tar"):
        check_shards(shards, tmp_path / "shards.npy", resume=True)


@pytest.mark.slow
def test_processes_index_the_same_files_at_once(tmp_path: Path) -> None:
    source = table(tmp_path, b"a.png\tone\nb.png\ttwo\nc.png\tthree\n")
    examples = Path(__file__).parents[2] / "examples"
    code = (
        f"import sys; sys.path.insert(0, {str(examples)!r})\nfrom pathlib import Path\nfrom first_pass import number_pairs\n"
        f"for i in range(150):\n    number_pairs({str(source)!r}, Path(f'{{i}}.npz'), 32)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in processes:
        errors = process.communicate(timeout=200)[1]
        assert process.returncode == 0, errors[-2000:]
    assert not list(tmp_path.glob("*.partial*"))
