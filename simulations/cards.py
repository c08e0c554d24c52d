"""Model cards of a rehearsal, one beside each model file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icmoe.modelcard import PrivacySpent, SiteLine, write_card
from icmoe.modelfile import read_model
from icmoe.summary import tens

SCORED_ON = "the site's test patients"


def write_cards(results: dict[str, Any], root: Path) -> None:
    """Write a card for every model that `results` names.

    Parameters
    ----------
    results
        As results.json holds them.
    root
        Folder that the paths in it start from.
    """
    for by_seed in results["methods"].values():
        for run in by_seed.values():
            if run["model"] is not None:
                _write(root / run["model"], results, run["test"], list(results["sites"]), run.get("rounds", []))
            for site, path in run.get("models", {}).items():
                _write(root / path, results, run["own_test"], [site], run.get("rounds", []))


def _write(path: Path, results: dict[str, Any], test: dict[str, Any], sites: list[str], rounds: Sequence[dict[str, Any]]) -> None:
    lines = [
        SiteLine(
            name=name,
            patients=tens(count) if (count := results["sites"][name]["patients"]["train"]) else 0,
            dice=test["sites"].get(name, {}).get("dice"),
        )
        for name in sites
    ]
    header = read_model(path)[1]
    spent = [results.get("privacy")] if header.study.privacy.site is not None else []
    spent += [rounds[-1].get("privacy")] if rounds else []
    write_card(path, header, lines, scored_on=SCORED_ON, privacy=[PrivacySpent.of(one) for one in spent if one])
