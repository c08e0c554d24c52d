"""Tensors read back as they were written, and nothing left behind however often."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icmoe import tensor_file
from icmoe.tensor_file import read_tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_tensors_and_metadata_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = {
        "b": torch.arange(6).reshape(2, 3).to(dtype),
        "a": torch.zeros((), dtype=dtype),
        "none": torch.zeros(0, 2, dtype=dtype),
    }
    save_file(kept, tmp_path / "file", metadata={"key": "value"})
    tensors, metadata = read_tensors(tmp_path / "file")
    assert list(tensors) == ["a", "b", "none"]
    assert all(tensors[name].dtype == dtype and torch.equal(tensors[name], tensor) for name, tensor in kept.items())
    assert metadata == {"key": "value"}
    tensors["b"].add_(1)  # its own memory: the file stays as it is
    assert torch.equal(read_tensors(tmp_path / "file")[0]["b"], kept["b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_type_that_numpy_does_not_know_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.zeros(3).to(dtype)}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"float"):
        read_tensors(tmp_path / "file")


def kept_bytes(path: Path, times: int) -> int:
    """Return what the reader's own lines still hold after reading so often."""
    gc.collect()
    tracemalloc.start()
    for _ in range(times):
        read_tensors(path)
    gc.collect()
    here = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(inclusive=True, filename_pattern=tensor_file.__file__)])
    tracemalloc.stop()
    return sum(trace.size for trace in here.traces)


def test_reading_again_and_again_keeps_nothing(tmp_path: Path) -> None:
    save_file({name: torch.zeros(8) for name in "abcd"}, tmp_path / "file")
    # What is lost at each reading is lost each time; Python's table of names, which grows now and then, only once.
    assert min(kept_bytes(tmp_path / "file", 500) for _ in range(3)) / 500 < 85  # opened for PyTorch it is 170
