"""The personal parts of a site, adaptive experts and router, kept at the site between rounds (design section 10)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from icmoe.atomic import write_atomically
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import State
from icmoe.kinds import is_personal
from icmoe.study import Study


def personal_path(folder: Path, study: Study, site: str, round_number: int) -> Path:
    """Return where the personal parts after a round are kept."""
    return folder / study.digest[:16] / site / f"personal-{round_number:05d}.safetensors"


def with_personal(state: Mapping[str, Tensor], folder: Path, study: Study, site: str, after_round: int) -> State:
    """Return the global tensors with the site's personal parts of `after_round` put in.

    Before the first round there are none and the global tensors are used as they are.

    Raises
    ------
    IcmoeError
        304 where the parts of a later round are absent or damaged.
    """
    if not study.aggregation.personal or after_round == 0:
        return dict(state)
    path = personal_path(folder, study, site, after_round)
    try:
        own = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        fault = Fault(number=304, where=site, what="personal parts of the last round are not there", value=type(error).__name__)
        raise IcmoeError(fault) from None
    return {**state, **own}


def keep_personal(state: Mapping[str, Tensor], folder: Path, study: Study, site: str, round_number: int) -> None:
    """Write the personal parts after a round atomically and drop those of two rounds before: a round may be repeated."""
    if not study.aggregation.personal:
        return
    own = {name: tensor.contiguous() for name, tensor in sorted(state.items()) if is_personal(name, study.model)}
    write_atomically(personal_path(folder, study, site, round_number), save(own), private=True)
    personal_path(folder, study, site, round_number - 2).unlink(missing_ok=True)
