"""The global model as it arrives at a hospital: bounded in size and in change, its digest written down."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fl_client.records import Records
from icmoe.atomic import write_atomically
from icmoe.errors import NOTHING_SENT, Fault, IcmoeError
from icmoe.exchange import State, state_digest, state_faults
from icmoe.kinds import BALANCE_BIAS
from icmoe.server_noise import noise_of, sensitivity_of
from icmoe.study import Study
from icmoe.tensor_file import read_tensors

LARGEST_RMS = 10.0
"""Largest root mean square of one tensor; the initial tensors have at most 1."""

STEPS = 1000
"""Steps of AdamW, each about one learning rate long, by whose length a tensor may change from round to round."""

ROUNDING = 1.001
"""Of a bias in float32 that moves by exactly its step."""

DEVIATIONS = 8.0
"""How far noise may move a tensor, in its standard deviations: one of a single value passes them once in 10^15 rounds."""


def accept(records: Records, study: Study, about: Mapping[str, Any], tensors: State) -> None:
    """Check the size of a global model and its change since the last one, write its digest down, keep it for the next.

    Names, shapes, types and finiteness were checked before.

    Parameters
    ----------
    records
        The site's.
    study
        The approved study.
    about
        What the audit log says of the message: its kind, "train" or "evaluate", and its round among others.
    tensors
        The global tensors.

    Raises
    ------
    IcmoeError
        322, one fault per tensor outside its bounds; the model's digest is in the audit log even then.
    """
    age = int(about["round"]) - (about["kind"] == "train")
    path = records.state / study.digest[:16] / "last-global.safetensors"
    last_age, last = _last(path, tensors)
    faults = bound_faults(study, tensors, last, rounds=max(1, age - last_age))
    records.write("received", {**about, "digest": state_digest(tensors), "within_bounds": not faults})
    if faults:
        raise IcmoeError(*faults)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(whole, metadata={"age": str(age)}), private=True)


def bound_faults(study: Study, tensors: State, last: State | None, *, rounds: int) -> list[Fault]:
    """Return the tensors that are too large, or too far from those of `rounds` rounds ago, where those are known."""
    server = study.aggregation.server_learning_rate if study.aggregation.optimizer != "none" else 0.0
    trained, bias = STEPS * max(study.training.learning_rate, server), ROUNDING * study.aggregation.balance_step
    noise = 0.0 if server else DEVIATIONS * server_noise(study, sum(map(Tensor.numel, tensors.values())))
    faults = []
    for name, tensor in sorted(tensors.items()):
        own = bias if name == BALANCE_BIAS else 0.0  # it is not trained, but moved by at most its step in each round
        size, largest = _rms(tensor), max(LARGEST_RMS, study.rounds * own) + study.rounds**0.5 * noise
        farthest = rounds * max(trained, own) + rounds**0.5 * noise
        if size > largest:
            faults.append(_fault(name, "tensor is too large", size, largest))
        elif last is not None and (moved := _rms(tensor - last[name])) > farthest:
            faults.append(_fault(name, "tensor changed too much since the last global model", moved, farthest))
    return faults


def server_noise(study: Study, count: int) -> float:
    """Return the largest standard deviation of the coordinator's noise on a value of the model in a round, 0 without any.

    A clip norm that follows the updates does not pass the longest of an update of `count` values by more than a step or two.
    """
    settings = study.privacy.server
    if settings is None:
        return 0.0
    clip_norm = settings.clip_norm
    if settings.clip_quantile is not None:
        longest = STEPS * study.training.learning_rate * math.sqrt(count)
        clip_norm = max(clip_norm, longest) * math.exp(2.0 * settings.clip_rate)
    return noise_of(settings, study.rounds).update * sensitivity_of(settings, clip_norm) / settings.divisor


def _last(path: Path, like: State) -> tuple[int, State | None]:
    """Return the last global model and after how many rounds it came, refused unless it is of this one's form."""
    if not os.path.lexists(path):
        return 0, None
    todo = "Remove the file; the next global model is then only checked for its size."
    try:
        last, metadata = read_tensors(path)
        age = int(metadata["age"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise IcmoeError(Fault(number=321, where=str(path), value=type(error).__name__, todo=todo)) from None
    if faults := state_faults(like, last):
        raise IcmoeError(Fault(number=321, where=str(path), value=str(faults[0].where), todo=todo))
    return age, last


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def _fault(name: str, what: str, value: float, limit: float) -> Fault:
    did = NOTHING_SENT
    return Fault(number=322, where=name, what=what, value=f"root mean square {value:.4g}", limit=f"at most {limit:.4g}", did=did)
