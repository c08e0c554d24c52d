"""What a site may tell of its data: counts in tens, coarse ranges, nothing about few patients, and only in one form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icmoe.data.slices import Slice
from icmoe.errors import IcmoeError
from icmoe.exchange import announced_size
from icmoe.summary import SiteSummary, parse_summary, rounded, summarise, tens
from icmoe.window import Window

CLASSES = 3
MODALITIES = ("", "CT", "MR")


def patient(
    name: str, *, classes: Sequence[int] = (0, 1), spacing=(5.0, 0.7, 0.8), shape=(256, 200), modality="MR", images=1
) -> list[Slice]:
    one = Slice(
        site="Alder",
        patient=name,
        index=0,
        split="train",
        image=Path("image.png"),
        mask=Path("mask.png"),
        image_digest="0" * 64,
        shape=shape,
        window=Window(0.0, 1.0),
        spacing_mm=spacing,
        modality=modality,
        classes=tuple(classes),
    )
    return [replace(one, index=index) for index in range(images)]


def site_of(patients: int, **about: Any) -> list[Slice]:
    return [item for number in range(patients) for item in patient(f"p{number:03d}", **about)]


lengths_mm = st.floats(0.01, 200.0)
people = st.builds(
    dict,
    classes=st.sets(st.sampled_from([0, 1, 2])).map(sorted),
    spacing=st.none() | st.tuples(lengths_mm, lengths_mm, lengths_mm),
    shape=st.tuples(st.integers(1, 40000), st.integers(1, 40000)),
    modality=st.sampled_from(MODALITIES),
    images=st.integers(1, 4),
)
exports = st.lists(people, min_size=1, max_size=40).map(
    lambda rows: [item for number, row in enumerate(rows) for item in patient(f"p{number}", **row)]
)


def is_rounded(said: int, truth: int) -> bool:
    """Return whether a count is told as it must be; none and one to ten are one answer."""
    return said % 10 == 0 and max(truth, 1) <= said < max(truth, 1) + 10


@given(exports)
@settings(deadline=None)
def test_every_count_is_in_tens_and_never_below_the_truth(slices: list[Slice]) -> None:
    summary = summarise(slices, CLASSES)
    patients = {item.patient for item in slices}
    assert is_rounded(summary.images, len(slices))
    assert summary.images == announced_size(len(slices), exact=False)
    assert is_rounded(summary.patients, len(patients))
    for index, label in enumerate(summary.labels, start=1):
        having = [item for item in slices if index in item.classes]
        assert is_rounded(label.patients, len({item.patient for item in having}))
        assert label.images is None or is_rounded(label.images, len(having))


@given(exports)
@settings(deadline=None)
def test_nothing_is_told_about_at_most_ten_patients(slices: list[Slice]) -> None:
    summary = summarise(slices, CLASSES)

    def having(holds) -> int:
        return len({item.patient for item in slices if holds(item)})

    few = having(lambda item: True) <= 10
    assert bool(summary.labels) is not few
    for index, label in enumerate(summary.labels, start=1):
        assert (label.images is None) == (having(lambda item, index=index: index in item.classes) <= 10)
    assert set(summary.modalities) == {
        term for term in ("CT", "MR") if having(lambda item, term=term: item.modality == term) > 10
    }
    spaced = having(lambda item: item.spacing_mm is not None)
    assert (summary.in_plane_mm is None) == (summary.between_mm is None) == (spaced <= 10)
    assert (summary.side_px is None) == few


@given(exports)
@settings(deadline=None)
def test_no_value_is_finer_than_its_step(slices: list[Slice]) -> None:
    told = json.loads(summarise(slices, CLASSES).text())
    for key, per_step in (("in_plane_mm", 10), ("between_mm", 2)):
        for value in told[key] or []:
            assert value * per_step == pytest.approx(round(value * per_step), abs=1e-9)
            assert len(repr(value).partition(".")[2]) == 1
    assert all(side % 32 == 0 for side in told["side_px"] or [])


@given(exports, people)
@settings(deadline=None)
def test_one_more_patient_moves_each_count_by_one_step_at_most(slices: list[Slice], newcomer: dict[str, Any]) -> None:
    before, after = summarise(slices, CLASSES), summarise([*slices, *patient("new", **newcomer)], CLASSES)
    assert after.images - before.images in (0, 10)  # a patient has at most four images here
    assert after.patients - before.patients in (0, 10)
    for old, new in zip(before.labels, after.labels, strict=False):
        assert new.patients - old.patients in (0, 10)
        assert new.images is None or old.images is None or new.images - old.images in (0, 10)


@given(st.lists(st.floats(0.3, 3.0), min_size=11, max_size=40), st.floats(0.01, 200.0))
def test_the_values_of_one_patient_are_never_an_end_of_a_range(ordinary_mm: list[float], odd_mm: float) -> None:
    slices = [item for number, mm in enumerate(ordinary_mm) for item in patient(f"p{number}", spacing=(mm, mm, mm))]
    ends = summarise([*slices, *patient("odd", spacing=(odd_mm, odd_mm, odd_mm))], CLASSES).in_plane_mm
    assert ends is not None
    assert rounded(min(ordinary_mm), 0.1) <= ends[0] <= ends[1] <= rounded(max(ordinary_mm), 0.1)


@given(exports, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_neither_names_nor_order_nor_files_enter(slices: list[Slice], random) -> None:
    patients = sorted({item.patient for item in slices})
    names = dict(zip(patients, random.sample([f"Mustermann-{number}" for number in range(100)], len(patients)), strict=True))
    turned = [replace(item, patient=names[item.patient], image=Path("/home/x.png"), index=7) for item in slices]
    random.shuffle(turned)
    assert summarise(turned, CLASSES) == summarise(slices, CLASSES)


@given(exports)
@settings(deadline=None)
def test_a_summary_comes_back_from_its_text(slices: list[Slice]) -> None:
    summary = summarise(slices, CLASSES)
    assert parse_summary(summary.text(), CLASSES, where="Alder") == summary


def test_a_known_site_in_full() -> None:
    mixed = site_of(23, images=3) + [item for n in range(9) for item in patient(f"q{n}", classes=(0, 2), modality="CT", images=2)]
    assert json.loads(summarise(mixed, CLASSES).text()) == {
        "images": 90,
        "patients": 40,
        "labels": [{"patients": 30, "images": 70}, {"patients": 10, "images": None}],
        "modalities": ["MR"],
        "in_plane_mm": [0.8, 0.8],
        "between_mm": [5.0, 5.0],
        "side_px": [256, 256],
    }
    assert summarise(site_of(10, images=30), CLASSES) == SiteSummary(images=300, patients=10)


def test_tens() -> None:
    assert [tens(count) for count in (0, 1, 9, 10, 11, 20, 21)] == [10, 10, 10, 10, 20, 20, 30]


GOOD = json.loads(summarise(site_of(30, images=3), CLASSES).text())
SMALL = json.loads(summarise(site_of(5), CLASSES).text())
DEVIATIONS: dict[str, dict[str, Any]] = {
    "an unknown key": {"mean_age": 61},
    "a count that is not in tens": {"images": 93},
    "a count as text": {"images": "90"},
    "a count as a float": {"images": 90.0},
    "a count as a boolean": {"images": True},
    "a count of nothing": {"images": 0},
    "a negative count": {"patients": -10},
    "an endless count": {"images": 10**30},
    "fewer images than patients": {"images": 20, "labels": [{"patients": 10, "images": None}] * 2},
    "a modality that DICOM does not know": {"modalities": ["Mustermann"]},
    "modalities out of order": {"modalities": ["MR", "CT"]},
    "a modality twice": {"modalities": ["MR", "MR"]},
    "a spacing finer than its step": {"in_plane_mm": [0.75, 0.8]},
    "a spacing that is not finite": {"in_plane_mm": [0.7, float("inf")]},
    "a spacing that is no number": {"in_plane_mm": [float("nan"), 0.8]},
    "a spacing out of range": {"between_mm": [5.0, 1000.0]},
    "a spacing of nothing": {"between_mm": [0.0, 5.0]},
    "a distance of slices off its grid": {"between_mm": [5.0, 5.1]},
    "a range turned round": {"in_plane_mm": [0.9, 0.8]},
    "a range of three": {"in_plane_mm": [0.7, 0.8, 0.9]},
    "a side off its grid": {"side_px": [250, 256]},
    "a side as a float": {"side_px": [256.5, 512.0]},
    "another number of classes": {"labels": GOOD["labels"][:1]},
    "more patients with a class than patients": {"labels": [{"patients": 40, "images": 90}, GOOD["labels"][1]]},
    "more images with a class than images": {"labels": [{"patients": 30, "images": 100}, GOOD["labels"][1]]},
    "images of a class that few patients have": {"labels": [{"patients": 10, "images": 30}, GOOD["labels"][1]]},
    "images withheld without need": {"labels": [{"patients": 30, "images": None}, GOOD["labels"][1]]},
    "a name with a class": {"labels": [{"patients": 30, "images": 90, "name": "x"}, GOOD["labels"][1]]},
    "ranges of at most ten patients": {**SMALL, "side_px": [256, 256]},
    "labels of at most ten patients": {**SMALL, "labels": [{"patients": 10, "images": None}] * 2},
}


def refused(text: object) -> str:
    with pytest.raises(IcmoeError) as caught:
        parse_summary(text, CLASSES, where="Alder")
    (fault,) = caught.value.faults
    assert (fault.number, fault.where) == (504, "Alder")
    return str(fault)


def one_form(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"))


@pytest.mark.parametrize("name", DEVIATIONS)
def test_what_a_summary_may_not_hold_is_refused_by_number(name: str) -> None:
    assert parse_summary(one_form(GOOD), CLASSES, where="Alder")
    assert len(refused(one_form(GOOD | DEVIATIONS[name]))) < 400


@pytest.mark.parametrize("key", GOOD)
def test_a_summary_lacks_no_key(key: str) -> None:
    refused(one_form({name: value for name, value in GOOD.items() if name != key}))


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        ["x"],
        b"{}",
        "",
        "null",
        "[]",
        "{",
        json.dumps(GOOD),  # with spaces
        one_form(GOOD) + " ",
        one_form(dict(reversed(GOOD.items()))),
        one_form(GOOD).replace('"images":90', '"images":90,"images":90', 1),
        one_form(GOOD).replace("5.0", "5.00"),
        "[" * 5000,
        "x" * 10**6,
    ],
    ids=lambda text: repr(text)[:24],
)
def test_another_form_is_refused_too(text: object) -> None:
    refused(text)


@given(st.text(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    refused(text)


@pytest.mark.parametrize(("patients", "told"), [(10, False), (11, True)])
def test_a_value_is_told_from_the_eleventh_patient_on(patients: int, told: bool) -> None:
    unknown = [item for n in range(15) for item in patient(f"q{n}", classes=(0,), spacing=None, modality="")]
    summary = summarise([*site_of(patients), *unknown], CLASSES)
    values = (summary.labels[0].images, summary.in_plane_mm, summary.between_mm, summary.modalities or None)
    assert [value is not None for value in values] == [told] * 4
