"""All tensors of a message in one array: Flower asks for each array of a record by signed requests of its own.

A record that is not packed is left as it is; what is in it is checked afterwards either way.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

PACKED = "packed"
NUMPY = "numpy.ndarray"
"""What Flower calls NumPy's file format."""
HEADER_BYTES = 128
"""Length to which NumPy fills the header of an array of up to six or so axes."""


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


def tensors_digest(tensors: Mapping[str, npt.NDArray[Any]], before: bytes = b"") -> str:
    """Return the SHA-256 over names, types, shapes and values of tensors, and what stands before them.

    How their sender wrote them down, in which order of axes, does not enter.
    """
    sha = hashlib.sha256(before)
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}:{tensor.dtype}:{tensor.shape};".encode())
        sha.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def array_of(item: Any) -> npt.NDArray[Any] | None:  # noqa: ANN401  # Flower's type, which this package does not know
    """Return the array that a message claims to hold, read-only where it needed no copy; None where its bytes are none.

    Parameters
    ----------
    item
        Flower's array: NumPy's file format, as the sender wrote it. NumPy reads no pickle here, but a wrong header makes it
        raise nearly anything, and an archive is no array.
    """
    data: bytes = item.data
    if item.stype == NUMPY and (plain := _plain_array(data[:HEADER_BYTES])) is not None:
        dtype, shape, size_bytes = plain
        if len(data) == HEADER_BYTES + size_bytes:
            return np.ndarray(shape, dtype, data, HEADER_BYTES)
    try:
        found = item.numpy()
    except Exception:  # noqa: BLE001  # from another machine: whatever its bytes make the reader raise, they are no array
        return None
    return found if isinstance(found, np.ndarray) else None


def is_plain(item: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:  # noqa: ANN401  # as in `array_of`
    """Return whether a message's array is to the letter what `bytes_of` writes of native numbers of this type and shape."""
    head, size_bytes = _plain_form(dtype, shape)
    data = item.data
    return len(data) == size_bytes and data.startswith(head) and item.stype == NUMPY


def plain_view(item: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:  # noqa: ANN401  # as in `array_of`
    """Return the array of an item that `is_plain`, read-only and without a copy."""
    return np.ndarray(shape, dtype, item.data, HEADER_BYTES)


def bytes_of(tensor: npt.NDArray[Any]) -> bytes:
    """Return an array in NumPy's file format 1.0, as `numpy.save` writes it, in C order."""
    flat_N = np.ascontiguousarray(tensor).reshape(-1)
    return b"".join((_header(tensor.dtype, tensor.shape), flat_N.view(np.uint8).data if flat_N.size else b""))


@lru_cache(maxsize=1024)
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return file.getvalue()


@lru_cache(maxsize=1024)
def _plain_form(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[bytes, int]:
    """Return the header and the size in bytes, header included, of `bytes_of` an array; none is plain under a longer header."""
    head = _header(dtype, shape)
    return head, -1 if len(head) != HEADER_BYTES else len(head) + math.prod(shape) * dtype.itemsize


@lru_cache(maxsize=1024)
def _plain_array(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int] | None:
    """Return type, shape and bytes of an array of numbers in C order, None for any other: NumPy's own reader judges that.

    The updates of all sites and rounds share their few headers, and reading one takes longer than adding a small tensor.
    """
    file = BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # noqa: BLE001  # as in `array_of`
        return None
    if fortran_order or dtype.kind not in "biuf" or not dtype.isnative or file.tell() != HEADER_BYTES:
        return None
    return dtype, shape, math.prod(shape) * dtype.itemsize


def tensors_in(record: Mapping[str, Any]) -> dict[str, npt.NDArray[Any] | None]:
    """Return the arrays of a record by sorted name, None where an item's bytes are none; a packed record is left as it is.

    Parameters
    ----------
    record
        Flower's record of arrays, packed or not. To write each tensor as an item of its own, only to read it again, takes
        longer than all that is computed with it.
    """
    tensors = _unpacked(record)
    return {name: array_of(item) for name, item in sorted(record.items())} if tensors is None else {**tensors}


def _unpacked(record: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]] | None:
    """Return the tensors of a packed record, None where it is none."""
    array = array_of(record[PACKED]) if set(record) == {PACKED} else None
    return None if array is None else unpack(array)


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
        tensors = _unpacked(found)
        if tensors is not None:
            array = type(found[PACKED])
            content[name] = type(found)({key: array(tensor) for key, tensor in tensors.items()})
