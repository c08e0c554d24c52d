"""Pixels that a header describes oddly, wrongly or not at all: read as they are meant, or refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_builders import common, enhanced, image, item, place, save
from exports import read_frames
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from icmoe.data.ingest.headers import Header, image_record, read_header, sequence
from icmoe.data.ingest.pixels import Shown, plain_pixels_of, read_pictures
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.refusals import Refusal, refusing

RNG = np.random.default_rng(8)
U12 = RNG.integers(0, 4096, (32, 40)).astype(np.uint16)
S12 = U12.astype(np.int16) - 2048
TWELVE = {"BitsStored": 12, "HighBit": 11}


def raw(data: Dataset, name: str, vr: str, value: bytes) -> Dataset:
    """Return the data set with an element of these bytes, whatever their form."""
    data._dict[Tag(name)] = RawDataElement(Tag(name), vr, len(value), value, 0, False, True)
    return data


def grey_of(data: Dataset, folder: Path, number: int = 0) -> np.ndarray:
    ((_, grey),) = read_frames(save(data, folder / "x"), [number])
    assert not isinstance(grey, Refusal), grey.why
    return grey


def reason_of(data: Dataset, folder: Path) -> Refusal:
    ((_, found),) = read_frames(save(data, folder / "x"), [0])
    assert isinstance(found, Refusal)
    return found


def test_a_panic_of_a_decoder_in_another_language_is_a_reason(tmp_path: Path):
    data = pydicom.dcmread(save(image(np.pad(U12, ((0, 0), (0, 2))), **TWELVE), tmp_path / "plain"))
    data.compress(RLELossless, generate_instance_uid=False)
    data.Columns = 40
    assert reason_of(data, tmp_path).number == 118


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_program_is_not_a_reason(kind: type[BaseException]):
    with pytest.raises(kind), refusing(118, "why"):
        raise kind


def table(first: int, entries: np.ndarray, vr: str) -> Dataset:
    data = Dataset()
    data.add_new("LUTDescriptor", vr, [len(entries), first, 16])
    data.add_new("LUTData", "OW", entries.tobytes())
    return data


STEPS = (np.arange(4096) * 16).astype(np.uint16)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(("first", "vr"), [(-1024, "SS"), (65536 - 1024, "US")])
def test_a_table_after_a_rescale_begins_below_zero_whatever_values_are_there(first: int, vr: str, syntax: str, tmp_path: Path):
    stored = (U12 % 2000 + 1100).astype(np.uint16)  # none of these is below zero after the rescale
    data = image(stored, syntax, RescaleSlope="1", RescaleIntercept="-1024", VOILUTSequence=[table(first, STEPS, vr)], **TWELVE)
    assert np.array_equal(grey_of(data, tmp_path), STEPS[stored])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("name", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_table_for_unsigned_values_begins_above_zero_whatever_its_kind_of_number(name: str, syntax: str, tmp_path: Path):
    stored = (40000 + U12).astype(np.uint16)
    data = image(stored, syntax, **{name: [table(40000 - 65536, STEPS, "SS")]})
    assert np.array_equal(grey_of(data, tmp_path), STEPS[U12])


@pytest.mark.parametrize(("first", "vr"), [(-2048, "SS"), (65536 - 2048, "US")])
def test_a_palette_for_signed_values_begins_below_zero_whatever_values_are_there(first: int, vr: str, tmp_path: Path):
    stored = np.abs(S12)
    data = image(stored, PhotometricInterpretation="PALETTE COLOR", **TWELVE)
    for colour in ("Red", "Green", "Blue"):
        data.add_new(f"{colour}PaletteColorLookupTableDescriptor", vr, [4096, first, 16])
        data.add_new(f"{colour}PaletteColorLookupTableData", "OW", STEPS.tobytes())
    assert np.array_equal(grey_of(data, tmp_path), STEPS[np.minimum(stored.astype(int) + 2048, 4095)])


@pytest.mark.parametrize("empty", ["PixelPaddingRangeLimit", "PixelPaddingValue"])
def test_an_empty_element_of_padding_says_nothing(empty: str, tmp_path: Path):
    data = image(S12, **TWELVE)
    data.add_new("PixelPaddingValue", "SS", -2048)
    raw(data, empty, "SS", b"")
    want = np.where(S12 == -2048, S12[S12 > -2048].min(), S12) if empty != "PixelPaddingValue" else S12
    assert np.array_equal(grey_of(data, tmp_path), want)


@pytest.mark.parametrize("slope", [b"0,5 ", b"0.5\\0.5 ", b"5D-1", b"nan "])
def test_a_slope_that_is_not_one_number_is_a_reason(slope: bytes, tmp_path: Path):
    reason = reason_of(raw(image(U12, RescaleIntercept="-7", **TWELVE), "RescaleSlope", "DS", slope), tmp_path)
    assert (reason.number, reason.why) == (118, "RescaleSlope is not one number")
    transform = raw(item(RescaleIntercept="-7"), "RescaleSlope", "DS", slope)
    enhanced = image(U12, SharedFunctionalGroupsSequence=[item(PixelValueTransformationSequence=[transform])], **TWELVE)
    assert reason_of(enhanced, tmp_path).why == reason.why


@pytest.mark.parametrize("intercept", [b"-1024,0", b"-1024\\0 ", b"HU"])
def test_an_intercept_that_is_not_one_number_is_a_reason(intercept: bytes, tmp_path: Path):
    reason = reason_of(raw(image(U12, RescaleSlope="1", **TWELVE), "RescaleIntercept", "DS", intercept), tmp_path)
    assert (reason.number, reason.why) == (118, "RescaleIntercept is not one number")


@pytest.mark.parametrize("photometric", ["RGB", "MONOCHROME2"])
def test_what_lies_above_the_stored_bits_is_no_colour_either(photometric: str, tmp_path: Path):
    clean = np.stack([U12, U12 // 2, U12 // 3], axis=-1) if photometric == "RGB" else U12
    planes = {"SamplesPerPixel": 3, "PlanarConfiguration": 0} if photometric == "RGB" else {}
    pictures = []
    for name, stored in (("clean", clean), ("overlaid", clean | 0x8000)):
        data = image(U12, PhotometricInterpretation=photometric, **TWELVE, **planes)
        data.PixelData = stored.astype("<u2").tobytes()
        pictures.append(grey_of(data, tmp_path / name))
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("name", ["SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"])
def test_what_a_header_lacks_is_not_called_damage(name: str, tmp_path: Path):
    told = f"its header lacks {name}, without which no pixel can be read"
    assert reason_of(image(U12, **TWELVE | {name: None}), tmp_path).why == told


def test_a_header_alone_is_not_called_damage(tmp_path: Path):
    assert reason_of(image(U12, **TWELVE, PixelData=None), tmp_path).why.startswith("the file holds no pixels")


@pytest.mark.parametrize(("written", "want"), [("monochrome2", U12), ("Monochrome1", 4095 - U12)])
def test_the_kind_of_a_picture_may_be_written_small(written: str, want: np.ndarray, tmp_path: Path):
    assert np.array_equal(grey_of(image(U12, PhotometricInterpretation=written, **TWELVE), tmp_path), want)


def test_two_slopes_of_a_plain_object_are_a_reason_too(tmp_path: Path):
    path = save(image(U12, RescaleSlope=["1", "2"], RescaleIntercept="-7", **TWELVE), tmp_path / "x")
    plain = plain_pixels_of(path, read_header(path))
    ((_, found),) = read_pictures(path, [0], plain=(plain["plain"], plain["pixels_at"]))
    assert isinstance(found, Refusal)
    assert found.number == 118


@pytest.mark.parametrize("slope", [b"", b"  ", b"0 ", b"1\0"])
def test_a_slope_of_nothing_or_0_counts_as_not_given(slope: bytes, tmp_path: Path):
    data = raw(image(U12, RescaleIntercept="-7", **TWELVE), "RescaleSlope", "DS", slope)
    assert np.array_equal(grey_of(data, tmp_path), U12 - 7.0)


@pytest.mark.parametrize(
    ("centre", "width"),
    [
        (b"100\\" * 8 + b"100 ", b"50\\" * 8 + b"50"),
        (b"100\\", b"50\\60 "),
        (b"100\\ ", b"50"),
        (b"100\\abc ", b"50"),
    ],
)
def test_the_first_window_bounds_the_series_whatever_follows_it(centre: bytes, width: bytes, tmp_path: Path):
    data = raw(raw(image(U12, **TWELVE), "WindowCenter", "DS", centre), "WindowWidth", "DS", width)
    shown = Shown()
    list(read_pictures(save(data, tmp_path / "x"), [0], shown))
    assert (shown.low, shown.high) == (75.0, 124.0)


def test_a_mosaic_of_slices_is_not_taken_as_one_slice(tmp_path: Path):
    path = save(image(U12, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], **TWELVE), tmp_path / "x")
    with pytest.raises(Refusal, match="mosaic") as refusal:
        image_record(read_header(path), Pseudonyms(bytes(32)))
    assert refusal.value.number == 119


def test_functional_groups_are_looked_up_once_for_all_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looks: list[str] = []

    def looked(data: Header, name: str) -> Sequence[Dataset]:
        looks.append(name)
        return sequence(data, name)

    monkeypatch.setattr("icmoe.data.ingest.groups.sequence", looked)
    slopes = [item(PixelValueTransformationSequence=[item(RescaleSlope=str(n), RescaleIntercept="0")]) for n in (1, 2, 3)]
    path = save(image(np.stack([U12] * 3), PerFrameFunctionalGroupsSequence=slopes, **TWELVE), tmp_path / "x")
    assert [np.array_equal(grey, U12 * (n + 1)) for n, grey in read_frames(path, range(3))] == [True] * 3
    assert looks.count("PerFrameFunctionalGroupsSequence") == 1


def test_what_a_frame_says_of_itself_goes_before_what_all_frames_share(tmp_path: Path):
    def transform(slope: str) -> Dataset:
        return item(RescaleSlope=slope, RescaleIntercept="0", RescaleType="US")

    own = [place((0.0, 0.0, 5.0 * number), stack=number + 1) for number in range(3)]
    own[1].PixelValueTransformationSequence = [transform("2")]
    data = enhanced(np.stack([U12, U12, U12]), own, common(PixelValueTransformationSequence=transform("3")), **TWELVE)
    for number, slope in enumerate((3.0, 2.0, 3.0)):
        assert np.array_equal(grey_of(data, tmp_path, number), U12 * slope)
