"""Folders as spreadsheets, drawing programs and mistaken labels leave them: read as they are meant, or the cause is named."""

from __future__ import annotations

import csv
import json
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import series_window
from PIL import Image
from predictions import write_random_model
from typer.testing import CliRunner

from icmoe.cli import app
from icmoe.data.ingest.index import INDEX
from icmoe.data.ingest.run import store_of
from icmoe.data.slices import load_image
from icmoe.data.sources import read_sites, read_sites_split
from icmoe.dataset import TrainingSet
from icmoe.errors import IcmoeError
from icmoe.features import FeatureCache
from icmoe.study import Label
from icmoe.window import normalise

LABELS = (Label(name="background", values=(0,)), Label(name="lesion", values=(255,)))
HEADER = ["split", "site", "patient", "slice", "image", "mask"]
SPACING = ["spacing_slice_mm", "spacing_row_mm", "spacing_col_mm"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Site A with one patient of two slices in each split."""
    for split in ("train", "val", "test"):
        rows = [HEADER]
        for index in ("1", "2"):
            image, mask = (f"A/{part}/{split}_{index}.png" for part in ("images", "masks"))
            grey = np.random.default_rng(len(rows)).integers(0, 200, (20, 24)).astype(np.uint8)
            for name, pixels in ((image, grey), (mask, np.where(grey > 150, 255, 0).astype(np.uint8))):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / name)
            rows.append([split, "A", f"of {split}", index, image, mask])
        write(tmp_path, split, rows)
    return tmp_path


def write(root: Path, split: str, rows: list[list[str]]) -> None:
    (root / "splits").mkdir(exist_ok=True)
    with (root / f"splits/{split}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def train(root: Path) -> list[list[str]]:
    with (root / "splits/train.csv").open(newline="") as file:
        return list(csv.reader(file))


def refusal(root: Path) -> str:
    with pytest.raises(IcmoeError) as caught:
        read_sites(root, LABELS)
    assert len(caught.value.faults) == 1
    return str(caught.value)


def test_names_of_columns_may_have_spaces_and_capitals(root: Path):
    header, *rows = train(root)
    names = [f" {name.title()} " for name in (*header, *SPACING)]
    write(root, "train", [names, *([*row, "5", "0.5", "0.75"] for row in rows)])
    site = read_sites(root, LABELS)["A"]
    assert [item.spacing_mm for item in site.of("train")] == [(5.0, 0.5, 0.75)] * 2


def test_a_further_column_that_differs_by_capitals_alone_is_ignored(root: Path):
    header, *rows = train(root)
    write(root, "train", [[*header, "Image", ""], *([*row, "other.png", ""] for row in rows)])
    assert len(read_sites(root, LABELS)["A"].of("train")) == 2


def test_a_column_that_stands_there_twice_is_refused(root: Path):
    header, *rows = train(root)
    write(root, "train", [[*header, " image", "spacing_row_mm", "spacing_row_mm"], *([*row, "x.png", "1", "2"] for row in rows)])
    assert "ICM110 splits/train.csv: column image, spacing_row_mm stands there more than once" in refusal(root)


def test_rows_without_any_text_are_passed_over(root: Path):
    write(root, "train", [*train(root), [""] * len(HEADER), ["  "], [" "] * len(HEADER)])
    assert len(read_sites(root, LABELS)["A"].of("train")) == 2


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_header_with_another_separator_is_shown(root: Path, separator: str):
    path = root / "splits/train.csv"
    path.write_text(path.read_text().replace(",", separator))
    shown = repr(separator.join(HEADER))
    assert f"is missing: {shown} (allowed: {','.join(HEADER)}, with commas between them)" in refusal(root)


def test_a_path_with_backslashes_is_told_to_have_slashes(root: Path):
    write(root, "train", [[text.replace("A/images/train_1", "A\\images\\train_1") for text in row] for row in train(root)])
    assert "with / between its parts" in refusal(root)


def test_a_palette_with_alpha_is_read_without_a_warning(root: Path):
    path = root / "A/images/train_1.png"
    grey = Image.open(path).convert("RGB").quantize(16)
    expected = np.asarray(grey.convert("RGB"))[..., 0]
    grey.save(path, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_image(read_sites(root, LABELS)["A"].of("train")[0])
    assert np.array_equal(np.argsort(np.unique(found)), np.arange(len(np.unique(expected))))


@pytest.mark.parametrize("split", ["", "test"])
def test_a_folder_of_indexes_for_other_labels_is_told_so(tmp_path: Path, split: str):
    for site in ("Elm", "Oak"):
        store = store_of(tmp_path / site, (*LABELS, Label(name="other", values=(7,))))
        store.mkdir(parents=True)
        (store / INDEX).touch()
    with pytest.raises(IcmoeError) as caught:
        read_sites_split(tmp_path, split, LABELS) if split else read_sites(tmp_path, LABELS)
    assert [(fault.number, fault.where) for fault in caught.value.faults] == [(131, "Elm"), (131, "Oak")]
    assert "no index for the study's labels." in str(caught.value)


def test_png_hospitals_with_an_index_for_other_labels_are_read_from_their_splits(root: Path):
    store = store_of(root / "A", (*LABELS, Label(name="other", values=(7,))))
    store.mkdir(parents=True)
    (store / INDEX).touch()
    assert read_sites(root, LABELS)["A"].images_used == 6


def test_scores_as_json_name_on_standard_error_what_was_left_out(root: Path, make_study):
    (root / "A/masks/test_1.png").unlink()
    model = write_random_model(root / "m.safetensors", make_study(labels=[label.model_dump(mode="json") for label in LABELS]))
    words = ["evaluate", "--model", str(model), "--data", str(root), "--cache", str(root / "cache"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["sites"]["A"]["images_used"] == 1
    assert done.stderr.startswith("ICM103 A/masks/test_1.png: mask is missing.")


@pytest.mark.parametrize("shape", [(20, 24), (24, 20)])
def test_a_mask_that_changed_after_reading_is_refused(root: Path, make_study, shape: tuple[int, int]):
    study = make_study(labels=[label.model_dump(mode="json") for label in LABELS])
    slices, cache = read_sites(root, LABELS)["A"].of("train"), FeatureCache.of(root / "cache", study)
    assert len(TrainingSet(slices, study, cache)) == 2
    Image.fromarray(np.zeros(shape, np.uint8)).save(root / "A/masks/train_2.png")
    with pytest.raises(IcmoeError, match=r"ICM104 A/train_2\.png: mask changed since the folder was read"):
        TrainingSet(slices, study, cache)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_one_however_their_letters_are_composed(root: Path, form: str):
    """A macOS disk writes "ü" as "u" and two dots, a spreadsheet as one character."""
    for split in ("train", "val", "test"):
        text = (root / f"splits/{split}.csv").read_text().replace("A", "Süd").replace("of train", "Jürgen")
        (root / f"splits/{split}.csv").write_text(unicodedata.normalize(form, text))
    (root / "A").rename(root / unicodedata.normalize("NFD" if form == "NFC" else "NFC", "Süd"))
    (site,) = read_sites(root, LABELS).values()
    assert (site.name, site.images_used) == (unicodedata.normalize("NFC", "Süd"), 6)
    assert {item.patient for item in site.of("train")} == {"Jürgen"}
    assert load_image(site.of("train")[0]).shape == (20, 24)


def test_a_patient_in_two_splits_is_found_however_its_letters_are_composed(root: Path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        path = root / f"splits/{split}.csv"
        path.write_text(path.read_text().replace(f"of {split}", unicodedata.normalize(form, "Jürgen")))
    assert "ICM107 A" in refusal(root)


def test_one_file_under_two_ways_of_writing_is_one_image(root: Path):
    (root / "A/images/train_1.png").rename(root / "A/images" / unicodedata.normalize("NFD", "ü.png"))
    rows = [[text.replace("A/images/train_1.png", "A/images/ü.png") for text in row] for row in train(root)]
    write(root, "train", [*rows, [text.replace("ü", unicodedata.normalize("NFD", "ü")) for text in rows[1]]])
    site = read_sites(root, LABELS)["A"]
    assert (len(site.of("train")), [fault.number for fault in site.exclusions]) == (2, [112])


def test_images_of_8_and_of_16_bits_of_one_patient_are_each_on_their_own_scale(root: Path):
    path = root / "A/images/train_2.png"
    flat = np.asarray(Image.open(path))
    Image.fromarray(flat.astype(np.uint16) * 200).save(path)
    one, deep = read_sites(root, LABELS)["A"].of("train")
    other = load_image(one)
    assert deep.window.high > 100 * one.window.high
    assert other.mean() > 0.3
    assert np.allclose(load_image(deep), normalise(flat, series_window([flat])), atol=1e-5)
