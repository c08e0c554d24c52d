"""Folders whose names some systems write with composed letters and others with decomposed ones: one name, one patient."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, used
from test_ingest_further import FILLED, nifti
from test_ingest_looks import GREYS
from test_names_of_masks import picture

pytestmark = pytest.mark.usefixtures("in_this_process")
FORMS = (("NFC", "NFD"), ("NFD", "NFC"))


def in_form(form: str, name: str) -> str:
    return unicodedata.normalize("NFC" if form == "NFC" else "NFD", name)


@pytest.mark.parametrize(("image", "mask"), FORMS)
@pytest.mark.parametrize("names", ["{}/images/1.png {}/masks/1.png", "images/{}/1.png masks/{}/1.png"])
def test_a_mask_lies_with_the_images_of_its_folder_however_it_is_written(names: str, image: str, mask: str, tmp_path: Path):
    one, other = names.split()
    for seed, patient in enumerate(("Jürgen", "Zoë")):
        picture(tmp_path, one.format(in_form(image, patient)), GREYS[seed])
        picture(tmp_path, other.format(in_form(mask, patient)), FILLED)
    data = used(tmp_path)[2]
    assert (len(data.slices), len({item.patient for item in data.slices})) == (2, 2)


def test_one_persons_folder_in_two_ways_of_writing_is_one_patient(tmp_path: Path):
    for seed, form in enumerate(("NFC", "NFD")):
        picture(tmp_path, f"{in_form(form, 'Jürgen')}/{seed}.png", GREYS[seed])
        picture(tmp_path, f"{in_form(form, 'Jürgen')}/{seed}_mask.png", FILLED)
        volume = np.random.default_rng(seed).integers(0, 999, MASKS.shape).astype(np.int16)
        nifti(tmp_path, f"{in_form(form, 'Zoë')}/v{seed}/i.nii.gz", volume)
        nifti(tmp_path, f"{in_form(form, 'Zoë')}/v{seed}/i_seg.nii.gz", MASKS)
    data = used(tmp_path, patient_pattern="^([^/]+)/")[2]
    assert (len(data.slices), len({item.patient for item in data.slices})) == (12, 2)


@pytest.mark.parametrize(("said", "written"), FORMS)
def test_patterns_of_the_site_file_fit_names_in_either_way_of_writing(said: str, written: str, tmp_path: Path):
    for seed, name in enumerate(("Übung_1", "Übung_2", "alte Läufe")):
        picture(tmp_path, f"{in_form(written, name)}/{seed}.png", GREYS[seed])
        picture(tmp_path, f"{in_form(written, name)}/{seed}_mask.png", FILLED)
    pattern, passed = in_form(said, r"^(Übung)_\d"), in_form(said, "*Läufe*")
    data = used(tmp_path, patient_pattern=pattern, exclude=(passed,))[2]
    assert (len(data.slices), len({item.patient for item in data.slices})) == (2, 1)
