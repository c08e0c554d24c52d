"""What `fl_client ingest` and `fl_client forget` do for every study that the site approved."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fl_client.approval import approved_studies, read_approvals
from fl_client.preparing import encode_ingested
from fl_client.progress import bars
from fl_client.site import SiteFile, cache_folder_of, read_named, site_export
from icmoe.cache_entries import forget_images
from icmoe.data.ingest.page import PAGE, drop_report, quality_report
from icmoe.data.ingest.quality import quality_record
from icmoe.data.ingest.run import Export, forget, gone_digests, ingest
from icmoe.study import Study


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
        with _place(site_export(path, settings, study), dry_run=dry_run) as export, bars() as on_progress:
            changed = ingest(export, on_progress=on_progress)
            if dry_run:
                record = quality_record(export.store, study.labels)
            else:
                record = quality_report(export.store, export.site, study.labels, on_progress=on_progress)
                record["page"] = str(export.store / PAGE)
                _drop_features(path, settings, export)
            reports.append({"study": study.name, "changed": changed, **record})
    return reports


def encode_site(path: Path, name: str, reports: list[dict[str, Any]]) -> None:
    """Fill the feature cache of every approved study and note in its report how many views were new.

    Raises
    ------
    IcmoeError
        206, 207 for the backbone's weights, 211 for the device; the index is complete all the same.
    """
    settings, studies = _approved(path, name)
    for study, report in zip(studies, reports, strict=True):
        with bars() as on_progress:
            report["encoded"] = encode_ingested(path, settings, study, on_progress=on_progress)


def forget_patient(path: Path, name: str, patient: str) -> tuple[int, int]:
    """Take a patient out of every index, those of withdrawn studies too; return how many images and cached views went."""
    settings = read_named(path, name)
    studies = tuple(approval.study for approval in read_approvals(path.parent / settings.state))
    frames = features = 0
    for study in studies:
        export = site_export(path, settings, study)
        drop_report(export.store)  # it shows the patient
        frames += forget(export, patient)
        features += _drop_features(path, settings, export)
    return frames, features


def print_report(reports: list[dict[str, Any]]) -> None:
    """Print the quality records as tables, each with its reasons and where its page is."""
    console = Console(highlight=False)
    for report in reports:
        console.print(_table(report))
        for item in report["reasons"]:
            console.print(f"{_many(item['frames'], item['of'])}: {item['sentence']}", markup=False, soft_wrap=True)
        for split, counts in report["splits"].items():
            line = f"{split}: {_many(counts['patients'], 'patients')}, {_many(counts['images'], 'images')}"
            rates = report["label_rates"][split][1:] if counts["images"] else []
            console.print(", ".join([line, *(f"{rate['label']} on {rate['images_share']:.0%}" for rate in rates)]))
        console.print(f"{report['used']} of {_many(report['found'], 'images')} used, {_many(report['patients'], 'patients')}")
        if "page" in report:
            console.print(f"Page with pictures, for this site alone: {report['page']}", markup=False, soft_wrap=True)


def _table(report: dict[str, Any]) -> Table:
    """Return one block per patient: its sums, then its series; hashes are never cut, since people copy them."""
    table = Table(title=f"{report['study']}: used of found", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("patient, series", no_wrap=True)
    for column in ("split", "kind"):
        table.add_column(column, no_wrap=True)
    table.add_column("used", no_wrap=True, justify="right")
    for column in ("spacing mm", "labels", "reasons"):
        table.add_column(column)
    series: dict[str, list[dict[str, Any]]] = {}
    for row in report["series"]:
        series.setdefault(row["patient"], []).append(row)
    for patient in report["per_patient"]:
        name = Text(patient["patient"] or "no single patient", "bold")
        labelled = f"{patient['with_label']} images" if patient["used"] else ""
        table.add_row(name, patient["split"], "", f"{patient['used']}/{patient['found']}", "", labelled, "")
        for row in series[patient["patient"]]:
            spacing = "x".join(f"{value:.3g}" for value in row["spacing_mm"]) if row["spacing_mm"] else "-"
            reasons = " ".join(f"{item['number']}:{item['frames']}" for item in row["reasons"])
            used = f"{row['used']}/{row['found']}"
            table.add_row(
                f" {row['series']}", row["split"], row["modality"], used, spacing, _volumes(row, report["labels"]), reasons
            )
    return table


def _many(number: int, things: str) -> str:
    return f"{number} {things if number != 1 else things[:-1]}"


def _volumes(row: dict[str, Any], labels: list[str]) -> str:
    values, unit = (row["class_ml"], "ml") if row["class_ml"] else (row["class_px"], "px")
    pairs = list(zip(labels, values, strict=False))[1:]
    return ", ".join(f"{name} {value:,.{1 if unit == 'ml' else 0}f} {unit}" for name, value in pairs)


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


def _drop_features(path: Path, settings: SiteFile, export: Export) -> int:
    """Remove the cached features of pictures that are gone and return their number."""
    with gone_digests(export.store) as digests:
        return forget_images(cache_folder_of(path, settings), digests)
