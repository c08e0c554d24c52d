"""What hospitals call the study's classes: names and codes, compared without regard to case, spaces and underscores."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from icmoe.data.ingest.folding import folded
from icmoe.data.ingest.marked import SIDES, kindless, organ_in, says_reading
from icmoe.data.ingest.walking import SEPARATOR, parted, stem
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Label

LETTERS = re.compile(r"[^\W\d_]{2}")


class Called(NamedTuple):
    """The class that a path names, None if none, where, as in `FileRecord.called_at`, and of which part, 0 of the whole."""

    label: int | None
    at: int
    part: int


class LabelNames:
    """Class index by name or code.

    Parameters
    ----------
    labels
        Classes of the study; their own names count.
    synonyms
        Further names and codes ("SCT:52988006", "Lesion") by class name.

    Raises
    ------
    IcmoeError
        210 where a synonym belongs to no class, or to two.
    """

    def __init__(self, labels: Sequence[Label], synonyms: Mapping[str, Sequence[str]]) -> None:
        classes = {label.name: index for index, label in enumerate(labels)}
        self.values = {value: index for index, label in enumerate(labels) for value in label.values}
        """What masks hold by which a class is meant, and which."""
        self._index = {_plain(name): index for name, index in classes.items()}
        faults = []
        for name, others in synonyms.items():
            if name not in classes:
                what = "synonyms are given for a class that the study does not have"
                faults.append(Fault(number=210, where="ingest.labels", what=what, value=name, limit=", ".join(classes)))
                continue
            twice = [other for other in others if self._index.setdefault(_plain(other), classes[name]) != classes[name]]
            faults += [Fault(number=210, where="ingest.labels", what="one synonym for two classes", value=name) for name in twice]
        if faults:
            raise IcmoeError(*faults)
        self._part = _parts(self._index)
        words = (name for name, index in self._index.items() if index and LETTERS.search(name))
        self._words = {name: re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in words}

    def index(self, names: Iterable[str]) -> int | None:
        """Return the class of the first name that is known, else of the first that is known without its number, else None.

        Who draws several objects of a class counts them: "lesion 1", "Lesion_2", "GTV-3".
        """
        return None if (name := self._known(names)) is None else self._index[name]

    def said_by(self, relative: str) -> Called:
        """Return the class that a path names, and where.

        Programs write a file for each class under the name of the case (case1_edema), or a folder for each; they may go on
        with whose reading it is (case1_edema_final).

        Parameters
        ----------
        relative
            Path of a mask.
        """
        name, folders = stem(relative), PurePosixPath(relative).parent.parts
        ends = ((self._known([end, kindless(end)]), -1) for end in _ends(name))
        lies = ((self._of_folder(folder), len(folders) - at) for at, folder in enumerate(reversed(folders)))
        found = itertools.chain([(self._known([name]), 0)], ends, [(self._within(name), -1)], lies)
        known = ((called, at) for called, at in found if called is not None)
        return next((Called(self._index[called], at, self._part.get(called, 0)) for called, at in known), Called(None, 0, 0))

    def _known(self, names: Iterable[str]) -> str | None:
        plain = [_plain(name) for name in names]
        return next((name for name in (*plain, *map(_uncounted, plain)) if name in self._index), None)

    def _of_folder(self, folder: str) -> str | None:
        """Return the name by which a folder is called, also beside a word for masks or in the plural: edema_masks, edemas."""
        called = kindless(folder)
        return self._known([folder, called, called.removesuffix("s")])

    def _within(self, name: str) -> str | None:
        """Return the name of the one class that stands in a name between others, None of none or of several.

        Behind it follows which reading it is (case1_edema_final) or, where it is the first word, a side or the organ that
        it is in (lesion_brain): liver_tumor is no liver.
        """
        plain = " ".join(SEPARATOR.split(_plain(name)))
        parts = ((called, part) for called, word in self._words.items() for part in word.finditer(plain))
        found = [called for called, part in parts if _goes_on(called, plain[part.end() :], first=not part.start())]
        return found[0] if len({self._index[called] for called in found}) == 1 else None


def _goes_on(called: str, rest: str, *, first: bool) -> bool:
    """Return whether a name may go on so behind a class: with a reading, or behind the first word with a side or the organ.

    Where a number comes last, a case may be called like the class: lesion_001.
    """
    if rest.strip() in SIDES or (first and organ_in(rest) and not organ_in(called)):
        return True
    return says_reading(rest) and not (first and re.search(r"(^| )\d+$", rest))


def _parts(index: Mapping[str, int]) -> dict[str, int]:
    """Return a number for each name that is of a part: several words, the first also that of another name of its class.

    As in vertebra L1 and vertebra L2, but not in tumor and gtv, which are two words for one thing.
    """
    begins: dict[tuple[int, str], list[str]] = {}
    for name, label in index.items():
        if " " in name:
            begins.setdefault((label, name.split()[0]), []).append(name)
    several = (name for names in begins.values() if len(names) > 1 for name in names)
    return {name: number for number, name in enumerate(several, 1)}


def _ends(name: str) -> Iterable[str]:
    """Yield what follows each separator in a name, the longest first; a number or a single letter is no class."""
    return (end for _, end in parted(name) if LETTERS.search(end))


def _uncounted(name: str) -> str:
    return re.sub(r"(?<=[^\W\d])[ .#-]*\d{1,2}$", "", name)


def _plain(name: str) -> str:
    return " ".join(folded(name.replace("_", " ")).split())
