"""Drawn text in pictures: a safety net for letters that no header mentions, not a guarantee.

Found are horizontal lines of six or more letters drawn in the picture's lightest or darkest value, as scanners, PACS and
drawing programs write them. Of such lines in six fonts on MR, CT and noise, where a person could read them, it finds 63 %
in fonts of 8 pixels, 79 % of 9, 83 % of 10, 91 % of 12 and 94 to 97 % of 14 to 24 (`samples` in tests/test_burned_in.py,
seeds 0, 100 and 200 plus the size). Of 2,703 real MR, CT and other pictures without text it takes none for text; its rules
were chosen on these, so expect a few in ten thousand elsewhere: turned, clipped or resized, 3 of some 18,900 were taken.

Not found are handwriting, slanted or upright lines, short words, letters that touch, letters in a grey between the extremes,
and faces. So a person looks at the pictures of sources that write into them, and this looks at the others.

No letter is read: a letter is a connected stroke that stands off from its surroundings; a line is several of like height
on one row with nothing above and below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icmoe.data.ingest.connected import Numbers, Runs, runs_of, strokes_of
from icmoe.data.picture import Picture

STROKE_PX = 6
"""Strokes up to this width are letters; wider things are surroundings."""
CONTRAST = 48
"""Least step from the surroundings to a letter, in levels of 255."""
HEIGHT_PX = (3, 40)
"""Of a letter."""
LEVEL_ROWS = 3
"""Letters whose lowest rows lie within as many rows are one line's: round letters and noise reach lower."""
LETTERS, STANDING = 5, 4
"""Least letters of a line, and how many of them stand on exactly one row."""
TILE_PX = 4
"""Side of the tiles whose extremes tell where nothing is drawn: twice it is more than a square of surroundings."""
GAP, BLANK = 0.6, 1.6
"""Median distance of neighbours, and the largest between words, in heights."""
ABOVE, BELOW = 0.1, 0.2
"""Share of a line's columns that may be drawn upon just above and just below it: commas, and letters that hang down."""

Levels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Strokes:
    """Connected strokes: their boxes as top, bottom, left, right (the ends exclusive), and which reach the extreme."""

    boxes_N4: Numbers
    reach_N: npt.NDArray[np.bool_]
    drawn_HW: npt.NDArray[np.bool_]

    def of(self, chosen: slice | Numbers | npt.NDArray[np.bool_]) -> _Strokes:
        """Return some of the strokes."""
        return _Strokes(self.boxes_N4[chosen], self.reach_N[chosen], self.drawn_HW)

    @property
    def heights_N(self) -> Numbers:
        """Heights, pixels."""
        return self.boxes_N4[:, 1] - self.boxes_N4[:, 0]

    @property
    def gaps(self) -> Numbers:
        """Distances of neighbours, pixels."""
        return self.boxes_N4[1:, 2] - self.boxes_N4[:-1, 3]


def holds_text(picture: Picture) -> bool:
    """Return whether a picture likely holds a line of drawn text.

    Parameters
    ----------
    picture
        Grey values on any scale; what is not finite counts as the least.
    """
    finite_V = picture.values_V[picture.finite_V]
    if len(finite_V) < 2:
        return False
    low, high = float(finite_V[0]), float(finite_V[-1])
    values_V = np.where(picture.finite_V, picture.values_V, finite_V[0])
    levels_V = ((values_V - np.float32(low)) * np.float32(255.0 / (high - low)) + np.float32(0.5)).astype(np.uint8)
    least_hw, most_hw = _tiled(np.minimum, picture.ranks_HW), _tiled(np.maximum, picture.ranks_HW)
    low_hw, high_hw = levels_V.take(least_hw), levels_V.take(most_hw)
    around_2hw = _opened(np.stack([low_hw, 255 - high_hw]), 3)  # for light text and, turned round, for dark
    drawn_2hw = _drawn(np.stack([high_hw, 255 - low_hw]), around_2hw)
    for table_V, drawn_hw in zip((levels_V, 255 - levels_V), drawn_2hw, strict=True):
        for part in _parts(drawn_hw):
            if _holds_light_text(table_V.take(picture.ranks_HW[part])):
                return True
    return False


def _tiled(extreme: np.ufunc, ranks_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the least or the greatest rank of each tile; those at the lower and right ends may be smaller."""
    for axis in (0, 1):
        short = -ranks_HW.shape[axis] % TILE_PX
        if short:
            last = ranks_HW.take([-1] * short, axis=axis)
            ranks_HW = np.concatenate([ranks_HW, last], axis=axis)
        lines = ranks_HW if axis == 0 else ranks_HW.T
        tiled = extreme(extreme(lines[0::4], lines[1::4]), extreme(lines[2::4], lines[3::4]))
        ranks_HW = tiled if axis == 0 else tiled.T
    return ranks_HW


def _parts(drawn_hw: npt.NDArray[np.bool_]) -> Iterator[tuple[slice, slice]]:
    """Yield bands of rows, with the squares of surroundings about them, outside which no line is drawn, from the tiles that are.

    Any square of surroundings about a pixel lies within some three by three tiles, so that the surroundings are at least as
    light as the least of these, and a pixel at most as light as the greatest of its tile. A band ends where a row of tiles
    has nothing drawn, which no letter crosses.
    """
    counts_h = np.count_nonzero(drawn_hw, axis=1)
    if not counts_h.any():
        return
    edges = np.flatnonzero(np.diff(counts_h > 0, prepend=False, append=False))
    for top, bottom in zip(edges[::2], edges[1::2], strict=True):
        if 2 * int(counts_h[top:bottom].max()) < LETTERS:  # a tile has room for two letters beside each other
            continue
        columns = np.flatnonzero(drawn_hw[top:bottom].any(axis=0))
        yield _reached(top, bottom), _reached(columns[0], columns[-1] + 1)


def _reached(first: int, end: int) -> slice:
    """Return the pixels of tiles with the squares of surroundings about them."""
    return slice(max(int(first) * TILE_PX - STROKE_PX, 0), int(end) * TILE_PX + STROKE_PX)


def _holds_light_text(levels_HW: Levels) -> bool:
    strokes = _strokes(levels_HW)
    if strokes is None:
        return False
    for shift in range(LEVEL_ROWS):
        rows_N = (strokes.boxes_N4[:, 1] + shift) // LEVEL_ROWS
        order = np.lexsort((strokes.boxes_N4[:, 2], rows_N))
        lined, rows_N = strokes.of(order), rows_N[order]
        tall = np.maximum(lined.heights_N[1:], lined.heights_N[:-1])
        breaks = (np.diff(rows_N) != 0) | (lined.gaps > BLANK * tall)
        ends = np.flatnonzero(np.concatenate(([True], breaks, [True])))
        for at in np.flatnonzero(np.diff(ends) >= LETTERS):
            if _is_line(lined.of(slice(ends[at], ends[at + 1]))):
                return True
    return False


def _strokes(levels_HW: Levels) -> _Strokes | None:
    """Return what is drawn in the lightest value, as light strokes more than half-way from their surroundings to it."""
    around_HW = _opened(levels_HW, STROKE_PX + 1)
    drawn_HW = _drawn(levels_HW, around_HW)
    # Letters of a line are at least as high as its lowest rows differ, so that one row crosses all of them.
    runs = runs_of(drawn_HW)
    if len(runs.starts_R) < LETTERS or int(np.bincount(runs.rows_R).max()) < LETTERS:
        return None
    marks_R, firsts_N = strokes_of(runs)
    count = len(firsts_N)
    if count < LETTERS:
        return None
    full = 20 * levels_HW[drawn_HW].astype(np.int32) >= 17 * 255 + 3 * around_HW[drawn_HW].astype(np.int32)
    full_R = np.logical_or.reduceat(full, np.cumsum(runs.lengths_R) - runs.lengths_R)
    area_N = np.bincount(marks_R, weights=runs.lengths_R, minlength=count)
    boxes_N4 = _boxes(runs, marks_R, firsts_N)
    height_N, width_N = boxes_N4[:, 1] - boxes_N4[:, 0], boxes_N4[:, 3] - boxes_N4[:, 2]
    fits = (height_N >= HEIGHT_PX[0]) & (height_N <= HEIGHT_PX[1]) & (width_N <= 4 * height_N) & (5 * area_N >= 4 * height_N)
    return _Strokes(boxes_N4, np.bincount(marks_R, weights=full_R, minlength=count) > 0, drawn_HW).of(fits)


def _drawn(levels_HW: Levels, around_HW: Levels) -> npt.NDArray[np.bool_]:
    """Return which pixels are more than half-way from their surroundings to the extreme, where these leave room for contrast."""
    above_HW = np.multiply(levels_HW, 5, dtype=np.int16)
    above_HW -= np.multiply(around_HW, 2, dtype=np.int16)
    return np.asarray((above_HW >= 3 * 255) & (around_HW <= 255 - CONTRAST))


def _boxes(runs: Runs, marks_R: Numbers, firsts_N: Numbers) -> Numbers:
    """Return the box of each stroke."""
    rows_R, left_R = np.divmod(runs.starts_R, runs.stride)
    boxes_4N = np.zeros((4, len(firsts_N)), dtype=np.int64)
    boxes_4N[0] = rows_R[firsts_N]
    boxes_4N[1][marks_R] = rows_R + 1  # the last one stays
    boxes_4N[2] = runs.stride
    np.minimum.at(boxes_4N[2], marks_R, left_R)
    np.maximum.at(boxes_4N[3], marks_R, left_R + runs.lengths_R)
    return boxes_4N.T


def _is_line(run: _Strokes) -> bool:
    """Return whether neighbours on a row look like letters of a line."""
    middle = float(np.median(run.heights_N))
    run = run.of((run.heights_N >= 0.6 * middle) & (run.heights_N <= 1.6 * middle))
    count = len(run.reach_N)
    if count < LETTERS:
        return False
    height_N, bottom_N = run.heights_N, run.boxes_N4[:, 1]
    middle = float(np.median(height_N))
    standing = int(np.bincount(bottom_N - bottom_N.min()).max())
    alike = int((np.abs(height_N - middle) <= max(1.0, 0.2 * middle)).sum())
    return (
        standing >= max(STANDING, count / 2)
        and alike >= count / 2
        and float(run.reach_N.mean()) >= 0.6
        and float(np.median(run.gaps)) <= GAP * middle
        and _is_alone(run)
    )


def _is_alone(run: _Strokes) -> bool:
    top, left = run.boxes_N4[:, (0, 2)].min(axis=0)
    bottom, right = run.boxes_N4[:, (1, 3)].max(axis=0)
    above = run.drawn_HW[max(top - 2, 0) : top, left:right].any(axis=0)
    below = run.drawn_HW[bottom : bottom + 2, left:right].any(axis=0)
    return bool(above.mean() <= ABOVE and below.mean() <= BELOW)


def _opened(levels_HW: Levels, side: int) -> Levels:
    """Return levels without what is light and narrower than a square: the greatest of the least value in it.

    Before height and width there may be a number of pictures. Comparing shifted arrays is many times as fast as scipy's
    filters here, because numpy compares 16 bytes at a time.
    """
    reach = side - 1
    *several, rows, columns = levels_HW.shape
    padded_HW = np.empty((*several, rows + 2 * reach, columns + 2 * reach), dtype=np.uint8)
    inner_HW = padded_HW[..., reach:-reach]
    inner_HW[..., reach:-reach, :] = levels_HW
    inner_HW[..., :reach, :], inner_HW[..., -reach:, :] = levels_HW[..., :1, :], levels_HW[..., -1:, :]
    padded_HW[..., :reach], padded_HW[..., -reach:] = inner_HW[..., :1], inner_HW[..., -1:]
    eroded_HW = _folded(np.minimum, padded_HW, side)
    return _folded(np.maximum, eroded_HW, side)


def _folded(extreme: np.ufunc, levels_HW: Levels, side: int) -> Levels:
    """Return the least or the greatest level of each square, in steps that double."""
    reach = 1
    while reach < side:
        step = min(reach, side - reach)
        levels_HW = extreme(levels_HW[..., :-step, :], levels_HW[..., step:, :])
        levels_HW = extreme(levels_HW[..., :-step], levels_HW[..., step:])
        reach += step
    return levels_HW
