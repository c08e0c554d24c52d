"""The model card of a finished study, from what its sites told: names, patients in tens, validation scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fl_server.round_log import RoundRecord
from icmoe.accounting import study_epsilon
from icmoe.atomic import read_regular
from icmoe.errors import IcmoeError
from icmoe.modelcard import PrivacySpent, SiteLine, write_card
from icmoe.modelfile import ModelHeader
from icmoe.study import Study

SCORED_ON = "the site's own validation patients, of the model after the last round"


def write_study_card(model: Path, header: ModelHeader, history: Sequence[RoundRecord], data_check: Path) -> Path:
    """Write the card beside the model and return its path.

    Parameters
    ----------
    model, header
        The model file and what it says of itself.
    history
        Of all rounds: a site that trained in any of them is named.
    data_check
        What the data check kept; absent where it was not made.
    """
    names = sorted({name for record in history for name in record["sites"]})
    last = history[-1]["sites"] if history else {}
    patients = _patients(data_check)
    lines = [SiteLine(name=name, patients=patients.get(name), dice=last.get(name, {}).get("val_dice")) for name in names]
    return write_card(model, header, lines, scored_on=SCORED_ON, privacy=_spent(header.study, history))


def _spent(study: Study, history: Sequence[RoundRecord]) -> list[PrivacySpent]:
    """Return what was spent at the sites and at the server; of the sites what the study lets them spend."""
    site, server = study.privacy.site, history[-1].get("privacy") if history else None
    spent = []
    if site is not None:
        names = {"unit": site.unit, "adjacency": "add/remove", "accountant": site.accountant}
        with suppress(IcmoeError):  # a coordinator without Opacus cannot tell an epsilon from the noise: the card has none then
            epsilon = study_epsilon(study) if site.epsilon is None else site.epsilon
            spent.append(PrivacySpent(epsilon=epsilon, delta=site.delta, **names))
    if server is not None:
        spent.append(PrivacySpent.of(server))
    return spent


def _patients(data_check: Path) -> dict[str, int]:
    """Return training patients in tens of the sites that share a summary."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found: dict[str, Any] = json.loads(read_regular(data_check))
        return {name: int(summary["patients"]) for name, summary in found["summaries"].items()}
    return {}  # absent or damaged: no reason to fail a study that is complete
