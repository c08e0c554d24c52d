"""Pixels that a header describes oddly, wrongly or not at all: read as they are meant, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_builders import image, save
from exports import read_frames
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

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
