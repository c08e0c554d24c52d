"""Tensors of messages in Ray's store: put there once, and sent to a thousand sites as a reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from flwr.app import Array, ArrayRecord, RecordDict

SMALL_BYTES = 65536
"""Below this Ray sends a value within the call anyway."""


class InStore(Array):
    """An array that lies in Ray's store; what travels is where.

    Parameters
    ----------
    dtype, shape, stype
        As Flower says them.
    where
        Ray's reference to its bytes.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, where: ray.ObjectRef[Any]) -> None:
        self.dtype, self.shape, self.stype, self._where = dtype, shape, stype, where

    def __reduce__(self) -> tuple[type[InStore], tuple[Any, ...]]:
        """Travel as a reference."""
        return InStore, (self.dtype, self.shape, self.stype, self._where)

    @property
    def data(self) -> memoryview:  # type: ignore[override]  # is a plain attribute of bytes there, which nobody sets
        """The bytes, where they lie in the store."""
        bytes_N: npt.NDArray[np.uint8] = ray.get(self._where)
        return bytes_N.data


def in_store(content: RecordDict) -> RecordDict:
    """Return the records with their large arrays in Ray's store."""
    return RecordDict({name: _put(record) if isinstance(record, ArrayRecord) else record for name, record in content.items()})


def _put(record: ArrayRecord) -> ArrayRecord:
    kept = ArrayRecord()  # item by item: made of a dict, it would hold plain copies
    for name, array in record.items():
        kept[name] = _stored(array) if len(array.data) > SMALL_BYTES else array
    return kept


def _stored(array: Array) -> Array:
    return InStore(array.dtype, array.shape, array.stype, ray.put(np.frombuffer(array.data, dtype=np.uint8)))
