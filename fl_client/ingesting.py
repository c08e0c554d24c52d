"""What `fl_client ingest` and `fl_client forget` do for every study that the site approved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fl_client.approval import approved_studies
from fl_client.by_round import forget_unsent
from fl_client.dry_run import passing_folder, remove_killed
from fl_client.one_secret import note_secret, require_same_secret
from fl_client.preparing import encode_ingested
from fl_client.progress import bars
from fl_client.site import SiteFile, cache_folder_of, ingest_folder, read_named, site_export
from icmoe.cache_entries import forget_images
from icmoe.data.ingest.finding import files_of
from icmoe.data.ingest.index import STATE, claimed, is_index, meta, opened, put_meta
from icmoe.data.ingest.page import PAGE, drop_report, quality_report
from icmoe.data.ingest.pseudonyms import SECRET_FILE
from icmoe.data.ingest.quality import quality_record
from icmoe.data.ingest.run import ABSENT, Export, forget, images_of, ingest, sharing, stores_in
from icmoe.data.ingest.shown import SHOWN, no_longer_shown, note_shown
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Study

RUNNING = 130


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
    state, folder = path.parent / settings.state, ingest_folder(path, settings)
    remove_killed()
    with _numbered_os_errors():
        if dry_run:
            return [_ingest_study(path, settings, study, dry_run=True) for study in studies]
        require_same_secret(state, folder)
        reports = [_ingest_study(path, settings, study, dry_run=False) for study in studies]
        note_secret(state, folder)
        return reports


def _ingest_study(path: Path, settings: SiteFile, study: Study, *, dry_run: bool) -> dict[str, Any]:
    with _kept_or_passing(site_export(path, settings, study), dry_run=dry_run) as export, bars() as on_progress:
        if is_index(export.store) and not _is_settled(export):
            note_shown(export.secret_folder, [export.store])  # what is about to be replaced
        changed = ingest(export, on_progress=on_progress)
        if dry_run:
            record = quality_record(export.store, study.labels)
        else:
            record = quality_report(export.store, export.site, study.labels, on_progress=on_progress)
            record["page"] = str(export.store / PAGE)
            if not _is_settled(export):
                note_shown(export.secret_folder, [export.store])
                _drop_features(path, settings)
                _settle(export)
        with opened(export.store) as connection:
            absent = int(meta(connection, ABSENT) or 0)
    passing = dry_run and not (site_export(path, settings, study).secret_folder / SECRET_FILE).exists()
    names = {row["series"] for row in record["series"]}
    unknown = sorted(set(export.settings.allow) - names)
    told = {"allowed_but_not_found": unknown, "split_but_not_found": absent, "hashes_will_change": passing}
    return {"study": study.name, "changed": changed, **told, **record}


@contextmanager
def _numbered_os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        did = "What was kept so far stays; another run continues there."
        todo = "Make room, or move the whole store to another disk and name it there under [ingest]; then run ingest again."
        fault = Fault(
            number=129, where="ingest", what="a file cannot be kept or read", value=error.strerror or "", did=did, todo=todo
        )
        raise IcmoeError(fault) from None


def encode_site(path: Path, name: str, reports: list[dict[str, Any]]) -> None:
    """Fill the feature cache of every approved study and note in its report how many views were new.

    Raises
    ------
    IcmoeError
        206, 207 for the backbone's weights, 211 for the device; the index is complete all the same.
    """
    (settings, studies), faults = _approved(path, name), list[Fault]()
    for study, report in zip(studies, reports, strict=True):
        try:
            with bars() as on_progress:
                report["encoded"] = encode_ingested(path, settings, study, on_progress=on_progress)
        except IcmoeError as error:  # what one study lacks keeps no other waiting
            faults += error.faults
    if faults:
        raise IcmoeError(*faults)


def forget_patient(path: Path, name: str, patient: str) -> tuple[int, int, list[str]]:
    """Take a patient out of every index, those of withdrawn studies too.

    Return how many images and cached views went, and who else has some of the pictures (`sharing`).

    Raises
    ------
    IcmoeError
        203 where the site file has no section [ingest], 210 where nobody is named, 129 or 130 for the ingest.
    """
    settings = read_named(path, name)
    if not patient.strip():
        what, todo = "no patient is named", "Give the hospital's own number, or the P-... of ingest."
        raise IcmoeError(Fault(number=210, where="forget", what=what, did="Nothing was removed.", todo=todo))
    folder = ingest_folder(path, settings)
    remove_killed()
    with _numbered_os_errors():
        require_same_secret(path.parent / settings.state, folder)
        stores = stores_in(folder)
        others = sharing(folder, patient)
        for store in stores:
            drop_report(store)  # it shows the patient
        note_shown(folder, stores)
        used, state = images_of(folder, patient), path.parent / settings.state
        if used:
            forget_unsent(state)  # before, too: killed in between, the next one would find no image of the patient any more
        with _begun_beside_ingest():
            frames = max(used, forget(folder, patient))  # an ingest that runs beside it may be the one that takes them out
        if frames:
            forget_unsent(state)
        return frames, _drop_features(path, settings), others


@contextmanager
def _begun_beside_ingest() -> Iterator[None]:
    """Say what is done and what is left to do where another ingest holds an index."""
    try:
        yield
    except IcmoeError as error:
        did = "The patient is noted and will not be read any more, but what is kept of them is not removed yet."
        todo = "Wait for the other process, or stop it; then forget the patient again."
        running = [replace(one, did=did, todo=todo) if one.number == RUNNING else one for one in error.faults]
        raise IcmoeError(*running) from None


def files_named(path: Path, name: str, wanted: str) -> list[str]:
    """Return the files that a hash of any approved study's report stands for, below the export.

    Raises
    ------
    IcmoeError
        As `files_of`.
    """
    settings, studies = _approved(path, name)
    faults: list[Fault] = []
    for study in studies:
        try:
            return files_of(site_export(path, settings, study), wanted)
        except IcmoeError as error:
            faults = [*error.faults]
    raise IcmoeError(*faults)


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
        if not report["splits"]["train"]["images"]:
            what, did = "site has no usable training image", "It cannot take part in training."
            todo = "Look at the reasons above, or place patients with split_file or shares under [ingest]."
            console.print(str(Fault(number=108, what=what, did=did, todo=todo)), markup=False, soft_wrap=True)
        if unknown := report["allowed_but_not_found"]:
            what, todo = "allow names series that are not there", "Copy their names from the table."
            console.print(str(Fault(number=210, what=what, value=", ".join(unknown), todo=todo)), markup=False, soft_wrap=True)
        if absent := report["split_but_not_found"]:
            what, value = "split_file names patients without an image in the export", str(absent)
            todo = "Correct their numbers: as they stand, the patients meant are dealt by chance."
            console.print(str(Fault(number=110, what=what, value=value, todo=todo)), markup=False, soft_wrap=True)
        if "page" in report:
            console.print(f"Page with pictures, for this site alone: {report['page']}", markup=False, soft_wrap=True)
        elif report["hashes_will_change"]:
            line = "Dry run before the first ingest: P-... and S-... and who is in which split will differ in the real one."
            console.print(line, soft_wrap=True)


def print_encoded(reports: list[dict[str, Any]]) -> None:
    """Print how many views the frozen backbone ran over, as `fl_client prepare` does."""
    for report in reports:
        line = f"{report['study']}: {_many(report['encoded'], 'views')} encoded, {_many(report['used'], 'images')} ready"
        Console(highlight=False).print(line, soft_wrap=True)


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
def _kept_or_passing(export: Export, *, dry_run: bool) -> Iterator[Export]:
    if not dry_run:
        yield export
        return
    with passing_folder() as folder:
        known = (export.secret_folder / SECRET_FILE).exists()
        yield replace(export, store=folder / "store", secret_folder=export.secret_folder if known else folder)


def _is_settled(export: Export) -> bool:
    """Return whether the pictures of an index are noted and the features of those that are gone removed, as it is now."""
    with claimed(export.store) as connection:  # a kill may have left the index without its tables: it has them then
        now = meta(connection, STATE)
        return bool(now) and meta(connection, SHOWN) == now and (export.secret_folder / SHOWN).exists()


def _settle(export: Export) -> None:
    with claimed(export.store) as connection:
        put_meta(connection, {SHOWN: meta(connection, STATE)})


def _drop_features(path: Path, settings: SiteFile) -> int:
    """Remove the cached features of pictures that no index of the site offers any more and return their number."""
    folder = ingest_folder(path, settings)
    with no_longer_shown(folder, stores_in(folder)) as digests:
        return forget_images(cache_folder_of(path, settings), digests)
