"""Named profiles: values of a study under one word, spelled out when the study is read.

`profile = "lite"` in a study file stands for the values below; what the file names itself stays. The study keeps the
values, not the word, so that its digest says what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icmoe.errors import NOT_STARTED, Fault, IcmoeError

# The norm of the noise grows with the square root of the coordinates: one narrow expert per kind, no laterals, and no
# contrast, whose projection would be 17 k coordinates more. 44 k trained parameters over the lite-medsam backbone.
LITE: dict[str, Any] = {
    "model": {"basic_experts": 1, "semantic_experts": 1, "adaptive_experts": 1, "top_k": 3, "bottleneck": 8},
    "backbone": {"block_features": False},
    "loss": {"contrast": 0.0},
}
PROFILES = {"lite": LITE}


def spelled_out(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return a study's tables with those of its profile beneath, and without the word.

    Raises
    ------
    IcmoeError
        202 where the profile is not known.
    """
    below = dict(values)
    if "profile" not in below:
        return below
    name = below.pop("profile")
    if not isinstance(name, str) or name not in PROFILES:
        value, limit = f"profile = {name!r}", ", ".join(PROFILES)
        raise IcmoeError(Fault(number=202, where=where, value=value, limit=limit, did=NOT_STARTED))
    return merged(PROFILES[name], below)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above` on top, table by table."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
