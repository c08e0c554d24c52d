"""Equal pictures: each is used once, and nobody who shares one with the test is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from icmoe.data.ingest.index import FrameRow, LeftOut
from icmoe.data.ingest.refusals import Refusal
from icmoe.data.ingest.run import SPLITS

COMMON = 5
"""Patients from whom on an equal picture says nothing about a person: a logo, a test pattern, an empty report."""


def without_copies(rows: Sequence[FrameRow]) -> tuple[list[FrameRow], list[LeftOut]]:
    """Return the frames to use in their order, and one reason per frame that is not.

    Patients who share a picture count as one person, and so do those whom a third one links. Where such a person stands in
    several splits, only the patients of the best one stay, test before val before train: otherwise pictures of a person in
    the test would be trained on. Of equal pictures the first is used.

    Parameters
    ----------
    rows
        Frames that may be used, in the order in which they are published.
    """
    owners: dict[str, set[str]] = {}
    for row in rows:
        owners.setdefault(row.result.picture, set()).add(row.patient)
    persons = _persons([sorted(patients) for patients in owners.values() if len(patients) < COMMON])
    best: dict[str, int] = {}
    for row in rows:
        person = persons.get(row.patient, row.patient)
        best[person] = max(best.get(person, 0), SPLITS.index(row.split))
    kept: dict[str, FrameRow] = {}
    out = []
    for row in rows:
        reason = _reason(row, persons, best, kept, common=len(owners[row.result.picture]) >= COMMON)
        if reason is None:
            kept[row.result.picture] = row
        else:
            out.append(LeftOut(subject=row.series, number=reason.number, why=reason.why, patient=row.patient, series=row.series))
    return list(kept.values()), out


def _reason(
    row: FrameRow, persons: Mapping[str, str], best: Mapping[str, int], kept: Mapping[str, FrameRow], *, common: bool
) -> Refusal | None:
    if SPLITS.index(row.split) < best[persons.get(row.patient, row.patient)]:
        return Refusal(127, "it shares pictures with a patient of another split")
    if common:
        return Refusal(125, f"{COMMON} or more patients have the same picture")
    other = kept.get(row.result.picture)
    if other is None:
        return None
    return Refusal(125, "a copy of it is used" if other.patient == row.patient else f"{other.patient} has the same picture")


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
