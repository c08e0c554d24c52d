"""What ingest holds in memory does not grow with the export."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from icmoe.data.ingest import catalogue, index
from icmoe.data.ingest.catalogue import Catalogue
from icmoe.data.ingest.pairing import pair
from icmoe.data.ingest.planning import Planned, Site, plan
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.publishing import Publication
from icmoe.data.ingest.records import FileRecord, FramePlace, FrameResult

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
