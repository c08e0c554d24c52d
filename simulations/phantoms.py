"""Write phantom hospitals in the layout that `icmoe.data.folder` reads: made-up heads, no patient behind them.

The hospitals differ in contrast, noise, shading, sharpness, field of view, lesion size and share of patients with a
lesion. Bright normal structures (fat, caps of the ventricles, small spots) keep brightness alone from finding it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

from icmoe.atomic import read_regular
from icmoe.data.splits import COLUMNS, SPACING_COLUMNS, SPLITS
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from simulations.anatomy import Head, Lesion

Picture = npt.NDArray[np.uint8]

ABOUT = "README.md"
_NOT_WRITTEN = "Nothing was written."


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomSite:
    """One made-up hospital.

    Parameters
    ----------
    name
        Name of the site and of its folder.
    train_patients
        Patients in the split train, 0 or more.
    val_patients
        Patients in the split val, 0 or more.
    test_patients
        Patients in the split test, 0 or more.
    slices_per_patient
        Neighbouring cross-sections of each head, 1 or more.
    lesion_share
        Share of patients with a lesion, 0 to 1; rounded per split, at least one where above 0.
    lesion_radius_mm
        Smallest and largest mean radius of a lesion.
    lesion_contrast
        Brightness of a lesion above white matter (which is 0.42), 0 to 1.
    tissue_contrast
        Difference of grey to white matter relative to the usual, 0 to 2.
    brightness
        Grey value of brightness 1, 32 to 255.
    shading
        Strength of the smooth shading across the picture (standard deviation of its logarithm), 0 to 1.
    noise
        Standard deviation of the Rician noise, brightness units, 0 to 1.
    blur_mm
        Standard deviation of the blur, mm, 0 or more.
    field_of_view_mm
        Side of the square picture, mm; below about 190 the head is cut by the frame.
    slice_spacing_mm
        Distance of neighbouring slices, mm.
    """

    name: str
    train_patients: int
    val_patients: int
    test_patients: int
    slices_per_patient: int = 3
    lesion_share: float = 1.0
    lesion_radius_mm: tuple[float, float] = (13.0, 22.0)
    lesion_contrast: float = 0.32
    tissue_contrast: float = 1.0
    brightness: float = 220.0
    shading: float = 0.10
    noise: float = 0.03
    blur_mm: float = 0.8
    field_of_view_mm: float = 196.0
    slice_spacing_mm: float = 6.0

    def patients(self, split: str) -> int:
        """Return the number of patients of one split."""
        return {"train": self.train_patients, "val": self.val_patients, "test": self.test_patients}[split]


DEFAULT_SITES = (
    PhantomSite(name="Alder", train_patients=6, val_patients=1, test_patients=2),
    PhantomSite(
        name="Birch",
        train_patients=4,
        val_patients=1,
        test_patients=2,
        lesion_contrast=0.26,
        tissue_contrast=0.7,
        brightness=160.0,
        noise=0.05,
        shading=0.22,
        lesion_radius_mm=(11.0, 18.0),
    ),
    PhantomSite(
        name="Cedar",
        train_patients=3,
        val_patients=1,
        test_patients=1,
        lesion_share=0.7,
        lesion_contrast=0.38,
        tissue_contrast=1.4,
        brightness=240.0,
        blur_mm=1.7,
        field_of_view_mm=215.0,
        lesion_radius_mm=(15.0, 26.0),
    ),
    PhantomSite(
        name="Dogwood",
        train_patients=1,
        val_patients=1,
        test_patients=1,
        lesion_contrast=0.28,
        brightness=120.0,
        noise=0.035,
        shading=0.15,
        field_of_view_mm=184.0,
        slice_spacing_mm=4.0,
    ),
)
"""Four hospitals of unequal size: 24 patients, 72 images."""


def write_phantoms(root: Path, *, seed: int, sites: Sequence[PhantomSite] = DEFAULT_SITES, size_px: int = 128) -> None:
    """Write phantom hospitals; the folder appears complete or not at all, and the same seed gives the same bytes.

    A patient depends on seed, site and its own number only: more patients or sites leave the others as they are.

    Parameters
    ----------
    root
        Folder to create; absent or empty.
    seed
        Origin of all randomness, 0 or more.
    sites
        The hospitals.
    size_px
        Side of the pictures, 32 to 1024 pixels.

    Raises
    ------
    IcmoeError
        210 for what does not fit, all at once; 115 where the folder cannot be written.
    """
    faults = [_unfit(*problem) for problem in _problems(seed, sites, size_px)]
    if faults:
        raise IcmoeError(*faults)
    temporary: Path | None = None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
        _fill(temporary, seed, sites, size_px)
        temporary.chmod(0o755)  # mkdtemp made it private
        os.replace(temporary, root)  # noqa: PTH105 - the same call as everywhere else for "complete or not at all"
    except OSError as error:
        raise IcmoeError(Fault(number=115, where=str(root), value=error.strerror or "", did=_NOT_WRITTEN)) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, seed: int, sites: Sequence[PhantomSite], size_px: int) -> None:
    rows: dict[str, list[tuple[str, ...]]] = {split: [] for split in SPLITS}
    for site in sites:
        for part in ("images", "masks"):
            (folder / site.name / part).mkdir(parents=True)
        for split, patient, has_lesion in _patients(site):
            pictures = _scan(_generator(seed, site.name, patient), site, size_px, has_lesion=has_lesion)
            for index, (image_HW, mask_HW) in enumerate(pictures, start=1):
                names = [f"{site.name}/{part}/{site.name}_{patient}_{index:03d}.png" for part in ("images", "masks")]
                for name, pixels_HW in zip(names, (image_HW, mask_HW), strict=True):
                    Image.fromarray(pixels_HW).save(folder / name)
                rows[split].append((split, site.name, patient, str(index), *names, *_spacing(site, size_px)))
    (folder / "splits").mkdir()
    for split in SPLITS:
        _write_split(folder / "splits" / f"{split}.csv", rows[split])
    (folder / ABOUT).write_text(_about(seed, size_px), encoding="utf-8")


def _about(seed: int, size_px: int) -> str:
    drawn = f"Made-up heads, seed {seed}, {size_px} x {size_px} pixels; no patient stands behind them."
    return f"# Phantom hospitals\n\n{drawn} Mask: 0 background, 255 lesion.\n"


def require_drawn_alike(root: Path, *, seed: int, size_px: int) -> None:
    """Refuse phantoms that are there already but were drawn with another seed or size: a result would name what it is not of.

    Raises
    ------
    IcmoeError
        502 where they were.
    """
    try:
        alike = read_regular(root / ABOUT) == _about(seed, size_px).encode()
    except OSError:
        alike = False
    if not alike:
        what, limit = "phantoms of another seed or size are there", f"seed {seed}, {size_px} pixels"
        todo = "Choose another --out, or remove that folder."
        raise IcmoeError(Fault(number=502, where=str(root), what=what, limit=limit, did=NOT_STARTED, todo=todo))


def _write_split(path: Path, rows: Sequence[tuple[str, ...]]) -> None:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow((*COLUMNS, *SPACING_COLUMNS))
    writer.writerows(rows)
    path.write_text(lines.getvalue(), encoding="utf-8")


def _patients(site: PhantomSite) -> Iterator[tuple[str, str, bool]]:
    """Yield split, name and "has a lesion"; names are numbered per split, so that splits can grow on their own."""
    for split in SPLITS:
        count = site.patients(split)
        with_lesion = max(1, round(site.lesion_share * count)) if site.lesion_share > 0.0 else 0
        for number in range(count):
            yield split, f"{split}{number + 1:04d}", number < with_lesion


def _spacing(site: PhantomSite, size_px: int) -> tuple[str, str, str]:
    pixel_mm = f"{site.field_of_view_mm / size_px:.6g}"
    return (f"{site.slice_spacing_mm:.6g}", pixel_mm, pixel_mm)


def _generator(seed: int, *parts: str) -> np.random.Generator:
    digest = hashlib.sha256("/".join([str(seed), *parts]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _scan(rng: np.random.Generator, site: PhantomSite, size_px: int, *, has_lesion: bool) -> list[tuple[Picture, Picture]]:
    """Return image and mask of each slice of one patient, from below upwards."""
    pixel_mm = site.field_of_view_mm / size_px
    middle_mm = float(rng.uniform(4.0, 38.0))
    lesion = _lesion(rng, site, middle_mm)
    head = Head(rng, lesion if has_lesion else None, tissue_contrast=site.tissue_contrast, softness_mm=max(0.7, 0.55 * pixel_mm))
    shift_mm, tilt = rng.normal(0.0, 2.0, 2), float(rng.normal(0.0, 0.06))
    axis_mm = (np.arange(size_px) + 0.5) * pixel_mm - site.field_of_view_mm / 2.0
    across_HW, down_HW = np.meshgrid(axis_mm - shift_mm[0], axis_mm - shift_mm[1])
    x_HW = across_HW * np.cos(tilt) - down_HW * np.sin(tilt)
    y_HW = -(across_HW * np.sin(tilt) + down_HW * np.cos(tilt))
    shading_HW = np.exp(site.shading * _smooth(rng, across_HW, down_HW, site.field_of_view_mm))
    count = site.slices_per_patient
    heights_mm = middle_mm + site.slice_spacing_mm * (np.arange(count) - (count - 1) / 2.0)
    pictures = []
    for z_mm in heights_mm:
        brightness_HW, lesion_HW = head.section(x_HW, y_HW, float(z_mm))
        blurred_HW = np.asarray(gaussian_filter(brightness_HW * shading_HW, site.blur_mm / pixel_mm))
        pictures.append((_grey(rng, blurred_HW, site), lesion_HW.astype(np.uint8) * np.uint8(255)))
    return pictures


def _lesion(rng: np.random.Generator, site: PhantomSite, middle_mm: float) -> Lesion:
    """Return a lesion beside the midline, some of it in or near the middle slice."""
    side, angle, radius = rng.choice((-1.0, 1.0)), rng.uniform(-1.3, 1.3), rng.uniform(*site.lesion_radius_mm)
    out = rng.uniform(0.50, 0.85)
    return Lesion(
        centre_mm=(
            float(side * 44.0 * out * np.cos(angle)),
            float(60.0 * out * np.sin(angle)),
            middle_mm + float(rng.normal(0.0, 0.3) * radius),
        ),
        radius_mm=float(radius),
        contrast=float(site.lesion_contrast * rng.uniform(0.85, 1.15)),
        edge_mm=float(rng.uniform(1.5, 4.0)),
        core=float(rng.choice((0.0, 0.0, rng.uniform(0.4, 0.9)))),
    )


def _smooth(
    rng: np.random.Generator, across_HW: npt.NDArray[np.float64], down_HW: npt.NDArray[np.float64], span_mm: float
) -> npt.NDArray[np.float64]:
    """Return a smooth field of about unit variance: a tilted and curved surface."""
    u, v = 2.0 * across_HW / span_mm, 2.0 * down_HW / span_mm
    terms = np.stack([u, v, u * v, u**2 - 1.0 / 3.0, v**2 - 1.0 / 3.0])
    return np.asarray(np.tensordot(rng.normal(0.0, 1.0, 5), terms, axes=1))


def _grey(rng: np.random.Generator, brightness_HW: npt.NDArray[np.float64], site: PhantomSite) -> Picture:
    real, imaginary = rng.normal(0.0, site.noise, (2, *brightness_HW.shape))
    noisy_HW = np.hypot(brightness_HW + real, imaginary)
    return np.asarray(np.clip(np.rint(noisy_HW * site.brightness), 0, 255), dtype=np.uint8)


_RANGES: dict[str, tuple[float, float]] = {
    "train_patients": (0, 100_000),
    "val_patients": (0, 100_000),
    "test_patients": (0, 100_000),
    "slices_per_patient": (1, 100),
    "lesion_share": (0.0, 1.0),
    "lesion_contrast": (0.0, 1.0),
    "tissue_contrast": (0.0, 2.0),
    "brightness": (32.0, 255.0),
    "shading": (0.0, 1.0),
    "noise": (0.0, 1.0),
    "blur_mm": (0.0, 20.0),
    "field_of_view_mm": (50.0, 1000.0),
    "slice_spacing_mm": (0.1, 100.0),
}


def _problems(seed: int, sites: Sequence[PhantomSite], size_px: int) -> Iterator[tuple[str, object, str]]:
    """Yield option, value and limit of everything that does not fit."""
    if not 0 <= seed < 2**63:
        yield "seed", seed, "0 to 2^63 - 1"
    if not 32 <= size_px <= 1024:
        yield "size_px", size_px, "32 to 1024"
    names = [site.name for site in sites]
    if not names or len(set(names)) < len(names):
        yield "sites", ", ".join(names) or "none", "at least one, each name once"
    for site in sites:
        yield from _problems_of_site(site)


def _problems_of_site(site: PhantomSite) -> Iterator[tuple[str, object, str]]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", site.name) or site.name == "splits":
        yield "name", repr(site.name), "letters, digits and . _ -, at most 64, not splits"
    if sum(site.patients(split) for split in SPLITS) < 1:
        yield f"{site.name}: patients", 0, "at least 1 in all splits together"
    low, high = site.lesion_radius_mm
    if not 1.0 <= low <= high <= 60.0:
        yield f"{site.name}: lesion_radius_mm", site.lesion_radius_mm, "1 to 60, the smaller first"
    for option, (least, most) in _RANGES.items():
        value = getattr(site, option)
        if not least <= value <= most:
            yield f"{site.name}: {option}", value, f"{least:g} to {most:g}"


def _unfit(option: str, value: object, limit: str) -> Fault:
    what = "option of the phantoms is outside its range"
    return Fault(number=210, where=option, what=what, value=str(value), limit=limit, did=_NOT_WRITTEN, todo="Change the option.")
