"""When two names are the same name."""

from __future__ import annotations

import re
import unicodedata


def folded(name: str) -> str:
    """Return a name without regard to case, to blanks around it and to how its letters are composed.

    Systems write one letter as one character or as two (a macOS disk takes names apart, most others do not).
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())


def unnumbered(name: str) -> str:
    """Return a `folded` name with 0 for each digit, to see whether two are numbers of one row; empty where it has no digit."""
    return re.sub(r"\d", "0", folded(name)) if re.search(r"\d", name) else ""
