"""All tensors of a message in one array: Flower asks for each array of a record by signed requests of its own.

A record that is not packed is left as it is; what is in it is checked afterwards either way.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

PACKED = "packed"


def pack(tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Return the tensors as the bytes of one safetensors file, by sorted name."""
    return np.frombuffer(save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}), dtype=np.uint8)


def unpack(packed: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]] | None:
    """Return the tensors of `pack`, None where the array holds none."""
    if packed.dtype != np.uint8 or packed.ndim != 1:
        return None
    try:
        return dict(sorted(load(packed.tobytes()).items()))  # the library gives them in no order
    except (SafetensorError, KeyError, ValueError):
        return None


def array_of(item: Any) -> npt.NDArray[Any] | None:  # noqa: ANN401  # Flower's type, which this package does not know
    """Return the array that a message claims to hold, None where its bytes are none.

    Parameters
    ----------
    item
        Flower's array: NumPy's file format, as the sender wrote it. NumPy reads no pickle here, but a wrong header makes it
        raise nearly anything, and an archive is no array.
    """
    try:
        found = item.numpy()
    except Exception:  # noqa: BLE001  # from another machine: whatever its bytes make the reader raise, they are no array
        return None
    return found if isinstance(found, np.ndarray) else None


def tensors_in(record: Mapping[str, Any]) -> dict[str, npt.NDArray[Any] | None]:
    """Return the arrays of a record by sorted name, None where an item's bytes are none; a packed record is left as it is.

    Parameters
    ----------
    record
        Flower's record of arrays, packed or not. To write each tensor as an item of its own, only to read it again, takes
        longer than all that is computed with it.
    """
    array = array_of(record[PACKED]) if set(record) == {PACKED} else None
    tensors = None if array is None else unpack(array)
    if tensors is None:
        return {name: array_of(record[name]) for name in sorted(record)}
    return {**tensors}


def pack_records(content: MutableMapping[str, Any], record: type, array: type) -> None:
    """Pack each record of arrays of a message in place.

    Parameters
    ----------
    content
        Records by name.
    record, array
        Flower's types of a record of arrays and of an array.
    """
    for name, found in list(content.items()):
        if isinstance(found, record) and set(found) != {PACKED}:  # type: ignore[call-overload]
            content[name] = record({PACKED: array(pack({key: item.numpy() for key, item in found.items()}))})  # type: ignore[attr-defined]


def unpack_records(content: MutableMapping[str, Any]) -> None:
    """Undo `pack_records`.

    Parameters
    ----------
    content
        Records by name.
    """
    for name, found in list(content.items()):
        packed: Any = found.get(PACKED) if set(found) == {PACKED} else None
        array = array_of(packed)
        tensors = None if array is None else unpack(array)
        if tensors is not None:
            content[name] = type(found)({key: type(packed)(tensor) for key, tensor in tensors.items()})
