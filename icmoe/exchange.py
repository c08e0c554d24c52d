"""What leaves a site and what comes in: named tensors, sorted, checked.

A tensor belongs to one expert, to the router, or to the shared rest; personal mode keeps adaptive experts and router
at the site. Features, routing maps, per-image values and optimiser state have no place here and so cannot leave.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from icmoe.errors import Fault, IcmoeError
from icmoe.kinds import is_personal
from icmoe.study import ModelShape

State = dict[str, Tensor]


def global_state(model: nn.Module) -> State:
    """Return a copy of what the server holds: all trained tensors and the balance bias, by sorted name, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in sorted(model.state_dict().items())}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the model after checking names, shapes, types and finiteness.

    Raises
    ------
    IcmoeError
        301, one fault per tensor that is wrong; the model is untouched then.
    """
    held = model.state_dict()
    faults = state_faults(held, state)
    if faults:
        raise IcmoeError(*faults)
    with torch.no_grad():  # the model's own tensors; `load_state_dict` would ask each of its modules once more what fits
        for name, tensor in held.items():
            tensor.copy_(state[name])


def state_faults(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[Fault]:
    """Return what is wrong with `state` beside what is `expected`; empty where all is right."""
    faults = [
        Fault(number=301, where=name, what="tensor is missing" if name in expected else "tensor is not part of the study")
        for name in sorted(set(expected) ^ set(state))
    ]
    for name in sorted(set(expected) & set(state)):
        want, got = expected[name], state[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            value, limit = f"{tuple(got.shape)} {got.dtype}", f"{tuple(want.shape)} {want.dtype}"
            faults.append(Fault(number=301, where=name, what="tensor has another shape or type", value=value, limit=limit))
        elif not _is_finite(got):
            faults.append(Fault(number=301, where=name, what="tensor holds NaN or infinity", limit="finite"))
    return faults


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; a finite norm says so at a fifth of the cost of looking at each."""
    if tensor.is_floating_point() and math.isfinite(float(torch.linalg.vector_norm(tensor))):
        return True
    return bool(torch.isfinite(tensor).all())


def update_of(model: nn.Module, start: Mapping[str, Tensor], *, personal: bool, shape: ModelShape) -> State:
    """Return trained minus the round's global tensors, by sorted name, float32 on the CPU.

    Parameters
    ----------
    model
        After local training.
    start
        The round's global tensors.
    personal
        Whether adaptive experts and router stay at the site.
    shape
        The study's model.
    """
    return {
        name: tensor.detach().cpu().float() - start[name]
        for name, tensor in sorted(model.named_parameters())
        if not (personal and is_personal(name, shape))
    }


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of the tensors in sorted order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def announced_size(slices: int, *, exact: bool) -> int:
    """Return n_k as it is sent: the number of training slices rounded up to ten, or exact in a simulation."""
    return slices if exact else 10 * math.ceil(slices / 10)
