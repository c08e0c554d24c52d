"""Two files that claim to be one instance: where they show two pictures, nobody knows which of them a mask means."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from icmoe.data.ingest.pixels import Shown, read_pictures
from icmoe.data.ingest.refusals import Refusal, refusing
from icmoe.data.picture import Picture

Pictures = Iterator[tuple[int, Picture | Refusal]]
TWO_PICTURES = Refusal(122, "files that claim to be the same instance show different pictures; exclude one of them")


def agreeing(pictures: Pictures, path: Path, copy: Path, numbers: Sequence[int], shown: Shown) -> Pictures:
    """Yield the pictures of a file, with a reason in place of each that its copy shows otherwise.

    A copy that is equal byte by byte is not decoded; one that cannot be decoded has no say.

    Parameters
    ----------
    pictures
        Of `path`, in rising order.
    path, copy
        DICOM files.
    numbers
        Frames from 0 that `pictures` are of.
    shown
        Of the series.
    """
    with refusing(117, "file cannot be opened"):
        equal = filecmp.cmp(path, copy, shallow=False)
    others = iter(()) if equal else _decodable(copy, numbers, shown)
    for number, picture in pictures:
        other = next(others, None)
        yield number, picture if other is None or _is_same(picture, other) else TWO_PICTURES


def _decodable(copy: Path, numbers: Sequence[int], shown: Shown) -> Iterator[Picture | Refusal]:
    try:
        for _, picture in read_pictures(copy, numbers, Shown(turning_point=shown.turning_point)):
            yield picture
    except Refusal:
        return


def _is_same(one: Picture | Refusal, other: Picture | Refusal) -> bool:
    if isinstance(one, Refusal) or isinstance(other, Refusal):
        return True
    return np.array_equal(one.values_V, other.values_V, equal_nan=True) and np.array_equal(one.ranks_HW, other.ranks_HW)
