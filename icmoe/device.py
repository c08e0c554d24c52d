"""The device of a run, checked before anything starts."""

from __future__ import annotations

import torch

from icmoe.errors import Fault, IcmoeError


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
        raise IcmoeError(Fault(number=211, value=name, limit=limit, did="Nothing was started."))
    return device
