"""The pixels that a site ingested: one safetensors file per frame with grey values and class indices, nothing else.

Grey values are kept as `icmoe.data.picture` has them, values and ranks, since all that is done to a frame begins with these.
Frames are patient data: the folder has the images' access and deletion rules. Names are keyed hashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from icmoe.atomic import read_regular, write_atomically
from icmoe.errors import Fault, IcmoeError

SUFFIX = ".safetensors"
VALUES, RANKS, CLASSES = "values", "ranks", "classes"


@dataclass(frozen=True, slots=True)
class Stored:
    """One frame: its distinct grey values in rising order, each pixel's place among them, and its class index."""

    values_V: npt.NDArray[Any]
    ranks_HW: npt.NDArray[np.unsignedinteger[Any]]
    classes_HW: npt.NDArray[np.uint8]

    @property
    def grey_HW(self) -> npt.NDArray[Any]:
        """The pixels, in the smallest type that holds them."""
        return self.values_V.take(self.ranks_HW)


def write_stored(path: Path, frame: Stored) -> None:
    """Write a frame atomically, readable by its owner alone; equal frames give equal bytes, and no mark takes no room."""
    tensors = {VALUES: frame.values_V, RANKS: np.ascontiguousarray(frame.ranks_HW)}
    if frame.classes_HW.any():
        tensors[CLASSES] = np.ascontiguousarray(frame.classes_HW)
    write_atomically(path, save(tensors), durable=False, private=True)


def read_stored(path: Path) -> Stored:
    """Return a frame.

    Raises
    ------
    IcmoeError
        101 where it is not there, 102 where it is damaged.
    """
    todo = "Run ingest again."
    try:
        tensors = load(read_regular(path))
        values_V, ranks_HW = tensors[VALUES], tensors[RANKS]
        classes_HW = tensors[CLASSES] if CLASSES in tensors else np.zeros(ranks_HW.shape, dtype=np.uint8)
    except FileNotFoundError:
        raise IcmoeError(Fault(number=101, where=path.name, todo=todo)) from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise IcmoeError(Fault(number=102, where=path.name, value=type(error).__name__, todo=todo)) from None
    known = values_V.ndim == 1 and ranks_HW.dtype.kind == "u" and int(ranks_HW.max(initial=0)) < len(values_V)
    if not known or ranks_HW.ndim != 2 or classes_HW.dtype != np.uint8 or classes_HW.shape != ranks_HW.shape:
        raise IcmoeError(Fault(number=102, where=path.name, what="stored frame has another form", todo=todo))
    return Stored(values_V, ranks_HW, classes_HW)


def entry_path(store: Path, entry: str) -> Path:
    """Return where a frame of a store is."""
    return store / "frames" / entry[:2] / f"{entry}.safetensors"


def smallest(grey_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values as uint8, uint16 or int16 where that loses nothing, else as float32."""
    if grey_HW.dtype.kind == "f" and not bool((np.rint(grey_HW) == grey_HW).all()):
        return grey_HW.astype(np.float32)
    low, high = (float(grey_HW.min()), float(grey_HW.max())) if grey_HW.size else (0.0, 0.0)
    for kind in (np.uint8, np.uint16, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return grey_HW.astype(kind)
    return grey_HW.astype(np.float32)
