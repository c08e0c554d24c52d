"""`fl_client check`: everything that would stop a site later, looked at now, every fault at once."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fl_client.approval import approved_studies
from fl_client.audit import LOG
from fl_client.budget import budget_faults
from fl_client.check import Check, attempt
from fl_client.connection import check_connection, check_health
from fl_client.credentials import Coordinator, parse_ca, read_node_key
from fl_client.ledger import FILE as LEDGER
from fl_client.site import (
    NOT_INGESTED,
    SiteFile,
    cache_folder_of,
    read_site_file,
    records_of,
    require_name,
    run_ingest,
    site_export,
    site_slices,
    study_faults,
)
from icmoe.backbone import backbone_digest, grid_of, weights_path, widths
from icmoe.backbones import BACKBONES
from icmoe.data.ingest.run import is_as_set
from icmoe.data.slices import Slice
from icmoe.device import available_device
from icmoe.errors import Fault, IcmoeError, print_faults
from icmoe.features import FeatureCache
from icmoe.joining import fingerprint, validity_fault
from icmoe.memory import free_bytes
from icmoe.prepare import wanted_views
from icmoe.private import read_small
from icmoe.rest import size_bytes
from icmoe.study import Study

GB = 1e9
CA_WARN_DAYS = 90  # a new CA certificate has to reach every hospital
UNPREPARED = frozenset({NOT_INGESTED, 207})
"""What is put right by `ingest` or `prepare`."""
EXPIRED = 309  # such a CA is still good enough to see who answers
RESERVE_BYTES = 500_000_000  # state, logs, Flower's unpacked bundles
MEMORY_BYTES = 1_500_000_000  # Flower's processes 0.4 GB, PyTorch 0.5 GB, the rest for training


def run_preflight(path: Path, *, site: str | None = None) -> list[Check]:
    """Look at everything that the site file names.

    Parameters
    ----------
    path
        The site file.
    site
        Name that the command gives; must be the file's.
    """
    try:
        settings = read_site_file(path)
    except IcmoeError as error:
        return [Check("site file", ok=False, fault=_with_known_sites(fault, path)) for fault in error.faults]
    checks = attempt("site file", lambda: _site_file(path, settings, site or settings.name))
    if settings.coordinator is not None:
        checks += check_coordinator(settings.coordinator, path.parent)
    checks += check_studies(path, settings)
    checks += check_records(path, settings)
    return [*checks, *attempt("device", lambda: str(available_device(settings.device))), check_memory()]


def check_coordinator(chosen: Coordinator, folder: Path) -> list[Check]:
    """Look at key, CA and the way to the coordinator."""
    ca_path, keys = folder / chosen.ca, []

    def look() -> str:
        keys.append(read_node_key(folder / chosen.key))
        return fingerprint(keys[0].public_key())

    checks = [*attempt("key", look), *attempt("CA", lambda: _ca(ca_path))]
    usable = checks[-1].ok or (checks[-1].fault is not None and checks[-1].fault.number == EXPIRED)
    not_asked = [Check("coordinator", ok=False, note="not asked")]
    checks += check_connection(chosen.address, ca_path, keys[0] if keys else None) if usable else not_asked
    return checks + (check_health(chosen.health) if chosen.health else [])


def check_studies(path: Path, settings: SiteFile) -> list[Check]:
    """Look at the approved studies and at what the site has for each: backbone, images, features, room for more features."""
    try:
        studies = approved_studies(path.parent / settings.state)
    except IcmoeError as error:
        return [Check("study", ok=False, fault=fault) for fault in error.faults]
    checks, ready = list[Check](), False
    for study in studies:
        faults = study_faults(path, settings, study) + _budget_faults(path, settings, study)
        over = bool(faults) and _is_over(path, settings, study)
        checks += [Check("study", ok=over, fault=_of_the_past(settings, study, fault) if over else fault) for fault in faults]
        if not faults:
            found = Check("study", ok=True, note=f"{study.name} {study.digest[:12]}")
            own = [found, *_backbone(path, settings, study), *_data(path, settings, study)]
            ready |= all(check.ok for check in own)
            checks += own
    return [_of_one_study(check) for check in checks] if ready else checks


def _of_one_study(check: Check) -> Check:
    """Return what the site still owes one study as a warning: it takes part in the others meanwhile."""
    if check.ok or check.fault is None or check.fault.number not in UNPREPARED:
        return check
    return replace(check, ok=True, fault=replace(check.fault, did="The site cannot take part in it before; others go on."))


def _require_writable(state: Path) -> None:
    """Refuse records that may only be read: it is enough to look at them, and too little to take part."""
    there = [path for path in (state, state / LOG, state / LEDGER) if path.exists()]
    if faults := [
        Fault(number=205, where=str(path), what="it may only be read") for path in there if not os.access(path, os.W_OK)
    ]:
        raise IcmoeError(*faults[:1])


def check_records(path: Path, settings: SiteFile) -> list[Check]:
    """Look at ledger and audit log: both whole, in agreement, signed. A key that was replaced since is only a warning."""
    records, found = records_of(path, settings), []

    def look() -> str:
        book, lines, signatures = records.verify()
        found.append(signatures)
        _require_writable(records.state)
        return f"{book.head.count} entries, {len(lines)} lines" + (f", {signatures.sentence()}" if signatures.keys else "")

    checks = attempt("records", look)
    try:
        fault = records.foreign_key(found[0]) if found else None
    except IcmoeError:
        fault = None  # the key itself cannot be used, which is said above
    return [replace(checks[0], fault=fault)] if fault is not None else checks


def check_memory() -> Check:
    """Look at the memory that is free now; a warning only, since it may be free again in a minute."""
    free = free_bytes()
    if free is None:
        return Check("memory", ok=True, note="not known")
    note = f"{free / GB:.1f} GB free"
    short = Fault(number=315, where="memory", value=note, limit=f"{MEMORY_BYTES / GB:.1f} GB", todo="Close other programs.")
    return Check("memory", ok=True, fault=short if free < MEMORY_BYTES else None, note=note)


def print_checks(site: str, checks: Sequence[Check], *, as_json: bool) -> bool:
    """Print the checks as a table with one sentence per fault, or as JSON, and return whether the site may start."""
    ok = all(check.ok for check in checks)
    if as_json:
        record = {"site": site, "ok": ok, "checks": [check.record() for check in checks]}
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return ok
    table = Table("", "checked", Column("found", overflow="fold"), title=site, title_justify="left")
    for check in checks:
        number = f"ICM{check.fault.number} " if check.fault else ""
        table.add_row(Text(*_state(check)), Text(check.name), Text(number + check.note))
    Console().print(table)
    print_faults([check.fault for check in checks if check.fault is not None], stderr=False)
    return ok


def _state(check: Check) -> tuple[str, str]:
    if check.fault is None:
        return ("ok", "green") if check.ok else ("-", "dim")
    return ("warning", "yellow") if check.ok else ("FAULT", "bold red")


def _site_file(path: Path, settings: SiteFile, site: str) -> str:
    require_name(path, settings, site)
    return str(path) if settings.coordinator else f"{path}, without [coordinator]"


def _with_known_sites(fault: Fault, path: Path) -> Fault:
    """Return the fault of a site file that is not there with the names of those that are."""
    if fault.value != os.strerror(errno.ENOENT):
        return fault
    known = ", ".join(sorted(item.stem for item in path.parent.glob("*.toml"))) or "none"
    todo = "Run fl_client --site NAME init --kit DIR, or name the file with --config."
    return Fault(number=205, where=str(path), what="site file is not there", limit=f"sites known here: {known}", todo=todo)


def _ca(path: Path) -> Check:
    ca = parse_ca(read_small(path), where=str(path))
    start, end, now = ca.not_valid_before_utc, ca.not_valid_after_utc, dt.datetime.now(tz=dt.UTC)
    ok, fault = validity_fault(start, end, now, where=str(path), warn_days=CA_WARN_DAYS)
    todo = "Ask the coordinator for a new start kit and run init again; the key stays."
    fault = replace(fault, todo=todo) if fault is not None and now >= start else fault
    return Check("CA", ok=ok, fault=fault, note=f"valid until {end:%Y-%m-%d}")


def _is_over(path: Path, settings: SiteFile, study: Study) -> bool:
    """Return whether the site has trained the study's last round: what speaks against it now stops no other study."""
    try:
        book = records_of(path, settings).book()
    except IcmoeError:
        return False  # said of the ledger itself
    return any((entry.study, entry.kind, entry.round) == (study.digest, "train", study.rounds) for entry in book.entries)


def _of_the_past(settings: SiteFile, study: Study, fault: Fault) -> Fault:
    did = "It was trained to its last round here and is not trained again; other studies go on."
    return replace(fault, did=did, todo=f"Once it is over: fl_client --site {settings.name} withdraw {study.name}.")


def _budget_faults(path: Path, settings: SiteFile, study: Study) -> list[Fault]:
    try:
        book = records_of(path, settings).book()
    except IcmoeError:
        return []  # said of the ledger itself
    return budget_faults(settings.budget, book, study, settings.policy.max_epsilon)


def _backbone(path: Path, settings: SiteFile, study: Study) -> list[Check]:
    def look() -> str:
        chosen = study.backbone
        checkpoint = path.parent / settings.checkpoint if settings.checkpoint and BACKBONES[chosen.name].wheel is None else None
        found = backbone_digest(chosen.name, checkpoint)
        if found != chosen.digest:
            where = chosen.name if BACKBONES[chosen.name].seeded else str(weights_path(chosen.name, checkpoint))
            raise IcmoeError(Fault(number=206, where=where, value=found, limit=chosen.digest))
        return f"{chosen.name} {found[:12]}"

    return attempt("backbone", look)


def _data(path: Path, settings: SiteFile, study: Study) -> list[Check]:
    slices: list[Slice] = []

    def look() -> str:
        slices.extend(site_slices(path, settings, study))
        return f"{len(slices)} images, {sum(item.split == 'train' for item in slices)} of them for training"

    found = attempt("data", look)
    if not found[0].ok:
        return found
    if settings.ingest is not None and not is_as_set(site_export(path, settings, study)):
        what, did = "[ingest] in the site file was changed since ingest was run", "What was read before is used."
        fault = Fault(number=NOT_INGESTED, where=str(path), what=what, did=did, todo=run_ingest(settings))
        found.append(Check("ingest", ok=True, fault=fault))
    cache = FeatureCache.of(cache_folder_of(path, settings), study)
    keys = {view.key for view in wanted_views(slices, study.training.views, cache, study.backbone.image_size)}
    missing, lost = list[str](), cache.lacks_rest()

    def count() -> Check:
        missing.extend(key for key in keys if not cache.is_whole(key))
        note = f"{len(keys) - len(missing)} of {len(keys)} views{', without the last stage' if lost else ''}"
        todo = f"Run fl_client --site {settings.name} prepare."
        fault = Fault(number=207, where=str(cache.folder), what="features are not in the cache", value=note, todo=todo)
        return Check("features", ok=not (missing or lost), fault=fault if missing or lost else None, note=note)

    found += attempt("features", count)
    rest_bytes = size_bytes(study.backbone) if lost else 0
    room = {cache.folder: len(missing) * _view_bytes(study) + rest_bytes, path.parent / settings.state: 0}
    for folder, needed_bytes in room.items():
        found += attempt("disk", lambda folder=folder, needed=needed_bytes: _disk(folder, needed))  # type: ignore[misc]
    return found


def _disk(folder: Path, needed_bytes: int) -> Check:
    there = next(above for above in (folder.absolute(), *folder.absolute().parents) if above.is_dir())
    free, needed = shutil.disk_usage(there).free, needed_bytes + RESERVE_BYTES
    note = f"{folder}: {free / GB:.1f} GB free, {needed / GB:.1f} GB needed"
    short = Fault(number=315, where=str(folder), value=f"{free / GB:.1f} GB free", limit=f"{needed / GB:.1f} GB")
    return Check("disk", ok=free >= needed, fault=short if free < needed else None, note=note)


def _view_bytes(study: Study) -> int:
    channels, blocks, _ = widths(study.backbone, block_features=True)
    return 2 * (channels + sum(blocks)) * grid_of(study.backbone) ** 2
