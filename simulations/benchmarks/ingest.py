"""Ingest beside plain pydicom: the same files, without any encoder.

    python simulations/benchmarks/ingest.py --data EXPORT
    python simulations/benchmarks/ingest.py --made 2000

Both ways read every image of the export and every mask that it has as DICOM: pydicom with `dcmread(...).pixel_array` in one
process, ingest with all that it does besides. Measured are two forms, in turns, each time in a new process:

* `work`: the seconds from the moment when everything is imported, as for a program that does other things as well; the
  processes that ingest forks count, with what a file makes them import (nibabel for a volume, pydicom's decoders).
* `command`: the seconds from start to end of `python -c` with the plain loop, and of `fl_client ... ingest --no-encode`, as
  somebody at a hospital waits for it: interpreter, imports, report and page included.

Printed are medians with the least and the greatest. Seconds of all processors hang less on what else a machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simulations.benchmarks.row import Row

SLICES = 25
LIMITS = {"speed": 0.5, "restart": 20.0}
BECOME_REAPER = 36
"""Option of Linux's prctl: what a child leaves behind becomes ours, and its time counts."""
STEPS = ("plain", "first", "again")
FORMS = ("work", "command")
PLAIN_COMMAND = """
import sys, pydicom
for line in open(sys.argv[1]):
    try:
        pydicom.dcmread(line.strip()).pixel_array
    except Exception:
        pass
"""
INGEST_COMMAND = "from fl_client.cli import main; main()"
STUDY = """
name = "benchmark"
seed = 1
labels = [{ name = "background", values = [0] }, { name = "lesion", values = [1, 255] }]
[backbone]
digest = "0000000000000000000000000000000000000000000000000000000000000000"
"""


def plain(paths: Sequence[Path]) -> None:
    """Decode every file; a damaged one costs its time."""
    import pydicom

    for path in paths:
        try:
            _ = pydicom.dcmread(path).pixel_array
        except Exception:  # noqa: BLE001, S112  # ingest has to try it too
            continue


def ingested(root: Path, place: Path) -> None:
    """Bring the index at `place` up to date."""
    from icmoe.data.ingest.run import Export, ingest
    from icmoe.data.ingest.settings import IngestSettings
    from icmoe.study import Label

    labels = (Label(name="background", values=(0,)), Label(name="lesion", values=(1, 255)))
    settings = IngestSettings(folder=str(root))
    ingest(Export(site="benchmark", root=root, store=place / "store", secret_folder=place, labels=labels, settings=settings))


def images(root: Path) -> list[Path]:
    """Return the DICOM files with pixels, masks among them."""
    from pydicom.tag import Tag

    from icmoe.data.ingest.opening import Refusal, open_dicom

    found = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        try:
            data = open_dicom(path, pixels=False, tags=[Tag("Rows")])
        except Refusal:
            continue
        if "Rows" in data:
            found.append(path)
    return found


def measure(root: Path, repeats: int, chosen: Sequence[str] = FORMS) -> dict[str, Any]:
    """Return files, seconds of each way in both forms and the ratios beside what is asked for.

    Parameters
    ----------
    root
        An export; files that are no DICOM images are passed over by pydicom and read by ingest.
    repeats
        Times that each way is taken.
    chosen
        Those of the forms that are taken.
    """
    listed = images(root)
    seconds: dict[str, dict[str, list[dict[str, float]]]] = {form: {step: [] for step in STEPS} for form in chosen}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "list").write_text("\n".join(map(str, listed)))
        for repeat in range(repeats):
            for form in chosen:
                place = _site(Path(folder) / f"{form}{repeat}", root)
                for step in STEPS:
                    seconds[form][step].append(_timed(form, step, root, place))
    forms = {form: {**_ratios(found), **{step: _spreads(found[step]) for step in STEPS}} for form, found in seconds.items()}
    load = round(os.getloadavg()[0], 1)
    return {"images": len(listed), "processors": os.cpu_count(), "load": load, "repeats": repeats, "limits": LIMITS, **forms}


def rows(*, quick: bool) -> list[Row]:
    """Return speed and restart of the `work` form for made-up exports, medians of the clock.

    Parameters
    ----------
    quick
        One small export, once.
    """
    ctypes.CDLL(None).prctl(BECOME_REAPER, 1, 0, 0, 0)
    sizes = (("MR", 25),) if quick else (("MR", 6000), ("MR", 2000), ("CT", 2000), ("CT", 500))
    return [row for kind, count in sizes for row in _rows_of(kind, count, 1 if quick else 3)]


def _rows_of(kind: str, count: int, repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), kind, count)
        found = measure(Path(folder), repeats, ["work"])["work"]
    plain_s, first_s, again_s = (found[step]["clock_s"]["median"] for step in STEPS)
    what = f"ingest of {count:,} {kind} slices without encoder"
    cpu_s = found["first"]["cpu_s"]["median"]
    speed: dict[str, Any] = {"against": "pydicom.dcmread(...).pixel_array", "bar": LIMITS["speed"], "note": f"{cpu_s:.2f} CPU s"}
    restart: dict[str, Any] = {"against": "the first run", "bar": LIMITS["restart"]}
    return [
        Row(what=what, ours=first_s, limit=plain_s, unit="s", at_most=False, **speed),
        Row(what=f"{what}, again on unchanged data", ours=again_s, limit=first_s, unit="s", at_most=False, **restart),
    ]


def _ratios(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the share of plain reading's speed and the gain of a restart, by clock and by processors."""
    pairs = {"speed": ("plain", "first"), "restart": ("first", "again")}
    return {
        name + by: _spread([a[key] / b[key] for a, b in zip(found[one], found[other], strict=True)])
        for name, (one, other) in pairs.items()
        for by, key in (("", "clock_s"), ("_by_processors", "cpu_s"))
    }


def _spreads(found: list[dict[str, float]]) -> dict[str, Any]:
    return {key: _spread([one[key] for one in found]) for key in found[0]}


def _site(place: Path, root: Path) -> Path:
    """Return a folder with the file of a site that approved a study, for the command."""
    from fl_client.approval import approve
    from icmoe.study import read_study

    place.mkdir()
    (place / "study.toml").write_text(STUDY)
    (place / "site.toml").write_text(f'name = "Elm"\n[ingest]\nfolder = "{root.resolve()}"\n')
    approve(place / "state", read_study(place / "study.toml"), "0" * 64, datetime.now(UTC))
    return place


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "least": round(min(values), 3), "greatest": round(max(values), 3)}


def _timed(form: str, step: str, root: Path, place: Path) -> dict[str, float]:
    """Return the seconds of one way in a process of its own, on the clock and of all processors that it and its own used."""
    listed = str(place.parent / "list")
    if form == "work":
        command = [__file__, "--step", step, "--data", str(root), "--place", str(place)]
    elif step == "plain":
        command = ["-c", PLAIN_COMMAND, listed]
    else:
        command = ["-c", INGEST_COMMAND, "--site", "Elm", "--config", str(place / "site.toml"), "ingest", "--no-encode"]
    before, started = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, timeout=3600)
    whole_s = time.perf_counter() - started
    with contextlib.suppress(ChildProcessError):  # its workers are ours since it ended; this process must have no others
        while True:
            os.waitpid(-1, 0)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    own = json.loads(done.stdout) if form == "work" else {"clock_s": whole_s, "imports_cpu_s": 0.0}
    return {"clock_s": own["clock_s"], "cpu_s": cpu_s - own["imports_cpu_s"]}


def _step(step: str, root: Path, place: Path) -> dict[str, float]:
    """Do one way in this process and return its seconds after the imports, and what these took of the processor."""
    if step == "plain":
        import pydicom.pixels  # noqa: F401

        listed = [Path(line) for line in (place.parent / "list").read_text().splitlines()]
    else:
        from icmoe.data.ingest import work  # noqa: F401
    imports_cpu_s, started = time.process_time(), time.perf_counter()
    if step == "plain":
        plain(listed)
    else:
        ingested(root, place)
    return {"clock_s": time.perf_counter() - started, "imports_cpu_s": imports_cpu_s}


def make(root: Path, kind: str, count: int) -> None:
    """Write an export of made-up series of `SLICES` slices, uncompressed, with a SEG object each.

    Parameters
    ----------
    root
        Folder to write into.
    kind
        MR is 256 x 256 of 16 bits, CT 512 x 512 of 12 bits with a rescale intercept.
    count
        Number of images.
    """
    import highdicom as hd
    import numpy as np
    from pydicom.sr.codedict import codes

    described = hd.seg.SegmentDescription(
        1, "lesion", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm, hd.seg.SegmentAlgorithmTypeValues.MANUAL
    )
    for number, start in enumerate(range(0, count, SLICES)):
        sources = _series(root / f"p{number:04d}", kind, min(SLICES, count - start), number)
        marks = np.zeros((len(sources), sources[0].Rows, sources[0].Columns), dtype=np.uint8)
        marks[len(sources) // 4 : len(sources) // 2 + 1, 90:120, 100:140] = 1
        hd.seg.Segmentation(sources, marks, "BINARY", [described], hd.UID(), 9, hd.UID(), 1, "Nobody", "None", "0", "0").save_as(
            root / f"p{number:04d}" / "seg.dcm"
        )


def _series(folder: Path, kind: str, count: int, seed: int) -> list[Any]:
    """Write and return the slices of a smooth body with noise, whose headers are as long as those of scanners."""
    import numpy as np
    import pydicom
    from pydicom.data import get_testdata_file
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    rng, side = np.random.default_rng(seed), 256 if kind == "MR" else 512
    template = pydicom.dcmread(str(get_testdata_file("MR_small.dcm" if kind == "MR" else "CT_small.dcm", download=False)))
    template.remove_private_tags()
    template.pop("PixelPaddingValue", None)
    template.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    template.StudyInstanceUID, template.SeriesInstanceUID, template.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    template.PatientID, template.Rows, template.Columns = f"made {seed}", side, side
    template.PixelSpacing, template.ImageOrientationPatient = [1.0, 1.0], [1, 0, 0, 0, 1, 0]
    rows, columns = np.indices((side, side)) / side - 0.5
    body = np.exp(-12.0 * (rows**2 + columns**2)) * (1.0 + 0.3 * np.sin(40.0 * rows * columns))
    made = []
    for number in range(count):
        data = deepcopy(template)
        grey = body * 900.0 * (1.0 + number / count) + np.abs(rng.normal(0.0, 12.0, body.shape))
        data.PixelData = grey.astype(np.int16).tobytes()
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.InstanceNumber, data.ImagePositionPatient = number + 1, [0.0, 0.0, 5.0 * number]
        data.save_as(folder / f"i{number:04d}.dcm", enforce_file_format=True)
        made.append(data)
    return made


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an export")
    parser.add_argument("--made", type=int, metavar="N", help="make an export of N images")
    parser.add_argument("--kind", choices=("MR", "CT"), default="MR", help="of the images that are made")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        sys.stdout.write(json.dumps(_step(options.step, options.data, options.place)))
        return
    if (options.data is None) == (options.made is None):
        parser.error("one of --data and --made is needed")
    ctypes.CDLL(None).prctl(BECOME_REAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        if options.made:
            make(Path(folder), options.kind, options.made)
        sys.stdout.write(json.dumps(measure(options.data or Path(folder), options.repeats), indent=1) + "\n")


if __name__ == "__main__":
    main()
