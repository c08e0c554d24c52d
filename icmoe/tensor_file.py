"""Tensors of a safetensors file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from icmoe.atomic import regular

METADATA_KEY = "icmoe"
"""Where the header of a file of ours says what it is."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors by name, in the names' order, and metadata of a file.

    They are read as NumPy arrays, which is twice as fast for files of the size of an entry of the feature cache and leaks
    nothing: safetensors 0.8 loses some 370 bytes each time that a file is opened for PyTorch.

    Raises
    ------
    OSError, SafetensorError, ValueError
        Where the file cannot be read, is damaged, or holds a type that NumPy or ``from_numpy`` does not know, such as bfloat16.
    """
    os.close(regular(path, os.O_RDONLY))  # safetensors waits for the other end of a pipe
    with safe_open(path, framework="np") as file:
        try:
            tensors = {name: torch.from_numpy(file.get_tensor(name)) for name in sorted(file.keys())}
        except (TypeError, AttributeError) as error:  # from PyTorch where a package has taught NumPy the type
            raise ValueError(str(error)) from None
        return tensors, file.metadata() or {}
