"""What a prediction refuses and by which number, what it leaves alone, and what odd headers are no obstacle to."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_builders import image, put, save, segmentation, volume
from PIL import Image
from predictions import BLOBS, MARKED, predicted, read_back, slices, write_random_model
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from icmoe.backbone import Backbone
from icmoe.errors import IcmoeError
from icmoe.predict.output import staged
from icmoe.predict.stacks import find_series
from icmoe.study import Label

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmoe.predict.run.os.cpu_count", lambda: 1)  # the pictures are tiny


@pytest.fixture(scope="module")
def model(make_study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "m.safetensors", make_study())


def refusal(*arguments: object, **options: object) -> IcmoeError:
    with pytest.raises(IcmoeError) as caught:
        predicted(*arguments, **options)  # type: ignore[arg-type]
    return caught.value


def numbers(error: IcmoeError) -> list[int]:
    return [fault.number for fault in error.faults]


def test_what_is_there_is_not_overwritten(model: Path, tmp_path: Path):
    put(tmp_path, slices("axial"))
    source, out = tmp_path / "export", tmp_path / "out"
    predicted(model, source, out, "png")
    before = (out / "prediction.json").read_bytes()
    assert numbers(refusal(model, source, out)) == [141]
    assert (out / "prediction.json").read_bytes() == before
    predicted(model, source, out, "nifti", force=True)
    assert sorted(path.name for path in (out / "001").iterdir()) == ["segmentation.nii.gz"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    assert numbers(refusal(model, source, tmp_path / "mine", force=True)) == [141]
    assert numbers(refusal(model, source, source / "out")) == [210]
    assert numbers(refusal(model, source, source)) == [210]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not list(tmp_path.glob(".*")), "nothing is left beside the output"


def test_what_is_used_does_not_go_with_a_former_prediction(model: Path, tmp_path: Path):
    put(tmp_path, slices("axial"))
    out = tmp_path / "out"
    predicted(model, tmp_path / "export", out, "png")
    inner = Path(shutil.copytree(tmp_path / "export", out / "export"))
    own = Path(shutil.copy(model, out / "m.safetensors"))
    for used, source in ((model, inner), (model, inner / "z1"), (own, tmp_path / "export")):
        assert numbers(refusal(used, source, out, "png", force=True)) == [210]
    (tmp_path / "way").symlink_to(tmp_path)
    assert numbers(refusal(model, inner, tmp_path / "way" / "out", "png", force=True)) == [210]
    assert (own.is_file(), len(list(inner.iterdir()))) == (True, 5)


def test_a_full_disk_is_told_by_the_name_of_the_output(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(tmp_path, slices("axial"))

    def full(descriptor: int, *_: object) -> None:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("icmoe.atomic.os.fdopen", full)
        (fault,) = refusal(model, tmp_path / "export", tmp_path / "out", "png").faults
    assert str(fault).startswith(
        f"ICM205 {tmp_path / 'out'}: file cannot be written: No space left on device. Nothing was written."
    )
    (tmp_path / "file").write_text("no folder")
    (fault,) = refusal(model, tmp_path / "export", tmp_path / "file/out", "png").faults
    assert str(fault).startswith(f"ICM205 {tmp_path / 'file'}")
    assert "/." not in str(fault)
    long = tmp_path / ("n" * 250)
    (fault,) = refusal(model, tmp_path / "export", long, "png").faults
    assert str(fault).startswith(f"ICM205 {long}: file cannot be opened: File name too long. Nothing was written.")
    assert not list(tmp_path.glob(".*")), "nothing is left beside the output"


def test_what_a_killed_prediction_left_beside_its_output_goes_with_the_next_and_nothing_that_lives_does(tmp_path: Path):
    out = tmp_path / "out[1]"
    script = f"""
import pathlib, signal, os
from icmoe.predict.output import staged
with staged(pathlib.Path({str(out)!r})) as stage:
    (stage / "x").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out*")
    kept = tmp_path / ".out[1].notes.new"
    kept.mkdir()
    with staged(out) as first, staged(out) as second:
        assert not left.exists()
        assert first.is_dir()
        (second / "y").touch()
    assert sorted(tmp_path.iterdir()) == [kept, out]
    (tmp_path / ".out[1].0123abcd.old").mkdir()  # killed while it took the place of a former one
    with staged(out):
        pass
    assert sorted(tmp_path.iterdir()) == [kept, out]


def test_input_without_images(model: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/readme.txt").write_text("no image")
    assert numbers(refusal(model, tmp_path / "in", tmp_path / "out")) == [140]
    assert numbers(refusal(model, tmp_path / "absent", tmp_path / "out")) == [109]
    assert numbers(refusal(model, tmp_path / "in", tmp_path / "out", "tiff")) == [210]
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_used(model: Path, make_study, tmp_path: Path):
    put(tmp_path, slices("axial"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(model.read_bytes()[:-5])
    assert numbers(refusal(broken, tmp_path / "export", tmp_path / "out")) == [209]
    other = write_random_model(tmp_path / "o.safetensors", make_study(backbone={"digest": "0" * 64}))
    assert numbers(refusal(other, tmp_path / "export", tmp_path / "out")) == [206]


def test_a_series_with_a_lost_slice_is_left_out_and_the_others_are_not(model: Path, tmp_path: Path):
    put(tmp_path, slices("axial"))
    bad = slices("coronal")
    for number, data in enumerate(bad):
        save(data, tmp_path / "export" / f"bad{number}")
    path = tmp_path / "export/bad2"
    path.write_bytes(path.read_bytes()[:-200])
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out", "png")
    assert [stack["frames"] for stack in record["stacks"]] == [5]
    assert [fault.number for fault in faults] == [142]
    assert "1 of 5 frames" in str(faults[0])


HEIGHTS = {
    "one lost": ((0, 5, 15, 20, 25), 1),
    "two lost at one place, and one": ((0, 2, 8, 10, 14, 16, 18), 3),
    "finer at the base": ((0, 2.5, 5, 7.5, 12.5, 17.5, 22.5), 0),
    "as planned": ((0, 5, 12, 14, 30), 0),
    "one wide step of no whole number": ((0, 5, 10, 18, 23, 28), 0),
    "rounded": ((0, 4.99, 10.01, 15, 20), 0),
    "two alone": ((0, 5, 15), 0),
}


@pytest.mark.parametrize("name", HEIGHTS)
def test_a_series_with_a_slice_that_was_never_exported_is_left_out_too(name: str, model: Path, tmp_path: Path):
    heights, lacking = HEIGHTS[name]
    series = volume(np.concatenate([BLOBS, BLOBS[::-1]])[: len(heights)])
    for data, height in zip(series, heights, strict=True):
        data.ImagePositionPatient = [-20.0, -30.0, float(height)]
    put(tmp_path, series)
    put(tmp_path, slices("coronal"), "whole{}")
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert len(record["stacks"]) == (1 if lacking else 2)
    assert [fault.number for fault in faults] == ([142] if lacking else [])
    assert not lacking or f"{lacking} slices are missing" in str(faults[0])


def heart(lost: int | None, *, timed: bool = True, planes: int = 5) -> list[Dataset]:
    """Three phases of a heart, 40 ms apart, without one of the files."""
    phases = [volume(BLOBS[:planes] + phase) for phase in range(3)]
    for number, data in enumerate(data for phase in phases for data in phase):
        data.SeriesInstanceUID = phases[0][0].SeriesInstanceUID
        data.InstanceNumber = number + 1
        if timed:
            data.TriggerTime = 40.0 * (number // planes)
    return [data for number, data in enumerate(data for phase in phases for data in phase) if number != lost]


@pytest.mark.parametrize(
    ("lost", "timed", "whole"), [(None, True, 3), (None, False, 3), (0, True, 0), (9, True, 1), (14, True, 2), (9, False, 0)]
)
def test_no_volume_is_made_of_two_phases(lost: int | None, timed: bool, whole: int, model: Path, tmp_path: Path):
    put(tmp_path, heart(lost, timed=timed))
    put(tmp_path, slices("coronal"), "whole{}")
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert len(record["stacks"]) == 1 + whole
    assert {fault.number for fault in faults} == ({142} if whole < 3 else set())
    for stack in record["stacks"]:
        headers = [pydicom.dcmread(tmp_path / "export" / path) for path, _ in stack["sources"]]
        assert len({header.get("TriggerTime") for header in headers}) == 1, "one volume, one time"


def test_a_plane_that_was_scanned_again_is_no_phase(model: Path, tmp_path: Path):
    series = heart(None)[:6]
    put(tmp_path, series)
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert ([stack["frames"] for stack in record["stacks"]], faults) == ([5, 1], [])


def test_what_a_format_cannot_hold_is_said_and_png_holds_it(model: Path, tmp_path: Path):
    put(tmp_path, slices("uneven"))
    assert numbers(refusal(model, tmp_path / "export", tmp_path / "out", "nifti")) == [143]
    _, faults = predicted(model, tmp_path / "export", tmp_path / "out", "png")
    assert not faults
    bare = volume(BLOBS)
    for data in bare:
        del data.PixelSpacing
    put(tmp_path / "bare", bare)
    assert numbers(refusal(model, tmp_path / "bare", tmp_path / "other")) == [143], "pixels of unknown size"
    flat = image(BLOBS, SOPClassUID="1.2.840.10008.5.1.4.1.1.7.2", Modality="OT")
    save(flat, tmp_path / "flat.dcm")
    assert numbers(refusal(model, tmp_path / "flat.dcm", tmp_path / "other")) == [143], "frames without planes"
    nibabel.save(nibabel.Nifti1Image(BLOBS.astype(np.int16), np.eye(4)), tmp_path / "a.nii")
    assert numbers(refusal(model, tmp_path / "a.nii", tmp_path / "other")) == [143]


WRITTEN = {
    "Latin": ("ISO_IR 100", "Müller^Jürg"),
    "Unicode": ("ISO_IR 192", "Müller^Jürg=山田^太郎"),
    "Cyrillic": ("ISO_IR 144", "Иванов^Иван"),
    "Japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "Korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    "misspelt": ("ISO-IR 999", "Doe^Jo"),
}


@pytest.mark.filterwarnings("ignore:.*character set:UserWarning", "ignore:Unknown encoding:UserWarning")
@pytest.mark.parametrize("script", WRITTEN)
def test_names_in_any_script_are_the_patient_s_own(script: str, model: Path, tmp_path: Path):
    sources = volume(BLOBS)
    for source in sources:
        source.SpecificCharacterSet, source.PatientName = WRITTEN[script]
    put(tmp_path, sources)
    _, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert not faults
    made, source = (pydicom.dcmread(tmp_path / place) for place in ("out/001/segmentation.dcm", "export/z1"))
    assert (str(made.PatientName), made.SpecificCharacterSet) == (str(source.PatientName), source.SpecificCharacterSet)
    assert str(made.PatientName) == WRITTEN[script][1]


ANONYMISED = {
    "no frame of reference": {"FrameOfReferenceUID": None},
    "dates of zeros": {"StudyDate": "20120000", "PatientBirthDate": "00000000", "PatientSex": "unknown"},
    "no names": {"PatientName": None, "PatientID": None, "AccessionNumber": None, "StudyID": None, "PatientSex": None},
}


@pytest.mark.parametrize("change", ANONYMISED)
def test_what_anonymisers_leave_behind_is_no_obstacle(change: str, model: Path, tmp_path: Path):
    sources = volume(BLOBS)
    for source in sources:
        for name, value in ANONYMISED[change].items():
            if value is None:
                del source[name]
            else:
                source[name] = DataElement(name, dictionary_VR(name), value, validation_mode=IGNORE)
    put(tmp_path, sources)
    _, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert not faults
    assert read_back(tmp_path / "out/001/segmentation.dcm", sources).any()
    made = pydicom.dcmread(tmp_path / "out/001/segmentation.dcm")
    assert {name: made.get(name) or None for name in ANONYMISED[change] if "UID" not in name} == {
        name: value for name, value in ANONYMISED[change].items() if "UID" not in name
    }, "a viewer joins the object to its patient and study by these"


def test_images_in_a_frame_of_reference_each_are_joined_by_reference(model: Path, tmp_path: Path):
    sources = volume(BLOBS)
    for source in sources:
        source.FrameOfReferenceUID = generate_uid()
    put(tmp_path, sources)
    _, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert not faults
    assert read_back(tmp_path / "out/001/segmentation.dcm", sources).any()
    space = pydicom.dcmread(tmp_path / "out/001/segmentation.dcm").FrameOfReferenceUID
    assert space not in {source.FrameOfReferenceUID for source in sources}


def test_masks_and_copies_are_no_input(model: Path, tmp_path: Path):
    sources = slices("axial")
    put(tmp_path, sources)
    put(tmp_path, sources, "copy{}")
    save(segmentation(sources, MARKED, "BINARY"), tmp_path / "export" / "mask.dcm")
    found, faults = find_series(
        tmp_path / "export", sorted(path.name for path in (tmp_path / "export").iterdir()), (Label(name="x", values=(0,)),)
    )
    assert [[len(stack.frames) for stack in series.stacks] for series in found] == [[5]]
    assert not faults


@pytest.mark.parametrize("same", [5, 2])
def test_slices_that_claim_to_be_one_instance_are_not_lost_in_silence(same: int, model: Path, tmp_path: Path):
    sources = volume(BLOBS)
    for data in sources[-same:]:  # as an anonymiser leaves them that gives one number to many files
        data.SOPInstanceUID = sources[-1].SOPInstanceUID
    put(tmp_path, sources)
    put(tmp_path, slices("coronal"), "whole{}")
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out", "png")
    assert [stack["frames"] for stack in record["stacks"]] == [5]
    assert [fault.number for fault in faults] == [142]
    assert "claim to be the same instance" in str(faults[0])


@pytest.mark.parametrize("form", ["dicom-seg", "nifti", "png"])
def test_no_volume_is_made_of_two_patients(form: str, model: Path, tmp_path: Path):
    sources = volume(BLOBS)
    for data in sources[3:]:
        data.PatientID, data.PatientName = "Roe 2", "Roe^Al"
    put(tmp_path, sources)
    error = refusal(model, tmp_path / "export", tmp_path / "out", form)
    assert (numbers(error), "several patients" in str(error)) == ([117], True)


def test_a_series_without_any_grey_values_is_not_said_to_be_free_of_findings(model: Path, tmp_path: Path):
    put(tmp_path, volume(np.full((3, 8, 8), 7, np.uint16)))
    assert numbers(refusal(model, tmp_path / "export", tmp_path / "out")) == [113]
    nibabel.save(nibabel.Nifti1Image(np.full((8, 8, 3), np.nan, np.float32), np.eye(4)), tmp_path / "a.nii")
    assert numbers(refusal(model, tmp_path / "a.nii", tmp_path / "out", "nifti")) == [113]


@pytest.mark.parametrize(("factor", "told"), [(1e9, "fp16"), (float("nan"), "fp16"), (1.0, "")])
def test_features_outside_half_precision_are_refused_as_in_training_and_are_no_finding_of_nothing(
    factor: float, told: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode = Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda self, images: encode(self, images).each(lambda tensor: factor * tensor))
    put(tmp_path, slices("axial"))
    if not told:
        assert not predicted(model, tmp_path / "export", tmp_path / "out", "png")[1]
        return
    error = refusal(model, tmp_path / "export", tmp_path / "out", "png")
    assert numbers(error) == [102]
    assert all(part in str(error) for part in (told, error.faults[0].where, "at most 65504", "It was not segmented."))
    assert (tmp_path / "export" / error.faults[0].where).is_file()


def test_what_is_taken_for_no_image_is_named(model: Path, tmp_path: Path):
    put(tmp_path, slices("axial"))
    Image.fromarray((BLOBS[0] > 1500).astype(np.uint8)).save(tmp_path / "export/b.png")
    nibabel.save(nibabel.Nifti1Image(np.stack([BLOBS, BLOBS], axis=3).astype(np.int16), np.eye(4)), tmp_path / "export/a.nii")
    record, faults = predicted(model, tmp_path / "export", tmp_path / "out")
    assert not faults
    assert [path for path, _ in record["passed_over"]] == ["a.nii", "b.png"]
    assert "of 4 axes" in record["passed_over"][0][1]
    assert record["passed_over"][1][1] == "few values, as a mask has"
    error = refusal(model, tmp_path / "export/a.nii", tmp_path / "other")
    assert (numbers(error), "a.nii: a NIfTI file of 4 axes" in str(error)) == ([140], True)


def test_the_command_prints_json_and_exits_with_one_where_something_was_left_out(model: Path, tmp_path: Path):
    put(tmp_path, slices("axial"))
    bad = save(slices("coronal")[0], tmp_path / "export" / "bad")
    bad.write_bytes(bad.read_bytes()[:-200])
    command = [sys.executable, "-m", "icmoe", "predict", "--model", model, "--input", tmp_path / "export", "--json"]
    done = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out"), "--format", "png"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "ICM142" in done.stderr
    record = json.loads(done.stdout)
    assert record["stacks"][0]["frames"] == 5
    assert (tmp_path / "out/001/overlay/0001.png").is_file()
    assert json.loads((tmp_path / "out/prediction.json").read_text()) == record
