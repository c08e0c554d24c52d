"""When two names are the same name."""

from __future__ import annotations

import unicodedata


def folded(name: str) -> str:
    """Return a name without regard to case, to blanks around it and to how its letters are composed.

    Systems write one letter as one character or as two (a macOS disk takes names apart, most others do not).
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())
