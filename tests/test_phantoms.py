"""Phantom hospitals: reproducible to the byte, complete or absent, readable like real ones, not trivially easy."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from icmoe.data.folder import read_folder
from icmoe.data.images import read_grey
from icmoe.data.slices import load_image, load_mask
from icmoe.errors import IcmoeError
from icmoe.study import Label
from simulations.phantoms import DEFAULT_SITES, PhantomSite, write_phantoms

LABELS = (Label(name="background", values=(0,)), Label(name="lesion", values=(255,)))
SMALL = (PhantomSite(name="Elm", train_patients=2, val_patients=0, test_patients=1, slices_per_patient=1),)


def _bytes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "phantoms"
    write_phantoms(root, seed=7)
    return root


def test_default_hospitals_are_read_whole(phantoms: Path):
    sites = read_folder(phantoms, LABELS)
    assert list(sites) == sorted(site.name for site in DEFAULT_SITES)
    assert sum(site.images_used for site in sites.values()) == 72
    assert all(site.images_found == site.images_used and not site.exclusions for site in sites.values())
    assert all(site.of(split) for site in sites.values() for split in ("train", "val", "test"))
    assert len({site.images_used for site in sites.values()}) == 4, "hospitals of unequal size"
    digests = [item.image_digest for site in sites.values() for item in site.slices]
    assert len(set(digests)) == 72
    assert sites["Alder"].slices[0].spacing_mm == pytest.approx((6.0, 196 / 128, 196 / 128), rel=1e-5)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_phantoms(tmp_path / name, seed=seed, sites=SMALL, size_px=64)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b") != _bytes(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "no temporary folder is left"


def test_more_patients_and_sites_leave_the_others_as_they_are(tmp_path: Path):
    write_phantoms(tmp_path / "few", seed=1, sites=SMALL, size_px=64)
    more = (*DEFAULT_SITES[:1], replace(SMALL[0], train_patients=4))
    write_phantoms(tmp_path / "many", seed=1, sites=more, size_px=64)
    few, many = _bytes(tmp_path / "few"), _bytes(tmp_path / "many")
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 6
    assert all(few[name] == many[name] for name in pictures)


def test_slices_of_a_patient_are_neighbouring_sections_of_one_head(phantoms: Path):
    slices = read_folder(phantoms, LABELS)["Alder"].of("train")
    images = {(item.patient, item.index): load_image(item) for item in slices}
    patients = sorted({item.patient for item in slices})
    within = [np.corrcoef(images[p, 1].ravel(), images[p, 2].ravel())[0, 1] for p in patients]
    between = [np.corrcoef(images[p, 1].ravel(), images[q, 1].ravel())[0, 1] for p, q in pairwise(patients)]
    assert min(within) > max(between)


def test_lesions_differ_in_share_and_are_neither_tiny_nor_huge(phantoms: Path):
    sites = read_folder(phantoms, LABELS)
    shares = {name: [load_mask(item.mask, LABELS).mean() for item in site.slices] for name, site in sites.items()}
    assert all(0.004 < np.mean(values) < 0.08 for values in shares.values())
    assert any(value == 0 for values in shares.values() for value in values), "some slices are free of lesion"
    assert all(any(load_mask(item.mask, LABELS).any() for item in site.of("test")) for site in sites.values())


def test_brightness_alone_does_not_find_the_lesion(phantoms: Path):
    best = []
    for site in read_folder(phantoms, LABELS).values():
        for item in site.slices:
            image, truth = load_image(item), load_mask(item.mask, LABELS) == 1
            if truth.any():
                dices = [2 * (truth & (image > t)).sum() / (truth.sum() + (image > t).sum()) for t in np.unique(image)[::4]]
                best.append(max(dices))
    assert np.mean(best) < 0.6, "the best threshold of each image, chosen with the truth at hand"


def test_hospitals_look_different(phantoms: Path):
    means = {
        name: np.mean([read_grey(item.image, where="").mean() for item in site.slices])
        for name, site in read_folder(phantoms, LABELS).items()
    }
    assert max(means.values()) > 1.5 * min(means.values())


def test_healthy_site_has_no_lesion(tmp_path: Path):
    write_phantoms(tmp_path / "x", seed=1, sites=[replace(SMALL[0], lesion_share=0.0)], size_px=64)
    assert not any(load_mask(item.mask, LABELS).any() for item in read_folder(tmp_path / "x", LABELS)["Elm"].slices)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": -1}, "seed"),
        ({"size_px": 8}, "size_px"),
        ({"sites": ()}, "sites"),
        ({"sites": SMALL * 2}, "sites"),
        ({"sites": [replace(SMALL[0], name="../x")]}, "name"),
        ({"sites": [replace(SMALL[0], name="splits")]}, "name"),
        ({"sites": [replace(SMALL[0], train_patients=-1)]}, "train_patients"),
        ({"sites": [replace(SMALL[0], train_patients=0, test_patients=0)]}, "patients"),
        ({"sites": [replace(SMALL[0], noise=float("nan"))]}, "noise"),
        ({"sites": [replace(SMALL[0], lesion_radius_mm=(9.0, 3.0))]}, "lesion_radius_mm"),
    ],
)
def test_options_out_of_range_are_refused_with_210(tmp_path: Path, changes: dict, sentence: str):
    with pytest.raises(IcmoeError, match="ICM210") as caught:
        write_phantoms(tmp_path / "x", **{"seed": 1, "sites": SMALL, "size_px": 64, **changes})
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(IcmoeError, match="ICM115"):
        write_phantoms(tmp_path / "x", seed=1, sites=SMALL, size_px=64)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "mine.txt"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IcmoeError, match="ICM115"):
        write_phantoms(tmp_path / "file" / "x", seed=1, sites=SMALL, size_px=64)
