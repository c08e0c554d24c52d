"""A data folder: what is usable is read, what is not is named by number, and nothing ends in a traceback."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icmoe.data.folder import read_folder, read_split
from icmoe.data.slices import load_image, load_mask
from icmoe.errors import IcmoeError
from icmoe.study import Label
from icmoe.window import Window, normalise

REAL = Path(__file__).parents[2] / "shared" / "data"
LABELS = (Label(name="background", values=(0,)), Label(name="lesion", values=(255, 300)))
HEADER = ["split", "site", "patient", "slice", "image", "mask"]
FIRST = "A/images/p1_1.png"
FIRST_MASK = "A/masks/p1_1.png"


def _image(seed: int, shape: tuple[int, int] = (20, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _rows(root: Path, split: str) -> list[list[str]]:
    with (root / f"splits/{split}.csv").open(newline="") as file:
        return list(csv.reader(file))


def _write(root: Path, split: str, rows: list[list[str]]) -> None:
    (root / "splits").mkdir(exist_ok=True)
    with (root / f"splits/{split}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sites A (train p1 with 2 slices and p2, val p3, test p4) and B (train p1)."""
    wanted = [("train", "A", "p1", 2), ("train", "A", "p1", 1), ("train", "A", "p2", 1), ("train", "B", "p1", 1)]
    wanted += [("val", "A", "p3", 1), ("test", "A", "p4", 1)]
    rows: dict[str, list[list[str]]] = {split: [HEADER] for split in ("train", "val", "test")}
    for seed, (split, site, patient, index) in enumerate(wanted):
        image, mask = (f"{site}/{part}/{patient}_{index}.png" for part in ("images", "masks"))
        _save(tmp_path / image, _image(seed))
        _save(tmp_path / mask, np.where(_image(seed) > 150, 255, 0).astype(np.uint8))
        rows[split].append([split, site, patient, str(index), image, mask])
    for split in rows:
        _write(tmp_path, split, rows[split])
    return tmp_path


def _numbers(root: Path, site: str = "A") -> list[int]:
    return [fault.number for fault in read_folder(root, LABELS)[site].exclusions]


def _set(root: Path, column: str, value: str, row: int = 2) -> None:
    """Change one field of train.csv; row 2 is A/p1 slice 1."""
    rows = _rows(root, "train")
    rows[row][HEADER.index(column)] = value
    _write(root, "train", rows)


def _add_spacing(root: Path, *values: str) -> None:
    rows = _rows(root, "train")
    rows[0] += ["spacing_slice_mm", "spacing_row_mm", "spacing_col_mm"]
    for row in rows[1:]:
        row += ["5", "0.5", "0.75"]
    rows[2][-3:] = values
    _write(root, "train", rows)


def test_a_sound_folder_is_used_whole(root: Path):
    seen: list[tuple[int, int]] = []
    sites = read_folder(root, LABELS, progress=lambda done, total: seen.append((done, total)))
    assert list(sites) == ["A", "B"]
    assert [(site.images_found, site.images_used, site.exclusions) for site in sites.values()] == [(5, 5, ()), (1, 1, ())]
    assert [(item.patient, item.index) for item in sites["A"].of("train")] == [("p1", 1), ("p1", 2), ("p2", 1)]
    assert [item.split for item in sites["A"].of("test")] == ["test"]
    assert seen[-1] == (6, 6)
    first, second, other = sites["A"].of("train")
    assert first.window == second.window != other.window
    assert first.shape == (20, 24)
    assert first.spacing_mm is None
    assert np.array_equal(load_image(first), normalise(_image(1), first.window))
    assert set(np.unique(load_mask(first.mask, LABELS))) == {0, 1}


def test_digest_is_of_pixels_not_of_bytes(root: Path):
    before = read_folder(root, LABELS)["A"].slices[0].image_digest
    Image.fromarray(_image(1)).save(root / FIRST, compress_level=0)
    assert read_folder(root, LABELS)["A"].slices[0].image_digest == before
    changed = _image(1)
    changed[0, 0] ^= 1
    _save(root / FIRST, changed)
    assert read_folder(root, LABELS)["A"].slices[0].image_digest != before


def test_digest_is_of_the_picture_not_of_the_scale_it_is_stored_in(root: Path):
    before = [item.image_digest for item in read_folder(root, LABELS)["A"].slices if item.patient == "p1"]
    for path in sorted((root / "A/images").glob("p1_*.png")):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 16).save(path)
    assert [item.image_digest for item in read_folder(root, LABELS)["A"].slices if item.patient == "p1"] == before


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _claim_a_huge_size(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    path.write_bytes(data)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_jpeg(path: Path) -> None:
    Image.fromarray(_image(0)).save(path, format="JPEG")


def _noise_after_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:40] + np.random.default_rng(0).bytes(len(data) - 40))


Break = Callable[[Path], object]
BAD_ROWS: dict[str, tuple[int, Break]] = {
    "image missing": (101, lambda root: (root / FIRST).unlink()),
    "image cut": (102, lambda root: _cut(root / FIRST)),
    "image empty": (102, lambda root: (root / FIRST).write_bytes(b"")),
    "image is text": (102, lambda root: (root / FIRST).write_text("hello")),
    "image is jpeg": (102, lambda root: _as_jpeg(root / FIRST)),
    "image is a folder": (102, lambda root: _as_folder(root / FIRST)),
    "image claims a huge size": (102, lambda root: _claim_a_huge_size(root / FIRST)),
    "image is noise": (102, lambda root: _noise_after_header(root / FIRST)),
    "image name too long": (102, lambda root: _set(root, "image", "A/images/" + "x" * 300)),
    "mask missing": (103, lambda root: (root / FIRST_MASK).unlink()),
    "mask cut": (104, lambda root: _cut(root / FIRST_MASK)),
    "mask is colour": (104, lambda root: _save(root / FIRST_MASK, np.dstack([_image(0), _image(1), _image(2)]))),
    "mask of another size": (105, lambda root: _save(root / FIRST_MASK, np.zeros((24, 20), np.uint8))),
    "mask value unknown": (106, lambda root: _save(root / FIRST_MASK, np.full((20, 24), 7, np.uint8))),
    "image twice": (112, lambda root: _set(root, "image", "A/images/./p1_2.png")),
    "image constant": (113, lambda root: _save(root / FIRST, np.full((20, 24), 9, np.uint8))),
    "spacing zero": (114, lambda root: _add_spacing(root, "0", "1", "1")),
    "spacing text": (114, lambda root: _add_spacing(root, "thick", "1", "1")),
    "spacing not finite": (114, lambda root: _add_spacing(root, "nan", "inf", "1")),
    "spacing half given": (114, lambda root: _add_spacing(root, "5", "", "")),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_image_is_excluded_by_number_and_the_rest_is_used(root: Path, case: str):
    number, damage = BAD_ROWS[case]
    damage(root)
    site = read_folder(root, LABELS)["A"]
    assert [fault.number for fault in site.exclusions] == [number]
    assert (site.images_found, site.images_used) == (5, 4)
    sentence = str(site.exclusions[0])
    assert "p1_" in sentence or "xxx" in sentence
    assert str(root) not in sentence


BAD_SPLITS: dict[str, tuple[int, str, Break]] = {
    "patient in two splits": (107, "p3 in train and val", lambda root: _set(root, "patient", "p3")),
    "no split file": (109, "splits/val.csv", lambda root: (root / "splits/val.csv").unlink()),
    "column missing": (110, "column mask is missing", lambda root: _write(root, "val", [row[:-1] for row in _rows(root, "val")])),
    "semicolons": (110, "column split", lambda root: (root / "splits/val.csv").write_text(";".join(HEADER) + "\n")),
    "empty file": (110, "column split", lambda root: (root / "splits/val.csv").write_text("")),
    "not text": (110, "not a text file", lambda root: (root / "splits/val.csv").write_bytes(b"\xff\xfe\x00\x80" * 9)),
    "not csv": (110, "not readable as CSV", lambda root: (root / "splits/val.csv").write_text(",".join(HEADER) + '\nval,A,"p\n')),
    "field too large": (110, "not readable as CSV", lambda root: _set(root, "patient", "x" * 200_000)),
    "split is a folder": (110, "cannot be opened", lambda root: _as_folder(root / "splits/val.csv")),
    "row too short": (
        110,
        "row 2: number of fields",
        lambda root: _write(root, "train", [r[:4] if i == 2 else r for i, r in enumerate(_rows(root, "train"))]),
    ),
    "row too long": (
        110,
        "row 2: number of fields",
        lambda root: _write(root, "train", [[*r, "x"] if i == 2 else r for i, r in enumerate(_rows(root, "train"))]),
    ),
    "slice no integer": (110, "row 2: slice is not an integer: '1.5'", lambda root: _set(root, "slice", "1.5")),
    "slice endless": (110, "row 2: slice is not an integer", lambda root: _set(root, "slice", "9" * 5000)),
    "patient empty": (110, "row 2: column patient is empty", lambda root: _set(root, "patient", " ")),
    "site empty": (110, "row 2: column site is empty", lambda root: _set(root, "site", "")),
    "mask empty": (110, "row 2: column mask is empty", lambda root: _set(root, "mask", "")),
    "site is a path": (110, "row 2: site is not a plain name", lambda root: _set(root, "site", "../A")),
    "another split": (110, "row 2: row of another split", lambda root: _set(root, "split", "test")),
    "image climbs out": (110, "row 2: image leaves the data folder", lambda root: _set(root, "image", "A/../../etc/x.png")),
    "mask absolute": (110, "row 2: mask leaves the data folder", lambda root: _set(root, "mask", "/etc/passwd")),
    "image with NUL": (110, "row 2: image leaves the data folder", lambda root: _set(root, "image", "A/im\x00age.png")),
    "image with backslash": (110, "row 2: image leaves the data folder", lambda root: _set(root, "image", "..\\x.png")),
}


@pytest.mark.parametrize("case", BAD_SPLITS)
def test_a_bad_split_stops_the_work_by_number(root: Path, case: str):
    number, sentence, damage = BAD_SPLITS[case]
    damage(root)
    with pytest.raises(IcmoeError) as caught:
        read_folder(root, LABELS)
    assert [fault.number for fault in caught.value.faults] == [number]
    assert sentence in str(caught.value)


def test_all_faults_of_the_splits_are_reported_at_once(root: Path):
    _set(root, "slice", "one", row=1)
    _set(root, "patient", "", row=3)
    _write(root, "val", [["split"]])
    (root / "splits/test.csv").unlink()
    with pytest.raises(IcmoeError) as caught:
        read_folder(root, LABELS)
    assert [fault.number for fault in caught.value.faults] == [110, 110, 110, 109]


def test_many_faulty_rows_are_counted_not_all_spelled_out(root: Path):
    _write(root, "train", [HEADER, *([["train", "A", "p", "x", "i", "m"]] * 200)])
    with pytest.raises(IcmoeError) as caught:
        read_folder(root, LABELS)
    assert len(caught.value.faults) == 51
    assert "150" in str(caught.value.faults[-1])


@pytest.mark.parametrize("name", ["absent", "splits/train.csv"])
def test_a_folder_that_is_none_stops(root: Path, name: str):
    with pytest.raises(IcmoeError, match="ICM109"):
        read_folder(root / name, LABELS)


def test_splits_without_rows_and_sites_stop(tmp_path: Path):
    for split in ("train", "val", "test"):
        _write(tmp_path, split, [HEADER])
    with pytest.raises(IcmoeError, match="ICM109"):
        read_folder(tmp_path, LABELS)


def test_a_site_without_training_images_stays_with_108(root: Path):
    (root / "B/images/p1_1.png").unlink()
    site = read_folder(root, LABELS)["B"]
    assert (site.images_found, site.images_used) == (1, 0)
    assert [fault.number for fault in site.exclusions] == [101, 108]


def test_a_site_with_test_images_only_keeps_them_and_gets_108(root: Path):
    _write(root, "train", [row for row in _rows(root, "train") if row[1] != "A"])
    site = read_folder(root, LABELS)["A"]
    assert (site.images_found, site.images_used) == (2, 2)
    assert [fault.number for fault in site.exclusions] == [108]


def test_a_folder_that_no_split_mentions_is_listed_with_108(root: Path):
    _save(root / "C/images/x.png", _image(0))
    site = read_folder(root, LABELS)["C"]
    assert (site.images_found, site.images_used) == (0, 0)
    assert _numbers(root, "C") == [108]


def test_image_files_that_no_split_lists_are_not_used(root: Path):
    _save(root / "A/images/new.png", _image(0))
    (root / "A/images/notes.txt").write_text("no image")
    site = read_folder(root, LABELS)["A"]
    assert (site.images_found, site.images_used, site.exclusions) == (5, 5, ())


def test_the_same_patient_name_at_two_sites_is_two_patients(root: Path):
    _write(root, "val", [HEADER, ["val", "B", "p2", "1", "A/images/p3_1.png", "A/masks/p3_1.png"]])
    assert read_folder(root, LABELS)["B"].images_used == 2


@pytest.mark.parametrize("spacing", [("5", "0.5", "0.75"), ("", "", "")])
def test_spacing_is_read_where_given(root: Path, spacing: tuple[str, str, str]):
    _add_spacing(root, *spacing)
    first = read_folder(root, LABELS)["A"].slices[0]
    assert first.spacing_mm == ((5.0, 0.5, 0.75) if spacing[0] else None)


def test_a_split_in_utf16_is_told_to_be_saved_as_utf8(root: Path):
    path = root / "splits/train.csv"
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(IcmoeError, match=r"ICM110 .*UTF-16.* Save it as UTF-8"):
        read_folder(root, LABELS)


def test_byte_order_mark_and_further_columns_are_fine(root: Path):
    path = root / "splits/train.csv"
    text = "\n".join(f"{line},9" for line in path.read_text().replace("split,", "split,", 1).split())
    path.write_text("\ufeff" + text.replace("mask,9", "mask,tumour_px"), encoding="utf-8")
    assert read_folder(root, LABELS)["A"].images_used == 5


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (Image.fromarray(np.arange(480).reshape(20, 24).astype(np.uint16) * 100), np.arange(480).reshape(20, 24) * 100.0),
        (Image.merge("RGB", [Image.fromarray(_image(3))] * 3), _image(3)),
        (
            Image.merge("RGB", [Image.fromarray(_image(seed)) for seed in (3, 4, 5)]),
            0.299 * _image(3) + 0.587 * _image(4) + 0.114 * _image(5),
        ),
        (Image.merge("RGBA", [Image.fromarray(_image(seed)) for seed in (3, 3, 3, 5)]), _image(3)),
        (Image.merge("LA", [Image.fromarray(_image(seed)) for seed in (3, 5)]), _image(3)),
        (Image.fromarray(_image(3) > 100), (_image(3) > 100) * 255.0),
        (Image.fromarray(_image(3)).convert("P"), _image(3)),
    ],
    ids=["16 bit", "equal channels", "colour", "RGBA", "LA", "1 bit", "palette"],
)
def test_kinds_of_png_become_grey(root: Path, stored: Image.Image, expected: np.ndarray):
    stored.save(root / FIRST)
    first = read_folder(root, LABELS)["A"].slices[0]
    assert first.index == 1
    assert np.allclose(load_image(first), normalise(expected, first.window), atol=1e-5)


@pytest.mark.parametrize("kind", ["16 bit", "1 bit", "equal channels", "palette"])
def test_kinds_of_png_become_classes(root: Path, kind: str):
    truth = _image(3) > 100
    grey = np.where(truth, 255, 0).astype(np.uint8)
    palette = Image.fromarray(grey).convert("P")
    palette.putpalette([90, 0, 90] * 256)
    stored = {
        "16 bit": Image.fromarray(np.where(truth, 300, 0).astype(np.uint16)),
        "1 bit": Image.fromarray(truth),
        "equal channels": Image.merge("RGB", [Image.fromarray(grey)] * 3),
        "palette": palette,
    }
    stored[kind].save(root / FIRST_MASK)
    assert np.array_equal(load_mask(root / FIRST_MASK, LABELS), truth.astype(np.uint8))
    assert _numbers(root) == []


def test_an_image_that_changed_after_reading_is_refused(root: Path):
    first = read_folder(root, LABELS)["A"].slices[0]
    _save(root / FIRST, _image(77))
    with pytest.raises(IcmoeError, match=r"ICM102 A/p1_1\.png: image changed"):
        load_image(first)


@pytest.mark.parametrize("place", ["splits/outside.csv", "outside.csv"])
def test_one_split_alone_is_read(root: Path, place: str):
    (root / "splits/test.csv").rename(root / place)
    sites = read_split(root, "outside", LABELS)
    assert list(sites) == ["A"]
    assert [item.split for item in sites["A"].of("outside")] == ["outside"]
    assert (sites["A"].images_found, sites["A"].exclusions) == (1, ())


@pytest.mark.parametrize(("name", "number"), [("absent", 109), ("../x", 109), ("", 109), ("a\x00b", 109), ("empty", 110)])
def test_one_split_that_cannot_be_read_stops(root: Path, name: str, number: int):
    _write(root, "empty", [HEADER])
    with pytest.raises(IcmoeError, match=f"ICM{number}"):
        read_split(root, name, LABELS)


@pytest.mark.real
@pytest.mark.skipif(not (REAL / "lgg-multisite").is_dir(), reason="needs the real images in ../shared/data/lgg-multisite")
def test_real_hospitals_are_used_whole():
    labels = (Label(name="background", values=(0,)), Label(name="abnormality", values=(255,)))
    sites = read_folder(REAL / "lgg-multisite", labels)
    assert {name: site.images_used for name, site in sites.items()} == {"CS": 167, "DU": 470, "EZ": 12, "HT": 294}
    assert all(site.exclusions == () and site.images_found == site.images_used for site in sites.values())
    assert {name: len({item.patient for item in site.of("test")}) for name, site in sites.items()} == {
        "CS": 3,
        "DU": 5,
        "EZ": 0,
        "HT": 4,
    }
    assert all(item.window.high - item.window.low > 20 for site in sites.values() for item in site.slices)
    assert isinstance(sites["CS"].slices[0].window, Window)


@pytest.mark.parametrize("fault", ["cut", "listed twice"])
def test_a_slice_that_was_left_out_is_noticed_between_its_neighbours(fault: str, root: Path) -> None:
    rows = _rows(root, "train")
    _save(root / "A/images/p1_3.png", _image(9))
    middle = rows[1][4]
    rows.append([*rows[1][:3], "3", "A/images/p1_3.png" if fault == "cut" else rows[2][4], rows[1][5]])
    if fault == "cut":
        _cut(root / middle)
    _write(root, "train", rows)
    steps = {(item.patient, item.index): item.step for item in read_folder(root, LABELS)["A"].of("train")}
    assert steps == {("p1", 1): 1, ("p1", 3 if fault == "cut" else 2): 1, ("p2", 1): None}
