"""Real series, each hospital's own encoding: the SEG read back equals the array prediction and lies where the images lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_builders import series_window
from exports import DATA
from PIL import Image
from predictions import array_prediction, loaded, planes_of, predicted, read_back, write_random_model

from icmoe.window import normalise

pytestmark = [pytest.mark.real, pytest.mark.skipif(not DATA.exists(), reason="the real hospital images are not here")]
LGG = DATA / "lgg-dicom"
GREY = {"CS": 1.0, "DU": 1.0, "HT": 16.0, "EZ": 16.0}
"""Stored grey values per step of the PNG files; `DU` says so in its rescale tags."""


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2.0 * float((one & other).sum()) / float(one.sum() + other.sum())


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmoe.predict.run.os.cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def model(make_study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "m.safetensors", make_study(backbone={"image_size": 64}))


@pytest.mark.parametrize("site", ["CS", "DU", "HT", "EZ"])
def test_a_seg_of_a_lgg_series_has_dice_one_with_the_array_and_the_geometry_of_the_source(site: str, model: Path, tmp_path: Path):
    source = sorted((LGG / site).iterdir())[0] / "FLAIR"
    record, faults = predicted(model, source, tmp_path / "out")
    assert not faults
    (stack,) = record["stacks"]
    headers = [pydicom.dcmread(source / path) for path, _ in stack["sources"]]
    heights = [float(header.ImagePositionPatient[2]) for header in headers]
    assert heights == sorted(heights)
    assert len(headers) == len(list(source.iterdir()))
    found = read_back(tmp_path / "out/001/segmentation.dcm", headers) > 0
    array = arrays_of(headers, model)
    assert array.any()
    assert not array.all()
    assert dice(found, array) == 1.0
    assert np.array_equal(found, array)
    stored = planes_of(tmp_path / "out/001/segmentation.dcm")
    by_uid = {header.SOPInstanceUID: header for header in headers}
    assert len(stored) == sum(bool(one.any()) for one in array)
    for (uid, _), plane in stored.items():
        header = by_uid[uid]
        want = (*header.ImagePositionPatient, *header.ImageOrientationPatient, *header.PixelSpacing)
        assert plane == tuple(float(value) for value in want)


def arrays_of(headers: list[pydicom.Dataset], model: Path) -> np.ndarray:
    """Return the array prediction from pixels that pydicom decodes and the standard's transforms applied by hand."""
    greys = []
    for header in headers:
        stored = header.pixel_array.astype(np.float64)
        grey = stored * float(header.get("RescaleSlope", 1.0)) + float(header.get("RescaleIntercept", 0.0))
        greys.append(4095.0 - grey if header.PhotometricInterpretation == "MONOCHROME1" else grey)
    window = series_window([grey for grey in greys if np.ptp(grey) > 0])
    parts = loaded(model)
    maps = [
        array_prediction(*parts, normalise(grey, window)) if np.ptp(grey) > 0 else np.zeros(grey.shape, int) for grey in greys
    ]
    return np.stack(maps) > 0


def test_every_multi_frame_and_compressed_sample_of_the_wheel_is_segmented_or_refused_by_number(model: Path, tmp_path: Path):
    from pydicom.data import get_testdata_file

    folder = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent
    record, faults = predicted(model, folder, tmp_path / "out", "png")
    assert len(record["stacks"]) > 20
    assert {fault.number for fault in faults} <= {117, 118, 142}
    for stack in record["stacks"]:
        masks = sorted((tmp_path / "out" / stack["folder"] / "mask").iterdir())
        assert len(masks) == stack["frames"]
        assert {Image.open(mask).size for mask in masks} == {(stack["columns"], stack["rows"])}


def test_phases_of_a_real_heart_are_a_segmentation_each(model: Path, tmp_path: Path):
    patient = DATA / "sunnybrook-lv-dicom/SCD0000301/cine"
    record, faults = predicted(model, patient, tmp_path / "out")
    assert not faults
    positions = [
        [tuple(pydicom.dcmread(patient / path, stop_before_pixels=True).ImagePositionPatient) for path, _ in stack["sources"]]
        for stack in record["stacks"]
    ]
    assert all(len(set(places)) == len(places) for places in positions)
