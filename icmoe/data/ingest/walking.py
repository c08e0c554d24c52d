"""The files of an export and what their names say; needs no package for images, so that a second look is quick."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from icmoe.data.ingest.folding import composed, folded
from icmoe.data.ingest.forms import VOLUMES
from icmoe.errors import Fault, IcmoeError

SEQUENCES = "flair|t1|t1w|t1n|t1c|t1ce|t1gd|t2|t2w|t2f|pd|dwi|adc|hbv|dce|swi|ct|mr|mri|pt|pet"
YEAR_LAST = r"\d\d-\d\d-(19|20)\d\d"
DATE = rf"(\d{{4}}(?P<gap>[-_.]?)(0[1-9]|1[0-2])(?P=gap)([0-2]\d|3[01])|{YEAR_LAST})"
TIMES = r"visit|session|timepoint|tp|baseline|follow[-_ ]?up|day|week|month|year"
WHEN = rf"ses-[a-z0-9]+|pre|post|({TIMES}|exam|study|series|scan)[-_ ]?\d*|{DATE}([-_ ]({SEQUENCES}))*|{YEAR_LAST}-.*"
GENERIC = re.compile(
    r"(image|img|mask|label|seg|segmentation|png|nifti|nii|dicom|scan|train|val|test|data)s?(tr|ts)?"
    rf"|{SEQUENCES}|anat|{WHEN}",
    re.I,
)
"""Folder names that say what lies in them or when it was taken, not whose it is: visits of one patient stay together."""

TAKEN = re.compile(rf"[_-](({TIMES}|frame|phase)[-_]?\d*|ses[-_]?\d+|e[ds]|{DATE}|{YEAR_LAST}-.*)$")
"""What the name of a volume ends with that says when it was taken: ED and ES are the ends of a heartbeat."""

VISITED = re.compile(rf"[ _.-]+((v|m|w|fu|bl|scan|exam|run|{TIMES})[ _-]?\d{{0,3}}|ses[ _-]?\d+|pre|post|{DATE})$")
"""What a patient's number ends with that says of which visit it is, as in trials; a letter alone is none."""

FURTHER = re.compile(rf"[_-](({TIMES})[_-]?\d*|v\d+|ses[_-]?\d+|{DATE}|left|right|\d{{1,2}}(?=[_-]))(?=$|[_-])")
"""Part of a volume's name that says of which visit or side it is, before or behind its sequence."""

BIDS = r"(?:^|/)(sub-[A-Za-z0-9]+)(?:/|_)"
"""Who it is in the Brain Imaging Data Structure."""

BRATS = re.compile(r"^(brats-[a-z-]+-\d{4,5})-\d{3}$")
"""A case of BraTS from 2023 on: group of patients, patient, time point."""

LOOK = re.compile(
    r"(?:^|[/_-])(?:(?P<state>baseline|follow[-_ ]?up[-_ ]?\d*|pre|post)|ses-(?P<session>[a-z0-9]+)|(?P<beat>e[ds])"
    r"|(?P<side>left|right)|brats-[a-z-]+-\d{4,5}-(?P<point>\d{3})"
    rf"|(?P<what>{TIMES}|ses|exam|study|frame|phase)[-_ ]?(?P<number>\d+)|(?P<date>{DATE})"
    r"|(?P<machine>ct|mri?|pt|pet)|(?P<contrast>flair|t2f|(?P<t1>t1[wn]?)|(?P<t1c>t1ce?|t1gd)|(?P<t2>t2w?)|pd|dwi|adc|hbv|dce|swi))"
    r"(?=$|[/_-])"
)
"""Part of a path that says which of several looks at a patient it is of: when it was taken, of which side, in which sequence."""

IMAGES = re.compile(r"(image|img)s?(tr|ts)?", re.I)
MASK = re.compile(r"mask|label|seg|annot|contour|truth|(?<![a-z])(gt|roi)(?![a-z])", re.I)
MASKS = re.compile(r"(mask|label|annotation|gt|ground[-_ ]?truth)s?(tr|ts)?", re.I)
VISIT = re.compile(WHEN, re.I)
SCAN = re.compile(rf"(.*[_-])?({SEQUENCES})")
"""Name of a volume that is called like a sequence."""
MASKED = re.compile(r"[_-](mask|seg|segmentation|label|labels|gt)$")
KINDS = "images?|imgs?|im|scan|slice|frame|volume|vol|masks?|seg|segmentation|labels?|gt|annotation"
NOBODYS = re.compile(rf"({KINDS}|{SEQUENCES}|case|patient|pat|subject|subj|sub|person|exam|study|series|anon\w*|unknown)?")
WHAT = re.compile(rf"^({KINDS})[ _.-]*(?=\d)|^({KINDS})[ _.-]+|[ _.-]+({KINDS})$")

ENDING = re.compile(
    "|".join(re.escape(end) for form in VOLUMES.values() for end in form.endings).join(("(", r"|\.png|\.dcm|\.dicom|\.ima)+$"))
)
SEPARATOR = re.compile(r"[ _.-]+")
SHARES = re.compile(
    r"(?<![a-z])(probs?(?![ _.-]?\d)|probabilit(y|ies)|softmax|logits?|uncertainty|entropy|distance|sdf"
    r"|(mask|seg|label)[ _.-]soft|soft[ _.-](mask|seg|label))(map)?(?![a-z])"
)
"""Words in the name of a volume of shares or distances instead of classes."""
COUNTED = re.compile(r"[_-]mask[_-]?\d{1,2}$")
GONE = (FileNotFoundError, NotADirectoryError)
"""What a look at a file or folder raises that is there no more."""


def walk(root: Path, exclude: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield path below `root`, size in bytes and time of change in ns of every regular file and link, in the order of names.

    Links are named but not followed: they could lead out of the export or round in circles. A pattern of `exclude` that is that
    of a folder passes over all that lies in it.

    Raises
    ------
    IcmoeError
        109, after the last file, where folders or files in them cannot be looked at: they must not pass for deleted ones.
    """
    shut: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=shut.append):
        within = os.path.relpath(folder, root)
        folders[:] = sorted(name for name in folders if not _matches(os.path.normpath(f"{within}/{name}"), exclude))
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118  # as below
        for name in sorted([*files, *links]):
            full = os.path.join(folder, name)  # noqa: PTH118  # three times as fast, and there may be a million
            relative = os.path.relpath(full, root)
            if _matches(relative, exclude):
                continue
            try:
                state = os.lstat(full)
            except GONE:  # since the folder was listed
                continue
            except OSError as error:  # a folder that may be listed and not entered, a path that is too long, a share that fails
                shut.append(error)
                break
            if stat.S_ISREG(state.st_mode) or stat.S_ISLNK(state.st_mode):
                yield relative, state.st_size, state.st_mtime_ns
    _require_open(
        root, [e for e in shut if not isinstance(e, GONE) and not _matches(f"{os.path.relpath(e.filename, root)}/", exclude)]
    )


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    """Return whether a path is one of those that are passed over; a folder may be named with a slash at its end."""
    return any(fnmatch.fnmatchcase(composed(relative), composed(pattern.rstrip("/"))) for pattern in patterns)


def _require_open(root: Path, shut: Sequence[OSError]) -> None:
    if shut:
        raise IcmoeError(
            Fault(
                number=109,
                where=str(root),
                what="folders of the export cannot be read",
                value=f"{len(shut)}, {shut[0].strerror}",
                did="Nothing was read.",
                todo="Let this user enter them (find FOLDER -type d ! -readable lists them), or name them under exclude.",
            )
        )


def stem(relative: str) -> str:
    """Return a file's name without endings and without a word for "mask", `folded`, to compare names by.

    A mask may keep the ending of its image: x.dcm.png, x.dcm_mask.png.
    """
    name = COUNTED.sub("", _without_ending(relative))
    return ENDING.sub("", re.sub(r"[_-](mask|msk|seg|segm|segmentation|label|labels|anno|gt|roi)$", "", name))


def bare(relative: str) -> str:
    """Return a `stem` without a word in front or behind for what the file is: 12 of volume-12, segmentation-12 and 12_img."""
    return WHAT.sub("", stem(relative))


def parted(name: str) -> list[tuple[str, str]]:
    """Return what stands before and what after each separator in a name, from its beginning on."""
    return [(name[: part.start()], name[part.end() :]) for part in SEPARATOR.finditer(name)]


def is_counted(relative: str) -> bool:
    """Return whether a mask is called one of several of its image: x_mask_1 beside x_mask, an object each."""
    return bool(COUNTED.search(_without_ending(relative)))


def _without_ending(relative: str) -> str:
    return ENDING.sub("", folded(PurePosixPath(relative).name))


def case(relative: str) -> str:
    """Return a volume's `stem` without the number of its channel (case_0000.nii.gz, as nnU-Net writes it)."""
    return re.sub(r"_\d{4}$", "", stem(relative))


def person(name: str) -> str:
    """Return a volume's `stem` or `case` without what says when it was taken: frames and visits of a patient stay together."""
    return BRATS.sub(r"\1", TAKEN.sub("", name))


def told(relative: str, pattern: str | None) -> str:
    """Return whose a path says that its file is, by the site's pattern or else as BIDS names people; empty where it does not."""
    found = re.search(composed(pattern or BIDS), composed(relative))
    return (found.group(1) or "") if found else ""


def owner(relative: str) -> str:
    """Return the part of a path that says whose a file is: the folders that are named for nothing else, without a visit's name.

    Empty where there is none.
    """
    return "/".join(owner_folders(relative))


def owner_folders(relative: str) -> tuple[str, ...]:
    """Return the folders of an `owner`."""
    return tuple(_without_visit(folded(part)) for part in own_folders(relative))


def without_visit(number: str) -> str:
    """Return a patient's number, `folded`, without what says of which visit it is, as long as digits are left."""
    found = VISITED.sub("", number)
    return found if re.search(r"\d{2}", found) and not re.search(r"[ _.-][vmw]$", number) else number


def _without_visit(folder: str) -> str:
    """Return a folder's name without what says when it was taken, as long as that leaves somebody's."""
    return found if is_somebodys(found := person(folder)) else folder


def is_somebodys(name: str) -> bool:
    """Return whether a part of a name may be a person's: P1 of P1_20200131 and doe_john of doe_john_20200131, but not case."""
    return bool(re.search(r"\d", name) or not NOBODYS.fullmatch(name))


def of_another_look(relative: str, other: str) -> bool:
    """Return whether two paths name two looks at a patient, such as visit1 and visit2, two dates, two frames, or T1 and FLAIR."""
    one, two = _looks(relative), _looks(other)
    return any(not one[kind] & two[kind] for kind in one.keys() & two.keys())


def _looks(relative: str) -> dict[str, set[str]]:
    """Return what a path says of each kind of look, in one way of writing."""
    found: dict[str, set[str]] = {}
    name = ENDING.sub("", folded(relative))
    for part in LOOK.finditer(name):
        before, after = name[: part.start()], name[part.end() :]
        starts = name[: part.start() + 1].endswith("/")
        ends = not after or (after[0] == "/" and not MASK.search(before.rpartition("/")[2]))
        if part["date"] and not (starts or ends):
            continue  # masks_20220131 says when they were drawn
        said = {name: re.sub(r"\W|_", "", value).lstrip("0") for name, value in part.groupdict().items() if value}
        number, what = said.pop("number", ""), said.pop("what", "")
        kind, value = (what, number) if what else next(iter(said.items()))
        plain = {"t2f": "flair", "pet": "pt", "mri": "mr"}.get(value, value)
        found.setdefault(kind, set()).add(next((name for name in ("t1", "t1c", "t2") if name in said), plain))
    return found


def case_names(relative: str, masks: Mapping[str, Collection[PurePosixPath]]) -> Iterator[str]:
    """Yield which masks a volume may be a sequence of, the longest name first: of X_1_flair those called X_1, then X.

    Beside a mask it may have any further name, in another folder that of a sequence.

    Parameters
    ----------
    relative
        Path of the volume.
    masks
        Folders of the masks by `stem`.
    """
    name, folder = stem(relative), PurePosixPath(relative).parent
    for found in reversed([*re.finditer(r"[_-]+", name)]):
        folders = masks.get(name[: found.start()], ())
        if folder in folders or (folders and re.fullmatch(SEQUENCES, name[found.end() :])):
            yield name[: found.start()]


def is_sequence(target: str, path: str) -> bool:
    """Return whether a volume is a sequence of a mask's case as BraTS names them: X_t1 and X_flair for X_seg."""
    return any(case_names(target, {stem(path): {PurePosixPath(path).parent}}))


def is_named_after(path: str, target: str) -> bool:
    """Return whether a mask is called like a volume and what is marked on it: case1_tumor, but not case1_2_tumor, for case1."""
    return re.fullmatch(re.escape(stem(target)) + r"[ _.-]+[^\d]+", stem(path)) is not None


def of_one_visit(path: str, targets: Mapping[str, str]) -> list[str]:
    """Return the keys of images that go on from a mask's name with one visit or side, those with none first; none of several.

    X_seg is of X_t1 and X_flair, and not of X_followup_t1 beside them.
    """
    found: dict[frozenset[str], list[str]] = {}
    for name, target in targets.items():
        if not stem(target).startswith(stem(path)):
            return [*targets]
        visits = frozenset(part.group(1) for part in FURTHER.finditer(stem(target).removeprefix(stem(path))))
        found.setdefault(visits, []).append(name)
    return found.get(frozenset()) or (next(iter(found.values())) if len(found) == 1 else [])


def called_image(relative: str, *, called: bool = False) -> bool:
    """Return whether a picture lies in a folder called images under a name that is no mask's: a dark one has few values too.

    The folder may have one for each patient in it, where what is `called` like a class is a mask.
    """
    path = PurePosixPath(relative)
    *_, above, own = ("", "", *path.parent.parts)
    of_patient = not called and re.search(r"\d", own) and not MASK.search(own)
    return bool(IMAGES.fullmatch(own) or (of_patient and IMAGES.fullmatch(above))) and not MASK.search(path.name)


def called_mask(relative: str) -> bool:
    """Return whether a picture is called a mask, or lies in a folder for them: one with soft edges has many values.

    The folder may have others for visits, dates and patients in it.
    """
    folders = reversed(PurePosixPath(relative).parent.parts)
    kinds = (name for name in folders if MASKS.fullmatch(name) or (GENERIC.fullmatch(name) and not VISIT.fullmatch(name)))
    kind = next(kinds, "")
    return bool(MASKS.fullmatch(kind) or MASKED.search(_without_ending(relative)))


def is_channel(relative: str) -> bool:
    """Return whether a volume is a channel of a case as nnU-Net writes it: imagesTr/case_0001.nii.gz."""
    folder = PurePosixPath(relative).parent.name
    return bool(re.fullmatch(r"images(tr|ts)", folder, re.I)) and called_image(relative) and case(relative) != stem(relative)


def called_shares(relative: str) -> bool:
    """Return whether a volume is called for shares of a mask or distances from it: its values are no grey values."""
    return not called_image(relative) and bool(SHARES.search(stem(relative)))


def called_scan(relative: str) -> bool:
    """Return whether a volume lies in a folder called images, or is called like a sequence: it is one where it is black, too."""
    parts = PurePosixPath(relative).parts
    return called_image(relative) or (bool(SCAN.fullmatch(stem(relative))) and not any(map(MASK.search, parts)))


def own_folders(relative: str) -> list[str]:
    """Return the folders of a file that may be named for whose it is."""
    return [part for part in PurePosixPath(composed(relative)).parent.parts if not GENERIC.fullmatch(part)]


def closest(path: str, targets: Mapping[str, str]) -> list[str]:
    """Return the keys whose path shares the most folders with `path`, from the top and then from the bottom.

    Several are returned where they are equally close.
    """
    folders = PurePosixPath(composed(path)).parent.parts

    def shared(one: Sequence[str], other: Sequence[str]) -> int:
        return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

    def depth(target: str) -> tuple[int, int]:
        other = PurePosixPath(composed(target)).parent.parts
        return shared(folders, other), shared(folders[::-1], other[::-1])

    depths = {name: depth(target) for name, target in targets.items()}
    deepest = max(depths.values(), default=None)
    return [name for name, found in depths.items() if found == deepest]
