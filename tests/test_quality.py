"""What a hospital's person reads before any training: the numbers are true, the page shows no identity, a rerun is cheap."""

from __future__ import annotations

import base64
import gc
import io
import json
import re
import shutil
import time
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from rich.progress import Progress

from fl_client.approval import approve
from fl_client.ingesting import forget_patient, ingest_site, print_report
from fl_client.progress import RateColumn
from icmoe.data.ingest import index, page
from icmoe.data.ingest.index import FrameRow
from icmoe.data.ingest.page import LABEL_COLOURS, PAGE, RECORD, THUMBNAIL_PIXELS, quality_page, quality_report, thumbnail
from icmoe.data.ingest.quality import quality_record
from icmoe.data.ingest.records import FrameResult
from icmoe.data.ingest.run import Export, ingest
from icmoe.data.ingest.settings import IngestSettings
from icmoe.errors import CATALOGUE
from icmoe.study import Label, read_study

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LABELS = (Label(name="background", values=(0,)), Label(name="lesion", values=(128,)), Label(name="core", values=(255,)))
MARKER = "QXZMARK"
ROWS, COLUMNS = 24, 32


def write_series(folder: Path, patient: str, slices: int = 4, seed: int = 0, **elements: object) -> None:
    """Write an axial MR series of 5 x 1 x 1.5 mm; slice n holds 4 n pixels of lesion and, from 2 on, 3 of core; the last has
    no mask."""
    rng, series = np.random.default_rng(seed), generate_uid()
    folder.mkdir(parents=True)
    for number in range(slices):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, generate_uid()
        data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = MRImageStorage, data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.PatientID, data.Modality = generate_uid(), series, patient, "MR"
        data.PatientName, data.SeriesDescription = f"{MARKER}^{patient}", f"{MARKER}<b>"
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 5.0 * number], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing = [1.0, 1.5]
        data.PixelData = rng.integers(0, 1000, (ROWS, COLUMNS)).astype(np.uint16).tobytes()
        for name, value in elements.items():
            setattr(data, name, value)
        data.save_as(folder / f"{MARKER}{number}.dcm", enforce_file_format=True)
        mask = np.zeros((ROWS, COLUMNS), np.uint8)
        mask[4 : 4 + number, 5:9] = 128
        if number >= 2:
            mask[15, 5:8] = 255
        if number < slices - 1 or slices == 1:
            Image.fromarray(mask).save(folder / f"{MARKER}{number}.png")


def export_of(place: Path, **settings: object) -> Export:
    chosen = IngestSettings.model_validate({"folder": "x", "processes": 2, "shares": (1.0, 0.0, 0.0), **settings})
    return Export(
        site="Elm",
        root=place / f"{MARKER}export",
        store=place / "store",
        secret_folder=place,
        labels=LABELS,
        settings=chosen,
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Two patients of four slices, one of them without mask, a held-back series, and a text file."""
    place = tmp_path_factory.mktemp("known")
    export = export_of(place)
    write_series(export.root / "a", "one", seed=1)
    write_series(export.root / "b", "two", seed=2)
    write_series(export.root / "c", "two", 2, seed=3, BurnedInAnnotation="YES")
    (export.root / "notes.txt").write_text(MARKER)
    ingest(export)
    quality_report(export.store, export.site, LABELS)
    return export


def record_of(export: Export) -> dict:
    return json.loads((export.store / RECORD).read_text())


def page_of(export: Export) -> str:
    return (export.store / PAGE).read_text()


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_the_counts_are_those_of_the_series(known: Export):
    record = record_of(known)
    assert (record["found"], record["used"], record["patients"], record["files_set_aside"]) == (10, 6, 2, 1)
    by_series = sorted((item["found"], item["used"], item["with_label"]) for item in record["series"])
    assert by_series == [(2, 0, 0), (4, 3, 2), (4, 3, 2)]
    by_patient = sorted((item["series"], item["found"], item["used"], item["with_label"]) for item in record["per_patient"])
    assert by_patient == [(1, 4, 3, 2), (2, 6, 3, 2)]
    assert record["splits"]["train"] == {"patients": 2, "series": 2, "images": 6}
    assert record["splits"]["val"] == {"patients": 0, "series": 0, "images": 0}
    reasons = {(item["number"], item["frames"], item["of"]) for item in record["reasons"]}
    assert reasons == {(116, 1, "files"), (124, 2, "images"), (126, 2, "images")}


def test_volumes_and_label_rates_are_those_of_the_masks(known: Export):
    record = record_of(known)
    used = [item for item in record["series"] if item["used"]]
    for item in used:
        assert item["spacing_mm"] == [5.0, 1.0, 1.5]
        assert item["class_px"][1:] == [4 + 8, 3]
        assert item["class_ml"][1:] == pytest.approx([12 * 7.5 / 1000, 3 * 7.5 / 1000])
        assert 450 < item["mean"] < 550
        assert 0 <= item["window"][0] < 20
        assert 980 < item["window"][1] <= 999
    background, lesion, core = record["label_rates"]["site"]
    assert (background["images_share"], lesion["images"], core["images"]) == (1.0, 4, 2)
    assert lesion["images_share"] == pytest.approx(4 / 6)
    assert core["pixels_share"] == pytest.approx(2 * 3 / (6 * ROWS * COLUMNS))
    assert sum(rate["pixels_share"] for rate in (background, lesion, core)) == pytest.approx(1.0)
    assert record["label_rates"]["train"] == record["label_rates"]["site"]
    assert record["label_rates"]["test"][1] == {
        "label": "lesion",
        "images": 0,
        "images_share": None,
        "pixels": 0,
        "pixels_share": None,
    }


def test_the_page_tells_each_reason_with_its_remedy_and_each_series(known: Export):
    html = page_of(known)
    for item in record_of(known)["reasons"]:
        assert f"ICM{item['number']}" in html
        assert CATALOGUE[item["number"]].remedy.replace("'", "&#39;") in html
    for item in record_of(known)["series"]:
        assert item["series"] in html
        assert item["patient"] in html


def test_a_held_back_series_has_no_picture(known: Export):
    held = next(item["series"] for item in record_of(known)["series"] if not item["used"])
    assert len(pictures(page_of(known))) == 2
    assert f"Slice of series {held}" not in page_of(known)


def test_page_and_record_hold_no_marker_and_are_for_the_owner_alone(known: Export):
    for name in (PAGE, RECORD):
        assert MARKER not in (known.store / name).read_text()
        assert (known.store / name).stat().st_mode & 0o777 == 0o600
    assert str(known.root) not in page_of(known)


def test_the_page_is_well_formed_and_needs_nothing_besides_itself(known: Export):
    opened: list[str] = []
    sources: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            sources.extend(str(value) for name, value in attrs if name in {"src", "href", "srcset", "data"})
            assert tag not in {"script", "link", "iframe", "object"}
            if tag not in {"meta", "img", "br"}:
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag == "rect"

    Reader().feed(page_of(known))
    assert not opened
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page_of(known)


def test_texts_are_escaped(known: Export):
    record = record_of(known)
    record["series"][0]["modality"] = "<img src=x>"
    record["reasons"][0]["why"] = "<script>1</script>"
    html = quality_page(known.store, "<b>Elm</b>", record)
    assert "<script>" not in html
    assert "<img src=x>" not in html
    assert "<b>Elm" not in html
    assert "&lt;script&gt;1" in html


def test_the_slice_with_most_label_is_shown_with_its_outlines(known: Export):
    for picture in pictures(page_of(known)):
        assert picture.width == THUMBNAIL_PIXELS
        assert picture.height == round(THUMBNAIL_PIXELS * ROWS * 1.0 / (COLUMNS * 1.5))
        seen = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
        assert set(LABEL_COLOURS[:2]) <= seen, "only slice 2 has both classes"


def test_a_thumbnail_keeps_the_grey_values_and_draws_only_the_edge():
    ramp = np.tile(np.linspace(0.0, 1.0, 64, dtype=np.float32), (64, 1))
    classes = np.zeros((64, 64), np.uint8)
    classes[20:40, 20:40] = 1
    (picture,) = pictures(f'src="{thumbnail(ramp, classes, (64, 64))}"')
    seen = np.asarray(picture.convert("RGB")).astype(int)
    edge = (seen == LABEL_COLOURS[0]).all(axis=2)
    assert edge.sum() == 4 * 20 - 4
    assert edge[20, 20:40].all()
    grey = ~edge
    assert np.abs(seen[..., 0] - ramp * 255)[grey].max() <= 3
    assert (seen[..., 0] == seen[..., 2])[grey].all()


def test_thumbnails_are_bounded_and_the_rest_is_counted(known: Export, monkeypatch: pytest.MonkeyPatch):
    record = record_of(known)
    record["series"] = [item for item in record["series"] if item["used"]] * 5
    monkeypatch.setattr(page, "THUMBNAILS", 4)
    html = quality_page(known.store, "Elm", record)
    assert len(pictures(html)) == 4
    assert "6 further series" in html


def test_a_frame_that_is_gone_is_told_instead_of_shown(known: Export, tmp_path: Path):
    html = quality_page(tmp_path, "Elm", record_of(known))
    assert not pictures(html)
    assert html.count("picture cannot be read: ICM101") == 2


def test_an_unchanged_index_gives_the_report_back_without_reading_a_frame(tmp_path: Path):
    export = export_of(tmp_path)
    write_series(export.root / "a", "one")
    ingest(export)
    first = quality_report(export.store, "Elm", LABELS)
    shutil.rmtree(export.store / "frames")
    before = [(export.store / name).stat().st_ino for name in (PAGE, RECORD)]
    assert quality_report(export.store, "Elm", LABELS) == first
    assert [(export.store / name).stat().st_ino for name in (PAGE, RECORD)] == before
    assert len(pictures(page_of(export))) == 1


@pytest.mark.parametrize("harm", ["page is gone", "record is gone", "record is damaged", "index changed"])
def test_the_report_is_made_again_where_it_does_not_belong_to_the_index(tmp_path: Path, harm: str):
    export = export_of(tmp_path)
    write_series(export.root / "a", "one")
    ingest(export)
    quality_report(export.store, "Elm", LABELS)
    if harm == "index changed":
        write_series(export.root / "b", "two", seed=5)
        ingest(export)
    elif harm == "record is damaged":
        (export.store / RECORD).write_bytes(b"\xff{")
    else:
        (export.store / (PAGE if harm == "page is gone" else RECORD)).unlink()
    record = quality_report(export.store, "Elm", LABELS)
    assert record == record_of(export)
    assert record["used"] == 3 * len(pictures(page_of(export))) == (6 if harm == "index changed" else 3)


def site_file(place: Path, export: Path, labels: str = "[1, 255]") -> Path:
    classes = "".join(
        f'[[labels]]\nname = "{name}"\nvalues = {values}\n' for name, values in (("air", "[0]"), ("lesion", labels))
    )
    (place / "study.toml").write_text(f'name = "tiny"\nseed = 1\n{classes}[backbone]\ndigest = "{"0" * 64}"\n')
    approve(place / "state", read_study(place / "study.toml"), "0" * 64, datetime.now(UTC))
    (place / "site.toml").write_text(f'name = "Elm"\n[ingest]\nfolder = "{export}"\nprocesses = 2\nshares = [1.0, 0.0, 0.0]\n')
    return place / "site.toml"


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal_and_cuts_no_hash(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_series(tmp_path / "export/a", "one", seed=1)
    write_series(tmp_path / "export/b", "two", 2, seed=2, BurnedInAnnotation="YES")
    reports = ingest_site(site_file(tmp_path, tmp_path / "export", "[128, 255]"), "Elm", dry_run=False)
    monkeypatch.setenv("COLUMNS", str(width))
    print_report(reports)
    printed = capsys.readouterr().out
    table = printed.split("train:")[0].splitlines()
    rows = [line for line in table if line.lstrip().startswith(("P-", "S-", "patient"))]
    assert max(map(len, rows)) <= width
    for item in reports[0]["series"]:
        (row,) = (line for line in rows if item["series"] in line)
        assert f"{item['used']}/{item['found']}" in row
        assert item["patient"] in printed
    used = next(line for line in rows if "3/4" in line and "S-" in line)
    assert re.search(r"train +MR +3/4 +5x1x1.5 +lesion 0.1 ml +124:1", used)
    assert "126:2" in printed
    assert "3 of 6 images used, 1 patient" in printed
    assert reports[0]["page"] in printed
    assert Path(reports[0]["page"]).is_file()


def test_forgetting_a_patient_takes_the_pictures_from_the_report(tmp_path: Path):
    write_series(tmp_path / "export/a", "one", seed=1)
    write_series(tmp_path / "export/b", "two", seed=2)
    path = site_file(tmp_path, tmp_path / "export", "[128, 255]")
    shown = Path(ingest_site(path, "Elm", dry_run=False)[0]["page"])
    forget_patient(path, "Elm", "one")
    assert not shown.exists()
    assert not shown.with_name(RECORD).exists()
    ingest_site(path, "Elm", dry_run=False)
    assert len(pictures(shown.read_text())) == 1


def test_the_rate_is_the_average_and_stays_when_the_step_is_done():
    now = [0.0]
    with Progress(RateColumn(), get_time=lambda: now[0], disable=True) as progress:
        step = progress.add_task("decode", total=1000)
        now[0] = 2.0
        progress.update(step, completed=100)
        assert RateColumn().render(progress.tasks[0]).plain == "50.0 images/s, 0:00:18 left"
        now[0] = 10.0
        progress.update(step, completed=1000)
        now[0] = 60.0
        assert RateColumn().render(progress.tasks[0]).plain == "100.0 images/s"


@pytest.mark.real
@pytest.mark.skipif(not DATA.exists(), reason="the real hospital images are not here")
def test_a_rerun_on_unchanged_real_data_opens_no_file_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """How much faster it is, at least 20 times, is measured by `simulations/benchmarks/ingest.py`."""
    from icmoe.data.ingest import work

    path, opened = site_file(tmp_path, DATA / "lgg-dicom"), 0

    def counted(function, items, *_, **__):
        nonlocal opened
        for item in items:
            opened += 1
            yield item, function(item)

    monkeypatch.setattr(work, "in_processes", counted)
    first = ingest_site(path, "Elm", dry_run=False)
    assert opened > 0
    opened = 0
    second = ingest_site(path, "Elm", dry_run=False)
    assert opened == 0
    assert [{**report, "changed": True} for report in second] == first
    assert len(pictures(Path(first[0]["page"]).read_text())) == 8


def seconds_for(store: Path, series: int) -> float:
    result = FrameResult(entry="e", digest="d", rows=2, columns=2, high=1.0, class_px=(3, 1, 0))
    rows = [
        FrameRow(patient=f"P-{n}", series=f"S-{n}", split="train", index=0, modality="MR", spacing=None, result=result)
        for n in range(series)
    ]
    with index.claimed(store) as connection, index.transaction(connection):
        index.write_frames(connection, rows, [])
    gc.disable()  # its pauses grow with all that other tests left
    try:
        started = time.perf_counter()
        assert quality_record(store, LABELS)["label_rates"]["site"][1]["pixels"] == series
        return time.perf_counter() - started
    finally:
        gc.enable()


def test_the_time_for_a_record_grows_with_the_series_and_not_with_their_square(tmp_path: Path):
    few, many = (min(seconds_for(tmp_path / f"{series}-{n}", series) for n in range(3)) for series in (500, 8000))
    assert many < 50 * few, "16 times the series"
