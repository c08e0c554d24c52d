"""A dark slice of a channel is no mask, and a mask without a mark is no image: those beside them tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_builders import numbers, used
from test_ingest_looks import FILLED, GREYS
from test_names_of_masks import picture

pytestmark = pytest.mark.usefixtures("in_this_process")
BLACK = np.zeros((20, 24), np.uint8)


@pytest.mark.parametrize("folder", ["FLAIR", "ax_flair", "ch2"])
@pytest.mark.parametrize("dark", ["black", "one bit"])
def test_a_dark_slice_of_a_channel_is_no_mask_of_another_one(folder: str, dark: str, tmp_path: Path):
    for number in range(4):
        picture(tmp_path, f"P1/T1/{number}.png", GREYS[number])
        picture(tmp_path, f"P1/{folder}/{number}.png", GREYS[number] // 2 if number else (BLACK if dark == "black" else FILLED))
    data = used(tmp_path)[2]
    assert not data.slices
    assert numbers(data) == [108, 124, 124]


@pytest.mark.parametrize("others", [True, False])
def test_a_channel_that_is_black_is_no_mask(others: bool, tmp_path: Path):
    picture(tmp_path, "P1/T1/0.png", GREYS[0])
    picture(tmp_path, "P1/FLAIR/0.png", BLACK)
    if others:
        picture(tmp_path, "P2/FLAIR/7.png", GREYS[1])
    data = used(tmp_path)[2]
    assert not data.slices
    assert numbers(data) == [108, *[124] * (3 if others else 2)]  # images without a mask, the dark one among them


@pytest.mark.parametrize("form", ["P1/lesion/{}.png", "P1/{}_lesion_mask.png", "P1/t1/{}_mask.png", "marks/P1/{}.png"])
def test_masks_without_a_mark_stay_masks(form: str, tmp_path: Path):
    names = ["P1/lesion/{}.png".replace("lesion", "t1"), form]
    if "lesion_mask" in form:
        names = ["P1/{}_lesion.png", form]
    for number in range(4):
        picture(tmp_path, names[0].format(number), GREYS[number])
        picture(tmp_path, names[1].format(number), FILLED if number == 1 else BLACK)
    assert [mask.any() for mask in used(tmp_path)[1]] == [False, True, False, False]
