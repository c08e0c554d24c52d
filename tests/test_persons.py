"""Whose files without identity are: one patient's folders never come into two splits, and what nobody can tell is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, numbers, put, segmentation, used, volume
from exports import LESION, export_of, taken
from test_ingest_further import nifti
from test_ingest_looks import FILLED, GREYS
from test_names_of_masks import picture

from icmoe.data.ingest.finding import files_of
from icmoe.data.ingest.persons import Persons
from icmoe.data.ingest.run import forget

TOLD = {
    "series below patients": ("P1/AX_T1/i P1/AX_FLAIR/i P2/AX_T1/i", "p1 p1 p2"),
    "patients below series": ("AX_T1/P1/i AX_FLAIR/P1/i AX_T1/P2/i", "p1 p1 p2"),
    "series of free names": ("P1/foo/i P1/bar/i P2/foo/i", "p1 p1 p2"),
    "free names above": ("foo/P1/i bar/P1/i foo/P2/i", "p1 p1 foo/p2"),
    "words within free names": ("doe/t1_mprage_sag_iso/i doe/flair_x/i roe/t1_mprage_sag_iso/i", "doe doe roe"),
    "words within free names above": ("t1_mprage_x/doe/i flair_x/doe/i", "doe doe"),
    "one that is plain tells of those beside it": ("doe/AX_T1/i doe/foo/i roe/bar/i roe/flair_2/i", "doe doe roe roe"),
    "bare numbers above words": ("1001/foo/i 1001/bar/i 1002/foo/i", "1001 1001 1002"),
    "bare numbers above words with digits": ("MR/1/T1DUAL/i MR/1/T2SPIR/i MR/2/T1DUAL/i", "1 1 2"),
    "groups of labels": ("Labeled/A0S9V0/i Unlabeled/B1F0V2/i", "labeled/a0s9v0 unlabeled/b1f0v2"),
    "volumes in folders of series": ("AX_T1/P1 AX_FLAIR/P1 AX_T1/P2", "p1 p1 p2"),
    "folders of one patient's series": ("P1_AX_T1/i P1_FLAIR/i P2_FLAIR/i DOE_T1/i DOE_T2/i", "p1 p1 p2 doe doe"),
    "volumes of one patient's series": ("P1_AX_T1 P1_FLAIR P2_T1", "p1 p1 p2"),
    "counted scans of numbered patients": (
        "P1_scan1 P1_scan2 P1_T1_2 P1_left P1_right lung_ct_01 lung_ct_02",
        "p1 p1 p1 p1 p1 lung_ct_01 lung_ct_02",
    ),
    "dates before series": (
        "12345_20200101_AX_T1 12345_20210101_CT doe_jo_20200101_t1 doe_jo_2021-01-01_t1",
        "12345 12345 doe_jo doe_jo",
    ),
    "dates before patients": ("20200101_P1/i 20210101_P1/i 20210101_1002/i 20210101_chest/i", "p1 p1 1002 20210101_chest"),
    "sides in two letters": ("9001104_L 9001104_R P1_OD P1_OS", "9001104 9001104 p1 p1"),
    "visits before series": ("P1_v1_t1 P1_v2_t1 roe_baseline_t1 roe_followup_t1", "p1 p1 roe roe"),
    "numbers before free words": (
        "P1_abdomen P1_chest 1001_CT_head 1001_MR_neck 1001_v1 case_1_2 case_1_3 2020_a 2020_b 1002-S01 1002-S02",
        "p1 p1 1001 1001 1001 case_1 case_1 2020_a 2020_b 1002-s01 1002-s02",
    ),
    "visits behind numbers": (
        "TCGA-02-0003_v1 TCGA-02-0003_v2 XK71_scan1 XK71_run-2 LUNG1-001_fu1 LUNG1-001_fu2 DE01-2001 DE01-2002 TCGA-24-1920",
        "tcga-02-0003 tcga-02-0003 xk71 xk71 lung1-001 lung1-001 de01-2001 de01-2002 tcga-24-1920",
    ),
    "dates with words behind them": (
        "fdg_0011f3deaf_03-23-2003-NA-PET-CT_24147 fdg_0011f3deaf_10-02-2004-NA-PET-CT_11111",
        "fdg_0011f3deaf fdg_0011f3deaf",
    ),
    "one folder each": ("P1/a1/i P2/b2/i P3/c3/i", "p1 p2 p3"),
    "places": ("siteA/P1/i siteA/P2/i siteB/P1/i site_c/doe/i", "sitea/p1 sitea/p2 siteb/p1 site_c/doe"),
    "groups": ("HGG/Brats18_2013_2_1/i HGG/Brats18_A_1/i LGG/0003/i", "hgg/brats18_2013_2 hgg/brats18_a_1 lgg/0003"),
    "one person in two groups": ("benign/P1/i malignant/P1/i benign/P2/i", "p1 p1 benign/p2"),
    "data sets in data sets": (
        "BraTS2020_TrainingData/MICCAI_Training/BraTS20_Training_001/i BraTS2020_TrainingData/MICCAI_Training/BraTS20_2/i",
        "brats2020_trainingdata/miccai_training/brats20_training_001 brats2020_trainingdata/miccai_training/brats20_2",
    ),
    "groups of pictures": ("Dataset_BUSI/benign/1 Dataset_BUSI/malignant/1", "dataset_busi/benign dataset_busi/malignant"),
    "time points of BraTS": (
        "BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1c BraTS-GLI-00005-101/i BraTS-MEN-RT-00007-000/i",
        "brats-gli-00005 brats-gli-00005 brats-men-rt-00007",
    ),
    "dates of names": (
        "DOE_JOHN_20200101/i DOE_JOHN_2021-01-01/i doe_john_visit2/i ROE_20200101/i",
        "doe_john doe_john doe_john roe",
    ),
    "dates of nobody": ("case_20200101/i case_20200202/i", "case_20200101 case_20200202"),
    "kinds of scanners": ("ct_1001/i ct_1002/i mr_1001/i", "ct_1001 ct_1002 mr_1001"),
    "names alike": ("doe/foo/i doe/bar/i roe/foo/i", "- - -"),
    "numbers below names": ("doe/1001/i doe/1002/i roe/1003/i", "- - -"),
    "numbers below numbers": ("1001/1/i 1001/2/i 1002/1/i", "- - -"),
    "years above names": ("2019/doe/i 2020/doe/i 2020/roe/i", "- - -"),
    "one alone": ("doe/foo/i doe/bar/i", "- -"),
    "volumes of equal names": ("doe/case1 doe/case2 roe/case1 roe/case2", "- - - -"),
}


@pytest.mark.parametrize(("paths", "want"), TOLD.values(), ids=TOLD)
def test_all_folders_together_tell_whose_a_file_is(paths: str, want: str):
    for ending, is_volume in ((".nii.gz", True), (".png", False)):
        named = [f"{path}{ending}" for path in paths.split()]
        if not is_volume and any("/" not in path or path.split("/")[-1] != "i" for path in paths.split()):
            continue  # volumes alone are called like patients
        of = Persons([(path, is_volume) for path in named], {}).of
        assert " ".join(of(path, volume=is_volume) or "-" for path in named) == want


@pytest.mark.parametrize("form", ["P1/{}", "{}/P1"])
@pytest.mark.parametrize("ending", ["nii.gz", "png"])
def test_series_in_folders_of_their_own_are_one_patients(form: str, ending: str, tmp_path: Path):
    for seed, folder in enumerate(("AX_T1", "AX_FLAIR", "SAG_T2_TSE")):
        place = form.format(folder)
        if ending == "png":
            picture(tmp_path, f"{place}/1.png", GREYS[seed])
            picture(tmp_path, f"{place}/1_mask.png", FILLED)
        else:
            nifti(tmp_path, f"{place}/img.nii.gz", np.random.default_rng(seed).integers(0, 999, MASKS.shape).astype(np.int16))
            nifti(tmp_path, f"{place}/img_seg.nii.gz", MASKS)
    data = used(tmp_path)[2]
    assert len({item.patient for item in data.slices}) == 1
    assert len(data.slices) == (3 if ending == "png" else 15)
    name = data.slices[0].patient
    export = export_of(tmp_path / "export", tmp_path / "kept", LESION, shares=(1.0, 0.0, 0.0))
    assert len(files_of(export, name)) >= 3
    assert forget(tmp_path / "kept", "P1") == len(data.slices)
    assert not used(tmp_path)[2].slices


@pytest.mark.parametrize(
    ("folder", "pattern", "count"), [("P1/v{}", None, 1), ("foo/v{}", None, 2), ("foo/v{}", "^(.*?)/", 1), ("P{}", None, 2)]
)
def test_scans_that_name_nobody_are_of_whom_their_folder_is_numbered_for(folder: str, pattern: str, count: int, tmp_path: Path):
    """Anonymisers empty number and name and give every study another UID."""
    for number in (1, 2):
        sources = volume(np.roll(VOLUME, number, axis=2), PatientID="", PatientName="")
        put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")], folder.format(number) + "/{}")
    data = used(tmp_path, patient_pattern=pattern)[2]
    assert (len(data.slices), len({item.patient for item in data.slices})) == (10, count)


@pytest.mark.parametrize("names", ["left/P1 right/P1", "benign/P1_1 malignant/P1_2", "left/P1 right/P1 other/P2 right/P2"])
def test_pictures_of_one_number_in_folders_that_number_nobody_stand_in_one_split(names: str, tmp_path: Path):
    for seed, name in enumerate(names.split()):
        picture(tmp_path, f"{name}.png", GREYS[seed])
        picture(tmp_path, f"{name}_mask.png", FILLED)
    for attempt in range(4):  # each with another secret
        data = taken(export_of(tmp_path / "export", tmp_path / f"kept{attempt}", LESION, shares=(0.5, 0.0, 0.5)))
        assert len(data.slices) == len(names.split())
        assert len({item.split for item in data.slices}) == 1


def test_files_of_which_nobody_can_tell_whose_they_are_link_nobody(tmp_path: Path):
    for seed, name in enumerate(("doe/case1", "doe/case2", "roe/case1", "roe/case2")):
        nifti(tmp_path, f"{name}.nii.gz", np.random.default_rng(seed).integers(0, 999, MASKS.shape).astype(np.int16))
        nifti(tmp_path, f"{name}_seg.nii.gz", MASKS)
    for seed, name in enumerate(("anna/case1", "bert/case2")):
        picture(tmp_path, f"{name}.png", GREYS[seed])
        picture(tmp_path, f"{name}_mask.png", FILLED)
    (tmp_path / "split.csv").write_text("patient,split\nanna,train\nbert,test\n")
    export = replace(export_of(tmp_path / "export", tmp_path / "kept"), split_file=tmp_path / "split.csv")
    assert sorted(item.split for item in taken(export).slices) == ["test", "train"]


def test_what_folders_do_not_tell_is_left_out_until_a_pattern_does(tmp_path: Path):
    for seed, folder in enumerate(("doe/foo", "doe/bar", "roe/foo")):
        picture(tmp_path, f"{folder}/1.png", GREYS[seed])
        picture(tmp_path, f"{folder}/1_mask.png", FILLED)
    data = used(tmp_path)[2]
    assert not data.slices
    assert numbers(data)[-3:] == [127] * 3
    assert any("patient_pattern" in fault.what for fault in data.exclusions)
    assert len({item.patient for item in used(tmp_path, patient_pattern="^([a-z]+)/")[2].slices}) == 2


def test_a_folder_that_comes_later_may_tell_whose_the_others_are(tmp_path: Path):
    for seed, folder in enumerate(("doe/foo", "doe/t1_ax")):
        picture(tmp_path, f"{folder}/1.png", GREYS[seed])
        picture(tmp_path, f"{folder}/1_mask.png", FILLED)
        owners = {item.patient for item in used(tmp_path)[2].slices}
        assert len(owners) == 1
    (tmp_path / "export/doe/t1_ax").rename(tmp_path / "export/doe/bar")
    assert not used(tmp_path)[2].slices


def test_a_picture_of_marks_is_not_of_another_series_of_its_patient(tmp_path: Path):
    for number, folder in enumerate(("foo", "bar", "bar")):
        picture(tmp_path, f"P1/{folder}/{number}.png", GREYS[number])
    picture(tmp_path, "P1/bar/0_mask.png", FILLED)
    assert not used(tmp_path)[2].slices


@pytest.mark.parametrize("form", ["BraTS-GLI-00005-10{}/BraTS-GLI-00005-10{}", "BraTS-GLI-00005-10{}-{}", "DOE_2020010{}/{}"])
def test_a_volume_of_marks_is_not_of_another_time_point(form: str, tmp_path: Path):
    nifti(tmp_path, form.format(1, 1) + "-t1c.nii.gz", np.random.default_rng(1).integers(0, 999, MASKS.shape).astype(np.int16))
    nifti(tmp_path, form.format(2, 2) + "-seg.nii.gz", MASKS)
    assert not used(tmp_path)[2].slices
