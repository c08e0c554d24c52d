"""PNG masks as image programs write them: what a person sees and what the values are need not be the same."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, same, save, scaled, used, volume
from exports import BACKGROUND, LESION
from PIL import ExifTags, Image

from icmoe.data.images import LUMINANCE
from icmoe.study import Label

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


def packed(values: np.ndarray, bits: int) -> bytes:
    """Return a grey PNG file of 1, 2 or 4 bits, which Pillow does not write."""
    rows = [b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in values]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


ONE = (BACKGROUND, Label(name="lesion", values=(1,)))
BOTH = (*ONE, Label(name="other", values=(85,)))
SHOWN = (BACKGROUND, Label(name="lesion", values=(170,)))


@pytest.mark.parametrize(
    ("bits", "stored", "labels", "told"),
    [
        *((bits, 1, ONE, "") for bits in (1, 2, 4)),
        (2, 2, SHOWN, ""),  # as an optimiser packs what was written with 8 bits
        (4, 15, LESION, ""),
        (2, 2, ONE, "ICM106"),
        (2, 1, BOTH, "both as stored and as shown"),
    ],
)
def test_few_bits_of_grey_mean_what_the_labels_say(bits: int, stored: int, labels: tuple[Label, ...], told: str, tmp_path: Path):
    save(volume(VOLUME[:1])[0], tmp_path / "export/Doe/a.dcm")
    (tmp_path / "export/Doe/a_mask.png").write_bytes(packed(MARKED * np.uint8(stored), bits))
    _, masks, data = used(tmp_path, labels)
    why = " ".join(map(str, data.exclusions))
    assert told in why
    assert bool(told) != bool(masks), why
    assert all(np.array_equal(mask, MARKED) for mask in masks)


@pytest.mark.parametrize("folder", ["masks/20220101", "masks/visit_2", "labels/2022-01-01_CT"])
def test_a_mask_with_soft_edges_in_a_folder_of_a_date_for_masks_is_no_image(folder: str, tmp_path: Path):
    for name, pixels in (("images", (VOLUME[0] >> 4).astype(np.uint8)), (folder, (VOLUME[1] >> 4).astype(np.uint8) * MARKED)):
        (tmp_path / "export/Doe" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "export/Doe" / name / "a.png")
    data = used(tmp_path)[2]
    assert data.images_found == 1
    assert [fault.number for fault in data.exclusions] == [106, 108]


@pytest.mark.parametrize("turned", ["image", "mask"])
def test_a_picture_that_is_shown_turned_is_refused(turned: str, tmp_path: Path):
    """A photograph that became PNG keeps the turn of the camera (eXIf), which programs for drawing marks follow."""
    (tmp_path / "export/Doe").mkdir(parents=True)
    for name, pixels, kind in (("a", (VOLUME[0] >> 4).astype(np.uint8), "image"), ("a_mask", MARKED, "mask")):
        orientation = Image.Exif()
        orientation[ExifTags.Base.Orientation] = 3 if kind == turned else 1
        Image.fromarray(pixels).save(tmp_path / f"export/Doe/{name}.png", exif=orientation)
    data = used(tmp_path)[2]
    assert not data.slices
    assert any("shown turned" in fault.what for fault in data.exclusions)


@pytest.mark.parametrize("folder", ["masks/P1", "P1/masks", "masks/P1/2020-01-02", "gt/doe"])
def test_a_mask_with_soft_edges_in_a_patients_folder_of_masks_is_no_picture(folder: str, tmp_path: Path):
    soft = np.arange(MARKED.size, dtype=np.uint8).reshape(MARKED.shape)
    own = "images/P1/a" if "P1" in folder else "images/doe/a"
    for name, pixels in ((own, (VOLUME[0] >> 4).astype(np.uint8)), (f"{folder}/a", soft)):
        (tmp_path / "export" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / f"export/{name}.png")
    data = used(tmp_path)[2]
    assert {fault.number for fault in data.exclusions} == {106, 108}
    assert data.images_found == 1
