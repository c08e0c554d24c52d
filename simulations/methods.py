"""The methods that a rehearsal compares, each as changes to one study, so that nothing else differs."""

from __future__ import annotations

from typing import Any

from icmoe.config import parse
from icmoe.study import Study, taught_alone

PLAIN_AVERAGE: dict[str, Any] = {
    "usage_exponent": 0.0,
    "floor": 0.0,
    "cap": 1.0,
    "min_contributors": 1,
    "starved": "plain",
    "shrinkage": False,
}

FEDERATED: dict[str, dict[str, dict[str, Any]]] = {
    "router-aware": {},
    "fedavg": {"aggregation": PLAIN_AVERAGE},
    "fedprox": {"aggregation": PLAIN_AVERAGE, "training": {"proximal_mu": 0.01}},
    "fedadam": {"aggregation": {**PLAIN_AVERAGE, "optimizer": "adam"}},
    "fedyogi": {"aggregation": {**PLAIN_AVERAGE, "optimizer": "yogi"}},
    "personal": {"aggregation": {"personal": True}},
}
ALONE = ("local", "pooled")
AFTERWARDS = {"personalised": ("router-aware", "local")}
"""Methods that start from the final models of others, and those."""
METHODS = (*FEDERATED, *AFTERWARDS, *ALONE)
DEFAULT_METHODS = ("router-aware", "fedavg", "local", "pooled")


def study_for(method: str, base: Study, seed: int) -> Study:
    """Return `base` as the method and seed want it.

    Parameters
    ----------
    method
        A name of `METHODS`; "local" and "pooled" share one study, without any averaging, without privacy and in
        float32: nothing leaves there.
    base
        The router-aware study.
    seed
        Origin of all derived seeds; equal for all methods, so that they see the same batches.
    """
    changes = FEDERATED.get(method, {"aggregation": PLAIN_AVERAGE})
    values = base.model_dump(mode="json")
    for section, keys in changes.items():
        values[section] |= keys
    values["seed"] = seed
    values["name"] = f"{base.name}-{'alone' if method in ALONE else method}"[:64]
    values["quorum"] = 1 if method in ALONE else base.quorum
    if method in ALONE:
        values.pop("privacy", None)
        values.pop("update", None)
    study = parse(Study, values, where=f"method {method}")
    return taught_alone(study) if method in ALONE else study
