"""Names of icons without what they say of style: "home-outline-rounded-24" is "home"."""

import re
from typing import Any

from pairs import concept_number

# Words that name a style in any set. What only some sets mean by a word, as "light", those sets declare.
STYLES = {"outline", "outlined", "filled", "fill", "duotone", "twotone", "linear", "rounded", "sharp"}
SIZES = {str(size) for size in (8, 10, 12, 14, 15, 16, 18, 20, 24, 28, 30, 32, 36, 40, 48, 60, 64, 96)}


def plain_words(name: str) -> list[str]:
    """Lower-case words of a name that hyphens and the like join."""
    return re.findall(r"[^\W_]+", name.lower())


def family(name: str) -> int:
    """The same number for names of the same words in any order, numbers aside: "arrow left 2" and "left-arrow"."""
    words = plain_words(name)
    return concept_number(" ".join(sorted({word for word in words if not word.isdigit()} or words)))


class Namer:
    """Splits icon names of a set into (name, style): by the prefixes and suffixes that the set declares, and the usual ones."""

    def __init__(self, collection: dict[str, Any]) -> None:
        self.prefixes, self.suffixes = (
            sorted((plain_words(part) for part in collection.get(key, {}) if part), key=len, reverse=True)
            for key in ("prefixes", "suffixes")
        )

    def __call__(self, icon: str) -> tuple[str, str]:
        words, style = plain_words(icon), []
        for prefix in self.prefixes:
            if words[: len(prefix)] == prefix and len(words) > len(prefix):
                words, style = words[len(prefix) :], prefix
                break
        while len(words) > 1:
            declared = next((part for part in self.suffixes if words[-len(part) :] == part and len(words) > len(part)), None)
            usual = words[-1:] if words[-1].removesuffix("px") in SIZES or words[-1] in STYLES else None
            cut = declared or usual
            if cut is None:
                break
            words, style = words[: -len(cut)], [*cut, *style]
        return " ".join(words), " ".join(word for word in style if word.removesuffix("px") not in SIZES)
