"""Ingest: odd files with their reasons, changes, and no identity anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
from exports import LESION, export_of, read_frames, taken, write_series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_charset_files, get_testdata_file

from icmoe.data.ingest import index
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.opening import Refusal, open_dicom
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.reading import Reader
from icmoe.data.ingest.run import Export, forget, ingest, store_of
from icmoe.data.ingest.segmentations import read_patch
from icmoe.data.slices import load_image, load_mask
from icmoe.data.sources import read_sites, read_sites_split
from icmoe.errors import IcmoeError
from icmoe.study import Label

ODD: dict[str, tuple[str, object, tuple[float, float] | None]] = {
    # what it is; its size or the number of the reason; least and greatest grey value, after the header's window
    "CT_small.dcm": ("image", (128, 128), (128 - 1024, 2191 - 1024)),
    "MR_small.dcm": ("image", (64, 64), (127, 2145)),
    "MR_small_implicit.dcm": ("image", (64, 64), (127, 2145)),
    "MR_small_bigendian.dcm": ("image", (64, 64), (127, 2145)),
    "MR_small_RLE.dcm": ("image", (64, 64), (127, 2145)),
    "MR_small_jp2klossless.dcm": ("image", (64, 64), (127, 2145)),
    "MR_truncated.dcm": ("image", 118, None),
    "image_dfl.dcm": ("image", (512, 512), (0, 255)),
    "JPEG-lossy.dcm": ("image", 118, None),
    "examples_rgb_color.dcm": ("image", (240, 320), (0, 255)),
    "examples_ybr_color.dcm": ("image", (240, 320), None),
    "examples_palette.dcm": ("image", (350, 800), (0, 255 * 256)),
    "SC_rgb_small_odd.dcm": ("image", (3, 3), None),
    "rtplan.dcm": ("none", 119, None),
    "rtdose.dcm": ("none", 119, None),
    "liver_1frame.dcm": ("seg", (512, 512), None),
    "reportsi.dcm": ("none", 119, None),
    "no_meta.dcm": ("none", 116, None),
    "meta_missing_tsyntax.dcm": ("none", 117, None),
    "dicomdirtests/DICOMDIR": ("none", 119, None),
    "dicomdirtests/77654033/CT2/17106": ("image", (16, 16), (-981, 77)),
    "dicomdirtests/77654033/CT2/17136": ("image", (16, 16), (77, 1360)),
    "dicomdirtests/77654033/CT2/17166": ("image", (16, 16), (991, 1489)),
    "dicomdirtests/77654033/CT2/17196": ("image", (16, 16), (498, 1399)),
    "chrH31.dcm": ("image", (32, 32), (0, 255)),
    "zipMR.gz": ("none", 116, None),
    "README.txt": ("none", 116, None),
}
SAME_PIXELS = {"MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm"}
FRAMES = {"examples_ybr_color.dcm": 30}
WHEEL = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent


@pytest.mark.parametrize(("name", "want"), ODD.items())
def test_odd_files_are_read_or_refused_for_the_right_reason(name: str, want: tuple[str, object, tuple[float, float] | None]):
    path = Path(get_charset_files(name)[0]) if name.startswith("chr") else WHEEL / name
    record = Reader(path.parent, Pseudonyms(bytes(32)), LabelNames(LESION, {"lesion": ("liver",)}), None).read(path.name)
    kind, result, extremes = want
    assert record.kind == kind
    if kind == "none":
        assert record.fault == result
    elif kind == "seg":
        assert (record.fault, record.rows, record.columns) == (0, *result)
        assert record.patches[0].number == 0
        assert np.array_equal(read_patch(open_dicom(path, pixels=True), record.patches[0]), pydicom.dcmread(path).pixel_array)
    else:
        assert record.fault == 0
        frames = [grey for _, grey in read_frames(path, range(len(record.frames)))]
        assert len(frames) == FRAMES.get(name, 1)
        for grey in frames:
            assert grey.number == result if isinstance(grey, Refusal) else grey.shape == (record.rows, record.columns) == result
        assert extremes is None or (frames[0].min(), frames[0].max()) == extremes


@pytest.mark.parametrize("name", sorted(SAME_PIXELS))
def test_the_encoding_does_not_change_a_pixel(name: str):
    ((_, one),), ((_, other),) = read_frames(WHEEL / "MR_small.dcm", [0]), read_frames(WHEEL / name, [0])
    header = pydicom.dcmread(WHEEL / "MR_small.dcm")
    assert (int(header.pixel_array.min()), int(header.pixel_array.max())) == (127, 2145)
    assert np.array_equal(one, header.pixel_array), "its window bounds the series, it does not clip the slice"
    assert np.array_equal(one, other)


def test_order_is_by_position_and_a_second_run_does_nothing(tmp_path: Path):
    pixels = write_series(tmp_path / "export/a", "Doe 1", 4)
    export = export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))
    data = taken(export)
    assert [item.index for item in data.slices] == [0, 1, 2, 3]
    assert data.slices[0].spacing_mm == (5.0, 1.0, 1.5)
    assert {item.modality for item in data.slices} == {"MR"}
    assert all(item.classes == tuple(np.unique(load_mask(item.mask, LESION))) for item in data.slices)
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
    assert forget(export.secret_folder, "two") == 2
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
    assert [item.number for item in data.exclusions].count(127) == 2


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
    assert [item.marks for item in by_dicom] == [item.marks for item in by_png]
    for one, other in zip(by_dicom, by_png, strict=True):
        assert np.array_equal(load_image(one), load_image(other))
        assert np.array_equal(load_mask(one.mask, LESION), load_mask(other.mask, LESION))


def test_a_folder_of_indexes_names_sites_by_folder_and_leaves_no_hospital_out_in_silence(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 3)
    export = export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))
    taken(export)
    shutil.copytree(export.store, store_of(tmp_path / "indexes/copy of Elm", LESION))
    (site,) = read_sites(tmp_path / "indexes", LESION).values()
    assert {site.name, *(item.site for item in site.slices)} == {"copy of Elm"}
    assert len(site.slices) == 3
    for split, images in (("train", 3), ("test", 0)):
        (part,) = read_sites_split(tmp_path / "indexes", split, LESION).values()
        assert (part.images_found, part.images_used) == (images, images)
    shutil.copytree(export.store, store_of(tmp_path / "indexes/Oak", (*LESION, Label(name="other", values=(7,)))))
    (tmp_path / "indexes/Yew/images").mkdir(parents=True)
    for read in (partial(read_sites, labels=LESION), partial(read_sites_split, name="train", labels=LESION)):
        with pytest.raises(IcmoeError) as caught:
            read(tmp_path / "indexes")
        assert [(fault.number, fault.where) for fault in caught.value.faults] == [(131, "Oak"), (131, "Yew")]


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
    assert json.loads(command("ingest", "--json", "--no-encode").stdout)[0]["changed"] is True
    again = json.loads(command("ingest", "--json", "--no-encode").stdout)[0]
    assert again["changed"] is False
    for row in again["series"]:
        names = command("which", row["series"]).stdout.splitlines()
        assert {Path(name).parent.name for name in names} in ({"a"}, {"b"})
        assert set(names) <= set(command("which", row["patient"]).stdout.splitlines())
    assert "ICM210" in command("which", "S-0123456789abcdef").stderr
    assert command("forget", "two").stdout.startswith("2 images")
    assert json.loads(command("ingest", "--json", "--no-encode").stdout)[0]["used"] == 2
    (tmp_path / "ingest/secret.key").chmod(0o644)
    refused = command("ingest")
    assert refused.returncode == 1
    assert "ICM129" in refused.stderr
    assert "Traceback" not in refused.stderr


CT = (WHEEL / "CT_small.dcm").read_bytes()


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
