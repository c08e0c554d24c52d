"""What a study must have come to, by what happened to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .events import BOTH, COORDINATOR, MACHINES, MALICIOUS, SITES

Row = dict[str, Any]
DICE = 0.01


def faults_of(row: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a study's result, in sentences; nothing where it held.

    Parameters
    ----------
    row
        With `identical`: whether its weights have the bits of the calm run, and for a liar `as_absent`: those of the run
        in which the liar stays away in the rounds in which it lied.
    """
    if not row["finished"]:
        return ["it did not finish"]
    found = [event["fault"] for event in row.get("events", []) if "fault" in event]
    if not row["finite"]:
        found.append("weights are not finite")
    if not row["quorum"]:
        found.append("a round counts without its quorum")
    if row["family"] in {COORDINATOR, BOTH} and not row["identical"]:
        found.append("bits differ from the calm run")
    if row["family"] in {SITES, MACHINES} and not row["identical"] and not any(row["missed"].values()):
        found.append("bits differ from the calm run though no hospital missed a round")
    if row["family"] == MALICIOUS:
        found += [f"{kind} was not refused" for kind, number in row["refused"].items() if not number]
        if not row["as_absent"]:
            found.append("the poison moved the model: bits differ from the run without the liar")
        if abs(row["dice"] - row["calm_dice"]) > DICE:
            found.append(f"Dice {row['dice']:.4f} beside {row['calm_dice']:.4f} in the calm run")
    return found
