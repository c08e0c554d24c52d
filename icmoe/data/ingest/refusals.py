"""Why a file or a frame is not used."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OFF_IMAGE = "most of the mask lies off the image"
ACROSS = "a contour lies across the planes of its images"
UNREADABLE = "file cannot be opened or read; the next run tries again"
CHANGED = "files of its series were changed while they were read; the next run tries again"
AGAIN = frozenset({UNREADABLE, CHANGED})
"""Reasons that lie in no file, and may be gone though no file has changed."""
OF_THE_DISK = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENODEV, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE),
        *(errno.ENOTCONN, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)
"""What systems say of shares that fail, of rights that are missing and of files that are gone; libraries say other things."""


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
    """Turn whatever a broken file makes a library raise into one reason, and what a disk refuses into that.

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
    except OSError as error:
        raise Refusal(number, UNREADABLE if error.errno in OF_THE_DISK else why) from None
    except BaseException:  # noqa: BLE001  # no list says what a parser raises on arbitrary bytes; a panic in Rust is no Exception
        raise Refusal(number, why) from None
