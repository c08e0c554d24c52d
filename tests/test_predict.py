"""Predictions come back in the geometry of their source, whatever form it has, and equal to the array the model predicts."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_builders import AXIAL, common, enhanced, place, put, save, scaled, segmentation, used, volume
from PIL import Image
from predictions import (
    BLOBS,
    MARKED,
    OBLIQUE,
    RNG,
    SERIES,
    array_prediction,
    loaded,
    plane,
    planes_of,
    predicted,
    read_back,
    slices,
    write_random_model,
)
from pydicom.dataset import Dataset

from icmoe.data.ingest.geometry import plane_matrix, upright
from icmoe.data.ingest.nifti import read
from icmoe.errors import IcmoeError
from icmoe.predict.nifti import nifti_bytes
from icmoe.predict.stacks import find_series
from icmoe.study import Label

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmoe.predict.run.os.cpu_count", lambda: 1)  # the pictures are tiny


@pytest.fixture(scope="module")
def model(make_study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "m.safetensors", make_study())


@pytest.mark.parametrize("name", SERIES)
def test_a_series_comes_back_as_the_array_that_training_would_see_and_on_its_own_planes(name: str, model: Path, tmp_path: Path):
    sources = slices(name)
    put(tmp_path, sources)
    save(segmentation(sources, MARKED, "BINARY"), tmp_path / "export" / "mask.dcm")
    pictures, _, _ = used(tmp_path)
    assert len(pictures) == len(sources)
    arrays = [array_prediction(*loaded(model), picture) for picture in pictures]
    assert {0, 1} == {int(value) for array in arrays for value in np.unique(array)}
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert not faults
    (stack,) = record["stacks"]
    by_name = {f"z{len(sources) - n}": source for n, source in enumerate(sources)}
    ordered = [by_name[path] for path, _ in stack["sources"]]
    found = read_back(tmp_path / "out/001/segmentation.dcm", ordered)
    turn = upright(plane(sources[0]))
    assert all(np.array_equal(turn.turn(one), array) for one, array in zip(found, arrays, strict=True))
    stored = planes_of(tmp_path / "out/001/segmentation.dcm")
    assert len(stored) == sum(bool(array.any()) for array in arrays)
    for source in sources:
        if (source.SOPInstanceUID, 1) in stored:
            assert stored[source.SOPInstanceUID, 1] == pytest.approx(plane(source), abs=1e-6)


def functional_frames(phases: int = 1) -> tuple[np.ndarray, list[Dataset]]:
    """Return pixels and groups of an enhanced object whose frames are stored in a wild order."""
    order = [(n, time) for time in range(1, phases + 1) for n in (3, 0, 4, 1, 2)]
    pixels = np.stack([np.roll(BLOBS[n], 2 * (time - 1), axis=1) for n, time in order])
    return pixels, [place((1.0, 2.0, 5.0 * n), stack=n + 1, time=time) for n, time in order]


def test_a_multi_frame_object_comes_back_frame_by_frame(model: Path, tmp_path: Path):
    pixels, groups = functional_frames()
    source = enhanced(pixels, groups, common(axes=OBLIQUE))
    for number, group in enumerate(groups):  # along the normal of oblique planes
        group.PlanePositionSequence[0].ImagePositionPatient = [
            float(v) for v in plane_matrix((1, 2, 0, *OBLIQUE, 1, 1))[:3, 2] * 5.0 * [3, 0, 4, 1, 2][number]
        ]
    save(source, tmp_path / "export/multi.dcm")
    save(segmentation([source], (pixels > 1500).astype(np.uint8), "BINARY"), tmp_path / "export/mask.dcm")
    pictures, _, _ = used(tmp_path)
    record, faults = predicted(model, tmp_path / "export/multi.dcm", tmp_path / "out")
    assert not faults
    numbers = [number for _, number in record["stacks"][0]["sources"]]
    assert numbers == [3, 1, 5, 4, 2], "from one end to the other, as the normal's main axis points up"
    path = tmp_path / "out/001/segmentation.dcm"
    found = read_back(path, [source], numbers)
    arrays = [array_prediction(*loaded(model), picture) for picture in pictures]
    assert any(array.any() for array in arrays)
    assert all(np.array_equal(one, array) for one, array in zip(found, arrays, strict=True))
    for (_, number), geometry in planes_of(path).items():
        position = groups[number - 1].PlanePositionSequence[0].ImagePositionPatient
        assert geometry == pytest.approx((*position, *OBLIQUE, 1.0, 1.5), abs=1e-6)


def test_phases_at_one_place_become_a_segmentation_each_and_refer_to_their_own_frames(model: Path, tmp_path: Path):
    pixels, groups = functional_frames(phases=2)
    source = enhanced(pixels, groups, common())
    save(source, tmp_path / "export/cine.dcm")
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert not faults
    assert [[number for _, number in stack["sources"]] for stack in record["stacks"]] == [[2, 4, 5, 1, 3], [7, 9, 10, 6, 8]]
    for n in (1, 2):
        assert {number for _, number in planes_of(tmp_path / f"out/00{n}/segmentation.dcm")} <= set(range(5 * n - 4, 5 * n + 1))


def test_axes_that_each_frame_names_for_itself_are_taken_from_there(model: Path, tmp_path: Path):
    pixels, groups = functional_frames()
    shared = common()
    for group in groups:
        group.PlaneOrientationSequence, group.PixelMeasuresSequence = (
            shared.PlaneOrientationSequence,
            shared.PixelMeasuresSequence,
        )
    save(enhanced(pixels, groups, Dataset()), tmp_path / "export/own.dcm")
    _, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert not faults
    assert next(iter(planes_of(tmp_path / "out/001/segmentation.dcm").values()))[3:] == (*AXIAL, 1.0, 1.5)


def test_views_of_several_directions_become_a_segmentation_each(model: Path, tmp_path: Path):
    one = volume(BLOBS[:2])
    ids = {"SeriesInstanceUID": one[0].SeriesInstanceUID, "StudyInstanceUID": one[0].StudyInstanceUID}
    put(tmp_path, [*one, *volume(BLOBS[2:], axes=(1, 0, 0, 0, 0, -1), **ids)])
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert not faults
    assert sorted(stack["frames"] for stack in record["stacks"]) == [2, 3]


def test_inverted_views_with_a_slope_of_their_own_are_turned_about_one_value(model: Path, tmp_path: Path):
    found = []
    for name, slope in (("plain", 1), ("sloped", 2)):
        one = volume(BLOBS[:2], PhotometricInterpretation="MONOCHROME1")
        ids = {"SeriesInstanceUID": one[0].SeriesInstanceUID, "StudyInstanceUID": one[0].StudyInstanceUID}
        stored, scale = BLOBS[2:] // 2 * (2 // slope), {"RescaleSlope": slope, "RescaleIntercept": 0}
        other = volume(stored, axes=(1, 0, 0, 0, 0, -1), PhotometricInterpretation="MONOCHROME1", **scale, **ids)
        put(tmp_path / name, [*one, *other])
        _, faults = predicted(model, tmp_path / name / "export", tmp_path / name / "out", "png")
        assert not faults
        masks = sorted((tmp_path / name / "out").rglob("*.png"))
        found.append([(path.relative_to(tmp_path / name).as_posix(), path.read_bytes()) for path in masks])
    assert len(found[0]) == 5
    assert found[0] == found[1]


def test_a_nifti_of_a_dicom_series_has_its_voxels_where_the_slices_lie(model: Path, tmp_path: Path):
    for name in SERIES:
        if name == "uneven":
            continue
        place_ = tmp_path / name
        put(place_, slices(name))
        record, faults = predicted(model, place_ / "export", place_ / "seg")
        again, more = predicted(model, place_ / "export", place_ / "nii", "nifti")
        assert not faults + more
        image = nibabel.load(place_ / "nii/001/segmentation.nii.gz")
        by_path = {path: pydicom.dcmread(place_ / "export" / path) for path, _ in record["stacks"][0]["sources"]}
        ordered = list(by_path.values())
        found = read_back(place_ / "seg/001/segmentation.dcm", ordered)
        assert np.array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), found)
        assert again["stacks"][0]["pixels"] == record["stacks"][0]["pixels"] == {"lesion": int(found.sum())}
        for index in ((0, 0, 0), (3, 7, 2), (24, 23, 4)):
            source = ordered[index[2]]
            want = plane_matrix(plane(source)) @ [index[1], index[0], 0, 1]
            assert (image.affine @ [*index, 1])[:3] == pytest.approx(want[:3] * [-1, -1, 1], abs=1e-4)


@pytest.mark.parametrize("name", ["axial", "oblique", "tilted gantry"])
def test_a_nifti_gives_each_voxel_one_place_whichever_matrix_a_reader_takes(name: str, model: Path, tmp_path: Path):
    put(tmp_path, slices(name))
    predicted(model, tmp_path / "export", tmp_path / "out", "nifti")
    image = nibabel.load(tmp_path / "out/001/segmentation.nii.gz")
    qform, code = image.get_qform(coded=True)
    assert code == (0 if name == "tilted gantry" else 1), "a quaternion cannot slant"
    assert image.get_sform(coded=True)[1] == 1
    assert qform is None or qform == pytest.approx(image.affine, abs=1e-4)
    read(tmp_path / "out/001/segmentation.nii.gz")  # ingest refuses a volume of two places


def test_a_nifti_volume_comes_back_on_its_own_grid(model: Path, tmp_path: Path):
    affine = np.array([[0.0, 0.0, -1.5, 10.0], [2.0, 0.1, 0.0, -20.0], [0.0, -4.0, 0.0, 30.0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(BLOBS.transpose(1, 0, 2).astype(np.int16), affine), tmp_path / "scan.nii.gz")
    _, faults = predicted(model, tmp_path / "scan.nii.gz", tmp_path / "out", "nifti")
    assert not faults
    image = nibabel.load(tmp_path / "out/001/segmentation.nii.gz")
    assert image.shape == (24, 5, 25)
    assert image.affine == pytest.approx(affine, abs=1e-5)
    assert set(np.unique(image.dataobj)) == {0, 1}


@pytest.mark.parametrize("form", ["nifti", "png"])
@pytest.mark.parametrize("step_mm", [0.002, -0.004, 0.005, 0.012, -5.0])
def test_slices_of_a_volume_are_planes_of_their_own_however_near(step_mm: float, form: str, model: Path, tmp_path: Path):
    affine = np.diag([0.004, 0.004, step_mm, 1.0])
    affine[2, 3] = 0.00251
    nibabel.save(nibabel.Nifti1Image(BLOBS.transpose(2, 1, 0).astype(np.int16), affine), tmp_path / "scan.nii.gz")
    record, faults = predicted(model, tmp_path / "scan.nii.gz", tmp_path / "out", form)
    assert not faults
    (stack,) = record["stacks"]
    assert [number for _, number in stack["sources"]] == [1, 2, 3, 4, 5][:: 1 if step_mm > 0 else -1]
    if form == "nifti":
        image = nibabel.load(tmp_path / "out/001/segmentation.nii.gz")
        assert image.shape == (25, 24, 5)
        assert image.affine == pytest.approx(affine, abs=1e-7)


def test_a_volume_of_which_slices_are_missing_is_refused_as_nifti(tmp_path: Path):
    nibabel.save(nibabel.Nifti1Image(BLOBS.transpose(2, 1, 0).astype(np.int16), np.eye(4)), tmp_path / "scan.nii")
    ((series,), _) = find_series(tmp_path, ["scan.nii"], ())
    cut = replace(series.stacks[0], frames=series.stacks[0].frames[1:])
    with pytest.raises(IcmoeError, match=r"ICM143 scan\.nii: .*: 4 slices \(allowed: its 5\)"):
        nifti_bytes(tmp_path, series, cut, np.zeros((4, 24, 25), np.uint8))


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_nifti_volume_that_does_not_say_where_it_lies_comes_back_as_one(ending: str, model: Path, tmp_path: Path):
    source = nibabel.Nifti1Image(BLOBS.transpose(2, 1, 0).astype(np.int16), None)
    source.header.set_zooms((1.5, 1.0, 5.0))
    nibabel.save(source, tmp_path / f"scan.{ending}")
    _, faults = predicted(model, tmp_path / f"scan.{ending}", tmp_path / "out", "nifti")
    assert not faults
    source, image = (nibabel.load(tmp_path / path) for path in (f"scan.{ending}", "out/001/segmentation.nii.gz"))
    assert [int(image.header[name]) for name in ("qform_code", "sform_code")] == [0, 0], "each reader places both alike"
    assert image.header.get_zooms() == source.header.get_zooms()
    assert np.array_equal(image.affine, source.affine)


def test_png_masks_hold_the_values_of_the_study(make_study, tmp_path: Path):
    labels = [{"name": "background", "values": [7]}, {"name": "lesion", "values": [200]}]
    model = write_random_model(tmp_path / "m.safetensors", make_study(labels=labels))
    for number, grey in enumerate(BLOBS):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(grey + RNG.integers(0, 50, grey.shape).astype(np.uint16)).save(tmp_path / "in" / f"{number}.png")
    record, faults = predicted(model, tmp_path / "in", tmp_path / "out", "png")
    assert not faults
    assert record["stacks"][0]["frames"] == 5
    values = {int(v) for path in (tmp_path / "out/001/mask").iterdir() for v in np.unique(np.asarray(Image.open(path)))}
    assert values == {7, 200}


def test_pictures_of_8_and_of_16_bits_are_each_segmented_on_their_own_scale(model: Path, tmp_path: Path):
    """In the order in which people number them: 8, 9, 10."""
    noisy = BLOBS + np.random.default_rng(9).integers(0, 900, BLOBS.shape).astype(np.uint16)  # more values than masks have
    greys = [*(noisy[:2] >> 4).astype(np.uint8), *noisy[2:]]
    (tmp_path / "in").mkdir()
    for number, grey in enumerate(greys, start=8):
        Image.fromarray(grey).save(tmp_path / f"in/{number}.png")
    record, faults = predicted(model, tmp_path / "in", tmp_path / "out", "png")
    assert not faults
    assert [path for path, _ in record["stacks"][0]["sources"]] == [f"{number}.png" for number in range(8, 13)]
    masks = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out/001/mask").iterdir())]
    arrays = [array_prediction(*loaded(model), picture) for picture in (*scaled(greys[:2]), *scaled(greys[2:]))]
    assert any(array.any() for array in arrays[:2])
    assert all(np.array_equal(mask > 0, array > 0) for mask, array in zip(masks, arrays, strict=True))


def test_maps_are_written_on_the_pixels_of_the_source_for_the_owner_alone(model: Path, tmp_path: Path):
    put(tmp_path, slices("turned"))
    record, _ = predicted(model, tmp_path / "export", tmp_path / "out", maps=True)
    kinds = {name: [Image.open(path) for path in sorted((tmp_path / "out/001" / name).iterdir())] for name in MAPS}
    assert {name: {(one.mode, one.size) for one in found} for name, found in kinds.items()} == {
        name: {(mode, (25, 24))} for name, mode in MAPS.items()
    }
    deciding = {int(v) for one in kinds["expert"] for v in np.unique(np.asarray(one))}
    assert len(deciding) > 1
    assert deciding <= set(range(len(record["experts"])))
    assert any(np.asarray(one).any() for one in kinds["disagreement"])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_the_mirrored_view_makes_a_prediction_that_turns_with_its_picture(model: Path, tmp_path: Path):
    square = (np.kron(RNG.integers(0, 3000, (4, 4)), np.ones((8, 8))) + RNG.integers(0, 50, (32, 32))).astype(np.uint16)
    for name, pixels in (("as it is", square), ("mirrored", np.ascontiguousarray(square[:, ::-1]))):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.png")

    def found(mirrored: bool, kind: str) -> list[np.ndarray]:
        out, pictures = tmp_path / f"out {mirrored}", []
        for name in ("as it is", "mirrored"):
            record, faults = predicted(model, tmp_path / name, out, "png", force=True, maps=True, mirrored=mirrored)
            assert (record["views"], faults) == (["identity", "flip"] if mirrored else ["identity"], [])
            pictures.append(np.asarray(Image.open(out / "001" / kind / "0001.png")).astype(int))
        return [pictures[0], pictures[1][:, ::-1]]

    for kind, nearly in (("mask", 0), ("expert", 0), ("disagreement", 1)):
        one, other = found(True, kind)
        assert np.abs(one - other).max() <= nearly, kind
        assert not np.array_equal(*found(False, kind)), "one view alone knows left from right"


MAPS = {"overlay": "RGB", "disagreement": "L", "expert": "P"}


def test_a_blank_slice_is_background_and_does_not_move_the_window(model: Path, tmp_path: Path):
    sources = slices("axial")
    put(tmp_path / "whole", sources)
    whole, _ = predicted(model, tmp_path / "whole/export", tmp_path / "a", "png")
    blank = volume(np.concatenate([BLOBS, np.full_like(BLOBS[:1], 60000)]))
    put(tmp_path / "blank", blank)
    record, faults = predicted(model, tmp_path / "blank/export", tmp_path / "b", "png")
    assert not faults
    assert record["stacks"][0]["blank_frames"] == 1
    assert record["stacks"][0]["pixels"] == whole["stacks"][0]["pixels"]


def test_the_segments_say_what_they_are_and_which_model_made_them(make_study, tmp_path: Path):
    code = {"scheme": "SCT", "value": "108369006", "meaning": "Neoplasm"}
    labels = [
        {"name": "background", "values": [0]},
        {"name": "lesion", "values": [1], "kind": code, "category": {**code, "value": "49755003", "meaning": "Abnormal"}},
        {"name": "edema", "values": [2]},
    ]
    model = write_random_model(tmp_path / "m.safetensors", make_study(labels=labels))
    put(tmp_path, slices("axial"))
    record, _ = predicted(model, tmp_path / "export", tmp_path / "out")
    seg = pydicom.dcmread(tmp_path / "out/001/segmentation.dcm")
    lesion, edema = seg.SegmentSequence
    assert (lesion.SegmentLabel, edema.SegmentLabel) == ("lesion", "edema")
    assert lesion.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert lesion.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Abnormal"
    assert edema.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    about = lesion.SegmentationAlgorithmIdentificationSequence[0]
    assert f"model_sha256={record['model']['digest']}" in about.AlgorithmParameters
    assert seg.SeriesDescription.startswith("TEST ONLY")
    referred = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred == {pydicom.dcmread(path).SOPInstanceUID for path in (tmp_path / "export").iterdir()}


def test_labels_without_codes_leave_the_digest_of_a_study_as_it_was(make_study):
    assert Label(name="lesion", values=(1,)).model_dump(mode="json") == {"name": "lesion", "values": [1]}
    assert "kind" not in json.dumps(make_study().model_dump(mode="json"))


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (Debian's dicom3tools)")
@pytest.mark.parametrize("name", ["oblique", "multi-frame"])
def test_dciodvfy_finds_no_error(name: str, model: Path, tmp_path: Path):
    if name == "oblique":
        put(tmp_path, slices(name))
    else:
        save(enhanced(*functional_frames(), common()), tmp_path / "export/multi.dcm")
    predicted(model, tmp_path / "export", tmp_path / "out")
    told = subprocess.run(["dciodvfy", "-new", tmp_path / "out/001/segmentation.dcm"], capture_output=True, text=True, timeout=60)
    assert "Segmentation" in told.stderr
    assert not [line for line in told.stderr.splitlines() if line.startswith("Error")], told.stderr
