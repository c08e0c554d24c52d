"""Equal pictures are used once and never on both sides of a split, however patients are linked."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from hypothesis import given
from hypothesis import strategies as st

from icmoe.data.ingest.copies import COMMON, Copies
from icmoe.data.ingest.run import SPLITS

Frame = tuple[int, int]
"""Patient and picture."""


def copies_of(frames: Sequence[Frame], splits: Mapping[int, str], *, named: bool) -> Copies:
    """Return what is made of frames where the hospital named the splits of all patients, or of none."""
    times = Counter(picture for _, picture in frames)
    repeated = [(str(picture), f"P-{patient}") for patient, picture in frames if times[picture] > 1]
    by_patient = {f"P-{patient}": splits.get(patient, "train") for patient, _ in frames}
    return Copies(by_patient, repeated, named=by_patient if named else ())


def told(frames: Sequence[Frame], splits: Mapping[int, str]) -> tuple[list[Frame], list[int]]:
    """Return the frames that are used and the numbers of the reasons why others are not, both in order; splits are named."""
    copies = copies_of(frames, splits, named=True)
    reasons = [copies.reason(f"P-{patient}", str(picture)) for patient, picture in frames]
    kept = [frame for frame, reason in zip(frames, reasons, strict=True) if reason is None]
    return kept, [reason.number for reason in reasons if reason is not None]


held = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12)), max_size=40)
splits = st.dictionaries(st.integers(0, 7), st.sampled_from(SPLITS))


@given(held, splits)
def test_whoever_is_linked_to_a_patient_stands_in_one_split(frames: list[Frame], splits: dict[int, str]):
    kept, out = told(frames, splits)
    assert len(kept) + len(out) == len(frames)
    assert len({picture for _, picture in kept}) == len(kept)
    owners = defaultdict(set)
    for patient, picture in frames:
        owners[picture].add(patient)
    linked = {patient: {patient} for patient, _ in frames}
    for _ in frames:  # closure by brute force
        for group in owners.values():
            if len(group) < COMMON:
                whole = set().union(*(linked[patient] for patient in group))
                for patient in whole:
                    linked[patient] = whole
    left = {patient for patient, _ in kept}
    for patient in left:
        assert len({splits.get(other, "train") for other in linked[patient] & left}) == 1
    assert told(kept, splits) == (kept, [])


@given(held, splits)
def test_where_no_split_is_named_nobody_is_left_out_and_linked_patients_stand_in_the_best_of_theirs(
    frames: list[Frame], splits: dict[int, str]
):
    copies = copies_of(frames, splits, named=False)
    reasons = [copies.reason(f"P-{patient}", str(picture)) for patient, picture in frames]
    assert {reason.number for reason in reasons if reason} <= {125}
    owners = defaultdict(set)
    for patient, picture in frames:
        owners[picture].add(patient)
    for patient, _ in frames:
        assert SPLITS.index(copies.split_of(f"P-{patient}")) >= SPLITS.index(splits.get(patient, "train"))
    for group in owners.values():
        assert len(group) >= COMMON or len({copies.split_of(f"P-{patient}") for patient in group}) == 1


def test_the_split_that_is_named_for_one_number_of_a_person_is_that_of_all():
    splits = {"P-1": "train", "P-2": "test", "P-3": "val"}
    copies = Copies(splits, [], [("study", "P-1"), ("study", "P-2")], named={"P-1"})
    assert [copies.split_of(patient) for patient in splits] == ["train", "train", "val"]
    assert not any(copies.reason(patient, "picture") for patient in splits)


def test_a_third_patient_links_two_who_share_nothing():
    kept, out = told([(1, 10), (2, 10), (1, 11), (3, 11), (2, 12), (3, 13), (4, 14)], {3: "test"})
    assert kept == [(3, 11), (3, 13), (4, 14)]
    assert set(out) == {127}


def test_a_picture_of_many_patients_links_nobody_and_is_used_by_nobody():
    frames = [(n, 0) for n in range(COMMON)] + [(n, n + 1) for n in range(COMMON)]
    kept, out = told(frames, {0: "test"})
    assert kept == frames[COMMON:]
    assert out == [125] * COMMON
