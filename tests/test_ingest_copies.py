"""Equal pictures are used once and never on both sides of a split, however patients are linked."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from icmoe.data.ingest.copies import COMMON, without_copies
from icmoe.data.ingest.index import FrameRow
from icmoe.data.ingest.records import FrameResult
from icmoe.data.ingest.run import SPLITS


def rows_of(held: list[tuple[int, int]], splits: dict[int, str]) -> list[FrameRow]:
    """One frame per (patient, picture)."""
    return [
        FrameRow(
            patient=f"P-{patient}",
            series=f"S-{patient}",
            split=splits.get(patient, "train"),
            index=place,
            modality="MR",
            spacing=None,
            result=FrameResult(entry=str(place), picture=str(picture)),
        )
        for place, (patient, picture) in enumerate(held)
    ]


held = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12)), max_size=40)
splits = st.dictionaries(st.integers(0, 7), st.sampled_from(SPLITS))


@given(held, splits)
def test_whoever_is_linked_to_a_patient_stands_in_one_split(held: list[tuple[int, int]], splits: dict[int, str]):
    rows = rows_of(held, splits)
    kept, out = without_copies(rows)
    assert len(kept) + len(out) == len(rows)
    assert [row.index for row in kept] == sorted(row.index for row in kept)
    assert len({row.result.picture for row in kept}) == len(kept)
    owners = defaultdict(set)
    for row in rows:
        owners[row.result.picture].add(row.patient)
    split_of = {row.patient: row.split for row in kept}
    linked = {row.patient: {row.patient} for row in rows}
    for _ in rows:  # closure by brute force
        for group in owners.values():
            if len(group) < COMMON:
                whole = set().union(*(linked[patient] for patient in group))
                for patient in whole:
                    linked[patient] = whole
    for patient in split_of:
        assert {split_of[other] for other in linked[patient] if other in split_of} == {split_of[patient]}
    assert without_copies(kept) == (kept, [])


def test_a_third_patient_links_two_who_share_nothing():
    rows = rows_of([(1, 10), (2, 10), (1, 11), (3, 11), (2, 12), (3, 13), (4, 14)], {3: "test"})
    kept, out = without_copies(rows)
    assert [(row.patient, row.result.picture) for row in kept] == [("P-3", "11"), ("P-3", "13"), ("P-4", "14")]
    assert {item.number for item in out} == {127}


def test_a_picture_of_many_patients_links_nobody_and_is_used_by_nobody():
    rows = rows_of([(n, 0) for n in range(COMMON)] + [(n, n + 1) for n in range(COMMON)], {0: "test"})
    kept, out = without_copies(rows)
    assert [row.result.picture for row in kept] == [str(n + 1) for n in range(COMMON)]
    assert [item.number for item in out] == [125] * COMMON
