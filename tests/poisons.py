"""What a malicious site may do to its update, by name; for the tests of the guard and for the chaos suite's lying site."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from icmoe.messages import NUMBERS, UPDATE

Tensors = dict[str, np.ndarray]


def first(value: float) -> Callable[[Tensors, str], None]:
    """Return a change of the first value of a tensor."""

    def change(tensors: Tensors, name: str) -> None:
        tensors[name].reshape(-1)[0] = value

    return change


# What is done to an update's tensors, by their names and the name of the first; and what to its numbers.
TENSORS: dict[str, Callable[[Tensors, str], object]] = {
    "NaN": first(np.nan),
    "Inf": first(np.inf),
    "1e30": first(1e30),
    "sign flip x10": lambda tensors, _: tensors.update({key: -10.0 * tensor for key, tensor in tensors.items()}),
    "wrong shape": lambda tensors, name: tensors.update({name: tensors[name].reshape(1, -1)}),
    "missing key": lambda tensors, name: tensors.pop(name),
    "extra key": lambda tensors, name: tensors.update(stranger=tensors[name]),
    "float64": lambda tensors, name: tensors.update({name: tensors[name].astype(np.float64)}),
}
VALUES: dict[str, dict[str, int | list[float]]] = {
    "zero weight": {"slices": 0},
    "negative weight": {"slices": -30},
    "size far above announced": {"slices": 10**6},
    "usage off the simplex": {"usage": [0.9, 0.9, 0.9]},
}
BYTES = {"a broken header": b"\x93NUMPY\x01\x00\x10\x00{'descr': bad   ", "an archive": b"PK\x05\x06" + bytes(18)}


def changed(reply: Message, kind: str) -> Message:
    """Return the reply with one thing made wrong."""
    tensors = {key: array.numpy().copy() for key, array in reply.content[UPDATE].items()}
    if kind in TENSORS:
        TENSORS[kind](tensors, min(tensors))
    arrays = {key: Array(tensor) for key, tensor in tensors.items()}
    if kind in BYTES:
        arrays[min(arrays)] = Array("float32", (3,), "numpy.ndarray", BYTES[kind])
    reply.content[UPDATE] = ArrayRecord(arrays)
    reply.content[NUMBERS].update(VALUES.get(kind, {}))
    return reply
