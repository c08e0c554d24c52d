"""Patients, copies and files that nobody expects: each is used once, or left out with a reason, and nothing hangs."""

from __future__ import annotations

import errno
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from dicom_builders import (
    MASKS,
    VOLUME,
    derived,
    image,
    item,
    numbers,
    plain_segmentation,
    put,
    same,
    save,
    scaled,
    segmentation,
    used,
    volume,
)
from exports import LESION, export_of, read_frames, taken, write_series
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from icmoe.data.images import DEEP_COLOUR, read_classes
from icmoe.data.ingest import index
from icmoe.data.ingest.labels import LabelNames
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.reading import Reader
from icmoe.data.ingest.records import FileRecord
from icmoe.data.ingest.run import ingest
from icmoe.data.ingest.walking import walk
from icmoe.data.ingest.work import _split
from icmoe.errors import IcmoeError

RNG = np.random.default_rng(8)
pytestmark = pytest.mark.usefixtures("in_this_process")


def record(path: Path) -> FileRecord:
    return Reader(path.parent, Pseudonyms(bytes(32)), LabelNames(LESION, {}), None).read(path.name)


def test_the_same_instances_in_two_folders_count_once_and_it_is_said(tmp_path: Path):
    sources = volume(VOLUME)
    mask = segmentation(sources, MASKS, "BINARY")
    put(tmp_path, [*sources, mask], "a/{}")
    put(tmp_path, [*sources, mask], "b/{}")
    pictures, classes, data = used(tmp_path)
    assert same(pictures, scaled(VOLUME))
    assert same(classes, MASKS)
    assert numbers(data) == [125]
    assert data.images_found == 10


def test_a_series_in_several_folders_is_one(tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, sources[:2], "a/{}")
    put(tmp_path, [*sources[2:], segmentation(sources, MASKS, "BINARY")], "b/{}")
    assert same(used(tmp_path)[0], scaled(VOLUME))


def test_blanks_and_case_of_a_patient_number_make_no_second_patient(tmp_path: Path):
    for number, name in enumerate(("Doe 1", " doe 1 ", "DOE 1")):
        sources = volume(VOLUME + number * np.arange(24, dtype=np.uint16), PatientID=name)
        groups = [item(DerivationImageSequence=[derived(one)]) for one in sources]
        put(tmp_path, [*sources, plain_segmentation(MASKS, groups, PatientID="Doe 1")], f"{number}/{{}}")
    data = used(tmp_path)[2]
    assert len(data.slices) == 15
    assert len({one.patient for one in data.slices}) == 1


@pytest.mark.parametrize(("others", "left", "reasons"), [(1, 4, [117]), (2, 0, [108, 117])])
def test_a_series_of_two_patients_is_left_out_and_one_slice_of_another_alone(
    others: int, left: int, reasons: list[int], tmp_path: Path
):
    sources = volume(VOLUME)
    for one in sources[2 : 2 + others]:
        one.PatientID = "Roe 2"
    groups = [item(DerivationImageSequence=[derived(one)]) for one in sources]
    put(tmp_path, [*sources, plain_segmentation(MASKS, groups, PatientID=None)])
    data = used(tmp_path)[2]
    assert (len(data.slices), numbers(data)) == (left, reasons)


@given(names=st.lists(st.text(min_size=1, max_size=9), min_size=1, unique=True), secret=st.binary(min_size=32, max_size=32))
def test_more_patients_move_nobody_to_another_split(names: list[str], secret: bytes):
    hashes, shares = Pseudonyms(secret), (0.7, 0.1, 0.2)
    alone = {name: _split(hashes.share(hashes.patient(name)), shares) for name in names[:1]}
    together = {name: _split(Pseudonyms(secret).share(hashes.patient(name)), shares) for name in names}
    assert alone.items() <= together.items()
    assert set(together.values()) <= {"train", "val", "test"}


def test_slices_without_positions_come_by_instance_number(tmp_path: Path):
    sources = volume(VOLUME)
    for source, number in zip(sources, (30, 4, 11, 2, 1), strict=True):
        source.InstanceNumber = number
        del source.ImagePositionPatient
    groups = [item(DerivationImageSequence=[derived(one)]) for one in sources]
    put(tmp_path, [*sources, plain_segmentation(MASKS, groups)])
    pictures, classes, data = used(tmp_path)
    assert same(pictures, scaled(VOLUME[[4, 3, 1, 2, 0]]))
    assert same(classes, MASKS[[4, 3, 1, 2, 0]])
    assert data.slices[0].spacing_mm is None


def test_a_lost_slice_leaves_no_spacing_and_localizers_of_other_sizes_stay_apart(tmp_path: Path):
    sources = volume(VOLUME)
    series = {name: sources[0][name].value for name in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")}
    across = volume(VOLUME[:1, :10], axes=(1, 0, 0, 0, 0, -1), **series)
    sources = [*sources[:2], *sources[3:], *across]
    groups = [item(DerivationImageSequence=[derived(one)]) for one in sources[:4]]
    put(tmp_path, [*sources, plain_segmentation(MASKS[[0, 1, 3, 4]], groups)])
    pictures, classes, data = used(tmp_path)
    assert same(pictures, scaled(VOLUME[[0, 1, 3, 4]]))
    assert same(classes, MASKS[[0, 1, 3, 4]])
    assert data.slices[0].spacing_mm is None
    assert numbers(data) == [124]


@pytest.mark.parametrize("modality", ["NM", "XA"])
def test_plain_objects_of_many_frames_keep_their_order_without_geometry(modality: str, tmp_path: Path):
    stack = image(
        VOLUME, SOPClassUID="1.2.840.10008.5.1.4.1.1.20", Modality=modality, FrameIncrementPointer=0x00181063, FrameTime=40
    )
    groups = [item(DerivationImageSequence=[derived(stack, n + 1)]) for n in range(5)]
    put(tmp_path, [stack, plain_segmentation(MASKS, groups)])
    pictures, classes, data = used(tmp_path)
    if modality == "XA":
        assert 126 in numbers(data), "angiography often has text burned in"
        series = [one.where.split("/")[1] for one in data.exclusions if one.number == 126]
        pictures, classes, data = used(tmp_path, allow=tuple(series))
    assert same(pictures, scaled(VOLUME))
    assert same(classes, MASKS)


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_sixteen_bits_of_colour_are_not_cut_to_eight(colour_type: int, tmp_path: Path):
    channels = {2: 3, 4: 2, 6: 4}[colour_type]
    rows = b"".join(b"\0" + RNG.integers(0, 2**16, 5 * channels).astype(">u2").tobytes() for _ in range(4))
    header = struct.pack(">IIBBBBB", 5, 4, 16, colour_type, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    found = record(tmp_path / "x.png")
    assert (found.fault, found.why) == (117, DEEP_COLOUR)
    with pytest.raises(IcmoeError, match=r"ICM104 x: .*16 bits"):
        read_classes(tmp_path / "x.png", LESION, where="x")


@pytest.mark.parametrize("form", ["L", "1", "P", "RGB", "RGBA", "I;16", "0 and 255"])
def test_png_masks_of_every_form_mean_the_same(form: str, tmp_path: Path):
    sources = volume(VOLUME[1:4])
    put(tmp_path, sources, "slice{}.dcm")
    for number, mask in enumerate(MASKS[1:4]):
        if form == "I;16":
            picture = Image.fromarray(mask.astype(np.uint16))
        elif form in {"P", "L"}:
            picture = Image.fromarray(mask)
            if form == "P":
                picture.putpalette([0, 0, 0, 255, 0, 0])
        else:
            picture = Image.fromarray(mask * 255).convert("L" if form[0] == "0" else form)
        picture.save(tmp_path / f"export/slice{3 - number}_mask.{'PNG' if number else 'png'}", "PNG")
    assert same(used(tmp_path)[1], MASKS[1:4])


def test_png_masks_of_another_size_name_or_value_are_refused(tmp_path: Path):
    put(tmp_path, volume(VOLUME[1:4]), "slice{}.dcm")
    Image.fromarray(MASKS[1][:10]).save(tmp_path / "export/slice1.png")
    Image.fromarray(MASKS[1]).save(tmp_path / "export/other.png")
    Image.fromarray(MASKS[1] * 7).save(tmp_path / "export/slice2.png")
    assert numbers(used(tmp_path)[2]) == [105, 106, 108, 123, 124]


def test_a_dark_picture_in_a_folder_called_images_is_no_mask(tmp_path: Path):
    masks = np.zeros((3, 16, 16), np.uint8)
    masks[:, 4:9, 4:9] = 1
    greys = np.random.default_rng(1).integers(0, [[[8]], [[30]], [[255]]], (3, 16, 16)).astype(np.uint8)
    for number in range(3):
        for folder, pixels in (("images", greys), ("masks", masks)):
            (tmp_path / "export/p1" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[number]).save(tmp_path / "export/p1" / folder / f"{number}.png")
    Image.fromarray(masks[2]).save(tmp_path / "export/p1/images/2_mask.png")
    pictures, classes, data = used(tmp_path)
    assert same(pictures, scaled(greys))
    assert same(classes, masks)
    assert numbers(data) == []


def test_pipes_sockets_links_and_names_that_are_no_text_do_not_stop_it(tmp_path: Path):
    sources = volume(VOLUME)
    put(tmp_path, [*sources[1:], segmentation(sources, MASKS, "BINARY")])
    export = tmp_path / "export"
    os.rename(save(sources[0], export / "plain"), os.fsencode(export) + b"/\xff\xfe\n name")  # noqa: PTH104  # bytes
    os.mkfifo(export / "pipe.dcm")
    (export / "loop").symlink_to(export)
    (export / "nowhere").symlink_to(export / "absent")
    (export / "empty.dcm").touch()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(export)
        server.bind("socket")
        os.chdir(here)
        pictures, _, data = used(tmp_path)
    assert same(pictures, scaled(VOLUME))
    assert numbers(data) == [116, 116, 116], "two links and an empty file"


@pytest.mark.parametrize("pattern", ["b", "b/", "b/*", "*/withdrawn", "*/withdrawn/", "b/with*", "*/withdrawn/*"])
def test_a_folder_is_passed_over_however_it_is_named(pattern: str, tmp_path: Path):
    for path in ("a/1", "b/withdrawn/2", "b/withdrawn/deep/3"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    assert [path for path, *_ in walk(tmp_path, [pattern])] == ["a/1"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EIO])
def test_a_folder_that_can_be_listed_alone_is_a_numbered_sentence(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    write_series(tmp_path / "export/b", "two", 2, seed=2)
    export = export_of(tmp_path / "export", tmp_path / "place")
    before = taken(export).slices
    looked = os.lstat

    def refused(path: str) -> os.stat_result:
        if "/export/b/" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return looked(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "lstat", refused)
        with pytest.raises(IcmoeError, match="ICM109") as caught:
            ingest(export)
        assert caught.value.faults[0].value == f"1, {os.strerror(number)}"
        assert "x1" not in str(caught.value), "names of files are the hospital's"
        ingest(export_of(tmp_path / "export", tmp_path / "other", exclude=("b/*",)))
    assert index.read_index(export.store).slices == before


def test_every_cut_of_a_file_has_a_reason(tmp_path: Path):
    whole = save(volume(VOLUME[:1])[0], tmp_path / "whole").read_bytes()
    mask = save(segmentation(volume(VOLUME), MASKS, "BINARY"), tmp_path / "mask").read_bytes()
    for content in (whole, mask):
        for cut in [*range(0, 600, 37), *range(600, len(content), 331)]:
            (tmp_path / "x").write_bytes(content[:cut])
            found = record(tmp_path / "x")
            assert bool(found.fault) == bool(found.why)


def nested(depth: int) -> bytes:
    """Return an implicit data set whose one sequence holds itself that many times."""
    start = struct.pack("<HHIHHI", 0x0008, 0x1140, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    end = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return start * depth + end * depth


@pytest.mark.parametrize("form", ["nested", "deflated", "huge", "many frames", "no pixels", "empty pixels"])
def test_hostile_files_cost_little_and_have_a_reason(form: str, tmp_path: Path):
    path = tmp_path / "x"
    if form == "nested":
        path.write_bytes(nested(10_000))
    elif form == "deflated":
        data = save(image(VOLUME[0], "1.2.840.10008.1.2.1.99"), path).read_bytes()
        start = data.index(b"1.2.840.10008.1.2.1.99") + 22
        packer = zlib.compressobj(wbits=-15)
        block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
        path.write_bytes(data[:start] + block * 70)  # more than 1 GiB
    elif form == "huge":
        save(image(VOLUME[0], Rows=65535, Columns=65535), path)
    elif form == "many frames":
        save(image(VOLUME[0], NumberOfFrames=2_000_000_000), path)
    elif form == "no pixels":
        save(image(VOLUME[0], PixelData=None, Rows=None, Columns=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33"), path)
    else:
        save(image(VOLUME[0], PixelData=b""), path)
    found = record(path)
    assert found.fault in {116, 117, 119} or form == "empty pixels"
    assert bool(found.fault) == bool(found.why)


NOT_PICTURES = {
    "structured report": "1.2.840.10008.5.1.4.1.1.88.33",
    "PDF": "1.2.840.10008.5.1.4.1.1.104.1",
    "presentation state": "1.2.840.10008.5.1.4.1.1.11.1",
    "waveform": "1.2.840.10008.5.1.4.1.1.9.1.1",
    "RT plan": "1.2.840.10008.5.1.4.1.1.481.5",
}
NO_PICTURES_WITH_PIXELS = {
    "RT dose": "1.2.840.10008.5.1.4.1.1.481.2",
    "parametric map": "1.2.840.10008.5.1.4.1.1.30",
    "whole slide": "1.2.840.10008.5.1.4.1.1.77.1.6",
    "spectroscopy": "1.2.840.10008.5.1.4.1.1.4.2",
}


@pytest.mark.parametrize("name", [*NOT_PICTURES, *NO_PICTURES_WITH_PIXELS])
def test_objects_that_are_no_pictures_are_passed_over(name: str, tmp_path: Path):
    if name in NOT_PICTURES:
        data = image(VOLUME[0], SOPClassUID=NOT_PICTURES[name], PixelData=None, Rows=None, Columns=None)
    else:
        data = image(VOLUME[0], SOPClassUID=NO_PICTURES_WITH_PIXELS[name])
    assert record(save(data, tmp_path / "x")).fault == 119


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("kept", ["preamble", "meta", "neither"])
def test_files_without_preamble_or_meta_header_read_the_same(kept: str, syntax: str, tmp_path: Path):
    pixels = VOLUME[0].byteswap() if syntax == ExplicitVRBigEndian else VOLUME[0]
    whole = save(image(pixels, syntax, SOPClassUID="1.3.9999.1", SOPInstanceUID=generate_uid()), tmp_path / "whole").read_bytes()
    meta = 132 + 12 + int.from_bytes(whole[140:144], "little")
    content = {"preamble": whole, "meta": whole[132:], "neither": whole[meta:]}[kept]
    (tmp_path / "x").write_bytes(content)
    found = record(tmp_path / "x")
    assert (found.kind, found.why, found.rows, found.columns) == ("image", "", 20, 24), found
    ((_, grey),) = read_frames(tmp_path / "x", [0])
    assert np.array_equal(grey, VOLUME[0])
