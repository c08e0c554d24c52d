"""Ingest from end to end: walk, read what changed, pair, decode what changed, publish in one transaction.

Killed at any moment it continues where it was, because each batch of files and each series is a transaction of its own
and what readers see changes only in the last one. Unchanged data need no work.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from icmoe.atomic import read_regular
from icmoe.config import in_utf16
from icmoe.data.ingest import index
from icmoe.data.ingest.folding import folded
from icmoe.data.ingest.forms import MASKS, VOLUMES
from icmoe.data.ingest.records import RECIPE_VERSION, whose
from icmoe.data.ingest.settings import IngestSettings
from icmoe.data.splits import SPLITS
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Label

PACKAGES = ("pydicom", "highdicom", "nibabel", "pylibjpeg", "libjpeg", "openjpeg", "rle", "jpeg_ls")
"""What the extra `dicom` installs, by import name."""
ABSENT = "absent"
"""Key of the index's meta table: how many patients of the split file have no image in the export."""
SETTINGS = "settings"
"""Key of the digest of what the site file said when ingest was run."""
SAME_PICTURE = " has the same picture"
"""After a patient's pseudonym: why a frame of another one is left out."""
BATCH_FILES = 16
DEADLINE_S = 600.0
SHARED = """select distinct json_extract(record, '$.patient'), json_extract(record, '$.why') from left_out
    where json_extract(record, '$.why') like ?"""
HELD = """insert or ignore into held select json_extract(result.value, '$.entry') from series, json_each(series.results) result
    where json_extract(result.value, '$.entry') is not null"""
Progress = Callable[[str, int, int], None]
"""Called with the name of the step, how much is done and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is ingested, and for whom.

    Parameters
    ----------
    site
        Name of the hospital.
    root
        The export; only read.
    store
        Folder of index and frames for these labels.
    secret_folder
        Where the site's secret is.
    labels
        Classes of the study.
    settings
        The site file's section; `folder`, `store` and `split_file` are resolved by the caller.
    split_file
        CSV with patient and split.
    """

    site: str
    root: Path
    store: Path
    secret_folder: Path
    labels: tuple[Label, ...]
    settings: IngestSettings
    split_file: Path | None = None


def store_of(folder: Path, labels: Sequence[Label]) -> Path:
    """Return where the index for these labels is below the ingest folder: other labels make other class maps."""
    text = json.dumps([label.model_dump(mode="json") for label in labels], sort_keys=True)
    return folder / hashlib.sha256(text.encode()).hexdigest()[:12]


def ingest(export: Export, *, on_progress: Progress = lambda *_: None) -> bool:
    """Bring the index up to date and return whether there was anything to do.

    Raises
    ------
    IcmoeError
        109 where the export is not there; 129, 130 for the store; 210 for synonyms, and for a store inside the export; 110 for
        the split file; 213 where the packages that read images are not installed.
    """
    require_packages()
    from icmoe.data.ingest.catalogue import Catalogue
    from icmoe.data.ingest.pseudonyms import forgotten, site_pseudonyms
    from icmoe.data.ingest.walking import walk

    _require_folder(export)
    _require_apart(export)
    hashes = site_pseudonyms(export.secret_folder)
    splits = _splits(export.split_file)
    with index.claimed(export.store) as connection:
        connection.executemany(
            "insert or ignore into forgotten values (?)", [(name,) for name in forgotten(export.secret_folder)]
        )
        walked = walk(export.root, export.settings.exclude)
        files = Catalogue(connection, ((path, hashes.of("file", path), size, changed) for path, size, changed in walked))
        if not len(files):  # a share that is not mounted looks like this, and must not empty the index
            todo = "Check that it is mounted and that folder and exclude under [ingest] are right."
            raise IcmoeError(_no_export(export, "export holds no file", todo))
        basis = _basis(export, splits, connection)
        if index.meta(connection, "recipe") != _recipe(export):
            _start_over(connection, export)
        new = files.new()
        if not new and not files.gone() and index.meta(connection, "complete") == basis:
            index.put_meta(connection, {SETTINGS: _settings(export)})
            _clean(connection, export.store)
            return False
        from icmoe.data.ingest.work import Work

        index.put_meta(connection, {"complete": "", "cleaned": "", "site": export.site})
        Work(connection, export, hashes, files, on_progress).through(splits)
        index.put_meta(connection, {index.STATE: index.state_of(connection), "complete": basis, SETTINGS: _settings(export)})
        _clean(connection, export.store)
        return True


def is_as_set(export: Export) -> bool:
    """Return whether the index was made with what the site file says now; so it is where an earlier version made it."""
    with index.opened(export.store) as connection:
        return index.meta(connection, SETTINGS) in {"", _settings(export)}


def _settings(export: Export) -> str:
    """Return a digest of what the hospital says about its export."""
    splits = b""
    if export.split_file is not None:
        with suppress(OSError):  # ingest tells of it
            splits = read_regular(export.split_file)
    said = export.settings.model_dump_json(exclude={"store", "processes"})
    return hashlib.sha256(said.encode() + splits).hexdigest()


def _require_folder(export: Export) -> None:
    try:
        if export.root.is_dir():
            return
        what = "export is not a folder" if export.root.exists() else "export is not there"
    except OSError as error:  # a name that is too long, a link to itself, a folder above it that is shut
        what = f"export cannot be looked at ({error.strerror})"
    raise IcmoeError(_no_export(export, what, "Correct folder under [ingest]."))


def _no_export(export: Export, what: str, todo: str) -> Fault:
    return Fault(number=109, where=str(export.root), what=what, did="Nothing was read.", todo=todo)


def _require_apart(export: Export) -> None:
    """Refuse to keep the ingest within the export, which is only read: it would find what it wrote."""
    kept, root = (os.path.realpath(path) for path in (export.secret_folder, export.root))
    if Path(kept).is_relative_to(root):
        what, value = "the ingest would be kept inside the export", str(export.secret_folder)
        did, todo = "Nothing was read.", "Name a store outside folder, or a folder without it."
        raise IcmoeError(Fault(number=210, where=str(export.root), what=what, value=value, did=did, todo=todo))


def require_packages() -> None:
    """Refuse to start where the packages that read images are not installed.

    Raises
    ------
    IcmoeError
        213 with their names.
    """
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise IcmoeError(Fault(number=213, value=", ".join(absent), did="Nothing was read."))


def stores_in(folder: Path) -> list[Path]:
    """Return the folders of the indexes that an ingest folder holds, of studies that are no longer approved too.

    Raises
    ------
    IcmoeError
        129 where one has frames and no index, so that nobody can tell whose they are.
    OSError
        Where one cannot be looked into.
    """
    found = []
    for place in sorted(folder.iterdir()) if folder.exists() else []:
        names = {path.name: path for path in place.iterdir()} if place.is_dir() else {}
        if index.INDEX in names and names[index.INDEX].stat().st_size:
            found.append(place)
        elif "frames" in names and any(names["frames"].iterdir()):
            what, todo = "index is gone, though its frames are there", "Remove this folder; the next ingest makes it anew."
            raise IcmoeError(Fault(number=129, where=str(place), what=what, did="Nothing was removed.", todo=todo))
    return found


def forget(folder: Path, patient: str) -> int:
    """Take a patient out of every index of a site for good; no `ingest` reads it again.

    Return how many frames went, of the index that had the most: those for studies of other labels have the same pictures.

    Parameters
    ----------
    folder
        The site's ingest folder, which holds its secret.
    patient
        The hospital's own number, whoever gave it, or "NUMBER^^^ISSUER", or the pseudonym P-....

    Raises
    ------
    IcmoeError
        129, 130 for the folder.
    """
    from icmoe.data.ingest.pseudonyms import forget_name, pseudonym_of, site_pseudonyms

    name = pseudonym_of(patient, site_pseudonyms(folder))
    forget_name(folder, name)
    return max([_forget_in(store, name) for store in stores_in(folder)], default=0)


def images_of(folder: Path, patient: str) -> int:
    """Return how many frames of a patient are in use, of the index that has the most: after `forget` nobody can tell any more.

    Parameters
    ----------
    folder, patient
        As for `forget`, before it is called.
    """
    from icmoe.data.ingest.pseudonyms import pseudonym_of, site_pseudonyms

    name, counts = pseudonym_of(patient, site_pseudonyms(folder)), [0]
    for store in stores_in(folder):
        with index.opened(store) as connection:
            counts.append(index.count_of(connection, _of_patient(connection, name)[0]))
    return max(counts)


def sharing(folder: Path, patient: str) -> list[str]:
    """Return the pseudonyms under which the export holds equal pictures of a patient, who may have another number there.

    Parameters
    ----------
    folder, patient
        As for `forget`, before it is called.
    """
    from icmoe.data.ingest.pseudonyms import pseudonym_of, site_pseudonyms

    name, found = pseudonym_of(patient, site_pseudonyms(folder)), set[str]()
    for store in stores_in(folder):
        with index.opened(store) as connection:
            pairs = connection.execute(SHARED, (f"%{SAME_PICTURE}",)).fetchall()
        found.update(*({whose, why.removesuffix(SAME_PICTURE)} for whose, why in pairs if name in {whose, why.split(" ")[0]}))
    return sorted(found - {name})


def _of_patient(connection: sqlite3.Connection, name: str) -> tuple[set[str], set[str]]:
    """Return a patient's pseudonyms and series, those too that an ingest that was stopped has not published."""
    names, series = {name}, set[str]()
    for _, record in index.records(connection):
        if name in {record.patient, record.person, record.number, *record.others}:
            names.add(whose(record))
            series.add(f"S-{record.series}")
    return names, series


def _forget_in(store: Path, name: str) -> int:
    with index.claimed(store) as connection:
        names, series = _of_patient(connection, name)
        with index.transaction(connection):
            connection.execute("insert or ignore into forgotten values (?)", (name,))
            connection.executemany("delete from series where id = ?", [(key,) for key in series])
            gone = index.drop_patients(connection, names)
            complete = index.meta(connection, "complete") and "forgotten"
            index.put_meta(connection, {"complete": complete, "cleaned": "", index.STATE: index.state_of(connection)})
        _clean(connection, store)
    return gone


def _recipe(export: Export) -> str:
    """Return what the records of files depend on besides the files."""
    settings = export.settings
    masks = [[name, sorted(form.sop_classes), form.on_planes] for name, form in MASKS.items()]  # their order is a choice too
    labels = {name: list(called) for name, called in sorted(settings.labels.items())}
    return json.dumps([RECIPE_VERSION, labels, settings.patient_pattern, sorted(VOLUMES), masks])


def _start_over(connection: sqlite3.Connection, export: Export) -> None:
    """Drop what was read by another recipe in one step with its name: after a kill, none of it passes for this recipe's."""
    with index.transaction(connection):
        connection.execute("delete from file")
        index.put_meta(connection, {"complete": "", "recipe": _recipe(export)})


def _basis(export: Export, splits: dict[str, str], connection: sqlite3.Connection) -> str:
    """Return what the published result depends on besides the files."""
    forgotten = sorted(name for (name,) in connection.execute("select patient from forgotten"))
    values = [
        _recipe(export),
        export.site,
        sorted(export.settings.allow),
        export.settings.shares,
        sorted(splits.items()),
        forgotten,
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _splits(path: Path | None) -> dict[str, str]:
    """Return the split of each patient by the hospital's own number."""
    if path is None:
        return {}
    did = "Nothing was read."
    todo = "Expected columns patient and split with train, val or test."
    try:
        reader = csv.DictReader(read_regular(path).decode("utf-8-sig").splitlines())
        rows = list(reader)
    except OSError as error:
        todo = "Correct split_file under [ingest]."
        raise IcmoeError(Fault(number=110, where=str(path), value=error.strerror or "", did=did, todo=todo)) from None
    except (UnicodeDecodeError, csv.Error) as error:
        words = in_utf16(error.object) if isinstance(error, UnicodeDecodeError) else {}
        words = words or {"value": "not CSV in UTF-8", "todo": todo}
        raise IcmoeError(Fault(number=110, where=path.name, did=did, **words)) from None
    if not {"patient", "split"} <= set(reader.fieldnames or ()):
        what = "column patient or split is missing"
        raise IcmoeError(Fault(number=110, where=path.name, what=what, did=did, todo=f"{todo} Commas separate them."))
    faults = []
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        patient, split = (row.get("patient") or "").strip(), (row.get("split") or "").strip()
        if not patient or split not in SPLITS or found.setdefault(folded(patient), split) != split:
            faults.append(
                Fault(number=110, where=f"{path.name} row {number}", limit="patient once, train, val or test", did=did, todo=todo)
            )
    if faults or not rows:
        raise IcmoeError(*(faults[:20] or [Fault(number=110, where=path.name, what="no patient is listed", did=did, todo=todo)]))
    return found


def _clean(connection: sqlite3.Connection, store: Path) -> None:
    """Remove frames that no series holds any more; done again after a kill, because the list is in the index."""
    if index.meta(connection, "cleaned") == index.meta(connection, "complete") != "":
        return
    connection.execute("create temp table held (entry text primary key) without rowid")
    connection.execute(HELD)
    for path in (store / "frames").glob("*/*"):
        if not connection.execute("select 1 from held where entry = ?", (path.name.removesuffix(".safetensors"),)).fetchone():
            path.unlink(missing_ok=True)
    connection.execute("drop table held")
    index.put_meta(connection, {"cleaned": index.meta(connection, "complete")})
