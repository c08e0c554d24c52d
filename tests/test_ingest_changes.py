"""Ingest after changes of the site file and after requests to forget: nothing stale is used, nobody comes back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, numbers, put, save, segmentation, volume
from exports import LESION, export_of, taken, write_series
from test_quality import site_file

from fl_client.ingesting import forget_patient, ingest_site
from icmoe.data.ingest import index
from icmoe.data.ingest.run import Export, forget, ingest
from icmoe.data.slices import load_mask
from icmoe.study import Label

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
    forget(export, " TWO ")
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
    assert forget(export, f" {name.upper()} ") == 2


def test_forgetting_a_patient_reaches_studies_that_are_no_longer_approved(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    path = site_file(tmp_path, tmp_path / "export", "[255]")
    former = Path(ingest_site(path, "Elm", dry_run=False)[0]["page"]).parent
    site_file(tmp_path, tmp_path / "export", "[128, 255]")
    ingest_site(path, "Elm", dry_run=False)
    assert forget_patient(path, "Elm", "one")[0] == 4
    assert not index.published(former)[0]
    assert not list((former / "frames").rglob("*.safetensors"))


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
