"""Reference lines of a rehearsal: what each site reaches alone, and what all data in one place would reach.

Both are validation Dice after the rehearsal's last round, mean over its seeds, like the live figures. The pooled one is
over all sites' validation patients together: the rehearsal keeps no other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from icmoe.atomic import regular
from icmoe.config import Section
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.study import Study

LARGEST_BYTES = 200_000_000
POOLED = "(pooled)"
COMPARED = ("labels", "backbone")


class References(Section):
    """Reference lines."""

    created: str
    """When the rehearsal was made."""
    phantoms: bool
    """Whether its images are drawn."""
    seeds: int
    """Number of seeds."""
    local: dict[str, float]
    """Validation Dice of each site's own local model on its own patients."""
    pooled: float | None
    """Validation Dice of the model of pooled data on all sites' patients."""
    labels: tuple[str, ...]
    """Names of its classes."""
    backbone: str
    """Digest of its backbone."""

    def differing(self, study: Study) -> list[str]:
        """Return in what the rehearsal differs from a study so much that its lines are no yardstick."""
        own = {"labels": tuple(label.name for label in study.labels), "backbone": study.backbone.digest}
        return [key for key in COMPARED if getattr(self, key) != own[key]]


def read_references(path: Path) -> References:
    """Return the reference lines of a rehearsal's results.json.

    Raises
    ------
    IcmoeError
        523 where the file cannot be read, is no results.json, or holds neither local nor pooled training.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            found = _of(json.loads(file.read(LARGEST_BYTES)))
    except OSError as error:
        raise _refusal(path, error.strerror or "") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refusal(path, "it is no results.json of a rehearsal, schema version 1") from None
    if not found.local and found.pooled is None:
        raise _refusal(path, "it holds neither local nor pooled training")
    return found


def _refusal(path: Path, value: str) -> IcmoeError:
    todo = "Name the results.json that simulations/run_sim.py wrote with the methods local and pooled."
    return IcmoeError(Fault(number=523, where=str(path), value=value, did=NOT_STARTED, todo=todo))


def _of(results: dict[str, Any]) -> References:
    if (results["kind"], results["schema_version"]) != ("icmoe-simulation", 1):
        raise ValueError
    local, pooled = (_last_scores(results["methods"].get(method, {})) for method in ("local", "pooled"))
    return References(
        created=str(results["created"])[:10],
        phantoms=bool(results["phantoms"]),
        seeds=len(results["seeds"]),
        local=local,
        pooled=pooled.get(POOLED),
        labels=tuple(results["labels"]),
        backbone=str(results["configuration"]["study"]["backbone"]["digest"]),
    )


def _last_scores(by_seed: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation Dice after the last round by site, mean over the seeds that have one."""
    found: dict[str, list[float]] = {}
    for run in by_seed.values():
        for name, row in (run["rounds"][-1]["sites"] if run["rounds"] else {}).items():
            dice = row["val_dice"]
            if isinstance(dice, float | int) and math.isfinite(dice) and 0.0 <= dice <= 1.0:
                found.setdefault(str(name), []).append(float(dice))
    return {name: fmean(values) for name, values in found.items()}
