"""A prediction as PNG: masks, overlays, the experts' disagreement, and which expert decided; on the source's pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from icmoe.study import Label

Colours = tuple[tuple[int, int, int], ...]

COLOURS = ((255, 176, 0), (150, 110, 255), (214, 80, 160), (0, 170, 120), (240, 100, 60), (90, 180, 240))
"""Of classes and experts, told apart with any colour vision; further ones start again."""
FILL = 0.4
"""Share of the colour inside a class; its border has all of it."""


def colour_of(index: int, colours: Colours = COLOURS) -> tuple[int, int, int]:
    """Return the colour of a class from 1, red, green and blue in 0 to 255."""
    return colours[(index - 1) % len(colours)]


def as_rgb(grey_HW: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Return a picture in [0, 1] as red, green and blue in 0 to 255, H W 3."""
    return np.repeat(np.clip(grey_HW, 0, 1).astype(np.float32)[..., None] * 255, 3, axis=2)


def mask_values(classes: npt.NDArray[np.uint8], labels: Sequence[Label]) -> npt.NDArray[Any]:
    """Return the first mask value of each class in the place of its index, so that the result is a mask of the study."""
    values = [label.values[0] for label in labels]
    return np.asarray(values, dtype=np.uint8 if max(values) < 256 else np.uint16)[classes]


def mask(values_HW: npt.NDArray[Any]) -> Image.Image:
    """Return mask values as a grey picture of 8 or 16 bits."""
    return Image.fromarray(values_HW)


def overlay(grey_HW: npt.NDArray[np.float32], classes_HW: npt.NDArray[np.uint8]) -> Image.Image:
    """Return a picture in [0, 1] with its classes tinted and outlined."""
    painted_HW3 = as_rgb(grey_HW)
    for index in np.unique(classes_HW[classes_HW > 0]):
        inside_HW = classes_HW == index
        share_HW1 = np.where(core(inside_HW), FILL, 1.0)[..., None] * inside_HW[..., None]
        painted_HW3 += share_HW1 * (np.asarray(colour_of(int(index)), np.float32) - painted_HW3)
    return Image.fromarray(painted_HW3.round().astype(np.uint8))


def shares(map_HW: npt.NDArray[np.float32]) -> Image.Image:
    """Return a map in [0, 1] as grey of 8 bits: 255 is 1."""
    return Image.fromarray((map_HW * 255.0).round().astype(np.uint8))


def choices(map_HW: npt.NDArray[np.uint8]) -> Image.Image:
    """Return a map of indices as a picture with a palette: its values are the indices."""
    picture = Image.frombytes("P", (map_HW.shape[1], map_HW.shape[0]), map_HW.tobytes())
    picture.putpalette([value for index in range(1, int(map_HW.max()) + 2) for value in colour_of(index)])
    return picture


def png(picture: Image.Image) -> bytes:
    """Return a picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def core(inside_HW: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels inside whose four neighbours are inside too."""
    padded = np.pad(inside_HW, 1)
    return np.asarray(inside_HW & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])
