"""An update in int8, and what its rounding left out: owed to the next update and kept at the site until then.

Where nothing can be read, a site owes nothing: its updates are then rounded once without being made up for, and training
goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, from_numpy, isfinite

from fl_client.by_round import KEPT, OWED, keep, last_until, round_path
from fl_client.egress import rounded_to
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import State, state_digest, state_faults
from icmoe.quantise import EXPONENT, MANTISSA_BITS, Dequantised, dequantised, quantised
from icmoe.study import Study
from icmoe.tensor_file import read_tensors

log = logging.getLogger("fl_client")


def owed_path(folder: Path, study: Study, site: str, round_number: int) -> Path:
    """Return where what a round left out is kept."""
    return round_path(folder, study, site, OWED, round_number)


def quantised_update(
    update: State, folder: Path, study: Study, site: str, round_number: int, *, bits: int, kept: int = KEPT
) -> State:
    """Return the update with what earlier rounds owe, in int8, after keeping what its own rounding leaves out.

    Parameters
    ----------
    update
        Trained minus global tensors, float32.
    folder
        The site's state folder.
    study, site, round_number
        Whose update it is.
    bits
        Bits of mantissa that may leave of each number; what fewer than the form's own leave out is owed as well.
    kept
        Rounds to keep.

    Raises
    ------
    IcmoeError
        304 where the update is not finite; nothing is kept of it then.
    """
    before = _last(owed_path(folder, study, site, round_number - 1), update)
    sent, left = State(), State()
    for name, tensor in sorted(update.items()):
        wanted = tensor if before is None else tensor + before[name]
        steps, exponent_R = quantised(_coarse(wanted, bits, name).numpy())
        sent[name], sent[name + EXPONENT] = from_numpy(steps), from_numpy(exponent_R)
        left[name] = (wanted - from_numpy(dequantised(steps, exponent_R))).contiguous()
    path, digest = owed_path(folder, study, site, round_number), state_digest(left)
    keep(path, save(left, metadata={"digest": digest}), kept)
    return dict(sorted(sent.items()))


def coarsened(sent: State, bits: int) -> State:
    """Return an update in int8 with no more than `bits` bits of mantissa; what that leaves out is not made up for.

    One that was finished before the site let fewer bits leave would be held back each time that it is asked for.
    """
    if bits >= MANTISSA_BITS:
        return sent
    found = State()
    for name, tensor in Dequantised({name: one.numpy() for name, one in sent.items()}).items():
        steps, exponent_R = quantised(_coarse(from_numpy(tensor), bits, name).numpy())
        found[name], found[name + EXPONENT] = from_numpy(steps), from_numpy(exponent_R)
    return dict(sorted(found.items()))


def _coarse(wanted: Tensor, bits: int, name: str) -> Tensor:
    if not bool(isfinite(wanted).all()):
        did = "The round's update was not sent."
        raise IcmoeError(Fault(number=304, where=name, what="update holds NaN or infinity", limit="finite", did=did))
    return rounded_to(wanted, bits) if bits < MANTISSA_BITS else wanted


def _last(path: Path, like: State) -> State | None:
    """Return what the last round until that of `path` left, None where there is none that can be used."""
    last = last_until(path)
    if last is None:
        return None
    try:
        owed, metadata = read_tensors(last)
        whole = metadata.get("digest") == state_digest(owed) and not state_faults(like, owed)
    except (OSError, SafetensorError, ValueError) as error:
        log.warning("%s is damaged (%s): what it held is not made up for", last.name, type(error).__name__)
        return None
    if not whole:
        log.warning("%s is not what was kept under this name: what it held is not made up for", last.name)
    return owed if whole else None
