"""Wherever a private study's epsilon is told, it stands with delta, unit, adjacency and accountant."""

from __future__ import annotations

from icmoe.server_privacy import spending_sentence
from simulations.findings import remarks

SPENT = {
    "epsilon": 3.21,
    "delta": 1e-4,
    "unit": "site",
    "adjacency": "add/remove",
    "accountant": "Gaussian, exact",
    "noise_multiplier": 1.1,
    "clip_norm": 0.5,
}
WANTED = ("epsilon 3.210", "delta 0.0001", "per site", "add/remove", "Gaussian, exact")


def test_the_sentence_is_whole() -> None:
    assert all(part in spending_sentence(SPENT) for part in WANTED)


def test_a_report_says_what_was_spent_and_what_is_not_covered() -> None:
    run = {"rounds": [{"round": 1, "privacy": SPENT, "sites": {}, "usage_spread": None}], "test": None}
    (line,) = [line for line in remarks({"methods": {"router-aware": {"1": run}}}) if "epsilon" in line]
    assert all(part in line for part in WANTED)
    assert "not covered" in line
    public = {"rounds": [{**run["rounds"][0], "privacy": None}], "test": None}
    assert not any("epsilon" in line for line in remarks({"methods": {"router-aware": {"1": public}}}))
