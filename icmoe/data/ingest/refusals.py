"""Why a file or a frame is not used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OFF_IMAGE = "most of the mask lies off the image"
ACROSS = "a contour lies across the planes of its images"


class Refusal(Exception):
    """A file, or a frame of it, is not used.

    Parameters
    ----------
    number
        Key of the error catalogue.
    why
        The reason in fixed words and numbers; never a text from the file.
    """

    def __init__(self, number: int, why: str) -> None:
        super().__init__(number, why)
        self.number = number
        self.why = why


@contextmanager
def refusing(number: int, why: str) -> Iterator[None]:
    """Turn whatever a broken file makes a library raise into one reason.

    Yields
    ------
    None

    Raises
    ------
    Refusal
        With the given number and reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Refusal, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:  # noqa: BLE001  # no list says what a parser raises on arbitrary bytes; a panic in Rust is no Exception
        raise Refusal(number, why) from None
