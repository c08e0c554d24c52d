"""Letterbox, target and restore share one geometry; views move image and target alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dicom_builders import series_window
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from icmoe.preprocess import MATRICES, _overlap, _resize, apply_view, prepare, restore, target, view_target
from icmoe.window import Window, normalise

sides = st.integers(1, 70)
quick = settings(max_examples=40)


def _ramp(height: int, width: int) -> np.ndarray:
    return np.add.outer(np.linspace(0.0, 0.5, height), np.linspace(0.0, 0.5, width)).astype(np.float32)


@quick
@given(sides, sides, st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_area_fractions_sum_to_one_and_keep_the_area(height: int, width: int, K: int, side: int, seed: int):
    classes = np.random.default_rng(seed).integers(0, K, (height, width)).astype(np.uint8)
    areas = target(classes, K, side)
    assert areas.shape == (K, side, side)
    assert torch.allclose(areas.sum(0), torch.ones(side, side), atol=1e-6)
    assert float(areas.min()) >= 0.0
    pixel_area = (side / max(height, width)) ** 2
    for k in range(1, K):
        assert float(areas[k].sum()) == pytest.approx(float((classes == k).sum()) * pixel_area, rel=1e-4, abs=1e-4)


def test_target_of_a_divisible_size_is_the_block_mean():
    classes = np.random.default_rng(0).integers(0, 3, (32, 32)).astype(np.uint8)
    blocks = torch.from_numpy(classes.reshape(8, 4, 8, 4) == 2).float().mean((1, 3))
    assert torch.allclose(target(classes, 3, 8)[2], blocks, atol=1e-6)


def test_target_refuses_a_class_beyond_K():
    with pytest.raises(ValueError, match="class index 3 with 3 classes"):
        target(np.full((2, 2), 3, np.uint8), 3, 4)


@quick
@given(sides, sides, st.integers(8, 64))
def test_prepare_fills_the_upper_left_and_pads_with_zero(height: int, width: int, size: int):
    square = prepare(normalise(np.ones((height, width), np.float32), Window(0.0, 1.0)), size)
    assert square.shape == (3, size, size)
    assert square.dtype == torch.float32
    rows = max(1, int(np.ceil(height * size / max(height, width) - 0.5)))
    columns = max(1, int(np.ceil(width * size / max(height, width) - 0.5)))
    assert torch.allclose(square[:, :rows, :columns], torch.ones(3, rows, columns), atol=1e-6)
    assert not square[:, rows:].any()
    assert not square[:, :, columns:].any()


@pytest.mark.parametrize(("shape", "size"), [((64, 64), 32), ((60, 60), 32), ((32, 32), 64), ((40, 80), 40), ((256, 256), 128)])
def test_prepare_equals_torch_where_torch_has_the_same_grid(shape: tuple[int, int], size: int):
    image = np.random.default_rng(1).random(shape, dtype=np.float32)
    out = tuple(n * size // max(shape) for n in shape)
    reference = interpolate(torch.from_numpy(image)[None, None], out, mode="bilinear", antialias=True)[0, 0]
    assert torch.allclose(prepare(normalise(image, Window(0.0, 1.0)), size)[1, : out[0], : out[1]], reference, atol=2e-6)


def test_prepare_windows_clips_and_survives_pixels_that_are_not_finite():
    image = np.array([[-5.0, 0.0, 5.0], [10.0, 99.0, np.nan], [np.inf, -np.inf, 2.5]])
    expected = torch.tensor([[0.0, 0.0, 0.5], [1.0, 1.0, 0.0], [0.0, 0.0, 0.25]])
    assert torch.equal(prepare(normalise(image, Window(0.0, 10.0)), 3), expected.expand(3, 3, 3))


@quick
@given(st.integers(16, 70), st.integers(16, 70), st.sampled_from([64, 96, 128]))
def test_restore_undoes_the_letterbox(height: int, width: int, size: int):
    image = _ramp(height, width)
    restored = restore(prepare(normalise(image, Window(0.0, 1.0)), size), (height, width))
    assert restored.shape == (3, height, width)
    inner = np.s_[3:-3, 3:-3]
    assert np.abs(restored[0].numpy() - image)[inner].max() < 0.02


@quick
@given(sides, sides, st.integers(2, 4), st.integers(4, 64), st.integers(0, 2**31))
def test_restore_keeps_probabilities(height: int, width: int, K: int, side: int, seed: int):
    logits = torch.randn(K, side, side, generator=torch.Generator().manual_seed(seed))
    restored = restore(logits.softmax(0), (height, width))
    assert torch.allclose(restored.sum(0), torch.ones(height, width), atol=1e-5)
    assert float(restored.min()) >= -1e-7


@pytest.mark.parametrize("shape", [(96, 96), (50, 96), (96, 37)])
def test_mask_survives_target_and_restore(shape: tuple[int, int]):
    row, column = np.ogrid[: shape[0], : shape[1]]
    classes = ((row - shape[0] * 0.6) ** 2 + (column - shape[1] * 0.4) ** 2 < 12**2).astype(np.uint8)
    again = restore(target(classes, 2, 64), shape).argmax(0).numpy()
    dice = 2 * (again & classes).sum() / (again.sum() + classes.sum())
    assert dice > 0.96


def test_padding_does_not_bleed_into_the_restored_border():
    square = torch.zeros(1, 64, 64)
    square[:, :32] = 1.0  # a 40 x 80 source covers exactly the upper half
    assert torch.equal(restore(square, (40, 80)), torch.ones(1, 40, 80))


@quick
@given(sides, sides, st.integers(0, 2**31))
def test_flip_moves_image_and_target_alike(height: int, width: int, seed: int):
    classes = np.random.default_rng(seed).integers(0, 2, (height, width)).astype(np.uint8)
    size = max(height, width)  # scale 1: the target of class 1 is the image itself
    square = prepare(normalise(classes, Window(0.0, 1.0)), size)
    areas = target(classes, 2, size)
    assert torch.allclose(square[0], areas[1], atol=1e-6)
    assert torch.allclose(apply_view(square, "flip")[0], view_target(areas, "flip")[1], atol=1e-6)


def test_intensity_views_keep_pixels_in_place_and_range():
    square = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    dark, bright = apply_view(square, "dark"), apply_view(square, "bright")
    assert (dark < square).all()
    assert (bright > square).all()
    assert float(bright.max()) <= 1.0
    assert torch.allclose(dark, square**1.5)
    assert torch.allclose(bright, square**0.67)
    assert torch.equal(apply_view(square, "identity"), square)
    areas = torch.rand(2, 4, 4)
    assert all(torch.equal(view_target(areas, view), areas) for view in ("identity", "dark", "bright"))


def test_a_window_wider_than_any_number_leaves_no_hole():
    """Fill values of either sign at the end of what a float64 holds."""
    image = np.array([[-1.7e308, 0.0, 1.7e308, np.nan]])
    assert normalise(image, Window(-1.7e308, 1.7e308)).tolist() == [[0.0, 0.5, 1.0, 0.0]]
    # Of 102 pixels the upper percentile lies at 100.495, between the last two.
    window = series_window([np.array([[-1.7e308] * 101 + [1.7e308]])])
    assert (window.low, window.high) == (-1.7e308, pytest.approx(-1.7e308 * 0.505 + 1.7e308 * 0.495))


def test_series_window_is_common_to_all_slices_and_robust():
    low, high = np.full((50, 50), 10, np.uint16), np.full((50, 50), 1000, np.uint16)
    high[0, 0] = 65535
    assert series_window([low, high]) == Window(10.0, 1000.0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.full((4, 4), 7.0), Window(7.0, 8.0)),
        (np.pad(np.array([[90]]), 50), Window(0.0, 90.0)),
        (np.array([[np.nan, 0.0], [np.inf, 2.0]]), None),
    ],
)
def test_series_window_is_never_degenerate(image: np.ndarray, expected: Window | None):
    window = series_window([image])
    assert window.low < window.high
    assert expected is None or window == expected


def test_windows_without_pixels_or_width_are_refused():
    with pytest.raises(ValueError, match="at least one finite pixel"):
        series_window([])
    with pytest.raises(ValueError, match="low < high"):
        Window(1.0, 1.0)
    with pytest.raises(ValueError, match="H x W"):
        prepare(normalise(np.zeros((2, 2, 3)), Window(0.0, 1.0)), 8)


def test_pictures_of_many_sizes_leave_few_matrices_in_memory() -> None:
    for pixels in range(30, 50):
        image_HW = np.zeros((pixels, pixels + 7), np.float32)
        prepare(image_HW, 32)
        restore(torch.zeros(2, 32, 32), image_HW.shape)
        target(image_HW.astype(np.uint8), 2, 16)
    assert _resize.cache_info().currsize <= MATRICES
    assert _overlap.cache_info().currsize <= MATRICES
    assert MATRICES <= 16
