"""Equal pictures: each is used once, and nobody who shares one with the test is trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from icmoe.data.ingest.refusals import Refusal
from icmoe.data.ingest.run import SAME_PICTURE
from icmoe.data.splits import SPLITS

COMMON = 5
"""Patients from whom on an equal picture says nothing about a person, such as a logo, nor does a study that a system named."""


class Copies:
    """Which frames are not used because of equal pictures, told in the order in which frames are published.

    Patients who share a picture, a study (which is of one person, PS3.3 A.1.2) or a number (OtherPatientIDs) count as one
    person, and so do those whom a third one links. Such a person stands in the best of their splits, test before val before
    train: otherwise pictures of a person in the test would be trained on. The hospital's word for one of them is for all; where
    it names several, only the patients of the best one stay. Of equal pictures the first is used.

    Parameters
    ----------
    splits
        By patient, of all who have frames that may be used.
    repeated
        Picture and patient of every frame whose picture occurs more than once.
    studies
        Study and patient of every series; further numbers that files give a patient, and each patient who has one of them.
    contradicted
        Pictures whose copies are marked differently: nobody knows which of them is right.
    named
        Patients whose split the hospital named.
    """

    def __init__(
        self,
        splits: Mapping[str, str],
        repeated: Iterable[tuple[str, str]],
        studies: Iterable[tuple[str, str]] = (),
        contradicted: Collection[str] = (),
        named: Collection[str] = (),
    ) -> None:
        self._splits = splits
        self._named = named
        self._contradicted = contradicted
        self._owners = _grouped(repeated)
        self._kept: dict[str, str] = {}
        groups = [*self._owners.values(), *_grouped(studies).values()]
        self._persons = _persons([sorted(patients) for patients in groups if len(patients) < COMMON])
        self._best = self._of_persons(patient for patient in splits if patient not in named)
        self._best |= self._of_persons(patient for patient in splits if patient in named)

    def _of_persons(self, patients: Iterable[str]) -> dict[str, int]:
        """Return the best split of each person among these patients."""
        best: dict[str, int] = {}
        for patient in patients:
            person = self._persons.get(patient, patient)
            best[person] = max(best.get(person, 0), SPLITS.index(self._splits[patient]))
        return best

    def split_of(self, patient: str) -> str:
        """Return the split in which a patient's frames stand."""
        return SPLITS[self._best[self._persons.get(patient, patient)]]

    def reason(self, patient: str, picture: str) -> Refusal | None:
        """Return why the next frame is not used, None where it is."""
        if patient in self._named and self._splits[patient] != self.split_of(patient):
            return Refusal(127, "it shares pictures, a study or a number with a patient of another split")
        owners = self._owners.get(picture)
        if owners is None:
            return None
        if len(owners) >= COMMON:
            return Refusal(125, f"{COMMON} or more patients have the same picture")
        if picture in self._contradicted:
            return Refusal(122, "a copy of it is marked differently; exclude one of them")
        if picture not in self._kept:
            self._kept[picture] = patient
            return None
        other = self._kept[picture]
        return Refusal(125, "a copy of it is used" if other == patient else f"{other}{SAME_PICTURE}")


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Return the patients of each picture or study."""
    found: dict[str, set[str]] = {}
    for shared, patient in pairs:
        found.setdefault(shared, set()).add(patient)
    return found


def _persons(groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """Return the first patient of each set of patients that the groups link, by patient."""
    parent: dict[str, str] = {}

    def root(patient: str) -> str:
        while parent.setdefault(patient, patient) != patient:
            patient = parent[patient]
        return patient

    for first, *others in groups:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return {patient: root(patient) for patient in list(parent)}
