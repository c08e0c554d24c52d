"""Exports of further programs: whose mask it is, and on which images it says what."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    image,
    put,
    same,
    save,
    scaled,
    segmentation,
    used,
    volume,
)
from exports import BACKGROUND, read_frames
from test_ingest_masks import as_nifti

from icmoe.study import Label

pytestmark = pytest.mark.usefixtures("in_this_process")
ANOTHER = np.random.default_rng(7).integers(0, 3000, VOLUME.shape).astype(np.uint16)
BOX = (2.4, 3.4, 12.6, 15.6)
FILLED = np.zeros((20, 24), np.uint8)
FILLED[3:13, 4:16] = 1
LIVER = (BACKGROUND, Label(name="liver", values=(1,)))


def nifti(place: Path, name: str, voxels: np.ndarray) -> None:
    path = place / "export" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(as_nifti(voxels, (2, 1, 0), [], voxels.dtype), path)


@pytest.mark.parametrize("differ", ["slopes", "depths"])
def test_inverted_slices_of_several_scales_stay_comparable(differ: str, tmp_path: Path):
    sources = volume(VOLUME, PhotometricInterpretation="MONOCHROME1")
    slopes = [1.0, 2.0, 0.5, 1.5, 3.0] if differ == "slopes" else [1.0] * 5
    for source, slope, bits in zip(sources, slopes, [12, 13, 14, 15, 16], strict=True):
        source.RescaleSlope, source.RescaleIntercept = slope, 0.0
        if differ == "depths":
            source.BitsStored, source.HighBit = bits, bits - 1
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")])
    want = [-slope * grey.astype(np.float64) for slope, grey in zip(slopes, VOLUME, strict=True)]
    assert same(used(tmp_path)[0], scaled(want))


def test_a_second_file_of_an_inverted_instance_is_its_copy(tmp_path: Path):
    sources = volume(VOLUME, PhotometricInterpretation="MONOCHROME1")
    for number, source in enumerate(sources):
        source.RescaleSlope, source.RescaleIntercept = 1.0 + number, 0.0
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")])
    for source in sources:
        source.InstitutionName = "Elm"
    put(tmp_path, sources, "again/{}")
    assert same(used(tmp_path)[1], MASKS)


def test_brightness_and_colour_differences_of_16_bits_are_read_by_brightness(tmp_path: Path):
    pixels = np.stack([VOLUME[0], VOLUME[1], VOLUME[2]], axis=-1)
    data = image(VOLUME[0], SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="YBR_FULL")
    data.PixelData = pixels.tobytes()
    ((_, found),) = read_frames(save(data, tmp_path / "x"), [0])
    assert same([found], [VOLUME[0]])
