"""Words of captions in any script."""

import re
import sys
import unicodedata
from functools import cache

# Scripts written without spaces between words, as ranges of Unicode: Thai and Lao, Myanmar, Khmer, kana, Han.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U00020000-\U0003ffff"
)
_ASCII_WORD = re.compile(r"\w+", re.ASCII)


def words(caption: str) -> list[str]:
    """The words of a caption, without regard to case: runs of letters, digits and combining marks, after NFKC.

    Scripts without spaces between words give pairs of neighbouring characters; a character without a neighbour stands alone.

    **Use it when:** you write a ``tokenizer`` that adds to the default one, such as stemming.
    **Not when:** captions are to be encoded: the default tokenizer calls it.
    **Related:** :class:`WordEncoder`, :meth:`protoclip_losses.TeacherAdapter.from_captions`.

    Example:
        >>> words("A dog's Ball, 2 of them")
        ['a', 'dog', 's', 'ball', '2', 'of', 'them']
        >>> words("柴犬の子 naïve")
        ['柴犬', '犬の', 'の子', 'naïve']
    """
    if caption.isascii():
        return _ASCII_WORD.findall(caption.lower())
    found: list[str] = []
    for word in _pattern().finditer(unicodedata.normalize("NFKC", caption).casefold()):
        run = word.group()
        found += [run[i : i + 2] for i in range(max(1, len(run) - 1))] if word.lastgroup == "unspaced" else [run]
    return found


@cache
def _pattern() -> re.Pattern[str]:
    r"""Python's ``\w`` leaves out combining marks, which would cut Hindi and Tamil at their vowels."""
    marks = {code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Mn", "Mc")}
    starts = sorted(code for code in marks if code - 1 not in marks)
    ends = sorted(code for code in marks if code + 1 not in marks)
    letter = rf"[\w{''.join(f'{chr(start)}-{chr(end)}' for start, end in zip(starts, ends, strict=True))}]"
    return re.compile(rf"(?P<unspaced>(?:(?=[{UNSPACED}]){letter})+)|(?:(?![{UNSPACED}]){letter})+")
