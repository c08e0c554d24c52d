"""What one run finds out beside the index: which files there are, and which mask speaks of which frame.

SQLite keeps it in a few megabytes of memory and in a file without a name, which is gone when the run ends, however it ends:
paths of the export never enter the index, and nothing that grows with the export is held in memory.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from icmoe.data.ingest.dark import dark_images
from icmoe.data.ingest.forms import MASKS
from icmoe.data.ingest.index import LeftOut, transaction
from icmoe.data.ingest.persons import UNDECIDED, Persons
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import FileRecord, Patch, is_image, whose
from icmoe.data.ingest.refusals import Refusal
from icmoe.data.ingest.walking import bare, case, case_names, person, stem, told

if TYPE_CHECKING:
    from icmoe.data.ingest.geometry import Grid

FORMS = (*MASKS, "volume", "picture")
"""Kinds of masks, the one that says most about its image first."""
STRAY = "it names no patient or another one than the other files of its series"
KEPT = 1024
"""Records that are held in memory."""
SCHEMA = """
create table run.image (path blob primary key, uid, series, patient, owner, study, space, folder blob, name blob, bare blob)
    without rowid;
create table run.link (shared, patient, primary key (shared, patient)) without rowid;
create table run.mask (path blob primary key) without rowid;
create table run.use (path blob, frame integer, form integer, mask blob, classes integer, said text);
create table run.refusal (path blob primary key, number integer, why text) without rowid;
"""
NEW = """
create temp view new as select path from run.found now left join file on file.id = now.id
    where file.size is not now.size or file.changed is not now.changed;
"""
VOLUMES = "select path from run.found join file using (id) where json_extract(record, '$.kind') = 'volume'"
MARKED = " and json_extract(record, '$.mask')"
UNIDENTIFIED = """
select path, json_extract(record, '$.mask'), json_extract(record, '$.kind') as kind, id, json_extract(record, '$.patient')
    from run.found join file using (id) where json_extract(record, '$.fault') is null
    and (kind in ('volume', 'picture') or (kind = 'image' and json_extract(record, '$.nameless'))) order by path
"""
"""Defaults are left out of records."""
PICTURES = """
select path, json_extract(record, '$.mask'), json_extract(record, '$.single') from run.found join file using (id)
    where json_extract(record, '$.kind') = 'picture' and json_extract(record, '$.fault') is null
"""
NAME = """
update file set record = json_set(record, '$.person', (select name from run.person where person.id = file.id))
    where id in (select id from run.person)
    and coalesce(json_extract(record, '$.person'), '') <> (select name from run.person where person.id = file.id)
"""
BESIDE = """
insert or ignore into run.link select beside, owner from run.image join run.found using (path) join run.person using (id)
    where beside <> '' and owner not in ('', '?')
"""
"""Studies of nobody in one folder may be one person's, who must not stand in two splits; so may P1 of two folders. Whose nobody
can tell links nobody."""
INDEXES = """
create index run.image_uid on image (uid);
create index run.image_series on image (series);
create index run.image_space on image (space);
create index run.image_name on image (name);
create index run.image_bare on image (bare);
create index run.use_frame on use (path, frame);
"""
STRAYS = """
with named as (select series, owner, count(*) files from run.image group by series, owner),
    most as (select series, max(files) files, sum(files) total from named group by series having count(*) > 1)
select path, study, owner from run.image join most using (series) join named using (series, owner)
    where named.files < most.files and total - most.files <= max(1, total / 10) and most.files > total - most.files
    and (uid = '' or not exists (select 1 from run.image other where other.uid = image.uid and other.path <> image.path))
"""
"""Files of a series of which nearly all others name one patient; where one claims to be another's instance too, nobody knows."""
PREFER = """
delete from run.use where classes = 0 and exists
    (select 1 from run.use other where other.path = use.path and other.frame = use.frame and other.classes <> 0);
delete from run.use where exists (select 1 from run.use other where other.path = use.path and other.frame = use.frame
    and other.form < use.form and (use.classes = -1 or use.classes & ~other.classes = 0));
insert into run.refusal
    select path, 128, 'other masks say more of these images and are used instead' from run.mask
    where path not in (select mask from run.use) and path not in (select path from run.refusal);
"""

Key = tuple[str, int]
"""A frame: path of its file below the export, frame number from 0."""


@dataclass(frozen=True, slots=True)
class Use:
    """What one mask file says about one frame; with no patch and no grid that there is nothing on it.

    Parameters
    ----------
    path
        Mask file below the export.
    form
        One of `FORMS`.
    patches
        Of a form of `MASKS`, or of a volume or picture that is called like a class.
    grids
        Per patch, or one for a volume: where its pixels lie; None for pixel by pixel.
    """

    path: str
    form: str
    patches: tuple[Patch, ...] = ()
    grids: tuple[Grid | None, ...] = ()


class Catalogue:
    """The files of an export with their records, and what belongs together.

    Parameters
    ----------
    connection
        Of the index, which holds the records.
    found
        Keyed hash, size in bytes and time of change in ns of each file, by path below the export.
    """

    def __init__(self, connection: sqlite3.Connection, found: Iterable[tuple[str, str, int, int]]) -> None:
        self._run = connection
        self._owners: dict[str, str] = {}
        self._dark: set[str] = set()
        self._pattern_of: Callable[[str], str] = str
        self.record = lru_cache(KEPT)(self._record)
        self.mark = lru_cache(KEPT)(self._mark)
        connection.execute("attach '' as run")
        connection.execute("pragma run.journal_mode = off")
        connection.execute("create table run.found (path blob primary key, id text, size integer, changed integer) without rowid")
        connection.execute(NEW)
        rows = ((os.fsencode(path), *state) for path, *state in found)
        connection.executemany("insert into run.found values (?, ?, ?, ?)", rows)

    def __len__(self) -> int:
        """Return the number of files."""
        return int(self._one("select count(*) from run.found")[0])

    def new(self) -> int:
        """Return how many files the index does not know as they are."""
        return int(self._one("select count(*) from new")[0])

    def new_paths(self, count: int) -> Iterator[list[str]]:
        """Yield the paths of files that the index does not know as they are, some at a time; they may enter it meanwhile."""
        query, last = "select path from new where path > ? order by path limit ?", b""
        while rows := self._run.execute(query, (last, count)).fetchall():
            last = rows[-1][0]
            yield [os.fsdecode(path) for (path,) in rows]

    def state(self, path: str) -> tuple[str, int, int]:
        """Return keyed hash, size in bytes and time of change in ns of a file."""
        key, size, changed = self._one("select id, size, changed from run.found where path = ?", os.fsencode(path))
        return key, size, changed

    def _mark(self, path: str) -> str:
        """Return the state of a file as one text."""
        return ":".join(map(str, self.state(path)))

    def gone(self) -> bool:
        """Return whether the index knows files that are not there."""
        return bool(self._one("select exists (select 1 from file where id not in (select id from run.found))")[0])

    def drop_gone(self) -> None:
        """Take files that are not there out of the index."""
        self._run.execute("delete from file where id not in (select id from run.found)")

    def sort(self, hashes: Pseudonyms, patient_pattern: str | None = None) -> None:
        """Note which files are images, which are masks and which are neither; all of them must have been read.

        The channels of one case (case_0000, case_0001) and its sequences (case_t1, case_flair) are one patient, named like
        their mask.

        Parameters
        ----------
        hashes
            Of the site.
        patient_pattern
            Of the site file: whom it names stands.
        """
        self._pattern_of = lambda text: hashes.of("pattern", text)
        self._dark = {*dark_images(self._pictures)}
        named = self._cases()
        self._name_persons(hashes, patient_pattern, named)
        cases = named.items()
        self._owners = {
            path: hashes.patient(person(name))
            for path, name in cases
            if self._record(path).patient == hashes.patient(person(stem(path)))
        }
        self._run.executescript(SCHEMA)
        for path, text in self._run.execute("select path, record from run.found join file using (id) order by path"):
            name = os.fsdecode(path)
            record = self._owned(name, FileRecord.model_validate_json(text))
            if record.fault:
                self.refuse(name, Refusal(record.fault, record.why))
            elif is_image(record):
                folder, single = os.fsencode(PurePosixPath(name).parent), len(record.frames) == 1
                called = [os.fsencode(of(name)) if single else None for of in (stem, bare)]
                row = record.image, record.series, record.patient, whose(record), record.study, record.space, folder, *called
                self._run.execute("insert into run.image values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (path, *row))
                self._link(whose(record), record.others)
            else:
                self._run.execute("insert into run.mask values (?)", (path,))
        self._run.executescript(INDEXES)
        self._run.execute(BESIDE)
        self._set_strays_aside()

    def _set_strays_aside(self) -> None:
        """Refuse single files of a series that name another patient than all the others; who they are of may be that patient."""
        for path, study, owner in self._run.execute(STRAYS).fetchall():
            self._run.execute("delete from run.image where path = ?", (path,))
            self.refuse(os.fsdecode(path), Refusal(117, STRAY))
            self._link(owner, [study] if study else [])

    def _link(self, patient: str, shared: Iterable[str]) -> None:
        """Note what tells that a patient may be one person with others: a study, or a further number."""
        self._run.executemany("insert or ignore into run.link values (?, ?)", [(one, patient) for one in shared])

    def _name_persons(self, hashes: Pseudonyms, pattern: str | None, cases: Mapping[str, str]) -> None:
        """Note in the records of images whose they are, where all folders of the export together say other than their own."""
        files = Persons(((path, kind == "volume") for path, kind, *_ in self._unidentified(pattern) if kind != "image"), cases)
        scans = Persons(((path, False) for path, kind, *_ in self._unidentified(pattern) if kind == "image"), {})
        self._run.execute("create table run.person (id text primary key, name text, beside text) without rowid")
        for path, kind, key, patient in self._unidentified(pattern):
            if kind == "image":
                name: str | None = told(path, pattern) or scans.numbered(path)
                beside = "" if name else scans.together(path)
            else:
                name, beside = files.of(path, volume=kind == "volume"), files.called(path)
            found = UNDECIDED if name is None else hashes.patient(name) if name else patient
            beside = hashes.patient(beside) if beside else ""
            self._run.execute("insert into run.person values (?, ?, ?)", (key, "" if found == patient else found, beside))
        with transaction(self._run):
            self._run.execute(NAME)

    def _unidentified(self, pattern: str | None) -> Iterator[tuple[str, str, str, str]]:
        """Yield path, kind, key and patient of the images that do not say whose they are, in order.

        Of a picture or volume that the pattern names the record does; of a scan without identity, its study alone is known.
        """
        for path, is_mask, kind, *said in self._run.execute(UNIDENTIFIED):
            name = os.fsdecode(path)
            if kind == "image" or not (told(name, pattern) or (is_mask and name not in self._dark)):
                yield name, kind, *said

    def _pictures(self) -> Iterator[tuple[str, bool, bool]]:
        """Yield path of every picture, whether its values look like classes, and whether it has but one."""
        for path, is_mask, is_blank in self._run.execute(PICTURES):
            yield os.fsdecode(path), bool(is_mask), bool(is_blank)

    def _cases(self) -> dict[str, str]:
        """Return the name of the case that each volume is a channel or a sequence of."""
        volumes = self._paths(VOLUMES)
        names, masks = {stem(path) for path in volumes}, dict[str, set[PurePosixPath]]()
        for path in self.mask_volumes():
            masks.setdefault(stem(path), set()).add(PurePosixPath(path).parent)
        found = {}
        for path in volumes:
            if name := case(path) if stem(path) != case(path) in names else next(case_names(path, masks), ""):
                found[path] = name
        return found

    def masks(self) -> list[str]:
        """Return the paths of masks, in order."""
        return self._paths("select path from run.mask order by path")

    def mask_volumes(self) -> list[str]:
        """Return the paths of volumes of classes, in no order."""
        return self._paths(VOLUMES + MARKED)

    def images(self, column: str, value: str | bytes) -> list[str]:
        """Return the paths of images that have this in a column (`uid`, `series`, `space`; `name`, `bare` in bytes), in order."""
        return self._paths(f"select path from run.image where {column} = ? order by path", value)  # noqa: S608  # fixed names

    def all_images(self) -> Iterator[tuple[str, FileRecord]]:
        """Yield every image with its record."""
        for path in self._paths("select path from run.image order by path"):
            yield path, self._record(path)

    def series(self) -> list[str]:
        """Return the keyed hashes of the series of images, in order."""
        return [name for (name,) in self._run.execute("select distinct series from run.image order by series")]

    def of_several_patients(self) -> set[str]:
        """Return the instances that images of several patients claim to be."""
        query = "select uid from run.image where uid <> '' group by uid having count(distinct patient) > 1"
        return {uid for (uid,) in self._run.execute(query)}

    def owners_by_folder(self) -> dict[str, set[str]]:
        """Return the patients of the images in each folder."""
        owners: dict[str, set[str]] = {}
        for folder, patient in self._run.execute("select distinct folder, patient from run.image order by folder"):
            owners.setdefault(os.fsdecode(folder), set()).add(patient)
        return owners

    def pattern(self, text: str) -> str:
        """Return the keyed hash of an unnumbered name, as records of images have it of their patient's number."""
        return self._pattern_of(text)

    def refuse(self, path: str, refusal: Refusal) -> None:
        """Note why a file is not used."""
        self._run.execute("insert into run.refusal values (?, ?, ?)", (os.fsencode(path), refusal.number, refusal.why))

    def add_uses(self, uses: Mapping[Key, Use]) -> None:
        """Note what a mask says about frames."""
        rows = (
            (os.fsencode(path), frame, FORMS.index(use.form), os.fsencode(use.path), _classes(use), _said(use))
            for (path, frame), use in uses.items()
        )
        self._run.executemany("insert into run.use values (?, ?, ?, ?, ?, ?)", rows)

    def is_used(self, key: Key) -> bool:
        """Return whether a mask speaks of a frame."""
        return bool(
            self._one("select exists (select 1 from run.use where path = ? and frame = ?)", os.fsencode(key[0]), key[1])[0]
        )

    def prefer(self) -> None:
        """Keep on each frame what marks something, each class in the best form, and refuse masks that are then of no use.

        That a mask lists an image without a mark says less than a mark of any other.
        """
        self._run.executescript(PREFER)

    def used_frames(self) -> int:
        """Return the number of frames that a mask speaks of."""
        return int(self._one("select count(*) from (select distinct path, frame from run.use)")[0])

    def uses(self, path: str) -> dict[Key, list[Use]]:
        """Return what masks say about the frames of a file, in the order of the masks."""
        found: dict[Key, list[Use]] = {}
        query = "select frame, form, mask, said from run.use where path = ? order by frame, mask"
        for frame, form, mask, said in self._run.execute(query, (os.fsencode(path),)):
            found.setdefault((path, frame), []).append(_use(os.fsdecode(mask), FORMS[form], said))
        return found

    def set_aside(self) -> Iterator[LeftOut]:
        """Yield the files that are not used, each with its reason."""
        for key, number, why in self._run.execute(
            "select id, number, why from run.refusal join run.found using (path) order by path"
        ):
            yield LeftOut(subject=f"F-{key}", number=number, why=why)

    def _record(self, path: str) -> FileRecord:
        """Return the record of a file."""
        (text,) = self._one("select record from run.found join file using (id) where path = ?", os.fsencode(path))
        return self._owned(path, FileRecord.model_validate_json(text))

    def _owned(self, path: str, record: FileRecord) -> FileRecord:
        owner = self._owners.get(path)
        said = ({"patient": owner} if owner else {}) | ({"mask": False} if path in self._dark else {})
        return record.model_copy(update=said) if said else record

    def _paths(self, query: str, *values: str | bytes) -> list[str]:
        return [os.fsdecode(path) for (path,) in self._run.execute(query, values)]

    def _one(self, query: str, *values: object) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._run.execute(query, values).fetchone()
        return row


def _classes(use: Use) -> int:
    """Return the classes that a use marks, a bit each; 0 where it marks nothing and -1 where only its pixels tell."""
    return sum({1 << min(patch.label, 61) for patch in use.patches}) if use.form in MASKS else -1


def _said(use: Use) -> str:
    patches = [patch.model_dump(mode="json", exclude_defaults=True) for patch in use.patches]
    return json.dumps([patches, [None if grid is None else grid.steps_33.tolist() for grid in use.grids]])


def _use(path: str, form: str, said: str) -> Use:
    import numpy as np  # a run on unchanged data comes without arrays

    from icmoe.data.ingest.geometry import Grid

    patches, grids = json.loads(said)
    return Use(
        path,
        form,
        tuple(Patch.model_validate(patch) for patch in patches),
        tuple(None if steps is None else Grid(np.asarray(steps, dtype=np.int64)) for steps in grids),
    )
