"""Burned-in text: drawn lines are found, anatomy and noise are not text, and a series that holds any stays out until allowed."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from exports import DATA, absent, export_of, published, read_frames, real, taken, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage
from scipy import ndimage

from icmoe.data.images import read_grey
from icmoe.data.ingest.burned_in import holds_text
from icmoe.data.ingest.headers import SAFE_MODALITIES, image_record
from icmoe.data.ingest.opening import Refusal
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.run import Export, forget, ingest
from icmoe.data.ingest.shown import no_longer_shown, note_shown
from icmoe.data.ingest.volumes import read_volume, through_axis
from icmoe.data.picture import picture_of
from simulations.phantoms import write_phantoms

FONTS = Path(str(pytest.importorskip("matplotlib").__file__)).parent / "mpl-data/fonts/ttf"
Grey = npt.NDArray[np.float64]


def shows_text(grey: npt.NDArray[np.generic]) -> bool:
    return holds_text(picture_of(grey))


def font_of(name: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if name == "default" else ImageFont.truetype(str(FONTS / f"{name}.ttf"), size)


def background(kind: str, rng: np.random.Generator, side: int = 256) -> Grey:
    """Return an MR slice with Rician noise, a CT slice, or noise alone, in whole grey values."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    inside = np.hypot(x / 0.36, y / 0.44) < 1
    texture = ndimage.gaussian_filter(rng.normal(size=(side, side)), 4)
    body = np.where(inside, 600 + 90 * texture / texture.std(), 0.0)
    grey = {
        "mr": np.hypot(body + rng.normal(0, 20, body.shape), rng.normal(0, 20, body.shape)),
        "ct": np.where(inside, 40.0, -1000.0) + rng.normal(0, 20, body.shape),
        "noise": rng.normal(1000, 50, body.shape),
    }
    return np.rint(grey[kind])


def written(
    grey: Grey, words: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, value: float, at: tuple[int, int]
) -> Grey:
    """Return a picture with a line of text, smoothed at its edges as fonts are drawn."""
    cover = Image.new("L", grey.shape[::-1])
    left, top, _, _ = font.getbbox(words)
    ImageDraw.Draw(cover).text((at[0] - left, at[1] - top), words, fill=255, font=font)
    share = np.asarray(cover) / 255.0
    return np.rint(grey * (1 - share) + value * share)


def words_of(rng: np.random.Generator) -> str:
    name = "".join(rng.choice(list(string.ascii_uppercase), rng.integers(6, 13)))
    number = "".join(rng.choice(list(string.digits), rng.integers(6, 12)))
    return str(rng.choice([name, name.capitalize(), number, f"{number[:2]}.{number[2:4]}.19{number[4:6]}"]))


def samples(size: int, seed: int) -> Iterator[Grey]:
    """Yield pictures with one line each: six fonts, three grounds, the lightest, darkest or greatest value, corner or middle."""
    rng = np.random.default_rng(seed)
    for name in ("default", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "cmr10"):
        font = font_of(name, size)
        for kind in ("mr", "ct", "noise"):
            for value in ("light", "dark", "most"):
                for corner in (True, False):
                    grey, words = background(kind, rng), words_of(rng)
                    left, top, right, bottom = font.getbbox(words)
                    at = (4, 4) if corner else (int(128 - (right - left) / 2), int(rng.integers(90, 150)))
                    place = grey[at[1] : int(at[1] + bottom - top), at[0] : int(at[0] + right - left)]
                    ink = {"light": grey.max(), "dark": grey.min(), "most": 4095.0}[value]
                    text = written(grey, words, font, ink, at)
                    far = np.abs(place - ink) > 0.2 * (text.max() - text.min())
                    if far.mean() >= 0.9 and abs(ink - np.median(place)) >= 3 * place.std():  # else nobody can read it
                        yield text


@pytest.mark.parametrize(("sizes", "least"), [((8, 9), 0.6), ((10, 12), 0.8), ((14, 16, 20, 24), 0.9)])
def test_most_lines_of_drawn_text_are_found(sizes: tuple[int, ...], least: float):
    found = [shows_text(grey) for size in sizes for grey in samples(size, seed=size)]
    assert len(found) > 100
    assert np.mean(found) >= least, f"{np.mean(found):.3f} of {len(found)}"


@settings(max_examples=40, deadline=None)
@given(scale=st.floats(0.01, 1000.0), shift=st.floats(-1e4, 1e4), seed=st.integers(0, 50))
def test_the_scale_of_grey_values_does_not_matter(scale: float, shift: float, seed: int):
    text = written(background("mr", np.random.default_rng(seed)), "DOE JOHN 1951", font_of("DejaVuSans", 14), 4095.0, (4, 4))
    assert shows_text(text * scale + shift)
    assert shows_text(-text * scale + shift), "dark letters are letters"


@pytest.mark.parametrize("kind", ["mr", "ct", "noise"])
def test_phantom_anatomy_and_noise_are_not_text(kind: str):
    assert not any(shows_text(background(kind, np.random.default_rng(seed), side)) for seed in range(40) for side in (64, 256))


def test_phantoms_ramps_and_degenerate_pictures_are_not_text(tmp_path: Path):
    write_phantoms(tmp_path / "phantoms", seed=7)
    pictures = [read_grey(path, where="") for path in (tmp_path / "phantoms").rglob("*.png")]
    plain = [np.zeros((64, 64)), np.ones((1, 1)), np.zeros((0, 5)), np.eye(64), np.arange(4096.0).reshape(64, 64)]
    grid = (np.indices((64, 64)).sum(axis=0) // 4 % 2).astype(np.uint8)
    broken = np.full((64, 64), np.nan)
    assert len(pictures) > 100
    assert not any(shows_text(grey) for grey in [*pictures, *plain, grid, broken])


def real_pictures() -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    tests = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent
    roots = [DATA / name for name in ("lgg-dicom", "sunnybrook-lv-dicom", "dicom-seg-samples")]
    for path in (path for root in [*roots, tests] for path in sorted(root.rglob("*")) if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            if header.get("Modality") not in SAFE_MODALITIES or "Rows" not in header:
                continue
            for number, grey in read_frames(path, range(int(header.get("NumberOfFrames") or 1))):
                if not isinstance(grey, Refusal):
                    yield f"{path.name} {number}", grey
        except (pydicom.errors.InvalidDicomError, Refusal):
            continue
    for path in sorted((DATA / "lgg-multisite").glob("*/images/*.png")):
        yield path.name, read_grey(path, where="")
    for path in sorted((DATA / "hippocampus-nifti/images").glob("*.nii.gz")):
        voxels, matrix = read_volume(path)
        for grey in np.moveaxis(voxels, through_axis(matrix, voxels.shape), 0):
            yield path.name, grey
            yield path.name, grey.T


@real
@absent
@pytest.mark.filterwarnings("ignore")
def test_no_real_picture_without_text_is_taken_for_one_with_text():
    pictures = list(real_pictures())
    assert len(pictures) > 3500
    assert [name for name, grey in pictures if shows_text(grey)] == []


@real
@absent
def test_the_test_patient_in_the_ultrasound_picture_is_found():
    ((_, grey),) = read_frames(DATA / "dicom-phi-samples/us_grey_burned_in.dcm", [0])
    assert not isinstance(grey, Refusal)
    assert shows_text(grey)


def write_lettered(folder: Path, number: int = 1) -> None:
    """Write a series of three larger slices; one has a name in it, on a MR scanner's picture without any tag about it."""
    write_series(folder, "one", 3, seed=1, Rows=96, Columns=160)
    for place, path in enumerate(sorted(folder.glob("*.dcm"))):
        data = pydicom.dcmread(path)
        grey = background("mr", np.random.default_rng(place), 160)[:96]
        grey = written(grey, "DOE^JOHN 1951", font_of("DejaVuSans", 12), 4095.0, (5, 5)) if place == number else grey
        data.PixelData = grey.astype(np.uint16).tobytes()
        data.save_as(path)
        Image.fromarray(np.pad(np.full((9, 9), 255, np.uint8), ((40, 47), (60, 91)))).save(path.with_suffix(".png"))


@pytest.fixture
def two_patients(tmp_path: Path) -> Export:
    write_lettered(tmp_path / "export/a")
    write_series(tmp_path / "export/b", "two", 2, seed=2)
    return export_of(tmp_path / "export", tmp_path / "place", shares=(1.0, 0.0, 0.0))


def allowing(export: Export, series: str) -> Export:
    return replace(export, settings=export.settings.model_copy(update={"allow": (series,)}))


def test_a_series_with_one_lettered_picture_is_held_back_whole(two_patients: Export):
    data = taken(two_patients)
    rows, out = published(two_patients.store)
    assert {row.patient for row in rows} == {item.patient for item in data.slices}
    assert len(rows) == 2, "only the other patient"
    assert [(item.number, item.why, item.frames) for item in out] == [(126, "letters were found in 1 of its pictures", 3)]
    assert out[0].patient not in {row.patient for row in rows}
    assert data.images_found == 5
    for path in (two_patients.store / "frames").glob("*/*"):
        assert path.stat().st_mode & 0o077 == 0, "held pixels are the owner's alone"


def test_allowing_it_by_name_needs_no_decoding_and_taking_that_back_removes_it(
    two_patients: Export, monkeypatch: pytest.MonkeyPatch
):
    taken(two_patients)
    _, (held,) = published(two_patients.store)
    monkeypatch.setattr("icmoe.data.ingest.work.in_processes", _decodes_nothing)
    assert len(taken(allowing(two_patients, held.series)).slices) == 5
    digests = {row.result.digest for row in published(two_patients.store)[0]}
    note_shown(two_patients.secret_folder, [two_patients.store])
    assert len(taken(two_patients).slices) == 2
    kept = {row.result.digest for row in published(two_patients.store)[0]}
    with no_longer_shown(two_patients.secret_folder, [two_patients.store]) as gone:
        assert set(gone) == digests - kept, "their features go from the cache"
    with no_longer_shown(two_patients.secret_folder, [two_patients.store]) as gone:
        assert not list(gone), "and they from the list"


def _decodes_nothing(function: Callable[..., object], items: Iterable[object], *_: object, **__: object) -> Iterator[object]:
    assert not list(items), function.__name__
    return iter(())


def test_forgetting_a_patient_removes_the_pixels_of_held_series_at_once(two_patients: Export):
    ingest(two_patients)
    assert forget(two_patients.secret_folder, "two") == 2
    assert forget(two_patients.secret_folder, "one") == 0, "nothing of this patient was in use"
    assert not list((two_patients.store / "frames").glob("*/*"))


def test_png_pictures_and_volumes_on_their_side_are_looked_at_too(tmp_path: Path):
    text = written(background("mr", np.random.default_rng(0)), "DOE JOHN 1951", font_of("DejaVuSans", 14), 4095.0, (40, 5))
    mask = np.pad(np.full((9, 9), 255, np.uint8), ((99, 148), (99, 148)))
    for name, pixels in (("images/1.png", text.astype(np.uint16)), ("masks/1.png", mask)):
        (tmp_path / "export/p" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "export/p" / name)
    for name, voxels in (("images/v.nii", text.T.astype(np.int16)), ("labels/v.nii", (mask > 0).astype(np.uint8))):
        (tmp_path / "export/v" / name).parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(np.stack([voxels.T] * 2, axis=2), np.diag([1, 1, 5, 1])), tmp_path / "export/v" / name)
    export = export_of(tmp_path / "export", tmp_path / "place")
    data = taken(export)
    assert not data.slices
    assert sorted((item.number, item.frames) for item in published(export.store)[1]) == [(126, 1), (126, 2)]


HELD: dict[str, dict[str, object]] = {
    "the header says that text is burned in": {"BurnedInAnnotation": "yes "},
    "the header says that text is burned in, twice": {"BurnedInAnnotation": ["NO", "YES"]},
    "the header says that text is burned in, in its own word": {"BurnedInAnnotation": "Y"},
    "the header says that the person may be recognised": {"RecognizableVisualFeatures": "YES"},
    "a secondary capture": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
    "a secondary capture of many frames": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"},
    "a secondary capture from a workstation": {"ConversionType": "wsd"},
    "a secondary capture from film": {"ConversionType": "DF"},
    "an ultrasound picture": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.3.1"},
    "a photograph": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.4"},
    "a picture of a screen": {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
    "a picture of a screen with a table": {"ImageType": ["derived", "secondary", "dose_info"]},
    "modality OT": {"Modality": "OT"},
    "modality US": {"Modality": "us"},
    "modality unknown": {"Modality": ["MR", "CT"]},
    "a colour picture": {"SamplesPerPixel": 3},
}


def header_of(**elements: object) -> Dataset:
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.PatientID, data.Modality = MRImageStorage, "1.2", "x", "MR"
    data.Rows, data.Columns, data.SamplesPerPixel = 8, 8, 1
    for name, value in elements.items():
        setattr(data, name, value)
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("why", "elements"), HELD.items())
def test_headers_that_make_text_likely_hold_a_series_back(why: str, elements: dict[str, object]):
    held = image_record(header_of(**elements), Pseudonyms(bytes(32))).held
    assert held
    assert why.startswith(held) or held.startswith(why)


@pytest.mark.parametrize(
    "elements",
    [
        {},
        {"BurnedInAnnotation": "NO", "RecognizableVisualFeatures": "no"},
        {"BurnedInAnnotation": ""},
        {"ConversionType": "SYN"},
        {"ImageType": ["DERIVED", "SECONDARY", "OTHER"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]},
    ],
)
def test_headers_of_plain_scanner_pictures_do_not(elements: dict[str, object]):
    assert image_record(header_of(**elements), Pseudonyms(bytes(32))).held == ""
