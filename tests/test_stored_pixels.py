"""Pixels that are not as their header says are refused before they are decoded, and those that are come out as they went in."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import jpeg_ls
import numpy as np
import pydicom
import pytest
from dicom_builders import image, save
from exports import read_frames
from jpeg_lossless import jpeg_lossless
from openjpeg.utils import encode_array
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from icmoe.data.images import LUMINANCE
from icmoe.data.ingest.codestreams import Codestream, codestream_of
from icmoe.data.ingest.refusals import Refusal

ROWS, COLUMNS = np.mgrid[:48, :56]
U12 = (COLUMNS * 60 + ROWS * 9).astype(np.uint16)
U8 = (U12 >> 4).astype(np.uint8)
S12 = U12.astype(np.int16) - 2048
TWELVE = {"BitsStored": 12, "HighBit": 11}
FRAMES = np.stack([U12, U12[::-1], U12[:, ::-1]])


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def jpeg_ls_lossless(pixels: np.ndarray, bits: int) -> bytes:
    rows, columns = pixels.shape
    kinds = {"rows": rows, "columns": columns, "samples_per_pixel": 1, "photometric_interpretation": "MONOCHROME2"}
    return bytes(jpeg_ls.encode_pixel_data(pixels.tobytes(), **kinds, bits_stored=bits, bits_allocated=8 * pixels.itemsize))


def jpeg_2000(pixels: np.ndarray, bits: int) -> bytes:
    return bytes(encode_array(pixels, bits_stored=bits, use_mct=False))


def jp2(codestream: bytes) -> bytes:
    """Return a codestream in a JP2 file, behind a box with another codestream's beginning in it."""
    fake = b"\xff\x4f\xff\x51" + bytes(60)
    boxes = ((b"jP  ", b"\r\n\x87\n"), (b"uuid", fake), (b"jp2c", codestream))
    return b"".join(struct.pack(">I", len(held) + 8) + kind + held for kind, held in boxes)


def compressed(header: Dataset, *codes: bytes) -> Dataset:
    header.PixelData = encapsulate(list(codes))
    header["PixelData"].is_undefined_length = True
    return header


def found(data: Dataset, folder: Path, number: int = 0) -> np.ndarray | Refusal:
    ((_, grey),) = read_frames(save(data, folder / "x"), [number])
    return grey


def reason(data: Dataset, folder: Path) -> str:
    refusal = found(data, folder)
    assert isinstance(refusal, Refusal)
    assert refusal.number == 118
    return refusal.why


@pytest.mark.parametrize(
    ("code", "bits", "lossy"),
    [
        (jpeg(U8), 8, True),
        (b"\xff\xd8\xff" + jpeg(U8)[2:], 8, True),
        (jpeg_ls_lossless(U8, 8), 8, False),
        (jpeg_ls_lossless(U12, 16), 16, False),
        (bytes(jpeg_ls.encode_array(U8, lossy_error=2)), 8, True),
        (jpeg_2000(U12, 12), 12, False),
        (jpeg_2000(S12, 12), 12, False),
        (bytes(encode_array(U8, compression_ratios=[5], use_mct=False)), 8, True),
        (jp2(jpeg_2000(U8, 8)), 8, False),
    ],
)
def test_a_compressed_frame_says_its_size_and_depth(code: bytes, bits: int, lossy: bool):
    assert codestream_of(code) == Codestream(48, 56, bits, lossy)


@pytest.mark.parametrize("code", [jpeg(U8), jpeg_ls_lossless(U12, 16), jp2(jpeg_2000(U8, 8)), b"\x00\x00\x00\x0cjP  " * 9])
def test_a_damaged_frame_says_something_or_nothing(code: bytes):
    rng = np.random.default_rng(0)
    for end in range(min(len(code), 400)):
        damaged = bytearray(code[: end + 1])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        codestream_of(bytes(damaged))


BOMB = bytearray(jpeg_2000(U8, 8))
struct.pack_into(">II", BOMB, 8, 40000, 40000)
struct.pack_into(">II", BOMB, 24, 40000, 40000)


@pytest.mark.parametrize(
    ("header", "syntax", "code", "size"),
    [
        (U8, JPEG2000Lossless, bytes(BOMB), "40000 x 40000"),
        (U12.reshape(96, 28), JPEG2000Lossless, jpeg_2000(U12, 12), "48 x 56"),
        (U12.reshape(96, 28), JPEGLSLossless, jpeg_ls_lossless(U12, 16), "48 x 56"),
        (U8.reshape(96, 28), JPEGBaseline8Bit, jpeg(U8), "48 x 56"),
        (U8, JPEG2000Lossless, jpeg_2000(U12, 12), "12 bits"),
    ],
)
def test_a_frame_of_another_size_than_the_header_says_is_not_decoded(
    header: np.ndarray, syntax: str, code: bytes, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.as_array", None)
    assert size in reason(compressed(image(header, syntax), code), tmp_path)


@pytest.mark.parametrize("columns", [48, 54, 57, 64, 112])
def test_run_lengths_of_another_size_than_the_header_says_are_refused(columns: int, tmp_path: Path):
    data = pydicom.dcmread(save(image(np.resize(U12, (48, columns)), **TWELVE), tmp_path / "plain"))
    data.compress(RLELossless, generate_instance_uid=False)
    data.Columns = 56
    reason(data, tmp_path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_plain_pixels_of_twice_the_depth_are_refused_and_a_tail_is_not(syntax: str, tmp_path: Path):
    assert "twice" in reason(image(U12, syntax, BitsAllocated=8, BitsStored=8, HighBit=7), tmp_path)
    assert np.array_equal(found(image(U12, syntax, PixelData=U12.tobytes() + bytes(512), **TWELVE), tmp_path), U12)


OVERLAY = U12 | ((COLUMNS > 30) << 12).astype(np.uint16)
DEEP = [
    (OVERLAY, U12, TWELVE),
    (U12 << 4, U12, {"BitsStored": 12, "HighBit": 15}),
    (S12.view(np.uint16) & 0xFFF, S12, {"PixelRepresentation": 1, **TWELVE}),
]


@pytest.mark.parametrize(("stored", "want", "header"), DEEP, ids=["overlay", "high bits", "sign not extended"])
@pytest.mark.parametrize(
    ("syntax", "encode"), [(JPEGLSLossless, jpeg_ls_lossless), (JPEG2000Lossless, jpeg_2000), (JPEG2000, jpeg_2000)]
)
def test_streams_of_all_allocated_bits_give_the_stored_bits(
    stored: np.ndarray, want: np.ndarray, header: dict[str, int], syntax: str, encode: Callable[..., bytes], tmp_path: Path
):
    data = compressed(image(stored, syntax, **header), encode(stored, 16))
    assert np.array_equal(found(data, tmp_path), want)


def test_a_stream_of_the_stored_bits_alone_is_not_shifted(tmp_path: Path):
    data = compressed(image(U12, JPEG2000Lossless, BitsStored=12, HighBit=15), jpeg_2000(U12, 12))
    assert np.array_equal(found(data, tmp_path), U12)


def test_white_that_overshoots_in_a_lossy_stream_stays_white(tmp_path: Path):
    over = np.where(COLUMNS > 30, 4097, U12).astype(np.uint16)
    code = bytes(encode_array(over, bits_stored=16, use_mct=False, signal_noise_ratios=[80]))
    assert codestream_of(code) == Codestream(48, 56, 16, lossy=True)
    grey = found(compressed(image(over, JPEG2000, **TWELVE), code), tmp_path)
    assert not isinstance(grey, Refusal)
    assert np.abs(grey.astype(int) - np.minimum(over, 4095)).max() < 64


def without_meta(path: Path) -> Path:
    """Take preamble and meta header away."""
    data = path.read_bytes()
    path.write_bytes(data[144 + int.from_bytes(data[140:144], "little") :])
    return path


@pytest.mark.parametrize("largest", [2**26, 10])
def test_compressed_pixels_under_a_syntax_of_plain_ones_are_refused(
    largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("icmoe.data.ingest.stored.WHOLE_BYTES", largest)
    noise = np.random.default_rng(0).integers(0, 65536, U12.shape).astype(np.uint16)
    data = pydicom.dcmread(save(image(noise), tmp_path / "plain"))
    data.compress(RLELossless, generate_instance_uid=False)
    ((_, refusal),) = read_frames(without_meta(save(data, tmp_path / "x")), [0])
    assert isinstance(refusal, Refusal)
    assert "transfer syntax is missing" in refusal.why


@pytest.mark.parametrize("largest", [2**26, 10])
@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless],
)
def test_large_objects_are_read_as_small_ones_are(
    syntax: str, meta: bool, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("icmoe.data.ingest.stored.WHOLE_BYTES", largest)
    if not meta and syntax in {DeflatedExplicitVRLittleEndian, RLELossless}:
        pytest.skip("nothing else names the compression")
    if syntax == RLELossless:
        data = pydicom.dcmread(save(image(FRAMES, **TWELVE), tmp_path / "plain"))
        data.compress(RLELossless, generate_instance_uid=False)
    else:
        data = image(FRAMES.byteswap() if syntax == ExplicitVRBigEndian else FRAMES, syntax, **TWELVE)
    path = save(data, tmp_path / "x")
    read = dict(read_frames(path if meta else without_meta(path), [2, 0]))
    assert sorted(read) == [0, 2]
    assert all(np.array_equal(read[number], FRAMES[number]) for number in read)


def test_one_pixel_and_its_padding_are_not_twice_a_pixel(tmp_path: Path):
    assert np.array_equal(found(image(U8[:1, 1:2]), tmp_path), U8[:1, 1:2])


@pytest.mark.parametrize("largest", [2**26, 10])
@pytest.mark.parametrize("shape", [(33, 31), (5, 7), (48, 56)])
def test_frames_of_single_bits_need_not_begin_with_a_byte(
    shape: tuple[int, int], largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("icmoe.data.ingest.stored.WHOLE_BYTES", largest)
    bits = np.random.default_rng(3).random((9, *shape)) > 0.5
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    data = image(bits.astype(np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed + b"\0" * (len(packed) % 2))
    data["PixelData"].VR = "OB"
    read = dict(read_frames(save(data, tmp_path / "x"), range(9)))
    assert all(np.array_equal(read[number], bits[number]) for number in range(9))
    data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
    data["PixelData"].VR, data.file_meta.TransferSyntaxUID = "OW", ExplicitVRBigEndian  # words of 16 bits, the higher byte first
    read = dict(read_frames(save(data, tmp_path / "y"), range(9)))
    assert all(np.array_equal(read[number], bits[number]) for number in range(9))


@pytest.mark.parametrize("kind", ["HSV", "YBR_PARTIAL_422", "MONOCHROME2", "PALETTE COLOR"])
def test_three_values_of_a_pixel_that_are_not_said_to_be_colours_are_no_grey(kind: str, tmp_path: Path):
    data = image(U8, PhotometricInterpretation=kind, SamplesPerPixel=3, PlanarConfiguration=0)
    data.PixelData = np.stack([U8, U8 // 2, U8 // 3], axis=-1).tobytes()
    assert "several values per pixel" in reason(data, tmp_path)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1, JPEGLSLossless])
@pytest.mark.parametrize("values", [U12, S12])
def test_jpeg_2000_under_the_name_of_jpeg_gives_its_own_values(syntax: str, values: np.ndarray, tmp_path: Path):
    data = compressed(image(values, syntax, **TWELVE), jpeg_2000(values, 12))
    assert np.array_equal(found(data, tmp_path), values)


@pytest.mark.parametrize(
    ("code", "tolerance"), [(jpeg(U8), 4), (jpeg_lossless(U8, 8, 1), 0), (jpeg_ls_lossless(U8, 8), 0)], ids=["dct", "14", "ls"]
)
def test_jpeg_under_the_name_of_jpeg_2000_gives_its_own_values(code: bytes, tolerance: int, tmp_path: Path):
    grey = found(compressed(image(U8, JPEG2000), code), tmp_path)
    assert np.abs(grey.astype(int) - U8).max() <= tolerance


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize(
    ("syntax", "code", "tolerance"),
    [(JPEGLosslessSV1, jpeg_lossless(U8, 8, 1), 0), (JPEGBaseline8Bit, jpeg(U8), 4), (JPEGExtended12Bit, jpeg(U8), 4)],
    ids=["14", "baseline", "extended"],
)
def test_jpeg_of_8_bits_is_read_where_16_are_allocated(bits: int, syntax: str, code: bytes, tolerance: int, tmp_path: Path):
    data = compressed(image(U8.astype(np.uint16), syntax, BitsStored=bits, HighBit=bits - 1), code)
    assert np.abs(found(data, tmp_path).astype(int) - U8).max() <= tolerance


@pytest.mark.parametrize("limit", [2**26, 0], ids=["in memory", "from disk"])
def test_plain_pixels_in_an_item_for_each_frame_are_read(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("icmoe.data.ingest.stored.WHOLE_BYTES", limit)
    data = compressed(image(FRAMES, "1.2.840.10008.1.2.1.98", **TWELVE), *(frame.tobytes() for frame in FRAMES))
    for number, frame in enumerate(FRAMES):
        assert np.array_equal(found(data, tmp_path, number), frame)
    cut = compressed(image(FRAMES, "1.2.840.10008.1.2.1.98", **TWELVE), *(frame.tobytes()[:-2] for frame in FRAMES))
    assert reason(cut, tmp_path / "cut").startswith("pixels are cut short")


@pytest.mark.parametrize("named", ["YBR_RCT", "YBR_FULL", "RGB"])
def test_colours_that_jpeg_2000_mixed_are_not_turned_back_twice(named: str, tmp_path: Path):
    colour = np.stack([U8, U8 // 2, U8 // 3], axis=-1)
    code = bytes(encode_array(colour, bits_stored=8, photometric_interpretation=1, use_mct=True))
    data = image(U8, JPEG2000Lossless, PhotometricInterpretation=named, SamplesPerPixel=3, PlanarConfiguration=0)
    assert np.allclose(found(compressed(data, code), tmp_path), colour @ np.asarray(LUMINANCE), atol=1e-3)
