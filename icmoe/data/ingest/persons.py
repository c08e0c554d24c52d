"""Whose files without identity are, from all folders of an export together: one name may be a patient's or a series'.

A patient who was taken for several might stand in several splits, so that files whose folders do not tell are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from icmoe.data.ingest.walking import DATE, SEQUENCES, is_somebodys, owner_folders, parted, person, stem, without_visit

TECHNIQUES = (
    "axi?|axial|sag|sagittal|cor|coronal|tra|trans|transverse|transversal|obl|oblique|tse|fse|gre|mprage|vibe|stir|dixon|epi|tof"
    "|fs|fatsat|iso|2d|3d|pre|post|gd|gad|ce|contrast|native|plain|dyn|arterial|venous|portal|delayed|mra|cta|dti"
    "|ser|series|acq|acquisition|seq|sequence|run|recon|rec|echo"
)
"""Words for how a series was taken, beside those for what."""
SERIES = re.compile(rf"({SEQUENCES}|{TECHNIQUES})\d{{0,2}}")
COUNT = re.compile(r"\d{1,2}|b\d{1,4}")
"""Further words of a folder that is named for its series alone."""
LAST = re.compile(rf"[-_ .]+({SEQUENCES}|{TECHNIQUES}|left|right|[lr]t?|o[ds])$")
COUNTED = re.compile(
    rf"[-_ .]+(({SEQUENCES}|{TECHNIQUES}|left|right|scan|exam|study|img|image|vol|volume|v|t)[-_ ]?\d{{1,3}}|\d{{1,2}})$"
)
"""What a name ends with that says which of several looks at a patient it is of."""
PERSON = re.compile(
    r"(.*[-_ ])?(p|pt|pat|patient|sub|subj|subject|case|id|person|proband|volunteer|training|validation|testing)[-_ .]?\d+[a-z]?"
    r"|brats[-_\d].*[-_]\d+"
)
"""Folders that are named as people number patients."""
NUMBER = re.compile(r"\d{3,}")
"""A patient's number by itself, in front of or behind something else in a name."""
FREE = re.compile(r".*[^\W\d_]{2}|[a-z]$|[vt]\d{1,2}$")
DATED = re.compile(rf"^{DATE}[-_]")
DAY = re.compile(DATE)
SITE = re.compile(r"(site|center|centre|hospital|clinic|institution)[-_ ]?\w{0,3}")
"""Folders that are named for where patients come from: equal numbers there are several persons'."""
GROUP = re.compile(
    r"(.*[^a-z])?(data|database|dataset|exports?|archive|project|batch|fold|split|sets?|cohort|group|part|train|test|val|training"
    r"|trainingdata)([^a-z].*)?"
    r"|([^\d]*[^a-z\d])?(patients|subjects|cases|raw|processed|preprocessed|nii|hgg|lgg|benign|malignant|normal|abnormal|healthy"
    r"|controls?|positive|negative|lesions?|tumou?rs?|(un)?labell?ed|(fe)?male)([^a-z\d][^\d]*)?"
)
"""Folders that are named for what their files have in common; the latter words are a patient's with a number."""
YEAR, DIGIT, BARE = (re.compile(form) for form in (r"(19|20)\d\d", r"\d", r"^\d+$"))
UNDECIDED = "?"
"""In place of a pseudonym, where nobody can tell whose a file is."""

Names = tuple[str, ...]


class Persons:
    """Who the files below folders are of.

    Parameters
    ----------
    paths
        Of volumes and pictures without identity, images alone; each with whether it is a volume.
    cases
        Names of the cases that volumes are channels or sequences of.
    """

    def __init__(self, paths: Iterable[tuple[str, bool]], cases: Mapping[str, str]) -> None:
        self._cases = cases
        volumes: dict[Names, set[str]] = {}
        for path, is_volume in paths:
            names = volumes.setdefault(owner_folders(path), set())
            if is_volume:
                names.add(self._called(path))
        self._named = _named(volumes)
        self._doubtful = _called_by_file(volumes, self._named)

    def of(self, path: str, *, volume: bool) -> str | None:
        """Return the name of a file's patient, None where its folders do not tell.

        Parameters
        ----------
        path
            One of those given.
        volume
            Whether it is a volume: those in no folder of a patient's have names of their own, pictures there are one patient's.
        """
        folders = owner_folders(path)
        if volume and folders in self._doubtful:
            return None
        own = _without_series(self._called(path)) if volume else "."
        return self._named[folders] if self._named[folders] != "" else own

    def numbered(self, path: str) -> str:
        """Return the name of the patient after whom a file's folder is numbered, empty where that cannot be told.

        Parameters
        ----------
        path
            One of those given.
        """
        name = self._named[owner_folders(path)] or ""
        return name if PERSON.fullmatch(name.rpartition("/")[2]) else ""

    def together(self, path: str) -> str:
        """Return what a file's folders are called beside places and groups, empty where they do not tell: maybe a person.

        Parameters
        ----------
        path
            One of those given.
        """
        folders = owner_folders(path)
        return (self._named[folders] or "") if _own(folders) else ""

    def called(self, path: str) -> str:
        """Return the number of a patient by which a file is called in a folder that numbers nobody, empty where there is none.

        Parameters
        ----------
        path
            One of those given.
        """
        if _numbered(self._named[owner_folders(path)]):
            return ""
        name = _without_series(self._called(path))
        return name if PERSON.fullmatch(name) else ""

    def _called(self, path: str) -> str:
        return person(self._cases.get(path) or stem(path))


def _named(folders: Iterable[Names]) -> dict[Names, str | None]:
    """Return the patient's name of each place, None where it cannot be told, empty where its folders have none."""
    cut = _cut(folders)
    levels: dict[int, set[Names]] = {}
    for names in cut.values():
        levels.setdefault(len(_own(names)), set()).add(_own(names))
    chosen = {count: _level(sorted(group)) for count, group in levels.items()}
    keys = {place: _key(names, chosen[len(_own(names))]) for place, names in cut.items()}
    below: dict[str | None, set[Names]] = {}
    for key, path in keys.values():
        below.setdefault(key, set()).add(path)
    return {place: "/".join(path) if key and len(below[key]) == 1 else key for place, (key, path) in keys.items()}


def _cut(folders: Iterable[Names]) -> dict[Names, Names]:
    """Return the folders of each place down to where one is called like a series, or lies beside one that is."""
    plain = {place: tuple(map(_without_series, place)) for place in folders}
    above = {names[:at] for names in plain.values() for at, name in enumerate(names) if _is_series(name) and _own(names[:at])}
    found = {}
    for place, names in plain.items():
        end = next((at for at in range(1, len(names)) if names[:at] in above), len(names))
        found[place] = tuple(name for name in names[:end] if not (_is_pure(name) or (_is_series(name) and len(place) > 1)))
    return found


def _own(names: Names) -> Names:
    """Return the folders that are named for neither a place nor a group."""
    return tuple(name for name in names if PERSON.fullmatch(name) or not (SITE.fullmatch(name) or GROUP.fullmatch(name)))


def _level(places: Sequence[Names]) -> int | None:
    """Return which of the folders is the patient's in places of equal depth, None where nobody can tell."""
    if len(places[0]) < 2:
        return 0
    levels = range(len(places[0]))
    numbered = [level for level in levels if all(PERSON.fullmatch(names[level]) for names in places)]
    plain = [level for level in levels if not all(_says_series(names[level]) for names in places)]
    left = numbered or plain or [*levels]
    if len(left) == 1 or len({_parted(places, level) for level in left}) == 1:
        return left[0]
    # Numbers below names may be patients of a group or series of a person.
    return left[0] if left[:1] in ([level for level in left if _all(kind, places, level)] for kind in (DIGIT, BARE)) else None


def _all(kind: re.Pattern[str], places: Sequence[Names], level: int) -> bool:
    """Return whether the folders of a level hold what a patient's number does, and are not all years."""
    names = {names[level] for names in places}
    return all(kind.search(name) for name in names) and not all(YEAR.fullmatch(name) for name in names)


def _parted(places: Sequence[Names], level: int) -> tuple[int, ...]:
    """Return how the folders of a level part the places."""
    first: dict[str, int] = {}
    return tuple(first.setdefault(names[level], at) for at, names in enumerate(places))


def _key(names: Names, level: int | None) -> tuple[str | None, Names]:
    """Return what patients are told apart by, the name alone but for where they come from, and the folders down to it."""
    own = _own(names)
    if not own:
        return "/".join(names), names
    if level is None:
        return None, names
    at = [place for place, name in enumerate(names) if _own((name,))][level]
    places = [name for name in names[:at] if SITE.fullmatch(name) and not PERSON.fullmatch(name)]
    return "/".join([*places, names[at]]), names[: at + 1]


def _called_by_file(volumes: Mapping[Names, set[str]], named: Mapping[Names, str | None]) -> set[Names]:
    """Return the places that are called like no patient and hold volumes of several that others hold too: P1 and P2 in each.

    They may be of a series or of a patient each.
    """
    places: dict[str, set[str]] = {}
    for folders, names in volumes.items():
        for name in names:
            if PERSON.fullmatch(name) and (owner := named[folders]):
                places.setdefault(name, set()).add(owner)
    shared = {name for name, owners in places.items() if len(owners) > 1}
    several = len(shared) > 1
    return {folders for folders, names in volumes.items() if several and names & shared and not _numbered(named[folders])}


def _numbered(name: str | None) -> bool:
    return name is None or any(re.search(r"\d", part) for part in name.split("/"))


def _is_pure(name: str) -> bool:
    """Return whether a name says its series alone, without a count: it is nobody's wherever it stands."""
    return _is_series(name) and not re.search(r"[-_ .]\d+$", name)


def _is_series(name: str) -> bool:
    words = re.findall(r"[^\W_]+", name)
    series = [word for word in words if SERIES.fullmatch(word)]
    return bool(series) and not PERSON.fullmatch(name) and all(word in series or COUNT.fullmatch(word) for word in words)


def _says_series(name: str) -> bool:
    """Return whether a name says among other things which series it is."""
    return not PERSON.fullmatch(name) and any(SERIES.fullmatch(word) for word in re.findall(r"[^\W_]+", name))


def _without_series(name: str) -> str:
    """Return a name without which series it is of and when it was taken, as long as that leaves somebody's.

    P1 of P1_AX_T1, P1_scan_2, P1_20200131_CT, 20200131_P1 and P1_abdomen.
    """
    undated = DATED.sub("", name)
    name = undated if PERSON.fullmatch(undated) or NUMBER.match(undated) else name
    if PERSON.fullmatch(counted := COUNTED.sub("", name)):
        return counted
    while (shorter := person(LAST.sub("", name))) != name and is_somebodys(shorter) and not _is_series(shorter):
        name = shorter
    return next((start for start, rest in parted(name) if _is_numbered(start, rest)), without_visit(name))


def _is_numbered(start: str, rest: str) -> bool:
    """Return whether a name begins with the number of a patient and goes on with what was taken, in free words.

    Where a letter and digits follow a bare number, that may be a hospital's: 1001-S01.
    """
    if any(PERSON.fullmatch(part) for part in (rest, *(end for _, end in parted(rest)))):
        return False
    if PERSON.fullmatch(start):
        return not GROUP.fullmatch(start) and bool(re.search(r"[^\W\d_]", rest))
    dated = YEAR.fullmatch(start) or DAY.fullmatch(start)
    return bool(NUMBER.fullmatch(start) and not dated and FREE.match(rest))
