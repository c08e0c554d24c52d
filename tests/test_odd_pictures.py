"""PNG masks as image programs write them: what a person sees and what the values are need not be the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, same, save, scaled, used, volume
from PIL import Image

from icmoe.data.images import LUMINANCE

pytestmark = pytest.mark.usefixtures("in_this_process")
MARKED = MASKS[2]
NOTHING, EVERYTHING = np.zeros_like(MARKED), np.ones_like(MARKED)


def test_pictures_of_8_and_of_16_bits_of_one_patient_are_each_on_their_own_scale(tmp_path: Path):
    """With one window for both, those of 8 bits would be nearly black."""
    deep = [grey * np.uint16(20) for grey in VOLUME[:2]]
    flat = [(grey >> 4).astype(np.uint8) for grey in VOLUME[2:4]]
    (tmp_path / "export/Doe").mkdir(parents=True)
    for number, grey in enumerate([*deep, *flat]):
        Image.fromarray(grey).save(tmp_path / f"export/Doe/{number}.png")
        Image.fromarray(MARKED).save(tmp_path / f"export/Doe/{number}_mask.png")
    assert same(used(tmp_path)[0], [*scaled(deep), *scaled(flat)])


def test_pictures_lie_in_the_order_in_which_people_number_them(tmp_path: Path):
    (tmp_path / "export/Doe").mkdir(parents=True)
    numbers = [1, 2, 9, 10, 11]
    for number, grey in zip(numbers, VOLUME, strict=True):
        Image.fromarray(grey).save(tmp_path / f"export/Doe/slice_{number}.png")
        Image.fromarray(MARKED).save(tmp_path / f"export/Doe/slice_{number}_mask.png")
    assert same(used(tmp_path)[0], scaled(VOLUME))


def masked(place: Path, mask: Image.Image) -> tuple[list[np.ndarray], str]:
    """Return the classes of an image with this mask of its name, and why it has none."""
    save(volume(VOLUME[:1])[0], place / "export" / "Doe" / "a.dcm")
    mask.save(place / "export" / "Doe" / "a_mask.png")
    _, masks, data = used(place)
    return masks, " ".join(map(str, data.exclusions))


def shown(value: np.ndarray, alpha: np.ndarray, colours: int) -> Image.Image:
    return Image.fromarray(255 * np.dstack([*[value] * colours, alpha]).astype(np.uint8))


@pytest.mark.parametrize("colour", [(1, 1, 1), (1, 0.5, 0.25)])
def test_a_grey_picture_of_many_values_that_has_a_palette_is_an_image(colour: tuple[float, ...], tmp_path: Path):
    grey = (VOLUME[0] >> 4).astype(np.uint8)
    picture = Image.fromarray(grey, "P")
    picture.putpalette([int(level * part) for level in range(256) for part in colour])
    (tmp_path / "export/Doe").mkdir(parents=True)
    picture.save(tmp_path / "export/Doe/a.png")
    Image.fromarray(MARKED).save(tmp_path / "export/Doe/a_mask.png")
    pictures, (mask,), _ = used(tmp_path)
    assert same(pictures, scaled([np.asarray(picture.convert("RGB")) @ np.asarray(LUMINANCE)]))
    assert np.array_equal(mask, MARKED)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("value", [NOTHING, EVERYTHING])
def test_a_mask_that_alpha_draws_is_not_read_without_it(value: np.ndarray, colours: int, tmp_path: Path):
    masks, why = masked(tmp_path, shown(value, MARKED, colours))
    assert not masks
    assert "ICM104" in why
    assert "alpha" in why


@pytest.mark.parametrize("alpha", [MARKED, EVERYTHING, NOTHING])
@pytest.mark.parametrize("colours", [1, 3])
def test_alpha_that_says_what_the_values_say_or_nothing_is_passed_over(colours: int, alpha: np.ndarray, tmp_path: Path):
    (mask,), _ = masked(tmp_path, shown(MARKED, alpha, colours))
    assert np.array_equal(mask, MARKED)


@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 0, 0)])
def test_a_palette_that_shows_the_marks_black_and_0_in_colour_was_numbered_anew(colour: tuple[int, ...], tmp_path: Path):
    """As Pillow's quantize makes it of a binary mask: white becomes 0 and black 1."""
    mask = Image.fromarray(1 - MARKED, "P")
    mask.putpalette([*colour, 0, 0, 0])
    masks, why = masked(tmp_path, mask)
    assert not masks
    assert "ICM104" in why
    assert "palette" in why


@pytest.mark.parametrize("palette", [[0, 0, 0, 255, 255, 255], [0, 0, 0, 128, 0, 0], [255, 255, 255, 200, 0, 0]])
def test_an_index_of_a_palette_is_the_value_where_the_ground_is_not_a_colour_beside_black(palette: list[int], tmp_path: Path):
    mask = Image.fromarray(MARKED, "P")
    mask.putpalette(palette)
    masks, why = masked(tmp_path, mask)
    assert np.array_equal(masks[0], MARKED), why
