"""Overlays of a slice: image, truth and prediction as small pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from icmoe.predict.pictures import COLOURS, Colours, as_rgb, colour_of, core

CLASS_COLOURS = COLOURS[:5]
"""Fills of the foreground classes; further classes start again."""

EXPERT_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))
"""Fills of the experts in the model's order; further experts start again."""

OUTLINE_COLOUR = (0, 229, 255)
"""Outline of the truth; stands out from grey values and from every fill."""

PANEL_PIXELS = 320
"""Longest side of a panel."""

Picture = npt.NDArray[np.uint8]


@dataclass
class Overlay:
    """One slice with its truth and prediction.

    Parameters
    ----------
    title
        Why it is shown, such as "median test patient: Dice 0.71".
    image_HW
        Grey values in [0, 1].
    truth_HW, prediction_HW
        Class indices, uint8, of the image's shape; 0 is the background.
    experts_HW, expert_names
        Index of the expert that had the largest gate, uint8, of the image's shape, and the experts' names.

    Raises
    ------
    ValueError
        Where the shapes differ or are not H W.
    """

    title: str
    image_HW: npt.NDArray[np.floating[Any]]
    truth_HW: npt.NDArray[np.uint8]
    prediction_HW: npt.NDArray[np.uint8]
    experts_HW: npt.NDArray[np.uint8] | None = None
    expert_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        maps = (self.image_HW, self.truth_HW, self.prediction_HW, self.experts_HW)
        shapes = [item.shape for item in maps if item is not None]
        if self.image_HW.ndim != 2 or len(set(shapes)) > 1:
            raise ValueError(f"image, truth, prediction and experts have shapes {shapes}: one shape (rows, columns) expected")


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of an overlay: caption, text alternative and PNG as data URI."""

    caption: str
    alternative: str
    uri: str


def panels(overlay: Overlay) -> list[Panel]:
    """Return image, truth and prediction as PNG; the prediction carries the truth's outline."""
    image_HW3, truth_HW3, prediction_HW3 = pictures(overlay)
    truth, prediction = _marked(overlay.truth_HW), _marked(overlay.prediction_HW)
    shown = [
        Panel("image", f"{overlay.title}: the image", _data_uri(image_HW3)),
        Panel("truth", f"{overlay.title}: truth, {truth}", _data_uri(truth_HW3)),
        Panel("prediction", f"{overlay.title}: prediction, {prediction}", _data_uri(prediction_HW3)),
    ]
    if overlay.experts_HW is not None:
        shares = np.bincount(overlay.experts_HW.ravel(), minlength=len(overlay.expert_names)) / overlay.experts_HW.size
        words = ", ".join(f"{name} {100 * share:.0f}%" for name, share in zip(overlay.expert_names, shares, strict=True))
        decided_HW3 = _enlarged(_filled(as_rgb(overlay.image_HW), overlay.experts_HW + 1, EXPERT_COLOURS))
        shown.append(Panel("who decided", f"{overlay.title}: largest gate, {words}", _data_uri(decided_HW3)))
    return shown


def pictures(overlay: Overlay) -> tuple[Picture, Picture, Picture]:
    """Return image, truth and prediction, uint8 H W 3, enlarged to at most `PANEL_PIXELS`; see `panels`."""
    grey_HW3 = as_rgb(overlay.image_HW)
    prediction_HW3 = _enlarged(_filled(grey_HW3, overlay.prediction_HW))
    # Drawn after enlarging, so that the line stays thin on coarse images.
    truth = Image.fromarray((overlay.truth_HW > 0).astype(np.uint8))
    marked_HW = np.asarray(truth.resize(prediction_HW3.shape[1::-1], Image.Resampling.NEAREST)) > 0
    prediction_HW3[_edge(marked_HW)] = OUTLINE_COLOUR
    return _enlarged(grey_HW3), _enlarged(_filled(grey_HW3, overlay.truth_HW)), prediction_HW3


def _marked(classes_HW: npt.NDArray[np.uint8]) -> str:
    return f"{int((classes_HW > 0).sum())} of {classes_HW.size} pixels marked"


def _filled(
    grey_HW3: npt.NDArray[np.float32], classes_HW: npt.NDArray[np.uint8], colours: Colours = CLASS_COLOURS
) -> npt.NDArray[np.float32]:
    painted_HW3 = grey_HW3.copy()
    for index in range(1, int(classes_HW.max(initial=0)) + 1):
        colour_3 = np.array(colour_of(index, colours), np.float32)
        inside_HW = classes_HW == index
        painted_HW3[inside_HW] = 0.45 * painted_HW3[inside_HW] + 0.55 * colour_3
    return painted_HW3


def _enlarged(panel_HW3: npt.NDArray[np.float32]) -> Picture:
    height, width = panel_HW3.shape[:2]
    scale = PANEL_PIXELS / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(panel_HW3.round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC))


def _data_uri(picture_HW3: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture_HW3).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _edge(mask_HW: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the mask's inner border, two pixels wide: one would vanish where the page shrinks the panel."""
    return np.asarray(mask_HW & ~core(core(mask_HW)))
