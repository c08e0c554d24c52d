"""Two rehearsals side by side: settings that differ, gains seed by seed, and what makes a comparison worth little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from icmoe.cli import app
from icmoe.compare import compare, read_results
from icmoe.errors import IcmoeError


def training(dice: float | None, **sites: float | None) -> dict[str, Any]:
    known = [value for value in sites.values() if value is not None]
    tests = {name: {"dice": value, "iou": 0.1} for name, value in sites.items()}
    return {"test": {"pooled": {"dice": dice}, "worst_site": {"dice": min(known, default=None)}, "sites": tests}, "rounds": []}


def results(methods: dict[str, dict[str, Any]], *, data: str = "d", masks: str | None = None, **study: object) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "icmoe-simulation",
        "study_digest": "s",
        "data_digest": data,
        **({} if masks is None else {"masks_digest": masks}),
        "phantoms": False,
        "configuration": {"study": {"rounds": 2, "model": {"top_k": 6}, **study}, "simulation": {"seeds": [1, 2]}},
        "methods": methods,
        "of later versions": [1],
    }


def write(folder: Path, record: object) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], terminal_width=150)
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def test_gains_are_paired_by_seed(tmp_path: Path) -> None:
    a = write(tmp_path / "a", results({"fedavg": {"1": training(0.5, X=0.4), "2": training(0.7, X=0.8)}}))
    b = write(
        tmp_path / "b",
        results(
            {"fedavg": {"2": training(0.8, X=0.8), "1": training(0.5, X=0.5), "3": training(0.0, X=0.0)}, "pooled": {}}, rounds=3
        ),
    )
    found = compare(read_results(a), read_results(b / "results.json"))
    assert found.settings == {"study.rounds": (2, 3)}
    assert (found.same_data, found.only_a, found.only_b) == (True, (), ("pooled",))
    change = next(change for change in found.changes if change.score == "all patients")
    assert change.seeds == 2
    assert change.difference == pytest.approx(0.05)
    assert change.spread == pytest.approx(0.1 / 2**0.5)
    assert (change.a, change.b) == pytest.approx((0.6, 0.65)), "of the same seeds as their difference"
    code, text = run("compare", a, b)
    assert code == 0
    assert "+0.0500 +-0.0707" in text
    assert "Only in B: pooled." in text
    code, text = run("compare", a, b, "--json")
    assert json.loads(text)["settings"] == {"study.rounds": [2, 3]}


def test_brackets_in_names_of_methods_are_kept(tmp_path: Path) -> None:
    a = write(tmp_path / "a", results({"fedavg [/x]": {"1": training(0.5, X=0.5)}}))
    code, text = run("compare", a, a)
    assert (code, "fedavg [/x]" in text) == (0, True)


def test_other_data_phantoms_and_single_seeds_are_said(tmp_path: Path) -> None:
    a = write(tmp_path / "a", results({"fedavg": {"1": training(None, X=None)}}))
    b = write(tmp_path / "b", {**results({"fedavg": {"1": training(0.5, X=0.5)}}, data="e"), "phantoms": True})
    _, text = run("compare", a, b)
    for sentence in ("different data", "say nothing about patients", "Fewer than two common seeds"):
        assert sentence in text
    found = compare(read_results(a), read_results(b))
    assert all(change.difference is None and change.a is None for change in found.changes)


def test_the_same_pictures_under_other_masks_are_other_data(tmp_path: Path) -> None:
    a, b, old = (write(tmp_path / name, results({}, masks=masks)) for name, masks in (("a", "1"), ("b", "2"), ("old", None)))
    found = {name: compare(read_results(a), read_results(other)).same_data for name, other in (("b", b), ("a", a), ("old", old))}
    assert found == {"b": False, "a": True, "old": True}  # an earlier version did not note them


def test_without_a_common_seed_each_shows_its_own_and_no_difference(tmp_path: Path) -> None:
    a = write(tmp_path / "a", results({"fedavg": {"1": training(0.5), "2": training(0.7)}}))
    b = write(tmp_path / "b", results({"fedavg": {"3": training(0.9)}}))
    change = compare(read_results(a), read_results(b)).changes[0]
    assert (change.a, change.b, change.difference, change.seeds) == (pytest.approx(0.6), pytest.approx(0.9), None, 0)


@given(st.dictionaries(st.sampled_from("123"), st.tuples(*[st.one_of(st.none(), st.floats(0, 1))] * 2), min_size=1))
def test_exchanging_them_turns_every_sign(rows: dict[str, tuple[float | None, float | None]]) -> None:
    from icmoe.compare import Results

    a, b = (
        Results.model_validate(results({"m": {seed: training(row[side], X=row[side]) for seed, row in rows.items()}}))
        for side in (0, 1)
    )
    for there, back in zip(compare(a, b).changes, compare(b, a).changes, strict=True):
        assert (there.a, there.b, there.seeds) == (back.b, back.a, back.seeds)
        assert (there.difference is None) == (back.difference is None)
        if there.difference is not None and back.difference is not None:
            assert there.difference == pytest.approx(-back.difference)
            assert there.spread == pytest.approx(back.spread) if there.spread is not None else back.spread is None
    assert all(change.difference in (None, 0.0) for change in compare(a, a).changes)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 217),
        ("[]", 217),
        ('{"schema_version": 2}', 217),
        ("[" * 5000, 217),
        (json.dumps(results({"fedavg": {"1": training(float("nan"))}})), 217),
        (None, 205),
        (json.dumps({**results({}), "methods": {"fedavg": {"1": {"test": {}}}}}), 217),
    ],
)
def test_what_is_no_rehearsal_is_refused_by_number(tmp_path: Path, text: str | None, number: int) -> None:
    good = write(tmp_path / "good", results({}))
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    with pytest.raises(IcmoeError) as caught:
        read_results(bad)
    assert [fault.number for fault in caught.value.faults] == [number]
    code, output = run("compare", good, bad)
    assert code == 1
    assert f"ICM{number}" in output
