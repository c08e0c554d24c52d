"""High-throughput JPEG 2000 is read as it was written, here by OpenJPH, and what is damaged has a reason."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import image, save
from exports import read_frames
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.uid import HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL

from icmoe.data.ingest.opening import Refusal

LOSSLESS = (
    "/0//UQApQAAAAAAgAAAAGAAAAAAAAAAAAAAAIAAAABgAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCIkJCQkJCQkJCQ"
    "kJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAA+sAAf+TwAAmg/AFB3QAwAATQAATQAATAAH9Awd0APP8Aod0AD38Aod0AMAA"
    "FVAABPAABOB9WpHubfcAw5QAuRr8AKI0AG7w4wCiNADAABa0AAFrQAAWiFMVt8URVYEInCO2aoHtAGfzGEBbmACdtYNrCKxQyTXGUkVW5f0P3MYQ"
    "M5cAglJAWe7PfDFT4gBPuBEylwDAABdxAABd3AABdqChndM0YdJFVZ8iByNrxlGQMjA90gHgAsGiyMU15Dsrs0VjOx8zMqZI9PQBOA1kiSlPFEWy"
    "kaq+AOrJdjDrEtXd59yOD9O2tplMc2I/qkaOYksrQKfBH4EFRKkAgV9ILcCUQv4A5FApAx9IRYdUgLQIE5ABpYNINyqSx5yhwgmgCBrsIbEm7LHa"
    "Oi627Rrn6D6n2yJhChlAppoHC96w8wNzQIi1WCAXPwDAAC+4IAAX2tAAC+1wd3baPZXYWo7lrDKXZ1k1iTXl+Lfya8hTpzvgLhiYDy0bnXpgPiJS"
    "c9YqNMOn32RHT2IjqPPmRIhBSYUM4Zw3N0kusHkpME/pucgBdo9yWYL/YAsxcTExmRL8Bx+kGFa8S4vVLacAZo7BdHzz+a/l0hdTlzcP1IOUDg6d"
    "AD/5raM2y71E6F+4oiiRAZzjBSXmbUDlDzrP8UcY/qxs5P0EnyrIG3VIkk9hg40I8f4AchcnsXN4PyhzntUvXTnfatG8e3g9O5wo8KvUnvJfLF8h"
    "0SQgAhKAAALAABclAADakwMeT/lRqDJ8GAsGOdvAa8jt5gMBtg+KXNbL34weDhN/lv2RRD9krG8BTmM13vrHEJWIUPgwmMKCfUyY8uaz8QGrjvuG"
    "GgmoUJZbMZnek4UZwwEKVax3JCIWoT5vsIUjm4ZCHLxp8vCgO5PFRR9jHhn11uFvsXf5Gzt2AKf7DgZuF+0xxo8ATjSE6o6kn/zHYIBVC3qHOw6M"
    "0DZHjZ0N+iGxmgeMQZlfgdMAFSBSUKoCpJRequvFQ5FIFwQ5VqJUJWlyqz7XKFjpCGuTYQAAQQAACeoIM54CZeUloLkwx4DL0pJhYshLzAwAsyRX"
    "MJgAc4nZLMkZSwxzmcm0LCsvAEtGWc4kWV6YloC5iZlZYjJKGPImTCWgieILOxQIMlnJxCxnylhmAsRcMMvKC2YmsxzIRC0FJkpA3MRkWi7JGUtL"
    "gEtMk/glJkaZzFwsY2UGYHlhjgGXJCajhMHMBABYgqlgZpJnYgBklmQyAMwLMwMIXMKUX1Zq3vwFSr6nqDPwdHDw4L2r98+vZD57uEHD57Kf2xcM"
    "vDp967ty+63x04AALVQAAFjAAA2IAAEotgP/2Q=="
)
LOSSY = (
    "/0//UQApQAAAAAAgAAAAGAAAAAAAAAAAAAAAIAAAABgAAAAAAAAAAAABDwEB/1AACAACAAAAJf9SAAwAAgABAAUEBEAA/1wAIyKPdI9Fj0WPF4dc"
    "h1yHPX+qf6p/wmg1aDVoeGAaYBpvv/9kABcAAU9wZW5KUEggVmVyIDAuMjYuMy7/kAAKAAAAAAGlAAH/k8AAJt35BQd0AMAAJYAASwAAlL0CB3QA"
    "hQGHdADfAId0AMAAVMAATwABMLV2cdH3AQK0AMOS/gBiNAAB9gAiNADAALQgAFoQACfxznwWENb3BPQAn3AEsbcALa82Nh+ZRen3AK9zpHuXAAP5"
    "o/lLdQDAAtiABb0ACrCtFCAWfFAKMe1RCPhJKE3nP69vgCuLfABV2146OlRaxDCDHFDA0GAInzvkBjplO3qo1mrrsAGPxwCfVBKZLAV5AMAF6nAB"
    "egQAL0AH0VP2VCGaohVXJmiopoPWhEWBNaZXAFzRFN4g0JSyRhX+eDNZt7Tk57XkLyXvOb6zc76rdwsnetSSL0Ne91fXrpJe89fFw4ebSZz3Hd5w"
    "6phxA3ftWWpWUsaiMUMwRc3KQArRQAPRZI5V7pJHYpI310KjixhubvWnN13FVhrcfNanXdx0LozvNnb9fNx28f3pWgK7SBQ2LorMxnGvkMSMPRnZ"
    "wDyu7GU93xu7LTsV827pxr9cueq761208e/X9Zz99T6dWHlr/WeZvGf64TefsXwC/9k="
)
ROWS, COLUMNS = np.mgrid[:24, :32]
RINGS = np.hypot(ROWS - 11, COLUMNS - 15) * 180 + ((COLUMNS * 7 + ROWS * 13) % 17) * 9
STORED = np.minimum(RINGS.astype(np.uint16), 4095)
LARGEST_ERROR = 64
"""Of the lossy one, in 4096 levels."""


def decoded(codestream: bytes, syntax: str, path: Path) -> np.ndarray | Refusal:
    """Return the grey values of an object with this codestream, or why it has none."""
    data = image(STORED, syntax)
    data.PixelData = encapsulate([codestream + b"\0" * (len(codestream) % 2)])
    data["PixelData"].VR = "OB"
    ((_, found),) = read_frames(save(data, path / "image.dcm"), [0])
    return found


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K])
def test_lossless_codestreams_give_the_values_that_were_stored(syntax: str, tmp_path: Path):
    found = decoded(base64.b64decode(LOSSLESS), syntax, tmp_path)
    assert not isinstance(found, Refusal)
    assert np.array_equal(found, STORED)


def test_a_lossy_codestream_gives_values_close_to_them(tmp_path: Path):
    found = decoded(base64.b64decode(LOSSY), HTJ2K, tmp_path)
    assert not isinstance(found, Refusal)
    assert 0 < np.abs(found.astype(int) - STORED).max() <= LARGEST_ERROR


@settings(derandomize=True)  # what a decoder makes of all bytes is the fuzz test's matter, in a process of its own
@given(at=st.integers(0, 1000), end=st.integers(1, 1120), value=st.integers(0, 255))
def test_a_damaged_codestream_gives_a_picture_of_its_size_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, at: int, end: int, value: int
):
    damaged = bytearray(base64.b64decode(LOSSLESS))[:end]
    damaged[min(at, end - 1)] = value
    found = decoded(bytes(damaged), HTJ2KLossless, tmp_path_factory.mktemp("damaged"))
    if isinstance(found, Refusal):
        assert found.number == 118
    else:
        assert found.shape == STORED.shape
