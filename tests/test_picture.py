"""Pictures as values and ranks: the same pixels, the same counts, and digests that no rising scale changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from dicom_builders import image, save, series_window
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from icmoe.data.ingest.headers import read_header
from icmoe.data.ingest.pixels import plain_pixels_of, read_pictures
from icmoe.data.picture import Picture, picture_digest, picture_of, ranks_digest
from icmoe.window import ValueCounts, Window, normalise

SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=9)
WHOLE = st.sampled_from(["u1", "i1", "<u2", "<i2", ">u2", ">i2", "<i4", "<i8"]).flatmap(lambda kind: arrays(kind, SHAPES))
REAL = st.sampled_from([np.float32, np.float64]).flatmap(lambda kind: arrays(kind, SHAPES))
FEW = arrays(np.int16, SHAPES, elements=st.integers(-3, 40))
GREY = np.random.default_rng(3).integers(0, 4000, (12, 15)).astype(np.uint16)


def digest(grey: npt.NDArray[np.generic], low: float = 0.0, high: float = 1.0) -> str:
    picture = picture_of(grey)
    return picture_digest(ranks_digest(picture.ranks_HW), picture.values_V, Window(low, high))


@given(WHOLE | REAL | FEW)
@settings(max_examples=200, deadline=None)
def test_a_picture_has_the_pixels_that_it_was_made_of(grey: npt.NDArray[np.generic]):
    picture = picture_of(grey)
    assert picture.grey_HW.dtype == grey.dtype
    assert np.array_equal(picture.grey_HW, grey, equal_nan=grey.dtype.kind == "f")
    assert picture.counts_V.sum() == grey.size
    assert picture.counts_V.min() >= 1
    assert not bool((picture.values_V[1:] <= picture.values_V[:-1]).any())


@given(FEW, st.lists(st.integers(-2, 2), min_size=44, max_size=44))
@settings(max_examples=100, deadline=None)
def test_what_is_done_to_values_is_done_to_pixels(grey: npt.NDArray[np.int16], table: list[int]):
    """A table joins values and turns their order round, as VOI tables, padding and MONOCHROME1 do."""
    done = np.asarray(table, np.int16)
    picture = picture_of(grey)
    other = picture.of_values(done[picture.values_V + 3])
    assert np.array_equal(other.grey_HW, done[grey + 3])
    expected = picture_of(done[grey + 3])
    assert all(np.array_equal(getattr(other, name), getattr(expected, name)) for name in ("values_V", "counts_V", "ranks_HW"))


@given(FEW, st.sampled_from([0.25, 1.0, 16.0]), st.integers(-1000, 1000), st.sampled_from([np.int32, np.float32, np.float64]))
@settings(max_examples=100, deadline=None)
def test_equal_pictures_on_other_scales_have_equal_digests(grey: npt.NDArray[np.int16], slope: float, shift: int, kind: type):
    stored = (grey * 4 * slope + shift).astype(kind)
    assert digest(grey, -3.0, 40.0) == digest(stored, -12.0 * slope + shift, 160.0 * slope + shift)


def test_another_pixel_shape_or_window_gives_another_digest():
    changed = GREY.copy()
    changed[0, 0] = GREY[0, 1]
    digests = [digest(GREY, 0, 4000), digest(changed, 0, 4000), digest(GREY.T, 0, 4000), digest(GREY, 0, 3000)]
    digests += [digest(GREY.reshape(15, 12), 0, 4000), digest(GREY[::-1], 0, 4000)]
    assert len(set(digests)) == len(digests)


@given(st.lists(WHOLE | REAL, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_window_of_counts_is_that_of_all_pixels(greys: list[npt.NDArray[np.generic]]):
    counts = ValueCounts()
    for grey in greys:
        picture = picture_of(grey)
        counts.add_counts(picture.values_V, picture.counts_V)
    finite = np.concatenate([grey[np.isfinite(grey)].astype(np.float64).ravel() for grey in greys])
    if finite.size == 0:
        with pytest.raises(ValueError, match="finite"):
            counts.window()
        return
    assert counts.window() == counts.window() == series_window(greys)
    low, high = np.percentile(finite, [0.5, 99.5])
    if np.isfinite(high - low) and low < high:
        assert (counts.window().low, counts.window().high) == pytest.approx((low, high), rel=1e-9, abs=1e-300)


def test_more_values_than_are_kept_join_their_lower_neighbours_with_their_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ValueCounts, "MAX_VALUES", 4)
    counts, ones = ValueCounts(), np.ones(4, np.int64)
    counts.add_counts(np.array([0.5, 1.5, 2.5, 3.5]), ones)
    assert (counts.window().low, counts.window().high) == pytest.approx((0.515, 3.485)), "as many as are kept are exact"
    counts.add_counts(np.array([4.5, 5.5, 6.5, 7.5]), ones)
    assert counts.window() == Window(0.5, 6.5)  # two of 0.5, of 2.5, of 4.5 and of 6.5


def test_the_values_of_an_image_of_floats_are_all_kept():
    grey = np.random.default_rng(5).random((600, 700))
    window = series_window([grey])
    assert (window.low, window.high) == pytest.approx(tuple(np.percentile(grey, [0.5, 99.5])), rel=1e-9)


def test_values_on_the_scale_of_the_series_are_those_of_the_pixels():
    window = Window(100.0, 3000.0)
    picture = picture_of(GREY)
    assert np.array_equal(normalise(picture.values_V, window).take(picture.ranks_HW), normalise(GREY, window))


PLAIN = {
    "as stored": {},
    "rescaled": {"RescaleSlope": 0.5, "RescaleIntercept": -100},
    "turned round": {"PhotometricInterpretation": "MONOCHROME1"},
    "windowed": {"WindowCenter": [200, 300], "WindowWidth": [400, 50]},
    "bent": {"WindowCenter": 2000, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"},
    "padded": {"PixelPaddingValue": 5},
    "twelve bits": {"BitsStored": 12, "HighBit": 11},
    "high bits": {"BitsStored": 12, "HighBit": 15},
    "with something after the pixels": {"DataSetTrailingPadding": b"\0" * 64},
}
NOT_PLAIN = {
    "colour": {"PhotometricInterpretation": "RGB"},
    "a term that the standard has not": {"VOILUTFunction": "BENT"},
    "no sign": {"PixelRepresentation": None},
    "a slope that is no number": {"RescaleSlope": ""},
    "two frames": {"NumberOfFrames": 2},
    "other rows": {"Rows": 13},
}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_object_is_read_as_by_pydicom(name: str, syntax: str, tmp_path: Path):
    path = save(image(GREY, syntax, **PLAIN[name]), tmp_path / "x")
    known = plain_pixels_of(path, read_header(path))
    ((_, quick),) = read_pictures(path, [0], None, (known["plain"], known["pixels_at"]))
    ((_, whole),) = read_pictures(path, [0])
    assert isinstance(quick, Picture)
    assert isinstance(whole, Picture)
    assert quick.grey_HW.dtype == whole.grey_HW.dtype
    assert np.array_equal(quick.grey_HW, whole.grey_HW)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_odd_is_left_to_pydicom(name: str, tmp_path: Path):
    path = save(image(GREY, **NOT_PLAIN[name]), tmp_path / "x")
    assert plain_pixels_of(path, read_header(path)) == {}


def test_a_file_that_changed_since_its_header_was_read_is_read_anew(tmp_path: Path):
    path = save(image(GREY), tmp_path / "x")
    known = plain_pixels_of(path, read_header(path))
    save(image(GREY, PatientComments="longer than before", RescaleSlope=2, RescaleIntercept=0), path)
    ((_, picture),) = read_pictures(path, [0], None, (known["plain"], known["pixels_at"]))
    assert isinstance(picture, Picture)
    assert np.array_equal(picture.grey_HW, GREY * 2)
    assert pydicom.dcmread(path).RescaleSlope == 2
