"""Every real series against the truth beside it, pixel by pixel, and a rehearsal that cannot tell DICOM from PNG."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from exports import BACKGROUND, LESION, export_of
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut

from icmoe.data.ingest import index
from icmoe.data.ingest.catalogue import Catalogue
from icmoe.data.ingest.pairing import pair
from icmoe.data.ingest.planning import Planned, Site, plan
from icmoe.data.ingest.pseudonyms import site_pseudonyms
from icmoe.data.ingest.records import FrameResult
from icmoe.data.ingest.run import Export, ingest, store_of
from icmoe.data.ingest.walking import walk
from icmoe.data.slices import load_image, load_mask
from icmoe.data.sources import read_sites
from icmoe.data.store import Stored, entry_path, read_stored
from icmoe.study import Label

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
pytestmark = [pytest.mark.real, pytest.mark.skipif(not DATA.exists(), reason="the real hospital images are not here")]
WHEEL = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent
CONSTANT = 113
BY_INSTANCE = {"ignore_spatial_locations": True, "assert_missing_frames_are_empty": True}
Frames = dict[tuple[str, int], Stored | int]
"""What became of each frame by path below the export and frame number: its pixels, or the number of the reason."""


def frames_of(export: Export) -> Frames:
    """Ingest an export and match its frames with its files again: only who has the export and the secret can."""
    ingest(export)
    hashes = site_pseudonyms(export.secret_folder)
    walked = walk(export.root, export.settings.exclude)
    site = Site(export.root, export.store, hashes, export.labels, export.settings.allow, ())
    with index.claimed(export.store) as connection:
        files = Catalogue(connection, ((path, hashes.of("file", path), *state) for path, *state in walked))
        files.sort(hashes)
        pair(files)
        made = [item for item in plan(files, site) if isinstance(item, Planned)]
        rows = connection.execute("select id, fingerprint, results from series").fetchall()
    results = {key: (mark, [FrameResult.model_validate(item) for item in json.loads(text)]) for key, mark, text in rows}
    found: Frames = {}
    for planned in made:
        known, answers = results[planned.job.series]
        assert known == planned.mark
        for frame, answer in zip(planned.job.frames, answers, strict=True):
            stored = answer.fault or read_stored(entry_path(export.store, answer.entry))
            found[frame.path, frame.number] = stored
    used = {item.image for item in index.read_index(export.store).slices}
    with_pixels = {entry_path(export.store, a.entry) for _, answers in results.values() for a in answers if not a.fault}
    assert used == with_pixels, "what was decoded is what training reads"
    return found


def rows_of(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((DATA / name / "index.csv").read_text().splitlines()))


def png(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def differing(found: Stored | int, grey: np.ndarray | None, classes: np.ndarray) -> int:
    """Return how many pixels differ from the truth; a refused frame differs everywhere."""
    if isinstance(found, int):
        return classes.size
    assert found.classes_HW.shape == classes.shape
    wrong = int((found.classes_HW != classes).sum())
    return wrong if grey is None else wrong + int((found.grey_HW != grey).sum())


def grey_of(header: pydicom.Dataset) -> np.ndarray:
    """Return what the standard makes of a linear grey object; its window bounds the series and clips no slice."""
    return np.asarray(apply_modality_lut(header.pixel_array, header), dtype=np.float64)


def lgg_pairs() -> dict[str, tuple[Path, Path, dict[str, str]]]:
    """Return PNG image, PNG mask and split row by DICOM path, for every slice that both collections hold."""
    listed = csv.DictReader((DATA / "lgg-multisite/splits/all.csv").read_text().splitlines())
    by_slice = {(row["site"], row["patient"], int(row["slice"])): row for row in listed}
    pairs = {}
    for row in rows_of("lgg-dicom"):
        key = (row["site"], row["patient"].removeprefix("TCGA-").replace("-", "_"), int(row["index"]) + 1)
        if key in by_slice:
            other = by_slice[key]
            pairs[row["dicom"]] = (DATA / "lgg-multisite" / other["image"], DATA / "lgg-multisite" / other["mask"], other)
    return pairs


@pytest.mark.parametrize("site", ["CS", "DU", "HT", "EZ"])
def test_every_slice_of_a_lgg_series_has_the_pixels_and_the_mask_of_the_png_export(site: str, tmp_path: Path):
    found = frames_of(export_of(DATA / "lgg-dicom" / site, tmp_path))
    rows = [row for row in rows_of("lgg-dicom") if row["site"] == site]
    assert {f"{site}/{path}" for path, _ in found} == {row["dicom"] for row in rows}
    pairs, compared = lgg_pairs(), 0
    for row in rows:
        frame = found[row["dicom"].removeprefix(f"{site}/"), 0]
        if isinstance(frame, int):
            values = pydicom.dcmread(DATA / "lgg-dicom" / row["dicom"]).pixel_array
            assert (frame, int(np.ptp(values)), row["tumour_px"]) == (CONSTANT, 0, "0"), row["dicom"]
            continue
        assert int((frame.classes_HW == 1).sum()) == int(row["tumour_px"]), row["dicom"]
        if row["dicom"] in pairs:
            image, mask, _ = pairs[row["dicom"]]
            scale = 16 if site in {"HT", "EZ"} else 1
            assert differing(frame, png(image).astype(np.int64) * scale, png(mask) // 255) == 0, row["dicom"]
            compared += 1
    every = [dicom for dicom in pairs if dicom.startswith(f"{site}/")]
    refused = [dicom for dicom in every if isinstance(found[dicom.removeprefix(f"{site}/"), 0], int)]
    assert compared == len(every) - len(refused) > 0
    assert all(np.ptp(png(pairs[dicom][0])) == 0 for dicom in refused), "the PNG is of one value too"


def lgg_mask(row: dict[str, str]) -> np.ndarray:
    """Return the mask of a row as its own reader gives it: highdicom, nibabel or Pillow."""
    path = DATA / "lgg-dicom" / row["mask"]
    if row["mask_form"] == "png":
        return png(path) // 255
    if row["mask_form"] == "nifti":
        return np.asarray(nibabel.load(path).dataobj)[:, :, int(row["index"])].T
    seg, uid = highdicom.seg.segread(path), row["sop_instance_uid"]
    return seg.get_pixels_by_source_instance([uid], ignore_spatial_locations=True, assert_missing_frames_are_empty=True)[
        0, ..., 0
    ]


def test_every_row_of_lgg_has_the_mask_that_its_own_reader_gives(tmp_path: Path):
    found = frames_of(export_of(DATA / "lgg-dicom", tmp_path))
    wrong = {}
    for row in rows_of("lgg-dicom"):
        frame = found[row["dicom"], 0]
        if frame != CONSTANT:
            wrong[row["dicom"]] = differing(frame, grey_or_inverted(row), lgg_mask(row))
    assert len(wrong) > 160
    assert sum(wrong.values()) == 0


def grey_or_inverted(row: dict[str, str]) -> np.ndarray:
    header = pydicom.dcmread(DATA / "lgg-dicom" / row["dicom"])
    grey = grey_of(header)
    return 4095 - grey if header.PhotometricInterpretation == "MONOCHROME1" else grey


@pytest.mark.parametrize("form", ["seg", "lv_png", "myo_png"])
def test_every_sunnybrook_image_has_its_own_pixels_and_the_experts_mask(form: str, tmp_path: Path):
    cavity, muscle = Label(name="LV cavity", values=(255,)), Label(name="myocardium", values=(2,))
    labels = (BACKGROUND, cavity) if form != "myo_png" else (BACKGROUND, Label(name="LV cavity", values=(1,)), muscle)
    others = tuple(f"*/{name}/*" for name in ("seg", "lv_png", "myo_png") if name != form)
    found = frames_of(export_of(DATA / "sunnybrook-lv-dicom", tmp_path, labels, exclude=others))
    column = "myo_png" if form == "myo_png" else "lv_png"
    rows = [row for row in rows_of("sunnybrook-lv-dicom") if row[column]]
    assert {path for path, _ in found} == {row["dicom"] for row in rows}
    assert len(rows) == (28 if form == "myo_png" else 78)
    for row in rows:
        header = pydicom.dcmread(DATA / "sunnybrook-lv-dicom" / row["dicom"])
        assert header.SOPInstanceUID == row["sop_instance_uid"]
        mask = png(DATA / "sunnybrook-lv-dicom" / row[column])
        truth = mask if form == "myo_png" else mask // 255
        assert differing(found[row["dicom"], 0], grey_of(header), truth) == 0, row["dicom"]


def test_every_voxel_of_every_hippocampus_is_where_the_body_has_it(tmp_path: Path):
    labels = (BACKGROUND, Label(name="anterior", values=(1,)), Label(name="posterior", values=(2,)))
    found = frames_of(export_of(DATA / "hippocampus-nifti", tmp_path, labels))
    expected: set[tuple[str, int]] = set()
    for row in rows_of("hippocampus-nifti"):
        # To the right, to the front, to the head; a picture shows the front above and the left of the body on the right.
        image, mask = (
            np.asarray(nibabel.as_closest_canonical(nibabel.load(DATA / "hippocampus-nifti" / kind / row["name"])).dataobj)
            for kind in ("images", "labels")
        )
        assert [int((mask == value).sum()) for value in (1, 2)] == [int(row["anterior_vox"]), int(row["posterior_vox"])]
        for height in range(image.shape[2]):
            key = (f"images/{row['name']}", height)
            grey, classes = (volume[::-1, ::-1, height].T for volume in (image, mask))
            if found[key] == CONSTANT:
                assert np.ptp(grey) == 0
            else:
                assert differing(found[key], grey.astype(np.float32), classes) == 0, key
            expected.add(key)
    assert found.keys() == expected


def nrrd(path: Path) -> np.ndarray:
    """Return the voxels of a small gzip NRRD, first axis first."""
    header, _, content = path.read_bytes().partition(b"\n\n")
    fields = dict(line.split(": ", 1) for line in header.decode().splitlines() if ": " in line)
    assert (fields["type"], fields["endian"], fields["encoding"]) == ("short", "little", "gzip")
    shape = tuple(map(int, fields["sizes"].split()))
    return np.frombuffer(gzip.decompress(content), "<i2").reshape(shape, order="F")


def test_the_liver_of_dcmqi_is_that_of_its_nrrd(tmp_path: Path):
    folder = DATA / "dicom-seg-samples/dcmqi-ct"
    found = frames_of(export_of(folder, tmp_path, (BACKGROUND, Label(name="Liver", values=(1,)))))
    voxels = nrrd(folder / "liver_seg.nrrd")
    assert voxels.sum() > 1000
    assert {path for path, _ in found} == {"image/01.dcm", "image/02.dcm", "image/03.dcm"}
    for (path, _), frame in found.items():
        header = pydicom.dcmread(folder / path)
        height = round(float(header.ImagePositionPatient[2]) + 128.69)  # of the NRRD's origin, 1 mm apart
        grey, padding = grey_of(header), header.pixel_array == header.PixelPaddingValue
        grey[padding] = grey[~padding].min()
        assert differing(frame, grey, voxels[:, :, height].T) == 0, path


@pytest.mark.parametrize("name", ["binary", "binary_fractional", "binary_single_frame"])
def test_segments_of_highdicom_are_those_that_highdicom_reads(name: str, tmp_path: Path):
    samples, folder = DATA / "dicom-seg-samples/highdicom", tmp_path / "export"
    images = [samples / "ct_image.dcm"] if "single" in name else sorted((WHEEL / "dicomdirtests/77654033/CT2").iterdir())
    for path in (*images, samples / f"seg_image_ct_{name}.dcm"):
        (folder / path.name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.name)
    bone = (BACKGROUND, Label(name="bone", values=(1,)))
    found = frames_of(export_of(folder, tmp_path, bone))
    seg = highdicom.seg.segread(samples / f"seg_image_ct_{name}.dcm")
    assert {path for path, _ in found} == {path.name for path in images}
    marked = 0
    for path in images:
        header = pydicom.dcmread(path)
        pixels = seg.get_pixels_by_source_instance([header.SOPInstanceUID], rescale_fractional=True, **BY_INSTANCE)[0, ..., 0]
        if found[path.name, 0] == CONSTANT:
            assert np.ptp(grey_of(header)) == 0
        else:
            assert differing(found[path.name, 0], grey_of(header), (pixels >= 0.5).astype(np.uint8)) == 0, path.name
            marked += int((pixels >= 0.5).sum())
    assert marked > 0


def test_pictures_with_burned_in_text_are_held_back(tmp_path: Path):
    export = export_of(DATA / "dicom-phi-samples", tmp_path)
    assert not frames_of(export)
    assert [item.number for item in index.read_index(export.store).exclusions].count(126) == 2


SPLIT = {"CS_5393": "val", "CS_5395": "test", "DU_A5TU": "test", "HT_8018": "test"}
"""Of the eight patients that both collections hold; the others are for training."""


KINDS = ("image", "mask")


def copied(files: Iterable[tuple[Path, Path]]) -> None:
    for source, target in files:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with "png" and "dicom": the same slices of the same hospitals as PNG folder and as ingest indexes."""
    root, pairs = tmp_path_factory.mktemp("both"), lgg_pairs()
    copied((path, root / "png" / row[kind]) for *paths, row in pairs.values() for path, kind in zip(paths, KINDS, strict=True))
    (root / "png/splits").mkdir()
    for split in ("train", "val", "test"):
        lines = [
            f"{split},{row['site']},{row['patient']},{row['slice']},{row['image']},{row['mask']},5,1,1"
            for _, _, row in pairs.values()
            if SPLIT.get(row["patient"], "train") == split
        ]
        head = "split,site,patient,slice,image,mask,spacing_slice_mm,spacing_row_mm,spacing_col_mm"
        (root / f"png/splits/{split}.csv").write_text("\n".join([head, *lines]) + "\n")
    masks = {row["dicom"]: row["mask"] for row in rows_of("lgg-dicom")}
    copied((DATA / "lgg-dicom" / path, root / "export" / path) for dicom in pairs for path in (dicom, masks[dicom]))
    for site in ("CS", "DU", "EZ", "HT"):
        ingest(site_export(root, site))
    return root


def site_export(root: Path, site: str) -> Export:
    numbers = {row["patient"] for row in rows_of("lgg-dicom") if row["site"] == site}
    split = root / f"{site}.csv"
    lines = [f"{name},{SPLIT.get(name.removeprefix('TCGA-').replace('-', '_'), 'train')}" for name in sorted(numbers)]
    split.write_text("\n".join(["patient,split", *lines]) + "\n")
    place = root / "dicom" / site
    chosen = export_of(root / "export" / site, place)
    fields = {name: getattr(chosen, name) for name in Export.__slots__}
    return Export(**fields | {"site": site, "store": store_of(place, LESION), "split_file": split})


def contents(root: Path) -> Iterator[tuple[str, str, bytes, bytes, str, str]]:
    for site, data in read_sites(root, LESION).items():
        for item in data.slices:
            arrays = load_image(item).tobytes(), load_mask(item.mask, LESION).tobytes()
            yield site, item.split, *arrays, item.image_digest, item.marks


def test_dicom_and_png_of_the_same_slices_give_equal_arrays_and_digests(both: Path):
    by_dicom, by_png = (sorted(contents(both / kind)) for kind in ("dicom", "png"))
    assert len(by_dicom) == len(by_png) > 100
    assert by_dicom == by_png


def rehearsed(data: Path, out: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    options = ["--backbone", "sam-vit-test", "--image-size", "64", "--rounds", "2", "--local-epochs", "1"]
    command = [sys.executable, str(ROOT / "simulations/run_sim.py"), "--data", str(data), *options, "--methods"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(out.parent / f"cache-{out.name}")}
    done = subprocess.run(
        [*command, "router-aware,local", "--out", str(out)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    models = {path.name: path.read_bytes() for path in (out / "models").glob("*.safetensors")}
    cached = {path.name for path in (out.parent / f"cache-{out.name}").rglob("*.safetensors")}
    return {**json.loads((out / "results.json").read_text()), "cached": cached}, models


def test_a_rehearsal_cannot_tell_dicom_from_png(both: Path, tmp_path: Path):
    (dicom, models), (png_, others) = rehearsed(both / "dicom", tmp_path / "dicom"), rehearsed(both / "png", tmp_path / "png")
    assert dicom["cached"] == png_["cached"] != set()
    for method in ("router-aware", "local"):
        one, other = dicom["methods"][method]["1"]["test"], png_["methods"][method]["1"]["test"]
        assert one["pooled"]["dice"] is not None
        assert (one["pooled"]["dice"], one["pooled"]["patients"]) == (other["pooled"]["dice"], other["pooled"]["patients"])
        assert {site: row["dice"] for site, row in one["sites"].items()} == {s: row["dice"] for s, row in other["sites"].items()}
    assert len(models) > 1
    assert models == others
