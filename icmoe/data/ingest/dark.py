"""Pictures of few values that lie in a row of images: a dark slice of a channel is no mask without a mark."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath

from icmoe.data.ingest.folding import folded
from icmoe.data.ingest.walking import MASK, SEQUENCES, called_image, called_mask

Picture = tuple[str, bool, bool]
"""Path below the export, whether its values look like classes, and whether all its pixels are equal."""
IMAGE, CLASSES, BLANK = range(3)


def dark_images(pictures: Callable[[], Iterable[Picture]]) -> Iterator[str]:
    """Yield the pictures that pass for masks by their values alone, though most of those of their row are images.

    A row are pictures in folders of one name that are called alike but for their numbers: every patient's FLAIR/001 and on.

    Parameters
    ----------
    pictures
        Returns all pictures of an export.
    """
    kinds: Counter[tuple[str, str, int]] = Counter()
    for path, is_mask, is_blank in pictures():
        if not is_mask:
            kinds[*_row(path), IMAGE] += 1
        elif not _is_called(path):
            kinds[*_row(path), BLANK if is_blank else CLASSES] += 1
    for path, is_mask, _ in pictures():
        if is_mask and not _is_called(path):
            row = _row(path)
            images, classes = kinds[*row, IMAGE], kinds[*row, CLASSES]
            if images > classes or (not images + classes and re.fullmatch(SEQUENCES, row[0])):
                yield path


def _row(path: str) -> tuple[str, str]:
    name = PurePosixPath(path)
    return folded(name.parent.name), re.sub(r"\d+", "0", folded(name.stem))


def _is_called(path: str) -> bool:
    """Return whether a picture's name or folder says what it is."""
    return called_mask(path) or called_image(path) or bool(MASK.search(PurePosixPath(path).name))
