"""Forms that DICOM and its neighbours allow, written here and compared with what was written: pixels, planes, masks, patients."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from dicom_builders import (
    common,
    derived,
    enhanced,
    image,
    item,
    place,
    plain_segmentation,
    save,
    segmentation,
    volume,
)
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from test_ingest import LESION, export_of, taken

from icmoe.data.ingest import work
from icmoe.data.ingest.opening import Refusal
from icmoe.data.ingest.pixels import read_frames
from icmoe.data.slices import SiteData, load_image, load_mask
from icmoe.study import Label
from icmoe.window import Window, normalise, series_window

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


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and decode here, which is far quicker for a handful of files; test_ingest.py has the processes."""
    monkeypatch.setattr(work, "in_processes", lambda function, items, *_, **__: ((one, function(one)) for one in items))


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


def used(place: Path, labels: tuple[Label, ...] = LESION, **settings: Any) -> tuple[list[np.ndarray], list[np.ndarray], SiteData]:
    """Ingest what is in `place`/export; return pictures and classes in order, and what the index says."""
    data = taken(export_of(place / "export", place / "kept", labels, shares=(1.0, 0.0, 0.0), **settings))
    items = sorted(data.slices, key=lambda one: (one.patient, one.index))
    return [load_image(one) for one in items], [load_mask(one.mask, labels) for one in items], data


def numbers(data: SiteData) -> list[int]:
    return sorted(one.number for one in data.exclusions)


def scaled(greys: Sequence[np.ndarray], low: float = -np.inf, high: float = np.inf) -> list[np.ndarray]:
    window = series_window(list(greys))
    return [normalise(grey, Window(max(low, window.low), min(high, window.high))) for grey in greys]


def same(found: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> bool:
    return len(found) == len(want) and all(np.allclose(one, other, atol=1e-5) for one, other in zip(found, want, strict=True))


VOLUME = RNG.integers(0, 3000, (5, 20, 24)).astype(np.uint16)
MASKS = np.zeros((5, 20, 24), np.uint8)
for n in range(1, 4):
    MASKS[n, 3 : 8 + n, 5 : 12 + 2 * n] = 1


def put(place: Path, objects: Sequence[Dataset], names: str = "z{}") -> None:
    for number, data in enumerate(objects):
        save(data, place / "export" / names.format(len(objects) - number))


def test_a_window_per_slice_does_not_make_equal_tissue_differ_from_slice_to_slice(tmp_path: Path):
    sources = volume(VOLUME)
    for number, source in enumerate(sources):
        source.WindowCenter, source.WindowWidth = [500 + 100 * number, 40], [800, 80]
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")])
    pictures, classes, _ = used(tmp_path)
    assert same(pictures, scaled(VOLUME, 100.5 - 0.5, 1299.0))
    assert same(classes, MASKS)


def test_a_narrow_window_bounds_the_whole_series_and_one_outside_of_the_data_counts_for_nothing(tmp_path: Path):
    for width, limits in ((80, (0.5, 79.5)), (401.0, (-160.5, 239.5))):
        place = tmp_path / str(width)
        sources = volume(VOLUME, WindowCenter=40, WindowWidth=width, VOILUTFunction="LINEAR_EXACT")
        put(place, [*sources, segmentation(sources, MASKS, "BINARY")])
        assert same(used(place)[0], scaled(VOLUME, max(0, 40 - width / 2), 40 + width / 2)), limits
    sources = volume(VOLUME, WindowCenter=-9000, WindowWidth=100)
    put(tmp_path / "off", [*sources, segmentation(sources, MASKS, "BINARY")])
    assert same(used(tmp_path / "off")[0], scaled(VOLUME))


def test_rescale_of_its_own_in_every_slice_gives_one_scale_for_the_series(tmp_path: Path):
    slopes = 1.0 / np.arange(1, 6)
    sources = volume(VOLUME, Modality="PT")
    for source, slope in zip(sources, slopes, strict=True):
        source.RescaleSlope, source.RescaleIntercept = f"{slope:.8f}", "0"
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY")])
    assert same(used(tmp_path)[0], scaled([grey * slope for grey, slope in zip(VOLUME, slopes, strict=True)]))


TILT = np.deg2rad(20)
PLANES: dict[str, tuple[dict[str, Any], Any]] = {
    "axial": ({}, lambda v: v),
    "head first downwards": ({"step": (0, 0, -5)}, lambda v: v[::-1]),
    "rows to the front": ({"axes": (1, 0, 0, 0, -1, 0), "step": (0, 0, 5)}, lambda v: v[:, ::-1]),
    "columns to the right": ({"axes": (-1, 0, 0, 0, 1, 0), "step": (0, 0, 5)}, lambda v: v[:, :, ::-1]),
    "lying on its side": ({"axes": (0, 1, 0, 1, 0, 0), "step": (0, 0, 5)}, lambda v: v.transpose(0, 2, 1)),
    "coronal": ({"axes": (1, 0, 0, 0, 0, -1), "step": (0, 5, 0)}, lambda v: v),
    "sagittal": ({"axes": (0, 1, 0, 0, 0, -1), "step": (-5, 0, 0)}, lambda v: v[::-1]),
    "oblique": ({"axes": (0.8, 0.6, 0, -0.6, 0.8, 0)}, lambda v: v),
    "steeply oblique": ({"axes": (0.6, 0, 0.8, 0, 1, 0)}, None),
    "gantry tilt": ({"axes": (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT)), "step": (0, 0, 5.0)}, lambda v: v),
}


@pytest.mark.parametrize("name", PLANES)
def test_slices_come_in_the_order_of_the_body_and_upright(name: str, tmp_path: Path):
    geometry, turned = PLANES[name]
    sources = volume(VOLUME, **geometry)
    put(tmp_path, [*sources, segmentation(sources, MASKS, "BINARY", omit_empty_frames=False)])
    pictures, classes, data = used(tmp_path)
    greys = turned(VOLUME) if turned else VOLUME[::-1] if np.cross([0.6, 0, 0.8], [0, 1, 0])[0] < 0 else VOLUME
    assert same(pictures, scaled(greys))
    assert same(classes, turned(MASKS) if turned else MASKS[::-1])
    distance = 5.0 * np.cos(TILT) if name == "gantry tilt" else 5.0
    assert data.slices[0].spacing_mm == pytest.approx((distance, 1.5, 1.0) if "side" in name else (distance, 1.0, 1.5))


def test_enhanced_frames_in_any_order_with_a_scale_of_their_own(tmp_path: Path):
    order = [3, 0, 4, 1, 2]
    frames = [
        place(
            (-20, -30, 5.0 * n),
            stack=n + 1,
            PixelValueTransformationSequence=item(RescaleSlope=f"{n + 1}", RescaleIntercept="-7", RescaleType="US"),
            FrameVOILUTSequence=item(WindowCenter=1000, WindowWidth=4000 + 100 * n, WindowCenterWidthExplanation=""),
            PixelMeasuresSequence=item(PixelSpacing=[1.0, 1.5], SliceThickness=5.0),
        )
        for n in order
    ]
    source = enhanced(VOLUME[order], frames, common(spacing=(9.0, 9.0)))
    groups = [item(DerivationImageSequence=[derived(source, at + 1)]) for at in range(5)]
    put(tmp_path, [source, plain_segmentation(MASKS[order], groups)])
    pictures, classes, data = used(tmp_path)
    assert same(
        pictures, scaled([grey * (n + 1.0) - 7 for n, grey in enumerate(VOLUME)], 1000 - 0.5 - 4399 / 2, 1000 - 0.5 + 4399 / 2)
    )
    assert same(classes, MASKS)
    assert data.slices[0].spacing_mm == pytest.approx((5.0, 1.0, 1.5))


def test_phases_of_a_cine_are_ordered_by_place_and_then_by_time(tmp_path: Path):
    where, when = [0, 0, 5, 5], [2, 1, 2, 1]
    frames = [place((0, 0, z), stack=1 + z // 5, time=t) for z, t in zip(where, when, strict=True)]
    source = enhanced(VOLUME[:4], frames, common())
    groups = [item(DerivationImageSequence=[derived(source, n + 1)]) for n in range(4)]
    put(tmp_path, [source, plain_segmentation(MASKS[:4], groups)])
    pictures, classes, data = used(tmp_path)
    order = [1, 0, 3, 2]
    assert same(pictures, scaled(VOLUME[order]))
    assert same(classes, MASKS[order])
    assert all(one.spacing_mm is None for one in data.slices), "the distance of phases is not one of slices"


def test_legacy_converted_objects_read_like_what_they_were_made_from(tmp_path: Path):
    kind = "1.2.840.10008.5.1.4.1.1.4"
    sources = volume(
        VOLUME,
        SOPClassUID=kind,
        ImageType=["ORIGINAL", "PRIMARY", "M"],
        RescaleSlope="2",
        RescaleIntercept="1",
        BodyPartExamined="",
        SliceThickness=5.0,
    )
    made = hd.legacy.LegacyConvertedEnhancedMRImage(
        sources, series_instance_uid=generate_uid(), series_number=2, sop_instance_uid=generate_uid(), instance_number=1
    )
    heights = [own.PlanePositionSequence[0].ImagePositionPatient[2] for own in made.PerFrameFunctionalGroupsSequence]
    put(tmp_path, [made, segmentation([made], MASKS[np.argsort(np.argsort(heights))], "BINARY")])
    pictures, classes, _ = used(tmp_path)
    assert same(pictures, scaled(VOLUME))
    assert same(classes, MASKS)
