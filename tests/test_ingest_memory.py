"""What ingest holds in memory does not grow with the export."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from icmoe.data.ingest import catalogue, index
from icmoe.data.ingest.catalogue import Catalogue
from icmoe.data.ingest.index import FrameRow, LeftOut
from icmoe.data.ingest.pairing import pair
from icmoe.data.ingest.planning import Planned, Site, plan
from icmoe.data.ingest.pseudonyms import Pseudonyms, site_pseudonyms
from icmoe.data.ingest.publishing import Publication
from icmoe.data.ingest.quality import quality_record
from icmoe.data.ingest.records import FileRecord, FramePlace, FrameResult
from icmoe.data.ingest.run import forget, sharing
from icmoe.study import Label

SLICES = 16
HASHES = Pseudonyms(bytes(32))


def record_of(path: str, place: int) -> FileRecord:
    patient, series = HASHES.patient(path[:6]), HASHES.of("folder", path[:6])
    return FileRecord(
        kind="picture", mask="mask" in path, rows=9, columns=9, patient=patient, series=series, frames=(_place(place),)
    )


def _place(place: int) -> FramePlace:
    return FramePlace(plane=(0.0, 0.0, float(place), 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0), order=(float(place),))


def peak_bytes(store: Path, files: int) -> tuple[int, int]:
    """Return the peak of memory while files are paired, planned and published, and the frames that were published."""
    paths = [f"{n // (2 * SLICES):06}/{n % (2 * SLICES) // 2}{'_mask' if n % 2 else ''}.png" for n in range(files)]
    with index.claimed(store) as connection:
        rows = [(HASHES.of("file", path), 1, 1, record_of(path, n).model_dump_json()) for n, path in enumerate(paths)]
        connection.executemany("insert into file values (?, ?, ?, ?)", rows)
        del rows
        tracemalloc.start()
        found = Catalogue(connection, ((path, HASHES.of("file", path), 1, 1) for path in paths))
        assert (found.new(), found.gone()) == (0, False)
        found.sort(HASHES)
        pair(found)
        publication = Publication(connection, ())
        for planned in plan(found, Site(store, store, HASHES, (), (), ())):
            publication.note(planned)
            assert isinstance(planned, Planned)
            results = [FrameResult(entry=f.entry, digest=f.entry, picture=f.entry) for f in planned.job.frames]
            index.put_series(connection, planned.job.series, planned.mark, results)
        publication.write(lambda patient, number: "train")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, int(connection.execute("select count(*) from frame").fetchone()[0])


def test_an_export_three_times_as_large_takes_hardly_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalogue, "KEPT", 16)  # what is held at all times
    few, many = 320, 960
    (small, used), *runs = [peak_bytes(tmp_path / str(n), files) for n, files in enumerate((few, many, many))]
    assert (used, runs[0][1]) == (few // 2, many // 2)
    large = min(peak for peak, _ in runs)  # Python's own tables grow in steps, now and then
    assert (large - small) / (many - few) < 500, "bytes per file: 5 MB for ten thousand"


LABELS = (Label(name="background", values=(0,)), Label(name="lesion", values=(1,)))


def published(store: Path, frames: int) -> Path:
    """Make an index of four series of two patients with so many frames, and as many that are left out."""
    series = [(name, HASHES.patient(name[0])) for name in ("a1", "a2", "b1", "b2")]
    with index.claimed(store) as connection:
        rows = (
            FrameRow(
                patient=patient,
                series=name,
                split="train",
                index=n,
                modality="MR",
                spacing=None,
                result=FrameResult(entry=f"{name}{n:06}", digest=f"{name}{n:06}", class_px=(90, n % 7), mean=float(n)),
            )
            for name, patient in series
            for n in range(frames // 4)
        )
        why = "a copy of it is used"
        out = (
            LeftOut(subject=name, number=125, why=why, patient=patient, series=name)
            for _ in range(frames // 4)
            for name, patient in series
        )
        index.write_frames(connection, rows, out)
    return store


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_the_quality_record_and_forgetting_hold_no_frame_in_memory(tmp_path: Path):
    few, many = 800, 3200
    for frames in (few, many):
        site_pseudonyms(tmp_path / str(frames))
    stores = {frames: published(tmp_path / str(frames) / "store", frames) for frames in (few, many)}
    quality_record(stores[few], LABELS)  # what is imported and compiled is no part of it

    def forgotten(frames: int) -> None:
        place = stores[frames].parent
        assert not sharing(place, HASHES.patient("a"))
        assert forget(place, HASHES.patient("a")) == frames // 2

    record, going = (
        [peak_of(lambda: work(frames)) for frames in (few, many)]  # noqa: B023  # called at once
        for work in (lambda frames: quality_record(stores[frames], LABELS), forgotten)
    )
    assert record[1] - record[0] < 100 * (many - few), "bytes per frame, eight of them for its mean; a row takes thousands"
    assert going[1] - going[0] < 100 * (many - few)
    kept = quality_record(stores[many], LABELS)
    assert (kept["used"], kept["found"], kept["patients"]) == (many // 2, many, 1)
    assert kept["series"][0]["mean"] == (many // 4 - 1) / 2
