"""Tables that say where compressed frames begin, and say it wrongly: no picture and no mark comes in the place of another one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import MASKS, VOLUME, image, numbers, put, same, save, segmentation, used, volume
from exports import read_frames
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import RLELossless

from icmoe.data.ingest.encapsulated import right_offsets
from icmoe.data.ingest.refusals import Refusal

pytestmark = pytest.mark.usefixtures("in_this_process")
FRAMES = VOLUME[:4]
HEAD = 8
"""Bytes before the first number of a table."""

Harm = Callable[[list[int]], list[int]]
WRONG: dict[str, Harm] = {
    "counted from the table": lambda offsets: [offsets[0], *(at + 28 for at in offsets[1:])],
    "all counted from the table": lambda offsets: [at + 28 for at in offsets],
    "without the heads of items": lambda offsets: [at - 8 * n for n, at in enumerate(offsets)],
    "all 0": lambda offsets: [0] * len(offsets),
    "of the first alone": lambda offsets: offsets[:1],
    "of the first two alone": lambda offsets: offsets[:2],
}


def coded() -> list[bytes]:
    """Return each frame in run lengths."""
    found = []
    for frame in FRAMES:
        data = image(np.ascontiguousarray(frame))
        data.compress(RLELossless, generate_instance_uid=False)
        found += generate_frames(data.PixelData, number_of_frames=1)
    return found


def told_by(harm: Harm, extended: bool, parts: int = 1) -> Dataset:
    """Return an object of four frames whose table was harmed."""
    data = image(FRAMES, RLELossless)
    if extended:
        data.PixelData, table, data.ExtendedOffsetTableLengths = encapsulate_extended(coded())
        offsets = harm([*struct.unpack("<4Q", table)])
        data.ExtendedOffsetTable = struct.pack(f"<{len(offsets)}Q", *offsets)
    else:
        data.PixelData = with_table(encapsulate(coded(), fragments_per_frame=parts), harm)
    data["PixelData"].is_undefined_length = True
    return data


def with_table(pixels: bytes, harm: Harm) -> bytes:
    """Return encapsulated pixels whose basic offset table was harmed."""
    size = struct.unpack_from("<I", pixels, 4)[0]
    offsets = harm([*struct.unpack_from(f"<{size // 4}I", pixels, HEAD)])
    table = struct.pack(f"<{len(offsets)}I", *offsets)
    return pixels[:4] + struct.pack("<I", len(table)) + table + pixels[HEAD + size :]


@pytest.mark.parametrize("largest", [2**26, 10], ids=["in memory", "from disk"])
@pytest.mark.parametrize("extended", [False, True], ids=["basic", "extended"])
@pytest.mark.parametrize("name", WRONG)
def test_by_a_wrong_table_each_item_is_a_frame(
    name: str, extended: bool, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("icmoe.data.ingest.stored.WHOLE_BYTES", largest)
    read = dict(read_frames(save(told_by(WRONG[name], extended), tmp_path / "x"), range(4)))
    assert same([read[number] for number in range(4)], FRAMES)


@pytest.mark.parametrize("extended", [False, True], ids=["basic", "extended"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_right_table_is_followed(parts: int, extended: bool, tmp_path: Path):
    if extended and parts > 1:
        pytest.skip("such a table is for frames of one item")
    read = dict(read_frames(save(told_by(lambda offsets: offsets, extended, parts), tmp_path / "x"), range(4)))
    assert same([read[number] for number in range(4)], FRAMES)


@pytest.mark.parametrize(("harm", "parts"), [(WRONG["counted from the table"], 3), (lambda offsets: offsets[::-1], 1)])
@pytest.mark.parametrize("extended", [False, True], ids=["basic", "extended"])
def test_where_nothing_tells_which_items_are_a_frame_none_is_read(harm: Harm, parts: int, extended: bool, tmp_path: Path):
    if extended and parts > 1:
        pytest.skip("such a table is for frames of one item")
    for _, grey in read_frames(save(told_by(harm, extended, parts), tmp_path / "x"), range(4)):
        assert isinstance(grey, Refusal)
        assert (grey.number, "table of offsets" in grey.why) == (118, True)


@pytest.mark.parametrize("name", WRONG)
def test_marks_of_a_segmentation_with_a_wrong_table_lie_on_their_own_slices(name: str, tmp_path: Path):
    sources = volume(VOLUME)
    made = segmentation(sources, MASKS, "LABELMAP", transfer_syntax_uid=RLELossless, omit_empty_frames=False)
    made.PixelData = with_table(made.PixelData, WRONG[name])
    put(tmp_path, [*sources, made])
    assert same(used(tmp_path)[1], MASKS)


def test_a_segmentation_whose_items_are_told_in_another_order_marks_nothing(tmp_path: Path):
    sources = volume(VOLUME)
    made = segmentation(sources, MASKS, "LABELMAP", transfer_syntax_uid=RLELossless, omit_empty_frames=False)
    made.PixelData = with_table(made.PixelData, lambda offsets: offsets[::-1])
    put(tmp_path, [*sources, made])
    _, masks, data = used(tmp_path)
    assert (masks, set(numbers(data))) == ([], {108, 118})


def test_a_table_that_leaves_out_the_first_item_is_wrong_though_items_begin_where_it_says():
    pixels = encapsulate([b"12345678", b"87654321"], fragments_per_frame=2)
    assert right_offsets(pixels, 2, None) is None
    with pytest.raises(Refusal, match="table of offsets"):
        right_offsets(with_table(pixels, lambda offsets: [at + 12 for at in offsets]), 2, None)  # an item of 4 bytes and its head


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_frame_may_be_a_byte_shorter_than_its_item_and_no_more(padding: int):
    pixels, table, lengths = encapsulate_extended([b"12345678", b"87654321"])
    told = table, struct.pack("<2Q", *(size - padding for size in struct.unpack("<2Q", lengths)))
    if padding < 2:
        assert right_offsets(pixels, 2, told) is None
    else:
        with pytest.raises(Refusal, match="table of offsets"):
            right_offsets(pixels, 2, told)
