"""What hospitals call the study's classes: names and codes, compared without regard to case, spaces and underscores."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from icmoe.data.ingest.folding import folded
from icmoe.data.ingest.walking import SEPARATOR, kindless, parted, stem
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Label

LETTERS = re.compile(r"[^\W\d_]{2}")


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

    def index(self, names: Iterable[str]) -> int | None:
        """Return the class of the first name that is known, else of the first that is known without its number, else None.

        Who draws several objects of a class counts them: "lesion 1", "Lesion_2", "GTV-3".
        """
        plain = [_plain(name) for name in names]
        return next((self._index[name] for name in (*plain, *map(_uncounted, plain)) if name in self._index), None)

    def said_by(self, relative: str) -> tuple[int | None, int]:
        """Return the class that a path names, and where it does: 0 by the file's name, -1 by its end, n by its nth folder.

        Programs write a file for each class under the name of the case (case1_edema), or a folder for each; they may go on
        with whose reading it is (case1_edema_final).

        Parameters
        ----------
        relative
            Path of a mask.
        """
        name, folders = stem(relative), PurePosixPath(relative).parent.parts
        ends = ((self.index([end, kindless(end)]), -1) for end in _ends(name))
        lies = ((self._of_folder(folder), len(folders) - at) for at, folder in enumerate(reversed(folders)))
        found = itertools.chain([(self.index([name]), 0)], ends, [(self._within(name), -1)], lies)
        return next(((label, at) for label, at in found if label is not None), (None, 0))

    def _of_folder(self, folder: str) -> int | None:
        """Return the class that a folder is called like, also beside a word for masks or in the plural: edema_masks, edemas."""
        called = kindless(folder)
        return self.index([folder, called, called.removesuffix("s")])

    def _within(self, name: str) -> int | None:
        """Return the one class that stands in a name as words of its own behind others; None if none does, or several do."""
        plain = " ".join(SEPARATOR.split(_plain(name)))
        words = {called: index for called, index in self._index.items() if index and LETTERS.search(called)}
        found = {index for called, index in words.items() if re.search(rf"\w {re.escape(called)}(?!\w)", plain)}
        return found.pop() if len(found) == 1 else None


def _ends(name: str) -> Iterable[str]:
    """Yield what follows each separator in a name, the longest first; a number or a single letter is no class."""
    return (end for _, end in parted(name) if LETTERS.search(end))


def _uncounted(name: str) -> str:
    return re.sub(r"(?<=[^\W\d])[ .#-]*\d{1,2}$", "", name)


def _plain(name: str) -> str:
    return " ".join(folded(name.replace("_", " ")).split())
