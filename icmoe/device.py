"""The device of a run, checked before anything starts."""

from __future__ import annotations

import torch
from torch import Tensor

from icmoe.errors import NOT_STARTED, Fault, IcmoeError


def available_device(name: str) -> torch.device:
    """Return the device called `name`.

    Raises
    ------
    IcmoeError
        211 where it is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise IcmoeError(Fault(number=211, value=name, limit="cpu, cuda or cuda:N")) from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        limit = "cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
        raise IcmoeError(Fault(number=211, value=name, limit=limit, did=NOT_STARTED))
    return device


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on `device`; for CUDA through pinned memory, so that the copy runs beside the computation."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
