"""Pixels that are not as their header says are refused before they are decoded, and those that are come out as they went in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_builders import image, save
from exports import read_frames
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from icmoe.data.ingest.refusals import Refusal

ROWS, COLUMNS = np.mgrid[:48, :56]
U12 = (COLUMNS * 60 + ROWS * 9).astype(np.uint16)
U8 = (U12 >> 4).astype(np.uint8)
S12 = U12.astype(np.int16) - 2048
TWELVE = {"BitsStored": 12, "HighBit": 11}
FRAMES = np.stack([U12, U12[::-1], U12[:, ::-1]])


def found(data: Dataset, folder: Path, number: int = 0) -> np.ndarray | Refusal:
    ((_, grey),) = read_frames(save(data, folder / "x"), [number])
    return grey


def reason(data: Dataset, folder: Path) -> str:
    refusal = found(data, folder)
    assert isinstance(refusal, Refusal)
    assert refusal.number == 118
    return refusal.why


@pytest.mark.parametrize("columns", [48, 54, 57, 64, 112])
def test_run_lengths_of_another_size_than_the_header_says_are_refused(columns: int, tmp_path: Path):
    data = pydicom.dcmread(save(image(np.resize(U12, (48, columns)), **TWELVE), tmp_path / "plain"))
    data.compress(RLELossless, generate_instance_uid=False)
    data.Columns = 56
    reason(data, tmp_path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_plain_pixels_of_twice_the_depth_are_refused_and_a_tail_is_not(syntax: str, tmp_path: Path):
    assert "twice" in reason(image(U12, syntax, BitsAllocated=8, BitsStored=8, HighBit=7), tmp_path)
    assert np.array_equal(found(image(U12, syntax, PixelData=U12.tobytes() + bytes(512), **TWELVE), tmp_path), U12)


def without_meta(path: Path) -> Path:
    """Take preamble and meta header away."""
    data = path.read_bytes()
    path.write_bytes(data[144 + int.from_bytes(data[140:144], "little") :])
    return path


@pytest.mark.parametrize("largest", [2**26, 10])
def test_compressed_pixels_under_a_syntax_of_plain_ones_are_refused(
    largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("icmoe.data.ingest.stored.WHOLE_BYTES", largest)
    noise = np.random.default_rng(0).integers(0, 65536, U12.shape).astype(np.uint16)
    data = pydicom.dcmread(save(image(noise), tmp_path / "plain"))
    data.compress(RLELossless, generate_instance_uid=False)
    ((_, refusal),) = read_frames(without_meta(save(data, tmp_path / "x")), [0])
    assert isinstance(refusal, Refusal)
    assert "transfer syntax is missing" in refusal.why


@pytest.mark.parametrize("largest", [2**26, 10])
@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless],
)
def test_large_objects_are_read_as_small_ones_are(
    syntax: str, meta: bool, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("icmoe.data.ingest.stored.WHOLE_BYTES", largest)
    if not meta and syntax in {DeflatedExplicitVRLittleEndian, RLELossless}:
        pytest.skip("nothing else names the compression")
    if syntax == RLELossless:
        data = pydicom.dcmread(save(image(FRAMES, **TWELVE), tmp_path / "plain"))
        data.compress(RLELossless, generate_instance_uid=False)
    else:
        data = image(FRAMES.byteswap() if syntax == ExplicitVRBigEndian else FRAMES, syntax, **TWELVE)
    path = save(data, tmp_path / "x")
    read = dict(read_frames(path if meta else without_meta(path), [2, 0]))
    assert sorted(read) == [0, 2]
    assert all(np.array_equal(read[number], FRAMES[number]) for number in read)


def test_one_pixel_and_its_padding_are_not_twice_a_pixel(tmp_path: Path):
    assert np.array_equal(found(image(U8[:1, 1:2]), tmp_path), U8[:1, 1:2])


@pytest.mark.parametrize("largest", [2**26, 10])
@pytest.mark.parametrize("shape", [(33, 31), (5, 7), (48, 56)])
def test_frames_of_single_bits_need_not_begin_with_a_byte(
    shape: tuple[int, int], largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("icmoe.data.ingest.stored.WHOLE_BYTES", largest)
    bits = np.random.default_rng(3).random((9, *shape)) > 0.5
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    data = image(bits.astype(np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed + b"\0" * (len(packed) % 2))
    data["PixelData"].VR = "OB"
    read = dict(read_frames(save(data, tmp_path / "x"), range(9)))
    assert all(np.array_equal(read[number], bits[number]) for number in range(9))
