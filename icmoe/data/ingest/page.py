"""The quality record as a page with one thumbnail per series; it shows patients' pictures and stays at the site."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from icmoe.atomic import read_regular, write_atomically
from icmoe.data.ingest import index
from icmoe.data.ingest.quality import Values, quality_record
from icmoe.data.store import entry_path, read_stored
from icmoe.errors import IcmoeError
from icmoe.study import Label
from icmoe.window import Window, normalise

RECORD, PAGE = "quality.json", "quality.html"
VERSION = "1"
"""Raised whenever an equal index gives another record or page."""

THUMBNAILS = 200
"""Most thumbnails of a page; more would make it too heavy for a browser."""
THUMBNAIL_PIXELS = 112
"""Longest side."""
BINS = 28
"""Bars of a histogram."""
LABEL_COLOURS = ((0, 229, 255), (255, 176, 0), (214, 80, 160), (0, 170, 120), (150, 110, 255), (240, 100, 60))
"""Outlines of the foreground classes, told apart with any colour vision; further classes start again."""
GREYS = 256 - len(LABEL_COLOURS)

Bits = npt.NDArray[np.bool_]
Progress = Callable[[str, int, int], None]


def quality_report(store: Path, site: str, labels: Sequence[Label], *, on_progress: Progress = lambda *_: None) -> Values:
    """Return the quality record of an index, with record and page written beside it where they are not of its state.

    Parameters
    ----------
    store
        Folder of the index.
    site
        Name of the hospital, as the page shows it.
    labels
        Classes of the study.
    on_progress
        Called with "report", series shown and series to show.
    """
    state = f"{VERSION}:{site}:{index.state(store)}"
    if (known := _known(store, state)) is not None:
        return known
    drop_report(store)
    record = {"state": state, **quality_record(store, labels)}
    write_atomically(store / PAGE, quality_page(store, site, record, on_progress=on_progress).encode(), private=True)
    write_atomically(store / RECORD, json.dumps(record, indent=1).encode(), private=True)
    return record


def drop_report(store: Path) -> None:
    """Remove record and page; the next ingest makes them again."""
    for name in (RECORD, PAGE):
        (store / name).unlink(missing_ok=True)


def _known(store: Path, state: str) -> Values | None:
    try:
        record = json.loads(read_regular(store / RECORD)) if (store / PAGE).is_file() else None
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("state") == state else None


def quality_page(store: Path, site: str, record: Values, *, on_progress: Progress = lambda *_: None) -> str:
    """Return the record as HTML that needs nothing besides itself; see `quality_report`."""
    used = [item for item in record["series"] if item["used"]]
    shown = used[:: -(-len(used) // THUMBNAILS) or 1]
    cards = []
    for done, item in enumerate(shown, start=1):
        cards.append(item | _card(store, item))
        on_progress("report", done, len(shown))
    environment = Environment(
        loader=PackageLoader("icmoe.data.ingest", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figures": _figures, "shares": _shares}
    return environment.get_template("quality.html.j2").render(
        site=site, record=record, cards=cards, not_shown=len(used) - len(cards), colours=_colours(len(record["labels"]))
    )


def _card(store: Path, series: Values) -> Values:
    """Return thumbnail and histogram of the slice that stands for a series, or why there are none."""
    try:
        stored = read_stored(entry_path(store, series["shown"]))
    except IcmoeError as error:
        return {"uri": "", "bars": [], "fault": f"ICM{error.faults[0].number}"}
    grey_HW = normalise(stored.grey_HW, Window(*series["window"]))
    counts = np.histogram(grey_HW, bins=BINS, range=(0.0, 1.0))[0]
    # Logarithmic, because air would flatten everything else.
    bars = np.log1p(counts) / max(float(np.log1p(counts).max()), 1.0)
    size = _size(grey_HW.shape, series["spacing_mm"])
    return {"uri": thumbnail(grey_HW, stored.classes_HW, size), "bars": bars.round(3).tolist(), "fault": ""}


def thumbnail(grey_HW: npt.NDArray[np.floating[Any]], classes_HW: npt.NDArray[np.uint8], size: tuple[int, int]) -> str:
    """Return a picture with the outlines of its classes as PNG in a data URI.

    Parameters
    ----------
    grey_HW
        In [0, 1].
    classes_HW
        Class indices of the same shape; 0 is the background.
    size
        Width and height, pixels.
    """
    small = Image.fromarray((grey_HW * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    values_HW = (np.asarray(small, np.float32) / 255 * (GREYS - 1)).astype(np.uint8)
    marked_HW = np.asarray(Image.fromarray(classes_HW).resize(size, Image.Resampling.NEAREST))
    for label in np.unique(marked_HW[marked_HW > 0]).tolist():
        values_HW[_edge(marked_HW == label)] = GREYS + (label - 1) % len(LABEL_COLOURS)
    picture = Image.fromarray(values_HW).convert("P")
    greys = [(round(value * 255 / (GREYS - 1)),) * 3 for value in range(GREYS)]
    picture.putpalette([part for colour in (*greys, *LABEL_COLOURS) for part in colour])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _size(shape: tuple[int, ...], spacing_mm: Sequence[float] | None) -> tuple[int, int]:
    """Return width and height of a thumbnail with the proportions of the body, where spacing is known."""
    rows_mm, columns_mm = spacing_mm[1:] if spacing_mm else (1.0, 1.0)
    height, width = shape[0] * rows_mm, shape[1] * columns_mm
    scale = THUMBNAIL_PIXELS / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _edge(mask_HW: Bits) -> Bits:
    padded = np.pad(mask_HW, 1)
    edge_HW: Bits = mask_HW & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])
    return edge_HW


def _colours(labels: int) -> list[str]:
    return [f"#{bytes(LABEL_COLOURS[place % len(LABEL_COLOURS)]).hex()}" for place in range(labels - 1)]


def _figures(value: float) -> str:
    """Return a number with three figures, none of them lost before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _shares(rate: Values) -> str:
    """Return a class's shares of images and pixels."""
    shares = (rate["images_share"], rate["pixels_share"])
    return "\N{EN DASH}" if None in shares else ", ".join(f"{100 * share:.3g} %" for share in shares)
