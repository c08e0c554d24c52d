"""Ingest beside plain pydicom: the same files, the same run, without any encoder.

    python simulations/benchmarks/ingest.py --data EXPORT

Prints files per second of `pydicom.dcmread(...).pixel_array`, of a first ingest and of one on unchanged data.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import pydicom

from icmoe.data.ingest.run import Export, ingest
from icmoe.data.ingest.settings import IngestSettings
from icmoe.study import Label

LABELS = (Label(name="background", values=(0,)), Label(name="lesion", values=(1, 255)))


def measure(root: Path) -> dict[str, float]:
    """Return seconds of each way and the two ratios.

    Parameters
    ----------
    root
        An export; every DICOM file with pixels below it counts.
    """
    plain_s, files = _plain(root), sum(path.is_file() for path in root.rglob("*"))
    with tempfile.TemporaryDirectory() as folder:
        settings = IngestSettings(folder=str(root))
        place = Path(folder)
        export = Export(site="benchmark", root=root, store=place / "store", secret_folder=place, labels=LABELS, settings=settings)
        started = time.perf_counter()
        ingest(export)
        first_s = time.perf_counter() - started
        started = time.perf_counter()
        ingest(export)
        again_s = time.perf_counter() - started
    return {
        "files": files,
        "plain_s": plain_s,
        "first_s": first_s,
        "again_s": again_s,
        "speed_of_plain": plain_s / first_s,
        "restart_gain": first_s / again_s,
    }


def _plain(root: Path) -> float:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    started = time.perf_counter()
    for path in paths:
        try:
            _ = pydicom.dcmread(path).pixel_array
        except Exception:  # noqa: BLE001, S112  # masks and other files: they cost time on both sides
            continue
    return time.perf_counter() - started


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    sys.stdout.write(json.dumps(measure(parser.parse_args().data), indent=1) + "\n")


if __name__ == "__main__":
    main()
