"""Pixels that a header describes oddly, wrongly or not at all: read as they are meant, or refused with a reason."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from dicom_builders import image, save
from exports import read_frames
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import RLELossless

from icmoe.data.ingest.refusals import Refusal, refusing

RNG = np.random.default_rng(8)
U12 = RNG.integers(0, 4096, (32, 40)).astype(np.uint16)
S12 = U12.astype(np.int16) - 2048
TWELVE = {"BitsStored": 12, "HighBit": 11}


def raw(data: Dataset, name: str, vr: str, value: bytes) -> Dataset:
    """Return the data set with an element of these bytes, whatever their form."""
    data._dict[Tag(name)] = RawDataElement(Tag(name), vr, len(value), value, 0, False, True)
    return data


def test_a_panic_of_a_decoder_in_another_language_is_a_reason(tmp_path):
    data = pydicom.dcmread(save(image(np.pad(U12, ((0, 0), (0, 2))), **TWELVE), tmp_path / "plain"))
    data.compress(RLELossless, generate_instance_uid=False)
    data.Columns = 40
    ((_, found),) = read_frames(save(data, tmp_path / "x"), [0])
    assert isinstance(found, Refusal)
    assert found.number == 118


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_program_is_not_a_reason(kind: type[BaseException]):
    with pytest.raises(kind), refusing(118, "why"):
        raise kind
