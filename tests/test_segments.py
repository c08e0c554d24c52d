"""A segment that is taken without highdicom's check is one that highdicom takes, and says the same."""

from __future__ import annotations

from copy import deepcopy

import highdicom as hd
import pytest
from exports import DATA, absent, real
from highdicom.seg import SegmentDescription
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes

from icmoe.data.ingest.segmentations import CODES, is_plain

EMPTY = {"SQ": [], "US": None, "UI": None}
FURTHER = ("EquivalentCodeSequence", "AnatomicRegionModifierSequence", "DefinitionSourceSequence")
NESTED = [*FURTHER, *sorted(name for name in CODES if name.endswith("Sequence"))]


def full() -> Dataset:
    """Return a segment with everything that one may have."""
    algorithm = hd.AlgorithmIdentificationSequence(
        name="model", version="1", family=codes.DCM.ArtificialIntelligence, source="somebody"
    )
    described = SegmentDescription(
        1,
        "lesion",
        codes.SCT.MorphologicallyAbnormalStructure,
        codes.SCT.Neoplasm,
        hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=hd.UID(),
        tracking_id="a",
        anatomic_regions=[codes.SCT.Brain],
        primary_anatomic_structures=[codes.SCT.Brain],
    )
    segment = Dataset()
    segment.update(described)
    return segment


def code(**elements: str) -> Dataset:
    found = Dataset()
    for name, value in ({"CodeValue": "1", "CodingSchemeDesignator": "SCT", "CodeMeaning": "a"} | elements).items():
        setattr(found, name, value)
    return found


def within(draw: st.DrawFn, data: Dataset) -> tuple[Dataset, DataElement]:
    """Return an element at any depth and what holds it."""
    element: DataElement = draw(st.sampled_from(list(data)))
    inner = element.value[0] if element.VR == "SQ" and element.value else None
    return within(draw, inner) if inner and draw(st.booleans()) else (data, element)


@st.composite
def segments(draw: st.DrawFn) -> Dataset:
    """Return a segment after some changes at any depth: elements that are gone or empty, items twice, further elements."""
    segment = full()
    if draw(st.booleans()):
        del segment.SegmentationAlgorithmIdentificationSequence
    for _ in range(draw(st.integers(0, 3))):
        at, element = within(draw, segment)
        match draw(st.sampled_from(["gone", "empty", "twice", "value", "nested", "strange"])):
            case "gone":
                del at[element.tag]
            case "empty":
                at[element.tag] = DataElement(element.tag, element.VR, deepcopy(EMPTY.get(element.VR, "")))
            case "twice" if element.VR == "SQ":
                element.value.append(code(CodeMeaning="b"))
            case "value":
                setattr(at, draw(st.sampled_from(["CodeValue", "LongCodeValue", "URNCodeValue"])), "urn:2")
            case "nested":
                setattr(at, draw(st.sampled_from(NESTED)), Sequence([draw(st.sampled_from([code(), Dataset()]))]))
            case "strange" if element.VR != "SQ":
                at.add_new(element.tag, "UN", b"\x01\x02\x03")
    return segment


@given(segment=segments())
def test_what_is_plain_passes_highdicoms_check(segment: Dataset):
    if is_plain(segment):
        checked = SegmentDescription.from_dataset(deepcopy(segment))
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        assert checked.segmented_property_type.meaning == kind.CodeMeaning


def test_a_segment_with_codes_of_places_is_plain_and_one_with_more_is_looked_into():
    segment = full()
    assert not is_plain(segment), "an algorithm has to be identified in full"
    del segment.SegmentationAlgorithmIdentificationSequence
    assert is_plain(segment)
    for name in ("SegmentLabel", "SegmentedPropertyTypeCodeSequence", "SegmentAlgorithmType"):
        lacking = deepcopy(segment)
        del lacking[name]
        assert not is_plain(lacking), name
    unnamed, twice = deepcopy(segment), deepcopy(segment)
    del unnamed.SegmentedPropertyTypeCodeSequence[0].CodeValue
    assert not is_plain(unnamed), "a code without a value"
    twice.SegmentedPropertyTypeCodeSequence[0].LongCodeValue = "1"
    assert not is_plain(twice), "a code with two"


def plain_in(path: str) -> list[bool]:
    return [is_plain(item) for item in dcmread(path).SegmentSequence]


def test_the_object_in_pydicoms_wheel_is_plain():
    assert all(plain_in(str(get_testdata_file("liver_1frame.dcm", download=False))))


@real
@absent
@pytest.mark.parametrize("folder", ["lgg-dicom", "sunnybrook-lv-dicom"])
def test_real_objects_are_plain(folder: str):
    found = [dcmread(path, stop_before_pixels=True, force=True) for path in sorted((DATA / folder).rglob("*.dcm"))]
    listed = [item for data in found if data.get("Modality") == "SEG" for item in data.SegmentSequence]
    assert listed
    assert all(map(is_plain, listed))
