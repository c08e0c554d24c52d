"""Ingest after changes of the site file and after requests to forget: nothing stale is used, nobody comes back."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_builders import MASKS, VOLUME, contour, numbers, put, same, save, scaled, segmentation, structures, used, volume
from exports import LESION, export_of, published, taken, write_series
from PIL import Image
from test_quality import site_file

from fl_client import preparing
from fl_client.approval import approved_studies
from fl_client.ingesting import forget_patient, ingest_site
from fl_client.participant import Participant
from fl_client.site import cache_folder_of, read_named, site_slices
from icmoe.data.ingest import index
from icmoe.data.ingest.pseudonyms import pseudonym_of, site_pseudonyms
from icmoe.data.ingest.run import Export, forget, ingest
from icmoe.data.slices import load_mask
from icmoe.errors import IcmoeError
from icmoe.features import FeatureCache
from icmoe.study import Label, Study, read_study

SHIFTED = np.roll(MASKS, 3, axis=1)


def two_segments(place: Path) -> Export:
    """Write a series with a SEG of two segments."""
    images = volume(VOLUME)
    put(place, images)
    both = np.stack([MASKS, SHIFTED], axis=-1)
    save(segmentation(images, both, "BINARY", ("first", "second")), place / "export/s")
    return export_of(place / "export", place / "kept")


def named(export: Export, *names: str) -> Export:
    """Return the export with these names for the class."""
    return replace(export, settings=export.settings.model_copy(update={"labels": {"lesion": names}}))


def classes(export: Export) -> np.ndarray:
    return np.stack([load_mask(item.mask, LESION) for item in taken(export).slices])


def test_other_names_for_a_class_make_other_class_maps(tmp_path: Path):
    export = two_segments(tmp_path)
    assert np.array_equal(classes(named(export, "first")), MASKS)
    assert np.array_equal(classes(named(export, "second")), SHIFTED)
    assert np.array_equal(classes(named(export, "first", "second")), MASKS | SHIFTED)


def test_a_kill_after_other_names_were_given_leaves_nothing_of_the_former(tmp_path: Path):
    export = two_segments(tmp_path)
    taken(named(export, "first"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(named(export, "third"), on_progress=stop)
    data = taken(named(export, "third"))
    assert not data.slices
    assert 120 in numbers(data)


@pytest.mark.parametrize("later", ["other study", "index lost"])
def test_a_forgotten_patient_stays_away_from_every_later_index(tmp_path: Path, later: str):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    write_series(tmp_path / "export/b", "two", 2, seed=2)
    export = export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))
    ingest(export)
    forget(export.secret_folder, " TWO ")
    if later == "other study":
        labels = (LESION[0], Label(name="tumour", values=(255,)))
        export = replace(export, store=tmp_path / "place/other", labels=labels)
    else:
        shutil.rmtree(export.store)
    data = taken(export)
    assert len(data.slices) == 2
    assert 132 in numbers(data)


def test_a_patient_is_forgotten_by_pseudonym_with_blanks_and_capitals(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    export = export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))
    (name,) = {item.patient for item in taken(export).slices}
    assert forget(export.secret_folder, f" {name.upper()} ") == 2


def test_forgetting_a_patient_reaches_studies_that_are_no_longer_approved(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    path = site_file(tmp_path, tmp_path / "export", "[255]")
    former = Path(ingest_site(path, "Elm", dry_run=False)[0]["page"]).parent
    site_file(tmp_path, tmp_path / "export", "[128, 255]")
    ingest_site(path, "Elm", dry_run=False)
    assert forget_patient(path, "Elm", "one")[0] == 2, "the same images in both indexes"
    assert not published(former)[0]
    assert not list((former / "frames").rglob("*.safetensors"))


def test_an_index_that_somebody_reads_can_be_put_away_all_the_same(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    export = export_of(tmp_path / "export", tmp_path / "kept")
    ingest(export)
    with ExitStack() as readers, index.claimed(export.store) as writer:
        index.put_meta(writer, {"key": "value"})
        reader = readers.enter_context(index.opened(export.store))
        reader.execute("begin")
        assert reader.execute("select count(*) from frame").fetchone() == (2,)
    with index.opened(export.store) as reader:
        assert index.meta(reader, "key") == "value"


@pytest.mark.parametrize("begun", ["an empty file", "a database without tables"])
def test_an_index_that_a_kill_left_before_its_tables_is_filled(begun: str, tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    path = site_file(tmp_path, tmp_path / "export", "[255]")
    store = Path(ingest_site(path, "Elm", dry_run=False)[0]["page"]).parent
    (store / "index.sqlite").write_bytes(b"")
    if begun != "an empty file":
        connection = sqlite3.connect(store / "index.sqlite")
        connection.execute("pragma journal_mode = wal")
        connection.close()
    assert ingest_site(path, "Elm", dry_run=False)[0]["used"] == 2


def with_features(path: Path) -> list[Path]:
    """Return a stand-in for each picture's cached features."""
    settings, (study,) = read_named(path, "Elm"), approved_studies(path.parent / "state")
    cache = FeatureCache.of(cache_folder_of(path, settings), study)
    entries = [cache.path(cache.key(item.image_digest, "identity")) for item in site_slices(path, settings, study)]
    for entry in entries:
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_bytes(b"features")
    return entries


@pytest.mark.parametrize("harm", ["the folder", "the index", "nothing"])
def test_features_of_the_forgotten_and_deleted_go_though_the_index_was_moved_away_and_made_anew(harm: str, tmp_path: Path):
    for number, name in enumerate(("one", "two", "three")):
        write_series(tmp_path / "export" / name, name, 2, seed=number)
    path = site_file(tmp_path, tmp_path / "export", "[255]")
    path.write_text(path.read_text().replace("[ingest]", 'cache = "cache"\n[ingest]'))
    store = Path(ingest_site(path, "Elm", dry_run=False)[0]["page"]).parent
    assert len(with_features(path)) == 6
    if harm == "the folder":
        store.rename(tmp_path / "moved")
    elif harm == "the index":
        (store / "index.sqlite").unlink()
    shutil.rmtree(tmp_path / "export/one")
    if harm == "the folder":  # the index knows nothing of the second patient when this is asked
        assert forget_patient(path, "Elm", "two")[1] == 6
    ingest_site(path, "Elm", dry_run=False)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == (0 if harm == "the folder" else 4)
    if harm != "the folder":
        assert forget_patient(path, "Elm", "two")[1] == 2
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_features_are_looked_through_again_once_they_are_computed_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    path = site_file(tmp_path, tmp_path / "export", "[255]")
    path.write_text(path.read_text().replace("[ingest]", 'cache = "cache"\n[ingest]'))
    settings, (study,) = read_named(path, "Elm"), approved_studies(tmp_path / "state")
    ingest_site(path, "Elm", dry_run=False)
    looks: list[str] = []
    monkeypatch.setattr(preparing, "_encode", lambda *_: len(looks))

    def look() -> int:
        looks.append("")
        return preparing.encode_ingested(path, settings, study, on_progress=lambda *_: None)

    assert (look(), look()) == (1, 2), "nothing is in the cache"
    entry = cache_folder_of(path, settings) / "ab/cd.safetensors"
    entry.parent.mkdir(parents=True)
    entry.touch()
    assert look() == 0
    for name in ("PREPROCESSING_VERSION", "FORMAT"):
        monkeypatch.setattr(preparing, name, "another")
        assert look()
        assert not look()
    ingest_site(path, "Elm", dry_run=False)
    assert not look(), "nothing has changed"
    write_series(tmp_path / "export/b", "two", 1, seed=2)
    ingest_site(path, "Elm", dry_run=False)
    assert look(), "other pictures are there"
    forget_patient(path, "Elm", "two")
    assert look(), "and others again"
    assert not look()


def test_a_dry_run_does_not_read_a_forgotten_patient(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    path = site_file(tmp_path, tmp_path / "export", "[255]")
    forget_patient(path, "Elm", "one")
    (report,) = ingest_site(path, "Elm", dry_run=True)
    assert report["used"] == 0
    assert "132" in json.dumps(report["reasons"])


def test_a_mask_of_another_patient_is_refused_although_it_shares_the_frame_of_reference(tmp_path: Path):
    images = volume(VOLUME)
    put(tmp_path, images)
    mask = segmentation(images, MASKS, "BINARY")
    for own in mask.PerFrameFunctionalGroupsSequence:
        own.pop("DerivationImageSequence", None)
    del mask.ReferencedSeriesSequence
    mask.PatientID = "Roe 2"
    save(mask, tmp_path / "export/s")
    data = taken(export_of(tmp_path / "export", tmp_path / "kept"))
    assert not data.slices
    assert 121 in numbers(data)


def picture(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (20, 24)).astype(np.uint8)


def test_a_mask_does_not_go_to_the_picture_of_its_name_in_another_patients_folder(tmp_path: Path):
    picture(tmp_path / "export/images/A/1.png", noise(1))
    picture(tmp_path / "export/images/B/2.png", noise(2))
    for name in ("B/1", "B/2"):
        picture(tmp_path / f"export/masks/{name}.png", MASKS[2] * 255)
    data = taken(export_of(tmp_path / "export", tmp_path / "kept"))
    assert len(data.slices) == 1
    assert numbers(data).count(121) == 1


@pytest.mark.parametrize(("image", "mask"), [("A.nii", "B_seg.nii"), ("A/t1.nii", "B/seg.nii")])
def test_a_volume_does_not_go_to_another_patients_image_on_the_same_grid(tmp_path: Path, image: str, mask: str):
    grey = np.random.default_rng(1).normal(size=(20, 24, 5)).astype(np.float32)
    for name, values in ((image, grey), (mask, np.moveaxis(MASKS, 0, 2))):
        (tmp_path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / "export" / name)
    data = taken(export_of(tmp_path / "export", tmp_path / "kept"))
    assert not data.slices
    assert 121 in numbers(data)


def test_a_mask_that_names_an_instance_of_two_patients_is_refused(tmp_path: Path):
    one, other = volume(VOLUME), volume(VOLUME[:, ::-1].copy(), PatientID="Roe 2")
    for first, second in zip(one, other, strict=True):
        second.SOPInstanceUID = first.SOPInstanceUID
    mask = segmentation(other, MASKS, "BINARY")
    mask.PatientID = ""
    for folder, objects in (("a", one), ("b", [*other, mask])):
        for number, data in enumerate(objects):
            save(data, tmp_path / f"export/{folder}/{number}")
    found = taken(export_of(tmp_path / "export", tmp_path / "kept"))
    assert not found.slices
    assert 122 in numbers(found)


@pytest.mark.parametrize("told", [True, False])
def test_contours_without_images_lie_in_the_frame_of_reference_that_their_region_names(told: bool, tmp_path: Path):
    one, other = volume(VOLUME), volume(VOLUME[:, ::-1].copy())
    square = contour(np.array([[-17, -27, 50], [-5, -27, 50], [-5, -18, 50], [-17, -18, 50]], dtype=float))
    drawn = structures([square], listed=one, space=one[0].FrameOfReferenceUID)
    further = structures([], listed=other, space=other[0].FrameOfReferenceUID)
    drawn.ReferencedFrameOfReferenceSequence.extend(further.ReferencedFrameOfReferenceSequence)
    if not told:
        drawn.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = ""
    put(tmp_path, [*one, *other, drawn])
    pictures, masks, data = used(tmp_path)
    assert same(pictures, scaled(VOLUME) if told else [])
    assert [bool(mask.any()) for mask in masks] == [False, False, True, False, False][: 5 * told]
    assert told or 122 in numbers(data)


def test_links_are_told_and_nothing_is_kept_inside_the_export(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    (tmp_path / "export/link").symlink_to(tmp_path / "export/a/x1.dcm")
    (tmp_path / "export/round").symlink_to(tmp_path / "export")
    with pytest.raises(IcmoeError, match="ICM210"):
        ingest(export_of(tmp_path / "export", tmp_path / "export/own"))
    assert not (tmp_path / "export/own").exists()
    export = export_of(tmp_path / "export", tmp_path / "place")
    assert ingest(export)
    assert not ingest(export)
    data = index.read_index(export.store)
    assert (len(data.slices), numbers(data).count(116)) == (2, 2)


def test_a_folder_that_cannot_be_read_is_not_taken_for_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    export = export_of(tmp_path / "export", tmp_path / "place")
    before = taken(export).slices
    listing = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refused)
        with pytest.raises(IcmoeError, match="ICM109"):
            ingest(export)
    assert index.read_index(export.store).slices == before


def test_one_patient_in_two_splits_is_a_fault_however_the_number_is_written(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    (tmp_path / "split.csv").write_text("patient,split\nOne,test\none,train\n")
    export = replace(export_of(tmp_path / "export", tmp_path / "place"), split_file=tmp_path / "split.csv")
    with pytest.raises(IcmoeError, match="ICM110"):
        ingest(export)


def test_a_study_of_other_labels_is_not_trained_on_the_masks_of_the_first(tmp_path: Path):
    first, second = (study_of(tmp_path, values) for values in ("[255]", "[128, 255]"))
    site = Participant(
        name="Elm", studies=(first, second), train=(), val=(), cache_folder=tmp_path / "cache", state_folder=tmp_path / "state"
    )
    assert site.approved(first.digest) is first
    with pytest.raises(IcmoeError, match="ICM302"):
        site.approved(second.digest)


def study_of(place: Path, values: str) -> Study:
    return read_study(site_file(place, place, values).with_name("study.toml"))


def test_what_ingest_keeps_is_its_owners_alone(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2)
    taken(export_of(tmp_path / "export", tmp_path / "place/ingest"))
    kept = [path for path in (tmp_path / "place/ingest").rglob("*") if path.name != "lock"]
    assert len(kept) > 5
    for path in [tmp_path / "place/ingest", *kept]:
        if path.is_file() or path.name in {"ingest", "store"}:
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_volume_keeps_its_spacing_without_its_empty_end_and_loses_it_with_a_gap(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 5, seed=1)
    export = export_of(tmp_path / "export", tmp_path / "place")
    assert {item.spacing_mm for item in taken(export).slices} == {(5.0, 1.0, 1.5)}
    make_constant(tmp_path / "export/a/x1.dcm")  # the last one: names count down
    assert [item.spacing_mm for item in taken(export).slices] == [(5.0, 1.0, 1.5)] * 4
    make_constant(tmp_path / "export/a/x3.dcm")
    assert [item.spacing_mm for item in taken(export).slices] == [None] * 3


def make_constant(path: Path) -> None:
    data = pydicom.dcmread(path)
    data.PixelData = bytes(len(data.PixelData))
    data.save_as(path)


def test_equal_numbers_of_two_issuers_are_two_patients_in_one_split(tmp_path: Path):
    for seed, issuer in enumerate(("Elm", "Oak", "")):
        named = {"IssuerOfPatientID": issuer} if issuer else {}
        write_series(tmp_path / f"export/{seed}", "17", 2, seed=seed, **named)
    write_series(tmp_path / "export/other", "18", 2, seed=9, IssuerOfPatientID="Elm")
    (tmp_path / "splits.csv").write_text("patient,split\n17,test\n17^^^Oak,test\n18,train\n")
    export = replace(export_of(tmp_path / "export", tmp_path / "place"), split_file=tmp_path / "splits.csv")
    data = taken(export)
    assert len({item.patient for item in data.slices}) == 4
    assert [len(data.of(split)) for split in ("train", "test")] == [2, 6]
    assert b"Oak" not in (export.store / "index.sqlite").read_bytes()
    drawn = taken(replace(export, split_file=None))
    splits = {item.patient: item.split for item in drawn.slices}
    hashes = site_pseudonyms(export.secret_folder)
    assert len({splits[pseudonym_of(f"17{issuer}", hashes)] for issuer in ("", "^^^Elm", "^^^Oak")}) == 1
    assert forget(export.secret_folder, "17^^^Oak") == 2
    assert forget(export.secret_folder, "17") == 4, "whoever gave the number"
    assert len(taken(export).slices) == 2
    assert ingest(export) is False
