"""A made-up head as functions of position: sections through one head fit together, since all of it is three-dimensional.

Axes in millimetres from the head's centre: x to the right of the picture, y towards the face, z towards the crown.
Grey values resemble a FLAIR image: fluid dark, grey matter a little brighter than white, abnormal tissue bright.
Nothing here comes from a person.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Grid = npt.NDArray[np.float64]
Point = tuple[Grid, Grid, Grid]
Field = Callable[[Point], Grid]

SCALP_MM, SKULL_MM, FLUID_MM = 5.0, 6.0, 2.5
BRAIN_STARTS_MM = SCALP_MM + SKULL_MM + FLUID_MM
FLUID, WHITE, GREY, FAT, BONE, MARROW, SPOT = 0.10, 0.42, 0.57, 0.74, 0.06, 0.30, 0.70
FOLD_WAVELENGTH_MM = 21.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesion:
    """An irregular bright region with a fuzzy edge.

    Parameters
    ----------
    centre_mm
        Position x, y, z.
    radius_mm
        Mean radius.
    contrast
        Brightness above white matter, on the scale where white matter is 0.42.
    edge_mm
        Width of the transition at the rim.
    core
        Darkening of the middle, 0 (none) to 1 (as dark as fluid).
    """

    centre_mm: tuple[float, float, float]
    radius_mm: float
    contrast: float
    edge_mm: float
    core: float


class Head:
    """One head, fixed by a random generator.

    Parameters
    ----------
    rng
        Source of all its traits; drawn from in a fixed order.
    lesion
        The abnormal region, or None for a healthy head.
    tissue_contrast
        Difference of grey to white matter relative to the usual, 0 to 2.
    softness_mm
        Width of anatomical edges, at least half a pixel so that sections are free of stairs.
    """

    def __init__(self, rng: np.random.Generator, lesion: Lesion | None, *, tissue_contrast: float, softness_mm: float) -> None:
        self.lesion = lesion
        self._grey = WHITE + (GREY - WHITE) * tissue_contrast
        self._soft = softness_mm
        self._axes_mm = tuple(np.array([72.0, 91.0, 84.0]) * rng.uniform(0.95, 1.05, 3))
        self._ventricle_scale = float(rng.uniform(0.75, 1.5))
        self._shape, self._folds, self._depth = _waves(rng, 90.0, 12), _waves(rng, FOLD_WAVELENGTH_MM, 24), _waves(rng, 45.0, 12)
        self._bend, self._texture, self._patches = _waves(rng, 60.0, 8), _waves(rng, 7.0, 24), _waves(rng, 30.0, 12)
        self._rim, self._lesion_texture = _waves(rng, 28.0, 16), _waves(rng, 11.0, 16)
        self._spots_mm = rng.uniform((-42.0, -50.0, -5.0, 1.8), (42.0, 50.0, 45.0, 4.2), (28, 4))

    def section(self, x_HW: Grid, y_HW: Grid, z_mm: float) -> tuple[Grid, npt.NDArray[np.bool_]]:
        """Return brightness (0 to about 1) and the lesion's pixels of the section at height z.

        Parameters
        ----------
        x_HW
            Position of each pixel across, mm.
        y_HW
            Position of each pixel towards the face, mm.
        z_mm
            Height of the section.
        """
        at = (x_HW, y_HW, np.full_like(x_HW, z_mm))
        depth_HW = self._depth_mm(at)
        inside_HW = self._step(depth_HW - BRAIN_STARTS_MM)
        brain_HW = self._brain(at, depth_HW - BRAIN_STARTS_MM)
        membership_HW = self._membership(at)
        if self.lesion is not None:
            brain_HW = _mix(brain_HW, self._lesion_brightness(at, self.lesion), 0.92 * membership_HW)
        picture_HW = _mix(self._shell(depth_HW), brain_HW, inside_HW)
        return picture_HW, (membership_HW > 0.5) & (depth_HW > BRAIN_STARTS_MM)

    def _step(self, distance_mm: Grid) -> Grid:
        """Return 0 to 1 across an edge at distance 0."""
        return np.asarray(0.5 * (1.0 + np.tanh(distance_mm / self._soft)))

    def _depth_mm(self, at: Point) -> Grid:
        """Return the depth below the skin, negative outside."""
        x, y, z = at
        across, along, up = self._axes_mm
        narrower = across * (1.0 - 0.09 * y / along)
        radius = np.sqrt((x / narrower) ** 2 + (y / along) ** 2 + (z / up) ** 2)
        return np.asarray((1.0 - radius) * 80.0 + 1.1 * self._shape(at))

    def _shell(self, depth_mm: Grid) -> Grid:
        """Return skin and fat, two tables of bone with marrow between them, and the fluid below."""
        layers = [(0.0, FAT), (SCALP_MM, BONE), (SCALP_MM + 2.0, MARROW), (SCALP_MM + 4.3, BONE), (SCALP_MM + SKULL_MM, FLUID)]
        brightness = np.zeros_like(depth_mm)
        for start_mm, level in layers:
            brightness = _mix(brightness, np.full_like(depth_mm, level), self._step(depth_mm - start_mm))
        return brightness

    def _brain(self, at: Point, depth_mm: Grid) -> Grid:
        grey, fluid = self._cortex(at, depth_mm)
        brightness = _mix(np.full_like(depth_mm, WHITE), np.full_like(depth_mm, self._grey), np.maximum(grey, self._nuclei(at)))
        brightness = brightness + 0.02 * self._texture(at) + 0.025 * self._patches(at)
        ventricle, rim = self._ventricles(at)
        brightness = _mix(brightness, np.full_like(depth_mm, SPOT), 0.75 * np.maximum(rim, self._spots(at)))
        return _mix(brightness, np.full_like(depth_mm, FLUID), np.maximum(fluid, ventricle))

    def _cortex(self, at: Point, depth_mm: Grid) -> tuple[Grid, Grid]:
        """Return shares of grey matter and of fluid: folds follow the zero surfaces of a random field and fade inwards."""
        fold_mm = np.abs(self._folds(at)) * FOLD_WAVELENGTH_MM / (2.0 * np.pi) * 1.3
        reach = self._step((17.0 + 6.0 * self._depth(at) - depth_mm) / 3.0)
        middle_mm = np.abs(at[0] + 1.2 * self._bend(at))
        cleft = self._step((29.0 - depth_mm) / 3.0)
        grey = np.maximum.reduce(
            [self._step(3.2 - depth_mm), self._step(3.4 - fold_mm) * reach, self._step(3.8 - middle_mm) * cleft]
        )
        # Fluid in a fold lies deeper than half its width, so that the brain's outline stays closed where folds end.
        fluid = np.maximum(
            self._step(0.9 - fold_mm) * reach * self._step((12.0 - depth_mm) / 4.0), self._step(1.1 - middle_mm) * cleft
        )
        return grey, fluid

    def _nuclei(self, at: Point) -> Grid:
        """Return the share of the deep grey structures: thalamus, head of the caudate, putamen, on both sides."""
        parts = (
            ((10.0, -8.0, 6.0), (8.0, 13.0, 11.0)),
            ((14.5, 21.0, 12.0), (5.0, 8.0, 12.0)),
            ((27.0, 6.0, 4.0), (5.0, 14.0, 11.0)),
        )
        mirrored = (np.abs(at[0] + 0.8 * self._bend(at)), at[1], at[2])
        return np.asarray(np.maximum.reduce([self._ellipsoid(mirrored, centre, radii) for centre, radii in parts]))

    def _ventricles(self, at: Point) -> tuple[Grid, Grid]:
        """Return the share of the ventricles, and of the bright caps at their ends (normal, yet as bright as a lesion)."""
        x, y, z = np.abs(at[0] + 0.8 * self._bend(at)), at[1], at[2]
        scale = self._ventricle_scale
        width = scale * (3.4 + 0.0020 * (y - 4.0) ** 2)
        across, up = (x - self._ventricle_x(y)) / width, (z - 16.0 + 0.004 * (y - 4.0) ** 2) / (10.0 + 2.0 * scale)
        lateral = self._step((1.0 - np.sqrt(across**2 + up**2 + ((y + 6.0) / 38.0) ** 6)) * width)
        third = self._ellipsoid((x, y, z), (0.0, -4.0, -2.0), (1.5 + scale, 13.0, 9.0))
        ends = [(float(self._ventricle_x(np.asarray(end_y))), end_y, 15.0) for end_y in (32.0, -45.0)]
        caps = np.maximum.reduce([self._ellipsoid((x, y, z), end, (4.5, 4.0, 9.0)) for end in ends])
        return np.maximum(lateral, third), 0.8 * caps

    def _ventricle_x(self, y: Grid) -> Grid:
        """Return how far a lateral ventricle's axis lies from the midline."""
        return np.asarray(6.5 + 1.2 * self._ventricle_scale + 0.0085 * (y - 6.0) ** 2)

    def _spots(self, at: Point) -> Grid:
        """Return the share of small bright spots, which are no lesion."""
        near = [spot for spot in self._spots_mm if abs(spot[2] - at[2].flat[0]) < 2.0 * spot[3]]
        shares = [self._ellipsoid(at, (spot[0], spot[1], spot[2]), (spot[3], spot[3] * 1.4, spot[3])) for spot in near]
        return np.maximum.reduce(shares) if shares else np.zeros_like(at[0])

    def _ellipsoid(self, at: Point, centre_mm: tuple[float, float, float], radii_mm: tuple[float, float, float]) -> Grid:
        squares = [((axis - centre) / radius) ** 2 for axis, centre, radius in zip(at, centre_mm, radii_mm, strict=True)]
        return self._step((1.0 - np.sqrt(np.add.reduce(squares))) * min(radii_mm))

    def _membership(self, at: Point) -> Grid:
        if self.lesion is None:
            return np.zeros_like(at[0])
        outward_mm = self._from_lesion_mm(at, self.lesion)
        return np.asarray(0.5 * (1.0 - np.tanh(outward_mm / self.lesion.edge_mm)))

    def _from_lesion_mm(self, at: Point, lesion: Lesion) -> Grid:
        """Return the distance from the lesion's irregular rim, negative inside."""
        squares = [(axis - centre) ** 2 for axis, centre in zip(at, lesion.centre_mm, strict=True)]
        return np.asarray(np.sqrt(np.add.reduce(squares)) - lesion.radius_mm * (1.0 + 0.17 * self._rim(at)))

    def _lesion_brightness(self, at: Point, lesion: Lesion) -> Grid:
        bright = WHITE + lesion.contrast * (1.0 + 0.22 * self._lesion_texture(at))
        in_core = self._step((-0.55 * lesion.radius_mm - self._from_lesion_mm(at, lesion)) / 2.0)
        return _mix(bright, np.full_like(bright, FLUID + 0.1), lesion.core * in_core)


def _mix(below: Grid, above: Grid, share: Grid) -> Grid:
    return np.asarray(below + (above - below) * share)


def _waves(rng: np.random.Generator, wavelength_mm: float, count: int) -> Field:
    """Return a smooth random field of about unit variance: a sum of plane waves in random directions."""
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    numbers = directions * (2.0 * np.pi / (wavelength_mm * rng.uniform(0.75, 1.35, (count, 1))))
    phases = rng.uniform(0.0, 2.0 * np.pi, count)

    def field(at: Point) -> Grid:
        total = np.zeros_like(at[0])
        for (along_x, along_y, along_z), phase in zip(numbers, phases, strict=True):
            total += np.cos(along_x * at[0] + along_y * at[1] + along_z * at[2] + phase)
        return np.asarray(total * np.sqrt(2.0 / count))

    return field
