"""Which of the images that a mask only lists are background: those where nothing is marked, on them or around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from icmoe.data.ingest.catalogue import Key
from icmoe.data.ingest.forms import MASKS
from icmoe.data.ingest.geometry import OFF_PLANE_MM, normal, parallel
from icmoe.data.ingest.records import FileRecord, Plane

SKIPPED = 4
"""Most slices from one mark to the next where a region is drawn on every other slice, or fewer."""


def not_background(record: FileRecord, unmarked: Mapping[Key, Plane | None]) -> set[Key]:
    """Return the listed frames in whose plane, or around it, something is marked on another image.

    As with a registered series or a second phase that a mask only names, and with a SEG object of thicker slices. Nor are
    those background that lie between the marks of a region that was drawn on every other slice.

    Parameters
    ----------
    record
        Of the mask.
    unmarked
        Planes of listed frames in its frame of reference on which it marks nothing.
    """
    planes = [patch.plane for patch in record.patches if patch.plane is not None]
    points_N3 = np.asarray([plane[:3] for plane in planes]).reshape(-1, 3)
    reach_mm = max(OFF_PLANE_MM, record.step_mm / 2.0 if _is_apart(planes, record.step_mm) else 0.0) + 1e-3
    found = _passed_over(record, unmarked)
    for key, plane in unmarked.items():
        if plane is not None:
            near_N = np.abs((points_N3 - plane[:3]) @ normal(plane)) <= reach_mm
            if any(MASKS[record.kind].on_planes or parallel(planes[at], plane) for at in np.flatnonzero(near_N)):
                found.add(key)
    return found


def _passed_over(record: FileRecord, unmarked: Mapping[Key, Plane | None]) -> set[Key]:
    """Return the frames between three or more marks of a region, no two on neighbouring slices and none far from the next."""
    across = next((normal(plane) for plane in unmarked.values() if plane is not None), None)
    if across is None:
        return set()
    regions: dict[tuple[int, int], set[float]] = {}
    for patch in record.patches:
        if patch.plane is not None:
            regions.setdefault((patch.label, patch.group), set()).add(round(float(np.dot(across, patch.plane[:3])), 1))
    heights = {key: round(float(np.dot(across, plane[:3])), 1) for key, plane in unmarked.items() if plane is not None}
    levels = sorted({*heights.values()}.union(*regions.values()))  # np.unique and np.median would import numpy.ma
    step_mm = median(np.diff(levels).tolist() or [0.0])
    found = set[Key]()
    for marked in regions.values():
        gaps = np.diff(sorted(marked)) / step_mm if step_mm > 0.0 else np.empty(0)
        if len(gaps) > 1 and gaps.min() > 1.5 and gaps.max() < SKIPPED + 0.5:
            found |= {key for key, height in heights.items() if min(marked) < height < max(marked)}
    return found


def _is_apart(planes: Sequence[Plane], step_mm: float) -> bool:
    """Return whether the frames of a SEG object lie a step apart or more: slices that overlap say less of those between."""
    heights = sorted({*np.round([np.dot(normal(planes[0]), plane[:3]) for plane in planes], 2).tolist()}) if planes else []
    return len(heights) > 1 and float(np.diff(heights).min()) >= 0.99 * step_mm > 0.0
