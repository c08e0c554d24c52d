"""Marks that name no image lie in the frame of reference that their region or object names."""

from __future__ import annotations

from pathlib import Path

import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    contour,
    item,
    numbers,
    put,
    same,
    save,
    scaled,
    structures,
    used,
    volume,
)
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from test_ingest_masks import referring, square

pytestmark = pytest.mark.usefixtures("in_this_process")


def two_spaces(made: Dataset, spaces: dict[str, list[Dataset]], own: str) -> Dataset:
    """Let a structure set list images in two frames of reference and have its region in one of them."""
    listing = (structures([], listed=shown, space=space) for space, shown in spaces.items())
    made.ReferencedFrameOfReferenceSequence = [one.ReferencedFrameOfReferenceSequence[0] for one in listing]
    made.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = own
    return made


@pytest.mark.parametrize("drawn_on", ["ct", "mr", "both", "unknown"])
def test_a_contour_lies_on_images_of_its_own_frame_of_reference(drawn_on: str, tmp_path: Path):
    """PS3.3 C.8.8.5: a region is defined in its Referenced Frame of Reference; here the MR was not exported."""
    ct = volume(VOLUME)
    mr = volume(VOLUME, FrameOfReferenceUID=generate_uid(), StudyInstanceUID=ct[0].StudyInstanceUID)
    spaces = {str(shown[0].FrameOfReferenceUID): shown for shown in (ct, mr)}
    first, second = spaces
    own = {"ct": first, "mr": second, "both": first, "unknown": str(generate_uid())}
    made = structures([contour(square(ct[2], 2.5, 2.5, 10.5, 10.5))])
    two_spaces(made, spaces, own[drawn_on])
    if drawn_on == "both":
        made.StructureSetROISequence.append(item(ROINumber=2, ROIName="lesion", ReferencedFrameOfReferenceUID=second))
        again = item(ReferencedROINumber=2, ContourSequence=[contour(square(ct[3], 2.5, 2.5, 10.5, 10.5))])
        made.ROIContourSequence.append(again)
    put(tmp_path, [*ct, made])
    _, masks, data = used(tmp_path)
    if drawn_on in {"mr", "both"}:
        assert not masks
        assert {"mr": 123, "both": 122}[drawn_on] in numbers(data)
    else:  # or an anonymiser wrote other UIDs for the region than for the images
        assert [bool(mask.any()) for mask in masks] == [False, False, True, False, False]


@pytest.mark.parametrize("there", [True, False])
def test_a_segmentation_in_the_space_of_a_series_that_is_not_there_marks_no_other(there: bool, tmp_path: Path):
    ct = volume(VOLUME)
    mr = volume(VOLUME[::-1], FrameOfReferenceUID=generate_uid(), StudyInstanceUID=ct[0].StudyInstanceUID)
    made, further = referring("as a list", mr), referring("as a list", ct)
    made.ReferencedSeriesSequence.extend(further.ReferencedSeriesSequence)
    put(tmp_path, ct, "ct/{}")
    put(tmp_path, mr if there else [], "mr/{}")
    save(made, tmp_path / "export" / "seg")
    pictures, masks, data = used(tmp_path)
    assert same(pictures, scaled(VOLUME[::-1]) if there else [])
    assert same(masks, MASKS if there else [])
    assert there or 122 in numbers(data)


def test_a_class_that_a_label_map_numbers_0_is_refused(tmp_path: Path):
    shown = volume(VOLUME)
    made = referring("as a list", shown)
    made.SegmentSequence[0].SegmentNumber = 0
    put(tmp_path, [*shown, made])
    assert numbers(used(tmp_path)[2]) == [108, 117, 124]


@pytest.mark.parametrize("odd", ["undrawn region", "empty frame of reference"])
def test_what_a_structure_set_lists_and_does_not_draw_changes_nothing(odd: str, tmp_path: Path):
    ct = volume(VOLUME)
    mr = volume(VOLUME, FrameOfReferenceUID=generate_uid(), StudyInstanceUID=ct[0].StudyInstanceUID)
    first, second = str(ct[0].FrameOfReferenceUID), str(mr[0].FrameOfReferenceUID)
    made = two_spaces(structures([contour(square(ct[2], 2.5, 2.5, 10.5, 10.5))]), {first: ct, second: mr}, first)
    if odd == "undrawn region":
        made.StructureSetROISequence.append(item(ROINumber=2, ROIName="lesion", ReferencedFrameOfReferenceUID=second))
    else:
        made.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = ""
        made.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = ""
    put(tmp_path, [*ct, made])
    assert [bool(mask.any()) for mask in used(tmp_path)[1]] == [False, False, True, False, False]


@pytest.mark.parametrize("space", ["images", "mask"])
def test_a_missing_slice_matters_not_where_nobody_names_a_frame_of_reference(space: str, tmp_path: Path):
    shown = volume(VOLUME)
    made = referring("as a list", shown)
    for one in shown if space == "images" else ():
        del one.FrameOfReferenceUID
    made.FrameOfReferenceUID = "" if space == "mask" else generate_uid()
    put(tmp_path, [*shown[:4], made])
    assert same(used(tmp_path)[1], MASKS[:4])
