"""Captions as people have them: text files in several encodings, and tables as pandas writes them."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path

CAPTION_BYTES = 64 * 1024  # more than any caption has: a larger text is something else
BYTE_ORDER_MARKS = (  # UTF-32 first, because its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HEADERS = ("filepath", "path", "image", "file")


class SampleError(ValueError):
    """Why a sample cannot be used, in the words in which such samples are counted."""


def read_caption(data: bytes | None) -> str:
    """The caption in a .txt file, its white space single spaces. `data` is None for a file that was too long to be read."""
    if data is None:
        raise SampleError(f"caption is longer than {CAPTION_BYTES // 1024} KiB")
    try:
        return clean_caption(decode_text(data))
    except UnicodeError as error:
        raise SampleError("caption is not in UTF-8") from error


def clean_caption(text: str) -> str:
    if len(text) > CAPTION_BYTES:
        return read_caption(None)
    # Half a surrogate pair is no character: no tokenizer takes it, and no file.
    caption = " ".join(text.encode("utf-8", "replace").decode().split())
    if not caption:
        raise SampleError("empty caption")
    return caption


def decode_text(data: bytes) -> str:
    """UTF-8, or the encoding that a byte order mark names; UnicodeDecodeError for anything else."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data.decode(encoding)
    if b"\0" in data:
        position = data.index(b"\0")
        raise UnicodeDecodeError("utf-8", data, position, position + 1, "NUL, as in UTF-16 without a byte order mark")
    return data.decode("utf-8-sig")


def read_table(path: Path) -> Iterator[tuple[int, list[str] | None]]:
    """(line, cells) of each record of a TSV, None for cells whose quotes do not close; SystemExit if it is no text.

    A line ends at LF or CRLF and nowhere else. Cells are quoted as pandas quotes them, and may then hold tabs and lines.
    """
    data = path.read_bytes()
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SystemExit(
            f"{path}, line {line}: a table must be in UTF-8, or in UTF-16 with a byte order mark, got the byte "
            f"0x{data[error.start : error.start + 1].hex()} ({error.reason}); if it is in Latin-1, convert it: "
            f"iconv -f latin1 -t utf-8 {path} > utf8.tsv"
        ) from error
    # The csv module ends lines at a lone CR too, which in a caption is white space like any other.
    lines = text.replace("\r\n", "\n").replace("\r", " ").split("\n")
    number = 0
    is_first = True
    while number < len(lines):
        cells, length = _record(lines, number)
        if lines[number].strip():
            if not (is_first and cells and cells[0].strip().lower() in HEADERS):
                yield number + 1, cells
            is_first = False
        number += length


def _record(lines: list[str], number: int) -> tuple[list[str] | None, int]:
    """The cells of the record that begins with this line, and its length in lines."""
    if '"' not in lines[number]:
        return lines[number].split("\t"), 1
    # From its first line: after an error the next record begins with the next line, and not where quotes happened to close.
    reader = csv.reader((f"{lines[i]}\n" for i in range(number, len(lines))), "excel-tab", strict=True)
    try:
        return next(reader), reader.line_num
    except csv.Error:
        return None, 1
