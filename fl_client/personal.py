"""The personal parts of a site, adaptive experts and router, kept at the site between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fl_client.by_round import KEPT, keep, last_until, round_path
from icmoe.atomic import read_regular
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import State
from icmoe.kinds import is_personal
from icmoe.study import Study


def personal_path(folder: Path, study: Study, site: str, round_number: int) -> Path:
    """Return where the personal parts after a round are kept."""
    return round_path(folder, study, site, "personal", round_number)


def with_personal(state: Mapping[str, Tensor], folder: Path, study: Study, site: str, after_round: int) -> State:
    """Return the global tensors with the site's personal parts of `after_round`, or of its last round before, put in.

    Before its first round a site has none and the global tensors are used as they are.

    Raises
    ------
    IcmoeError
        304 where the parts are damaged.
    """
    path = last_until(personal_path(folder, study, site, after_round)) if study.aggregation.personal else None
    if path is None:
        return dict(state)
    try:
        own = load(read_regular(path))
    except (OSError, SafetensorError) as error:
        fault = Fault(number=304, where=site, what="personal parts of the last round are damaged", value=type(error).__name__)
        raise IcmoeError(fault) from None
    return {**state, **own}


def keep_personal(
    state: Mapping[str, Tensor], folder: Path, study: Study, site: str, round_number: int, *, kept: int = KEPT
) -> None:
    """Keep the personal parts after a round, and those of the rounds before it, `kept` in all: a round may be repeated."""
    if not study.aggregation.personal:
        return
    own = {name: tensor.contiguous() for name, tensor in sorted(state.items()) if is_personal(name, study.model)}
    keep(personal_path(folder, study, site, round_number), save(own), kept)
