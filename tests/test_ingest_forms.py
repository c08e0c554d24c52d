"""Stored pixels of every form that DICOM allows, written here and compared with what was written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_builders import (
    image,
    item,
    save,
)
from exports import read_frames
from jpeg_lossless import jpeg_lossless
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from icmoe.data.ingest.opening import Refusal

RNG = np.random.default_rng(5)
U8, U16, U12 = (
    RNG.integers(0, top, (32, 40)).astype(kind) for top, kind in ((256, np.uint8), (65536, np.uint16), (4096, np.uint16))
)
S12 = U12.astype(np.int16) - 2048
TWELVE = {"BitsStored": 12, "HighBit": 11}


def lut(first: int, table: np.ndarray, **further: Any) -> Dataset:
    data = item(LUTDescriptor=[len(table), first, 16], LUTData=[int(v) for v in table], **further)
    data["LUTDescriptor"].VR, data["LUTData"].VR = "US", "US"
    return data


def lut_in_bytes(entries: bytes, count: int, bits: int, first: int = 0, vr: str = "OW") -> Dataset:
    data = Dataset()
    data.add_new("LUTDescriptor", "SS" if first < 0 else "US", [count, first, bits])
    data.add_new("LUTData", vr, entries if vr == "OW" else [int(v) for v in np.frombuffer(entries, "<u2")])
    return data


QUARTER = (np.arange(1024) // 4).astype(np.uint8)
"""A table of 8 bits with more entries than 8 bits can count."""
SQUARE = (np.arange(4096) ** 2 // 257).astype(np.uint16)
SEGMENTED = {  # discrete 0, 10; linear over 254 more entries up to 255 * 256
    f"Segmented{name}PaletteColorLookupTableData": np.asarray([0, 2, 0, 2560, 1, 254, 65280], "<u2").tobytes()
    for name in ("Red", "Green", "Blue")
}
GREY_RAMP = np.concatenate([[0, 2560], np.asarray([2560 + (65280 - 2560) * k / 254 for k in range(1, 255)])])

PIXELS: dict[str, tuple[Dataset, np.ndarray]] = {
    "8 bit": (image(U8), U8),
    "16 bit": (image(U16), U16),
    "12 bit": (image(U12, **TWELVE), U12),
    "12 bit signed": (image(S12, **TWELVE), S12),
    "10 bit in the high bits": (image((U12 >> 2) << 6, BitsStored=10, HighBit=15), U12 >> 2),
    "overlay in the high bits": (image(U12 | (U12 & 1) << 15, **TWELVE), U12),
    "sign not extended": (image((S12 & 0xFFF).astype(np.int16), **TWELVE), S12),
    "32 bit": (image(U16.astype(np.uint32) * 3), U16 * 3.0),
    "float": (
        image(
            U8.astype(np.uint32),
            PixelData=None,
            FloatPixelData=(U16 / 7).astype("<f4").tobytes(),
            BitsAllocated=32,
            BitsStored=None,
            HighBit=None,
            PixelRepresentation=None,
        ),
        (U16 / 7).astype("f4"),
    ),
    "double": (
        image(
            U8.astype(np.uint32),
            PixelData=None,
            DoubleFloatPixelData=(U16 / 7).astype("<f8").tobytes(),
            BitsAllocated=64,
            BitsStored=None,
            HighBit=None,
            PixelRepresentation=None,
        ),
        (U16 / 7).astype("f4"),
    ),
    "rescale": (image(U12, RescaleSlope="0.5", RescaleIntercept="-100", **TWELVE), U12 * 0.5 - 100),
    "rescale negative": (image(U12, RescaleSlope="-2", RescaleIntercept="10", **TWELVE), U12 * -2.0 + 10),
    "rescale by 0": (image(U12, RescaleSlope="0", RescaleIntercept="0", **TWELVE), U12),
    "slope alone": (image(U12, RescaleSlope="2", **TWELVE), U12 * 2),
    "intercept alone": (image(U12, RescaleIntercept="-1024", **TWELVE), U12 - 1024.0),
    "rescale no number": (image(U12, RescaleSlope="", RescaleIntercept="", **TWELVE), U12),
    "modality table": (image(U12, ModalityLUTSequence=[lut(0, SQUARE, ModalityLUTType="US")], **TWELVE), SQUARE[U12]),
    "modality table, implicit": (
        image(U12, ImplicitVRLittleEndian, ModalityLUTSequence=[lut(0, SQUARE, ModalityLUTType="US")], **TWELVE),
        SQUARE[U12],
    ),
    "voi table, implicit": (image(U12, ImplicitVRLittleEndian, VOILUTSequence=[lut(0, SQUARE)], **TWELVE), SQUARE[U12]),
    "voi table after rescale, MONOCHROME1": (
        image(
            U12,
            VOILUTSequence=[lut(0, SQUARE)],
            RescaleSlope="0.5",
            RescaleIntercept="0",
            PhotometricInterpretation="MONOCHROME1",
            **TWELVE,
        ),
        65535.0 - SQUARE[np.rint(U12 * 0.5).astype(int)],
    ),
    "voi table": (image(U12, VOILUTSequence=[lut(0, SQUARE)], **TWELVE), SQUARE[U12]),
    **{
        f"{kind} table of bytes, {where}": (
            image(U12 >> 2, BitsStored=10, HighBit=9, **{name: [lut_in_bytes(stored, 1024, 8, vr=vr)]}),
            QUARTER[U12 >> 2],
        )
        for kind, name in (("voi", "VOILUTSequence"), ("modality", "ModalityLUTSequence"))
        for where, stored, vr in (
            ("packed", QUARTER.tobytes(), "OW"),
            ("packed in words", QUARTER.tobytes(), "US"),
            ("a word each", QUARTER.astype("<u2").tobytes(), "OW"),
            ("a number each", QUARTER.astype("<u2").tobytes(), "US"),
        )
    },
    "voi table of bytes, big endian": (
        image(
            (U12 >> 2).byteswap(),
            ExplicitVRBigEndian,
            BitsStored=10,
            HighBit=9,
            VOILUTSequence=[lut_in_bytes(QUARTER.view("<u2").byteswap().tobytes(), 1024, 8)],
        ),
        QUARTER[U12 >> 2],
    ),
    "voi table with an odd number of bytes": (
        image(U8, VOILUTSequence=[lut_in_bytes(bytes(range(255)) + b"\0", 255, 8)]),
        np.minimum(U8, 254),
    ),
    "voi table from below zero": (
        image(S12, VOILUTSequence=[lut_in_bytes(SQUARE.tobytes(), 4096, 16, first=-2048)], **TWELVE),
        SQUARE[S12.astype(int) + 2048],
    ),
    "voi table from below zero, unsigned": (
        image(S12, VOILUTSequence=[lut_in_bytes(SQUARE.tobytes(), 4096, 16, first=65536 - 2048)], **TWELVE),
        SQUARE[S12.astype(int) + 2048],
    ),
    "voi table of 12 bits, MONOCHROME1": (
        image(
            U12,
            VOILUTSequence=[lut_in_bytes((SQUARE >> 4).tobytes(), 4096, 12)],
            PhotometricInterpretation="MONOCHROME1",
            **TWELVE,
        ),
        4095.0 - (SQUARE >> 4)[U12],
    ),
    "sigmoid": (
        image(U12, WindowCenter="2000", WindowWidth="800", VOILUTFunction="SIGMOID", **TWELVE),
        1 / (1 + np.exp(-4 * (U12 - 2000.0) / 800)),
    ),
    "MONOCHROME1": (image(U12, PhotometricInterpretation="MONOCHROME1", **TWELVE), 4095.0 - U12),
    "MONOCHROME1 8 bit": (image(U8, PhotometricInterpretation="MONOCHROME1"), 255.0 - U8),
    "MONOCHROME1 signed": (image(S12, PhotometricInterpretation="MONOCHROME1", **TWELVE), -1.0 - S12),
    "padding": (
        image(np.where(U12 < 100, 4000, U12).astype(np.uint16), PixelPaddingValue=4000, **TWELVE),
        np.where((U12 < 100) | (U12 == 4000), U12[U12 >= 100].min(), U12),
    ),
    "padding range": (
        image(U12, PixelPaddingValue=4095, PixelPaddingRangeLimit=3900, **TWELVE),
        np.where(U12 >= 3900, U12.min(), U12),
    ),
    "padding with the wrong sign": (
        image(np.where(S12 < -1900, -2000, S12).astype(np.int16), PixelPaddingValue=63536, BitsStored=16),
        np.where((S12 < -1900), S12[S12 >= -1900].min(), S12),
    ),
    "padding below zero of unsigned values": (
        image(np.where(U16 < 9000, 63536, U16 // 2).astype(np.uint16), PixelPaddingValue=0),
        np.where(U16 < 9000, (U16 // 2)[U16 >= 9000].min(), U16 // 2),
    ),
    "padding beyond the stored bits": (
        image(np.where(U12 < 900, 63536, U12).astype(np.uint16), PixelPaddingValue=63536, **TWELVE),
        np.where(U12 < 900, U12[U12 >= 900].min(), U12),
    ),
    "padding beyond the stored bits, signed": (
        image(np.where(S12 < -900, -32768, S12).astype(np.int16), PixelPaddingValue=-32768, **TWELVE),
        np.where(S12 < -900, S12[S12 >= -900].min(), S12),
    ),
    "big endian": (image(U12.byteswap(), ExplicitVRBigEndian, **TWELVE), U12),
    "implicit": (image(U12, ImplicitVRLittleEndian, **TWELVE), U12),
    "deflated": (image(U12, DeflatedExplicitVRLittleEndian, **TWELVE), U12),
    "palette": (
        image(
            U8,
            PhotometricInterpretation="PALETTE COLOR",
            **{
                f"{c}PaletteColorLookupTable{k}": v
                for c in ("Red", "Green", "Blue")
                for k, v in (("Descriptor", [256, 0, 16]), ("Data", (np.arange(256, dtype="<u2")[::-1] * 256).tobytes()))
            },
        ),
        (255.0 - U8) * 256,
    ),
    **{
        f"palette of bytes for 10 bits, {where}": (
            image(
                U12 >> 2,
                BitsStored=10,
                HighBit=9,
                PhotometricInterpretation="PALETTE COLOR",
                **{
                    f"{c}PaletteColorLookupTable{k}": v
                    for c in ("Red", "Green", "Blue")
                    for k, v in (("Descriptor", [1024, 0, 8]), ("Data", stored))
                },
            ),
            QUARTER[U12 >> 2],
        )
        for where, stored in (("packed", QUARTER.tobytes()), ("a word each", QUARTER.astype("<u2").tobytes()))
    },
    "segmented palette": (
        image(
            U8,
            PhotometricInterpretation="PALETTE COLOR",
            **SEGMENTED,
            **{f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")},
        ),
        np.around(GREY_RAMP)[U8],
    ),
    "RGB in planes": (
        image(
            np.stack([U8, U8.T.reshape(32, 40), U8[::-1]]).reshape(3 * 32, 40),
            Rows=32,
            SamplesPerPixel=3,
            PlanarConfiguration=1,
            PhotometricInterpretation="RGB",
        ),
        0.299 * U8 + 0.587 * U8.T.reshape(32, 40) + 0.114 * U8[::-1],
    ),
    "RGB grey": (
        image(np.repeat(U8, 3, axis=1), Columns=40, SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB"),
        U8,
    ),
    "YBR_FULL grey": (
        image(
            np.stack([U8, U8 * 0 + 128, U8 * 0 + 128], axis=-1).reshape(32, 120),
            Columns=40,
            SamplesPerPixel=3,
            PlanarConfiguration=0,
            PhotometricInterpretation="YBR_FULL",
        ),
        U8,
    ),
    "YBR_FULL_422 grey": (
        image(
            np.stack([U8[:, ::2], U8[:, 1::2], U8[:, ::2] * 0 + 128, U8[:, ::2] * 0 + 128], axis=-1).reshape(32, 80),
            Columns=40,
            SamplesPerPixel=3,
            PlanarConfiguration=0,
            PhotometricInterpretation="YBR_FULL_422",
        ),
        U8,
    ),
}


PIXELS["padding with the wrong sign"][0]["PixelPaddingValue"].VR = "US"
PIXELS["padding below zero of unsigned values"][0].add_new("PixelPaddingValue", "SS", -2000)


def first(path: Path, number: int = 0) -> np.ndarray:
    ((_, grey),) = read_frames(path, [number])
    assert not isinstance(grey, Refusal), grey.why
    return grey


@pytest.mark.parametrize("name", PIXELS)
def test_stored_pixels_become_the_grey_values_that_the_header_means(name: str, tmp_path: Path):
    data, want = PIXELS[name]
    assert np.allclose(first(save(data, tmp_path / "x")), want, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize(
    "name",
    [
        "8 bit",
        "16 bit",
        "12 bit",
        "12 bit signed",
        "overlay in the high bits",
        "MONOCHROME1",
        "rescale",
        "padding",
        "10 bit in the high bits",
    ],
)
def test_lossless_compression_changes_no_grey_value(name: str, syntax: str, tmp_path: Path):
    data, want = PIXELS[name]
    data = pydicom.dcmread(save(data, tmp_path / "plain"))
    if syntax != RLELossless and name in {"overlay in the high bits", "10 bit in the high bits"}:
        pytest.skip("these codecs hold the stored bits alone")
    data.compress(syntax, generate_instance_uid=False)
    assert np.allclose(first(save(data, tmp_path / "x")), want)


@pytest.mark.parametrize(("syntax", "predictor"), [(JPEGLosslessSV1, 1), (JPEGLossless, 4), (JPEGLossless, 7)])
@pytest.mark.parametrize(("stored", "bits"), [(U8, 8), (U12, 12), (U16, 16)])
def test_jpeg_lossless_changes_no_grey_value(stored: np.ndarray, bits: int, syntax: str, predictor: int, tmp_path: Path):
    data = image(stored, syntax, BitsStored=bits, HighBit=bits - 1)
    data.PixelData = encapsulate([jpeg_lossless(stored, bits, predictor)])
    data["PixelData"].is_undefined_length = True
    assert np.array_equal(first(save(data, tmp_path / "x")), stored)


def test_one_damaged_frame_costs_that_frame_alone(tmp_path: Path):
    data = pydicom.dcmread(save(image(np.stack([U8, U8, U8])), tmp_path / "plain"))
    data.compress(RLELossless, generate_instance_uid=False)
    frames = list(generate_frames(data.PixelData, number_of_frames=3))
    data.PixelData = encapsulate([frames[0], b"\0\1" * 40, frames[2]])
    found = list(read_frames(save(data, tmp_path / "x"), [0, 1, 2]))
    assert [number for number, _ in found] == [0, 1, 2]
    assert isinstance(found[1][1], Refusal)
    assert all(np.array_equal(grey, U8) for number, grey in found if number != 1)


@pytest.mark.parametrize("fragments", [1, 3])
def test_jpeg_baseline_in_several_fragments_is_what_pillow_decodes(fragments: int, tmp_path: Path):
    smooth = np.add.outer(np.arange(32), np.arange(40)).astype(np.uint8) * 3
    stream = io.BytesIO()
    Image.fromarray(smooth).save(stream, "JPEG", quality=95)
    data = image(smooth, JPEGBaseline8Bit)
    data.PixelData = encapsulate([stream.getvalue()] * 2, fragments_per_frame=fragments)
    data.NumberOfFrames, data["PixelData"].is_undefined_length = 2, True
    want = np.asarray(Image.open(stream)).astype(float)
    assert np.abs(first(save(data, tmp_path / "x"), 1) - want).max() <= 1
