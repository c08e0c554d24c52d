"""On which images a mark lies where several are close to it: thin slices are closer to each other than what systems round."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from icmoe.data.ingest.geometry import height_mm, normal, parallel
from icmoe.data.ingest.records import Patch, Plane

SAME_MM = 1e-3
"""How far from each other images lie that show one place, as those of a cine do."""

Shown = TypeVar("Shown")


def nearest(mark: Plane, places: Iterable[tuple[Shown, str, Plane]]) -> list[Shown]:
    """Return the images in the plane of a mark without those that another image of their series hides from it.

    Of two that are equally far, the lower one has it: where all marks lie between slices, each slice gets one of them.

    Parameters
    ----------
    mark
        Its position counts.
    places
        Images with their series and planes, all of them close to the mark.
    """
    stacks: list[tuple[str, Plane, list[tuple[float, Shown]]]] = []
    for image, series, plane in places:
        own = next((stack for stack in stacks if stack[0] == series and parallel(stack[1], plane)), None)
        if own is None:
            stacks.append(own := (series, plane, []))
        own[2].append((_above_mm(plane, mark, own[1]), image))
    return [image for _, _, found in stacks for above, image in found if abs(above - _least(found)) <= SAME_MM]


def marks(patches: Iterable[Patch]) -> Iterable[list[Patch]]:
    """Return the parts of a mask; those together that are one mark and name an image each."""
    found: dict[tuple[int, int], list[Patch]] = {}
    for patch in patches:
        found.setdefault((patch.number, patch.label) if patch.image else (-1, len(found)), []).append(patch)
    return found.values()


def _above_mm(plane: Plane, mark: Plane, first: Plane) -> float:
    """Return how far a plane lies above a mark; up is where the first plane's normal points."""
    above = height_mm(plane) - height_mm((*mark[:3], *plane[3:11]))
    return above if sum(a * b for a, b in zip(normal(plane), normal(first), strict=True)) > 0.0 else -above


def _least(found: Iterable[tuple[float, object]]) -> float:
    return min((above for above, _ in found), key=lambda above: (round(abs(above), 3), above))
