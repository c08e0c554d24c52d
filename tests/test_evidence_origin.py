"""Scores are compared, kept and drawn up only where they are of one study, one backbone, one set of data and one training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_evidence import rows_of, score

from simulations.evidence.tables import write_tables

HOSPITALS = ("CS", "DU", "HT")
DIGESTS = {f"{name}_digest": name[0] * 64 for name in ("study", "data", "backbone")}


def put(out: Path, name: str, scores: list[dict[str, Any]], **changes: object) -> None:
    (out / name).mkdir(parents=True, exist_ok=True)
    (out / name / "patients.json").write_text(json.dumps({"commit": "c0ffee", **DIGESTS, "scores": scores, **changes}))


def all_of(site: str) -> list[tuple[str, str]]:
    return [(f"{site}-{split}", split) for split in ("train", "val", "test")]


def base_scores() -> list[dict[str, Any]]:
    """Local models of three hospitals on all patients of the others, and what else the first table needs."""
    rows = rows_of(0.03)
    for seed in (1, 2):
        for site in HOSPITALS:
            for at in set(HOSPITALS) - {site}:
                rows += [score("local", seed, site, patient, 0.4, trained_at=at, split=split) for patient, split in all_of(site)]
    return rows


def without(site: str, dice: float = 0.5) -> list[dict[str, Any]]:
    return [score("router-aware", seed, site, patient, dice, split=split) for seed in (1, 2) for patient, split in all_of(site)]


def table(out: Path) -> str:
    return write_tables(out).read_text()


def test_runs_without_a_hospital_are_compared_and_tell_where_they_are_from(tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores())
    for site in HOSPITALS:
        put(tmp_path, f"lgg-without-{site}", without(site), commit=f"of{site}", data_digest="e" * 64)
    found = table(tmp_path)
    assert "| unseen hospital, mean | +0.100" in found
    for site in HOSPITALS:
        assert f"lgg-without-{site}: Commit `of{site}`, study `ssssssssssss`, data `eeeeeeeeeeee`, " in found
    assert "Not compared" not in found


@pytest.mark.parametrize("other", ["study", "backbone"])
def test_a_run_of_another_study_or_backbone_is_not_compared(other: str, tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores())
    for site in HOSPITALS:
        put(tmp_path, f"lgg-without-{site}", without(site), **({f"{other}_digest": "f" * 64} if site == "DU" else {}))
    found = table(tmp_path)
    assert f"Not compared with lgg-base: other {other}." in found
    assert "unseen hospital DU:" not in found
    assert "| unseen hospital CS: " in found
    mean = next(line for line in found.splitlines() if "unseen hospital, mean" in line)
    assert mean.startswith("| unseen hospital, mean, DU missing | +0.100"), mean
    assert mean.endswith("| - | - |  |"), "a mean of some hospitals has no bar"


def test_a_run_with_other_patients_of_the_hospital_is_not_compared(tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores())
    put(tmp_path, "lgg-without-DU", [row for row in without("DU") if row["split"] != "val"])
    found = table(tmp_path)
    assert "Not compared with lgg-base: other patients." in found
    assert "| unseen hospital" not in found


def test_a_mean_has_its_bar_only_where_every_planned_run_is_there(tmp_path: Path) -> None:
    put(tmp_path, "lgg-base", base_scores())
    put(tmp_path, "lgg-without-DU", without("DU"))
    mean = next(line for line in table(tmp_path).splitlines() if "unseen hospital, mean" in line)
    assert mean.startswith("| unseen hospital, mean, CS, HT missing | "), mean
    assert mean.endswith("| - | - |  |")
