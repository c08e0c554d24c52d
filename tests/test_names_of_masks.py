"""What people call pictures and their masks: whose mask it is must not hang on one way of naming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, numbers, put, same, scaled, used, volume
from PIL import Image

pytestmark = pytest.mark.usefixtures("in_this_process")
MARKED, APART, ACROSS = (np.zeros((24, 32), np.uint8) for _ in range(3))
MARKED[4:9, 5:11], APART[15:20, 5:11], ACROSS[7:12, 5:11] = 1, 1, 1
GREYS = np.random.default_rng(4).integers(0, 4000, (3, 24, 32)).astype(np.uint16)


def picture(place: Path, name: str, pixels: np.ndarray) -> None:
    path = place / "export" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("names", ["a_mask.png a_mask_1.png", "a_mask1.png a_mask2.png", "a-mask.png A-MASK-2.PNG"])
def test_masks_of_one_picture_may_be_counted(names: str, tmp_path: Path):
    """As in BUSI, where a second lesion of a picture has a mask of its own."""
    picture(tmp_path, "a.png", GREYS[0])
    for name, mask in zip(names.split(), (MARKED, APART), strict=True):
        picture(tmp_path, name, mask)
    _, masks, data = used(tmp_path)
    assert same(masks, [MARKED | APART])
    assert not numbers(data)
    picture(tmp_path, names.split()[1], ACROSS)
    assert 122 in numbers(used(tmp_path)[2]), "two readings of one lesion"


@pytest.mark.parametrize("channels", [1, 2])
def test_pictures_of_nnunet_share_the_mask_of_their_case(channels: int, tmp_path: Path):
    for channel in range(channels):
        picture(tmp_path, f"imagesTr/case_7_{channel:04}.png", GREYS[channel])
    picture(tmp_path, "labelsTr/case_7.png", MARKED)
    pictures, masks, data = used(tmp_path)
    assert same(pictures, scaled(GREYS[:channels]))
    assert same(masks, [MARKED] * channels)
    assert not numbers(data)


@pytest.mark.parametrize("mask", ["masks/case_mask.png", "labelsTr/case.png"])
def test_numbered_slices_are_no_channels_of_a_case(mask: str, tmp_path: Path):
    for number in range(1, 4):
        picture(tmp_path, f"imagesTr/case_{number:04}.png", GREYS[number - 1])
    picture(tmp_path, mask, MARKED)
    data = used(tmp_path)[2]
    assert not data.slices
    assert 123 in numbers(data)


@pytest.mark.parametrize("name", ["{}.dcm.png", "{}.dcm_mask.png", "{}_seg.dcm.PNG"])
def test_the_ending_of_the_image_may_stay_in_the_name_of_its_mask(name: str, tmp_path: Path):
    put(tmp_path, volume(VOLUME[1:4]), "IM{}.dcm")
    for number, mask in enumerate(MASKS[1:4]):
        picture(tmp_path, name.format(f"IM{3 - number}"), mask)
    assert same(used(tmp_path)[1], MASKS[1:4])


@pytest.mark.parametrize("name", ["masks/a.png", "labelsTr/a.png", "a_mask.png", "a-seg.PNG", "ground/a_GT.png"])
def test_a_mask_with_soft_edges_is_refused_for_its_values_and_is_no_image(name: str, tmp_path: Path):
    """A program that drew or shrank it smoothed its edges, so that it has as many values as a picture."""
    picture(tmp_path, "images/a.png" if "/" in name else "a.png", GREYS[0])
    down, across = np.mgrid[:24, :32]
    picture(tmp_path, name, np.clip(255 - 20 * np.hypot(down - 12, across - 16), 0, 255).astype(np.uint8))
    data = used(tmp_path)[2]
    assert data.images_found == 1
    assert numbers(data) == [106, 108]
