"""All tensors of a message in one array: Flower asks for each array of a record by signed requests of its own.

A record that is not packed is left as it is; what is in it is checked afterwards either way.
"""

from __future__ import annotations

import hashlib
import json
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
LENGTH_BYTES = 8
"""Of a safetensors file, before its head: how long that is."""
HEADER_BYTES = 128
"""Length to which NumPy fills the header of an array of up to six or so axes."""


def pack(tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Return the tensors as the bytes of one safetensors file, by sorted name."""
    return np.frombuffer(b"".join(_pieces(tensors)), dtype=np.uint8)


def packed_bytes(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return ``bytes_of(pack(tensors))``, each value copied once."""
    pieces = _pieces(tensors)
    return b"".join((_header(np.dtype(np.uint8), (sum(map(len, pieces)),)), *pieces))


def _pieces(tensors: Mapping[str, npt.NDArray[Any]]) -> list[bytes | memoryview]:
    """Return head and values of a safetensors file."""
    native = {name: np.asarray(tensor, tensor.dtype.newbyteorder("=")) for name, tensor in sorted(tensors.items())}
    head, names = _head(tuple((name, tensor.dtype, tensor.shape) for name, tensor in native.items()))
    return [head, *(_values(native[name]) for name in names)]


@lru_cache(maxsize=4)
def _head(forms: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> tuple[bytes, list[str]]:
    """Return the head of a safetensors file of tensors of these names, types and shapes, and their order in it."""
    file = save({name: np.zeros(shape, dtype) for name, dtype, shape in forms})
    head = file[: LENGTH_BYTES + int.from_bytes(file[:LENGTH_BYTES], "little")]
    places = json.loads(head[LENGTH_BYTES:])
    return head, sorted(places, key=lambda name: places[name]["data_offsets"])


def _values(tensor: npt.NDArray[Any]) -> memoryview:
    flat_N = np.ascontiguousarray(tensor).reshape(-1)
    return (flat_N.view(np.uint8) if flat_N.size else np.empty(0, np.uint8)).data


def unpack(packed: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]] | None:
    """Return the tensors of `pack`, views of it, None where the array holds none."""
    if packed.dtype != np.uint8 or packed.ndim != 1 or not packed.flags.c_contiguous:
        return None
    head_bytes = LENGTH_BYTES + int.from_bytes(packed[:LENGTH_BYTES].tobytes(), "little")
    places = _places(packed[:head_bytes].tobytes(), packed.size) if head_bytes <= packed.size else None
    if places is None:
        return None
    return {name: np.ndarray(shape, dtype, packed, start) for name, (dtype, shape, start) in places.items()}


@lru_cache(maxsize=4)
def _places(head: bytes, size_bytes: int) -> Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int]] | None:
    """Return type, shape and first byte of each tensor by sorted name, None where the library refuses such a head.

    Its verdict does not depend on the values, so zeros stand for them; all updates of a round share one head.
    """
    try:
        found = load(head + bytes(size_bytes - len(head)))
        starts = {name: value["data_offsets"][0] for name, value in json.loads(head[LENGTH_BYTES:]).items() if name in found}
    except (SafetensorError, KeyError, ValueError):
        return None
    return {name: (tensor.dtype, tensor.shape, len(head) + starts[name]) for name, tensor in sorted(found.items())}


def tensors_digest(tensors: Mapping[str, npt.NDArray[Any]], before: bytes = b"") -> str:
    """Return the SHA-256 over names, types, shapes and values of tensors, and what stands before them.

    How their sender wrote them down, in which order of axes, does not enter.
    """
    sha = hashlib.sha256(before)
    for name, tensor in sorted(tensors.items()):
        sha.update(_named(name, tensor.dtype, tensor.shape))
        sha.update(_values(tensor))
    return sha.hexdigest()


@lru_cache(maxsize=1024)
def _named(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    return f"{name}:{dtype}:{shape};".encode()


def array_of(item: Any) -> npt.NDArray[Any] | None:  # noqa: ANN401  # Flower's type, which this package does not know
    """Return the array that a message claims to hold, read-only where it needed no copy; None where its bytes are none.

    Parameters
    ----------
    item
        Flower's array: NumPy's file format, as the sender wrote it. NumPy reads no pickle here, but a wrong header makes it
        raise nearly anything, and an archive is no array.
    """
    data: bytes = item.data
    if item.stype == NUMPY and (plain := _plain_array(bytes(data[:HEADER_BYTES]))) is not None:
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
    return b"".join((_header(tensor.dtype, tensor.shape), _values(tensor)))


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
