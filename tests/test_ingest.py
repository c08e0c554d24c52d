"""Ingest: real exports against the truth beside them, odd files with their reasons, kills, changes, and no identity anywhere."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from icmoe.data.ingest import index
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.opening import Refusal
from icmoe.data.ingest.pixels import read_frames
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.reading import Reader
from icmoe.data.ingest.run import Export, forget, ingest, store_of
from icmoe.data.ingest.settings import IngestSettings
from icmoe.data.slices import SiteData, load_image, load_mask
from icmoe.data.sources import read_sites
from icmoe.study import Label

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.real
absent = pytest.mark.skipif(not DATA.exists(), reason="the real hospital images are not here")
BACKGROUND = Label(name="background", values=(0,))
LESION = (BACKGROUND, Label(name="lesion", values=(1, 255)))


def export_of(root: Path, place: Path, labels: tuple[Label, ...] = LESION, **settings: object) -> Export:
    chosen = IngestSettings.model_validate({"folder": "x", "processes": 2, **settings})
    return Export(site="Elm", root=root, store=place / "store", secret_folder=place, labels=labels, settings=chosen)


def taken(export: Export) -> SiteData:
    ingest(export)
    return index.read_index(export.store)


def truth(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((DATA / name / "index.csv").read_text().splitlines()))


def foreground(data: SiteData) -> list[int]:
    return sorted(int((load_mask(item.mask, ()) > 0).sum()) for item in data.slices)


def write_series(folder: Path, patient: str, slices: int = 3, seed: int = 0, **elements: object) -> list[np.ndarray]:
    """Write an axial MR series with PNG masks of the same names, and return its grey values by position."""
    rng, series, study = np.random.default_rng(seed), generate_uid(), generate_uid()
    folder.mkdir(parents=True)
    pixels = [rng.integers(0, 4000, (24, 32)).astype(np.uint16) for _ in range(slices)]
    for number, grey in enumerate(pixels):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, generate_uid()
        data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = MRImageStorage, data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.PatientID, data.Modality = study, series, patient, "MR"
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 24, 32, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 5.0 * number], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.PixelData = [1.0, 1.5], grey.tobytes()
        for name, value in elements.items():
            setattr(data, name, value)
        data.save_as(folder / f"x{slices - number}.dcm", enforce_file_format=True)
        mask = np.zeros((24, 32), np.uint8)
        mask[4 : 8 + number, 5:9] = 255
        Image.fromarray(mask).save(folder / f"x{slices - number}.png")
    return pixels


@real
@absent
@pytest.mark.parametrize("site", ["CS", "DU", "HT", "EZ"])
def test_lgg_series_of_every_encoding_give_the_grey_values_and_masks_of_the_truth(site: str, tmp_path: Path):
    data = taken(export_of(DATA / "lgg-dicom" / site, tmp_path))
    rows = [row for row in truth("lgg-dicom") if row["site"] == site]
    assert data.images_found == len(rows)
    assert {item.number for item in data.exclusions} <= {108, 113}
    constant = len(rows) - len(data.slices)
    assert foreground(data) == sorted(int(row["tumour_px"]) for row in rows)[constant:]


@real
@absent
def test_lgg_pixels_are_those_of_the_png_export():
    listed = csv.DictReader((DATA / "lgg-multisite/splits/all.csv").read_text().splitlines())
    png = {(row["patient"], int(row["slice"])): DATA / "lgg-multisite" / row["image"] for row in listed}
    compared = 0
    for row in truth("lgg-dicom"):
        path = png.get((row["patient"].removeprefix("TCGA-").replace("-", "_"), int(row["index"]) + 1))
        if path is None:
            continue
        ((_, grey),) = read_frames(DATA / "lgg-dicom" / row["dicom"], [0])
        scale = 16 if row["site"] in {"HT", "EZ"} else 1
        assert np.array_equal(np.asarray(grey) / scale, np.asarray(Image.open(path))), row["dicom"]
        compared += 1
    assert compared > 100


@real
@absent
def test_sunnybrook_masks_by_instance_and_by_name_agree_with_the_truth(tmp_path: Path):
    cavity = (BACKGROUND, Label(name="LV cavity", values=(255,)))
    want = sorted(int(row["lv_px"]) for row in truth("sunnybrook-lv-dicom") if row["lv_seg"])
    by_seg = taken(export_of(DATA / "sunnybrook-lv-dicom", tmp_path / "seg", cavity))
    by_png = taken(export_of(DATA / "sunnybrook-lv-dicom", tmp_path / "png", cavity, exclude=("*/seg/*", "*/myo_png/*")))
    assert foreground(by_seg) == foreground(by_png) == want


@real
@absent
def test_hippocampus_volumes_have_the_voxels_of_the_truth(tmp_path: Path):
    labels = (BACKGROUND, Label(name="anterior", values=(1,)), Label(name="posterior", values=(2,)))
    data = taken(export_of(DATA / "hippocampus-nifti", tmp_path, labels))
    found: dict[str, np.ndarray] = {}
    for item in data.slices:
        counts = np.bincount(load_mask(item.mask, ()).ravel(), minlength=3)[1:]
        found[item.patient] = found.get(item.patient, np.zeros(2, int)) + counts
    want = [(int(row["anterior_vox"]), int(row["posterior_vox"])) for row in truth("hippocampus-nifti")]
    assert sorted(map(tuple, found.values())) == sorted(want)


@real
@absent
def test_pictures_with_burned_in_text_are_held_back(tmp_path: Path):
    data = taken(export_of(DATA / "dicom-phi-samples", tmp_path))
    assert not data.slices
    assert sum(item.number == 126 for item in data.exclusions) == 2


ODD = {
    "CT_small.dcm": ("image", (128, 128)),
    "MR_small.dcm": ("image", (64, 64)),
    "MR_small_implicit.dcm": ("image", (64, 64)),
    "MR_small_bigendian.dcm": ("image", (64, 64)),
    "MR_small_RLE.dcm": ("image", (64, 64)),
    "MR_small_jp2klossless.dcm": ("image", (64, 64)),
    "MR_truncated.dcm": ("image", 118),
    "image_dfl.dcm": ("image", (512, 512)),
    "JPEG-lossy.dcm": ("image", 118),
    "examples_rgb_color.dcm": ("image", (240, 320)),
    "examples_ybr_color.dcm": ("image", (240, 320)),
    "examples_palette.dcm": ("image", (350, 800)),
    "SC_rgb_small_odd.dcm": ("image", (3, 3)),
    "rtplan.dcm": ("none", 119),
    "rtdose.dcm": ("none", 119),
    "liver_1frame.dcm": ("seg", (512, 512)),
    "reportsi.dcm": ("none", 119),
    "no_meta.dcm": ("none", 116),
    "meta_missing_tsyntax.dcm": ("none", 117),
    "zipMR.gz": ("none", 116),
    "README.txt": ("none", 116),
}


@pytest.mark.parametrize(("name", "want"), ODD.items())
def test_odd_files_are_read_or_refused_for_the_right_reason(name: str, want: tuple[str, object]):
    path = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent / name
    reader = Reader(path.parent, Pseudonyms(bytes(32)), LabelNames(LESION, {"lesion": ("liver",)}), None)
    record = reader.read(name)
    kind, result = want
    assert record.kind == kind
    if isinstance(result, tuple):
        assert (record.fault, record.rows, record.columns) == (0, *result)
    if kind == "image":
        (_, grey), *_ = read_frames(path, [0])
        assert grey.number == result if isinstance(grey, Refusal) else grey.shape == result
    elif kind == "none":
        assert record.fault == result


def test_order_is_by_position_and_a_second_run_does_nothing(tmp_path: Path):
    pixels = write_series(tmp_path / "export/a", "Doe 1", 4)
    export = export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))
    data = taken(export)
    assert [item.index for item in data.slices] == [0, 1, 2, 3]
    assert data.slices[0].spacing_mm == (5.0, 1.0, 1.5)
    for item, grey in zip(data.slices, pixels, strict=True):
        low, high = item.window.low, item.window.high
        assert np.allclose(load_image(item), np.clip((grey - low) / (high - low), 0, 1), atol=1e-6)
    assert not ingest(export), "nothing is left to do"


def test_changed_and_deleted_files_are_noticed_and_their_frames_go(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    write_series(tmp_path / "export/b", "two", 2, seed=2)
    export = export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))
    before = taken(export)
    for path in (tmp_path / "export/b").iterdir():
        path.unlink()
    after = taken(export)
    assert len(before.slices) == 4
    assert {item.patient for item in after.slices} < {item.patient for item in before.slices}
    assert sum(1 for _ in (export.store / "frames").rglob("*.safetensors")) == 2


def test_a_forgotten_patient_stays_away(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    write_series(tmp_path / "export/b", "two", 2, seed=2)
    export = export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))
    taken(export)
    assert forget(export, "two") == 2
    assert len(index.read_index(export.store).slices) == 2
    data = taken(export)
    assert len(data.slices) == 2
    assert [item.number for item in data.exclusions] == [132]
    assert sum(1 for _ in (export.store / "frames").rglob("*.safetensors")) == 2


def test_copies_are_found_also_between_patients_of_two_splits(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    write_series(tmp_path / "export/b", "two", 2, seed=1)
    split = tmp_path / "split.csv"
    split.write_text("patient,split\none,train\ntwo,test\n")
    export = export_of(tmp_path / "export", tmp_path / "place")
    export = Export(**{name: getattr(export, name) for name in export.__slots__} | {"split_file": split})
    data = taken(export)
    assert {item.split for item in data.slices} == {"test"}
    assert [item.number for item in data.exclusions].count(125) == 2


def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path):
    for number in range(12):
        write_series(tmp_path / f"export/{number}", f"patient {number}", 3, seed=number)
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); import test_ingest as t\n"
        "if __name__ == '__main__': t.ingest(t.export_of(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path / "export"), str(tmp_path / "killed"), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for wait_s in (1.5, 2.5, 3.0, 3.5):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        time.sleep(wait_s)
        os.killpg(process.pid, 9)
        process.wait()
    killed = taken(export_of(tmp_path / "export", tmp_path / "killed"))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/secret.key").write_bytes((tmp_path / "killed/secret.key").read_bytes())
    (tmp_path / "whole/secret.key").chmod(0o600)
    whole = taken(export_of(tmp_path / "export", tmp_path / "whole"))
    assert [(i.patient, i.index, i.split, i.image_digest) for i in killed.slices] == [
        (i.patient, i.index, i.split, i.image_digest) for i in whole.slices
    ]
    assert len(whole.slices) == 36


def test_no_marker_from_header_or_path_is_in_anything_that_is_written(tmp_path: Path):
    marker = "QXZMARK"
    texts = {"LO": f"{marker}LO", "PN": f"{marker}^PN", "SH": f"{marker}SH", "LT": f"{marker}LT", "ST": f"{marker}ST"}
    planted: dict[str, object] = {
        element[4]: texts[element[0]]
        for tag, element in pydicom.datadict.DicomDictionary.items()
        if tag > 0x00080000
        and element[0] in texts
        and element[1] == "1"
        and element[4]
        and not element[4].startswith(("Group", "Code"))
    }
    write_series(tmp_path / f"export/{marker}dir", f"{marker}id", 2, **planted)
    for path in list((tmp_path / f"export/{marker}dir").iterdir()):
        path.rename(path.with_name(f"{marker}{path.name}"))
        if path.suffix == ".dcm":
            data = pydicom.dcmread(path.with_name(f"{marker}{path.name}"))
            data.private_block(0x0099, f"{marker}private", create=True).add_new(1, "LO", f"{marker}value")
            data.save_as(path.with_name(f"{marker}{path.name}"))
    export = export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))
    data = taken(export)
    assert len(planted) > 500
    assert len(data.slices) == 2, "the series is used in spite of all markers"
    written = [path for path in (tmp_path / "place").rglob("*") if path.is_file()]
    assert len(written) >= 4
    for path in written:
        assert marker.encode() not in path.read_bytes(), path.name
        assert marker not in path.name
    assert marker not in repr(data)


def test_dicom_and_png_of_one_patient_give_equal_arrays_and_equal_digests(tmp_path: Path):
    pixels = write_series(tmp_path / "export/a", "one", 3, RescaleSlope="0.25", RescaleIntercept="-200")
    export = export_of(tmp_path / "export", tmp_path / "indexes/Elm", shares=(1.0, 0.0, 0.0))
    export = Export(
        **{name: getattr(export, name) for name in export.__slots__} | {"store": store_of(tmp_path / "indexes/Elm", LESION)}
    )
    ingest(export)
    by_dicom = read_sites(tmp_path / "indexes", LESION)["Elm"].slices
    for name in ("Elm/images", "Elm/masks", "splits"):
        (tmp_path / "png" / name).mkdir(parents=True)
    rows = ["split,site,patient,slice,image,mask"]
    for number, (grey, item) in enumerate(zip(pixels, by_dicom, strict=True)):
        Image.fromarray(grey).save(tmp_path / f"png/Elm/images/{number}.png")
        Image.fromarray(load_mask(item.mask, LESION) * 255).save(tmp_path / f"png/Elm/masks/{number}.png")
        rows.append(f"train,Elm,somebody,{number},Elm/images/{number}.png,Elm/masks/{number}.png")
    for split in ("train", "val", "test"):
        (tmp_path / f"png/splits/{split}.csv").write_text("\n".join(rows if split == "train" else rows[:1]) + "\n")
    by_png = read_sites(tmp_path / "png", LESION)["Elm"].slices
    assert [item.image_digest for item in by_dicom] == [item.image_digest for item in by_png]
    for one, other in zip(by_dicom, by_png, strict=True):
        assert np.array_equal(load_image(one), load_image(other))
        assert np.array_equal(load_mask(one.mask, LESION), load_mask(other.mask, LESION))


def test_the_command_ingests_forgets_and_refuses_by_number(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    write_series(tmp_path / "export/b", "two", 2, seed=2)
    study = (
        'name = "tiny"\nseed = 1\n[[labels]]\nname = "background"\nvalues = [0]\n[[labels]]\nname = "lesion"\nvalues = [255]\n'
    )
    (tmp_path / "study.toml").write_text(f'{study}[backbone]\ndigest = "{"0" * 64}"\n')
    (tmp_path / "site.toml").write_text('name = "Elm"\n[ingest]\nfolder = "export"\nshares = [1.0, 0.0, 0.0]\n')

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [str(Path(sys.executable).parent / "fl_client"), "--site", "Elm", "--config", str(tmp_path / "site.toml"), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    assert "not read yet" in command("approve", str(tmp_path / "study.toml"), "--yes").stdout
    dry = command("ingest", "--dry-run", "--json")
    assert json.loads(dry.stdout)[0]["used"] == 4
    assert not (tmp_path / "ingest").exists(), "a dry run keeps nothing"
    assert json.loads(command("ingest", "--json").stdout)[0]["changed"] is True
    assert json.loads(command("ingest", "--json").stdout)[0]["changed"] is False
    assert command("forget", "two").stdout.startswith("2 images")
    assert json.loads(command("ingest", "--json").stdout)[0]["used"] == 2
    (tmp_path / "ingest/secret.key").chmod(0o644)
    refused = command("ingest")
    assert refused.returncode == 1
    assert "ICM129" in refused.stderr
    assert "Traceback" not in refused.stderr


CT = Path(str(get_testdata_file("CT_small.dcm", download=False))).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(CT) - 8), new=st.binary(min_size=1, max_size=8), cut=st.integers(0, len(CT)))
def test_damaged_bytes_never_crash_and_always_have_a_reason(tmp_path: Path, at: int, new: bytes, cut: int):
    content = CT[:at] + new + CT[at + len(new) :]
    (tmp_path / "x").write_bytes(content[:cut] if cut % 3 == 0 else content)
    reader = Reader(tmp_path, Pseudonyms(bytes(32)), LabelNames(LESION, {}), None)
    record = reader.read("x")
    assert bool(record.fault) == bool(record.why)
    if record.kind == "image":
        for _, grey in read_frames(tmp_path / "x", [0]):
            assert isinstance(grey, Refusal) or grey.shape == (record.rows, record.columns)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=600),
    head=st.sampled_from([b"", bytes(128) + b"DICM", b"\x08\x00", b"\x89PNG\r\n\x1a\n", b"\x1f\x8b"]),
)
def test_arbitrary_bytes_are_refused(tmp_path: Path, content: bytes, head: bytes):
    (tmp_path / "x").write_bytes(head + content)
    record = Reader(tmp_path, Pseudonyms(bytes(32)), LabelNames(LESION, {}), None).read("x")
    assert record.fault in {116, 117, 119}
