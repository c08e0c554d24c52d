"""What `fl_client ingest` and `fl_client forget` do for every study that the site approved."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fl_client.approval import approved_studies, read_approvals
from fl_client.site import site_export
from fl_client.sitefile import SiteFile, read_named
from icmoe.atomic import write_atomically
from icmoe.data.ingest.quality import quality_record
from icmoe.data.ingest.run import Export, forget, gone_digests, ingest
from icmoe.features import FeatureCache, default_cache_folder
from icmoe.study import Study

REPORT = "quality.json"


def ingest_site(path: Path, name: str, *, dry_run: bool) -> list[dict[str, Any]]:
    """Bring the index of every approved study up to date and return one quality record per study.

    Parameters
    ----------
    path
        The site file.
    name
        The site that the command names; must be the file's.
    dry_run
        Whether to work in a temporary folder that is removed.

    Raises
    ------
    IcmoeError
        2xx for the site file, 316 where no study is approved, 109, 110, 129, 130 for the ingest.
    """
    settings, studies = _approved(path, name)
    reports = []
    for study in studies:
        with _place(site_export(path, settings, study), dry_run=dry_run) as export, _bars() as on_progress:
            changed = ingest(export, on_progress=on_progress)
            record = quality_record(export.store, study.labels)
            if not dry_run:
                write_atomically(export.store / REPORT, json.dumps(record, indent=1).encode(), private=True)
                _drop_features(path, settings, studies, export)
            reports.append({"study": study.name, "changed": changed, **record})
    return reports


def forget_patient(path: Path, name: str, patient: str) -> tuple[int, int]:
    """Take a patient out of every index, those of withdrawn studies too; return how many images and cached views went."""
    settings = read_named(path, name)
    studies = tuple(approval.study for approval in read_approvals(path.parent / settings.state))
    frames = features = 0
    for study in studies:
        export = site_export(path, settings, study)
        frames += forget(export, patient)
        features += _drop_features(path, settings, studies, export)
    return frames, features


def print_report(reports: list[dict[str, Any]]) -> None:
    """Print the quality records as tables."""
    console = Console()
    for report in reports:
        table = Table(title=report["study"], title_justify="left")
        for column in ("series", "patient"):
            table.add_column(column, no_wrap=True)  # to be copied into the site file
        for column in ("split", "used", "left out", "with label", "spacing mm"):
            table.add_column(column)
        for row in report["series"]:
            spacing = " ".join(f"{value:g}" for value in row["spacing_mm"]) if row["spacing_mm"] else "-"
            numbers = [str(row["used"]), str(row["left_out"]), str(row["with_label"]), spacing]
            table.add_row(row["series"], row["patient"], row["split"], *numbers)
        console.print(table)
        for item in report["reasons"]:
            console.print(f"{item['frames']} x {item['sentence']}", highlight=False, soft_wrap=True)
        console.print(f"{report['used']} of {report['found']} images used, {report['patients']} patients", highlight=False)


def _approved(path: Path, name: str) -> tuple[SiteFile, tuple[Study, ...]]:
    settings = read_named(path, name)
    return settings, approved_studies(path.parent / settings.state)


@contextmanager
def _place(export: Export, *, dry_run: bool) -> Iterator[Export]:
    if not dry_run:
        yield export
        return
    folder = Path(tempfile.mkdtemp(prefix="icmoe-dry-run-"))
    try:
        secret = export.secret_folder / "secret.key"
        if secret.exists():
            shutil.copy2(secret, folder)
        yield replace(export, store=folder / "store", secret_folder=folder)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _bars() -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars: dict[str, Any] = {}

        def on_progress(step: str, done: int, total: int) -> None:
            if step not in bars:
                bars[step] = progress.add_task(step, total=total)
            progress.update(bars[step], completed=done, total=total)

        yield on_progress


def _drop_features(path: Path, settings: SiteFile, studies: tuple[Study, ...], export: Export) -> int:
    """Remove the cached features of pictures that are gone and return their number."""
    folder = path.parent / settings.cache if settings.cache else default_cache_folder()
    removed = 0
    with gone_digests(export.store) as digests:
        for study in studies:
            cache = FeatureCache.of(folder, study)
            for digest in digests:
                for view in ("identity", "flip", "dark", "bright"):
                    entry = cache.path(cache.key(digest, view))
                    removed += entry.exists()
                    entry.unlink(missing_ok=True)
    return removed
