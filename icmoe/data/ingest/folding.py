"""When two names are the same name."""

from __future__ import annotations

import re
import unicodedata


def composed(name: str) -> str:
    """Return a name with its letters in one way of writing: "ü" as one character, where a macOS disk has "u" and two dots."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """Return a name without regard to case, to blanks around it and to how its letters are composed.

    Systems write one letter as one character or as two (a macOS disk takes names apart, most others do not).
    """
    return composed(composed(name.strip()).casefold())


def counted(name: str) -> tuple[str | int, ...]:
    """Return what names are sorted by as people count: slice_2 before slice_10."""
    return tuple(int(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", folded(name))))


def unnumbered(name: str) -> str:
    """Return a `folded` name with 0 for each digit, to see whether two are numbers of one row; empty where it has no digit."""
    return re.sub(r"\d", "0", folded(name)) if re.search(r"\d", name) else ""
