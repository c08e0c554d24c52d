"""The check of the sites' data before the first round: who is named, who is not, who declines; through real messages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from test_rounds import SITES, Wire
from test_summary import site_of

from fl_client.app import make_client_app
from fl_client.participant import Participant
from fl_server.app import Roster, compare_sites
from fl_server.data_check import DataCheck, check_data
from fl_server.outliers import nearest_median, outliers
from icmoe.data.folder import read_folder
from icmoe.errors import CATALOGUE
from icmoe.messages import CONFIG, STUDY_KEY, SUMMARY_KEY
from icmoe.study import Study
from icmoe.summary import LabelSummary, SiteSummary, parse_summary, summarise
from simulations.phantoms import PhantomSite, write_phantoms

CONTEXT = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
LABELS = ["background", "lesion"]
USUAL = SiteSummary(
    images=300,
    patients=30,
    labels=(LabelSummary(patients=30, images=150),),
    modalities=("MR",),
    in_plane_mm=(0.7, 0.9),
    between_mm=(3.0, 5.0),
    side_px=(256, 320),
)


def label(patients: int, images: int | None) -> tuple[LabelSummary, ...]:
    return (LabelSummary(patients=patients, images=images),)


PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "far smaller": ({"images": 90, "labels": label(30, 50)}, "training images at most 90; the other sites have 300."),
    "another modality": ({"modalities": ("CT",)}, "modality CT; the other sites have MR."),
    "a further modality": ({"modalities": ("CT", "MR")}, "modality CT; the other sites have MR."),
    "a rare label": ({"labels": label(20, 50)}, "share of images with lesion 17 %; the other sites have 50 %."),
    "a label everywhere": ({"labels": label(30, 300)}, "share of images with lesion 100 %; the other sites have 50 %."),
    "a missing label": ({"labels": label(10, None)}, "share of patients with lesion at most 33 %; the other sites have 100 %."),
    "coarse pixels": ({"in_plane_mm": (1.5, 1.6)}, "pixel distance 1.5 to 1.6 mm; the other sites have 0.7 to 0.9 mm."),
    "fine pixels": ({"in_plane_mm": (0.2, 0.2)}, "pixel distance 0.2 mm; the other sites have 0.7 to 0.9 mm."),
    "thick slices": ({"between_mm": (10.0, 10.0)}, "slice distance 10 mm; the other sites have 3 to 5 mm."),
    "large images": ({"side_px": (1024, 1024)}, "image side 1024 pixels; the other sites have 256 to 320 pixels."),
}


def changed(**values: Any) -> SiteSummary:
    return SiteSummary(**{name: getattr(USUAL, name) for name in SiteSummary.model_fields} | values)


@pytest.mark.parametrize("sites", [3, 4, 7])
@pytest.mark.parametrize("name", PLANTED)
def test_the_odd_site_is_named_with_its_value_and_the_others(name: str, sites: int) -> None:
    values, sentence = PLANTED[name]
    summaries = {f"S{number}": USUAL for number in range(sites - 1)} | {"Odd": changed(**values)}
    assert [str(finding) for finding in outliers(summaries, LABELS)] == [f"Odd: {sentence}"]


SMALL_CHANGES: dict[str, dict[str, Any]] = {
    "half as many images": {"images": 150, "labels": label(30, 80)},
    "twice as many images": {"images": 600, "labels": label(30, 300)},
    "a somewhat rarer label": {"labels": label(30, 90)},
    "pixels that are rounded the other way": {"in_plane_mm": (0.6, 0.6)},
    "ranges that meet": {"between_mm": (5.0, 7.0), "side_px": (320, 512)},
    "a wider range": {"in_plane_mm": (0.1, 3.0)},
    "nothing but counts": {"labels": (), "modalities": (), "in_plane_mm": None, "between_mm": None, "side_px": None},
    "no modality, as PNG folders": {"modalities": ()},
}


@pytest.mark.parametrize("name", SMALL_CHANGES)
def test_what_differs_a_little_or_is_withheld_is_no_outlier(name: str) -> None:
    assert outliers({"A": USUAL, "B": USUAL, "C": USUAL, "D": changed(**SMALL_CHANGES[name])}, LABELS) == []


@given(st.integers(11, 60), st.integers(1, 5), st.sampled_from([(0,), (0, 1)]), st.integers(1, 12))
def test_equal_sites_never_stand_out(patients: int, images: int, classes: tuple[int, ...], sites: int) -> None:
    one = summarise(site_of(patients, images=images, classes=classes), 2)
    assert outliers({f"S{number}": one for number in range(sites)}, LABELS) == []


def test_of_two_sites_neither_is_the_odd_one() -> None:
    other = changed(modalities=("CT",), images=2000, in_plane_mm=(3.0, 3.0))
    assert outliers({"A": USUAL, "B": other}, LABELS) == []
    assert {finding.site for finding in outliers({"A": USUAL, "B": other, "C": USUAL}, LABELS)} == {"B"}


@given(st.floats(0, 100), st.lists(st.floats(0, 100), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_the_nearest_median_needs_half_of_the_others_to_move(value: float, others: list[float], random) -> None:
    assert min(others) <= nearest_median(value, others) <= max(others)
    shuffled = random.sample(others, len(others))
    assert nearest_median(value, shuffled) == nearest_median(value, others)
    agreeing = [value] * len(others)
    assert nearest_median(value, [*agreeing, *others]) == value


def test_rounding_cannot_make_neighbours_far_apart() -> None:
    """0.14 and 0.15 mm are told as 0.1 and 0.2: twice the other by the numbers alone."""
    low, high = changed(in_plane_mm=(0.1, 0.1)), changed(in_plane_mm=(0.2, 0.2))
    assert outliers({"A": low, "B": low, "C": low, "D": high}, LABELS) == []
    assert outliers({"A": high, "B": high, "C": high, "D": low}, LABELS) == []


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study(deadline_s=0.5)


def participant(study: Study, tmp_path: Path, name: str = "Alder", **about: Any) -> Participant:
    train = tuple(site_of(12, **about))
    folders = {"cache_folder": tmp_path / "cache", "state_folder": tmp_path / "state"}
    return Participant(name=name, studies=(study,), train=train, val=(), share_summary=True, **folders)


def answer(site: Participant, message: Message) -> Message:
    return make_client_app(lambda *_: site)(message, CONTEXT)


def question(study: Study, **extra: Any) -> Message:
    content = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: study.digest, **extra})})
    return Message(content, dst_node_id=5, message_type="query.summary")


def test_the_answer_is_one_text_that_the_coordinator_can_read(study: Study, tmp_path: Path) -> None:
    site = participant(study, tmp_path)
    reply = answer(site, question(study))
    assert set(reply.content) == {CONFIG}
    assert set(reply.content[CONFIG]) == {SUMMARY_KEY}
    assert parse_summary(reply.content[CONFIG][SUMMARY_KEY], 2, where="Alder") == summarise(site.train, 2)


def test_a_site_that_was_not_told_to_share_declines_by_number(study: Study, tmp_path: Path) -> None:
    reply = answer(replace(participant(study, tmp_path), share_summary=False), question(study))
    assert reply.error.reason == f"ICM214 {CATALOGUE[214].title}"


def test_a_question_with_anything_else_or_of_another_study_is_refused(study: Study, tmp_path: Path, make_study) -> None:
    site = participant(study, tmp_path)
    more = question(study)
    more.content["fields"] = ConfigRecord({"name": "PatientName"})
    refused = [question(study, modality="CT"), more, question(study, **{"server-round": 1}), question(make_study(seed=99))]
    assert [answer(site, message).error.reason[:6] for message in refused] == ["ICM301", "ICM301", "ICM301", "ICM302"]


def checked(study: Study, answers: Callable[[Message, str], Message | None]) -> tuple[DataCheck, Wire]:
    wire = Wire(answers)
    return check_data(wire, SITES, study, poll_s=0.01), wire


def test_a_planted_outlier_is_named_by_the_coordinator_and_kept(study: Study, tmp_path: Path, caplog) -> None:
    spacings = {"Alder": (5.0, 0.8, 0.8), "Birch": (5.0, 0.7, 0.7), "Cedar": (5.0, 3.0, 3.0)}
    sites = {name: participant(study, tmp_path, name, spacing=spacing) for name, spacing in spacings.items()}
    wire = Wire(lambda message, name: answer(sites[name], message))
    kept = tmp_path / "run" / "study.data_check.json"
    compare_sites(wire, Roster(SITES, {}), study, kept)
    assert len(wire.asked) == 3
    record = json.loads(kept.read_text())
    sentence = "Cedar: pixel distance 3 mm; the other sites have 0.7 to 0.8 mm."
    assert [finding["sentence"] for finding in record["findings"]] == [sentence]
    assert set(record["summaries"]) == set(SITES.values())
    assert record["study_digest"] == study.digest
    assert sentence in caplog.text


def test_who_declines_fails_is_silent_or_lies_is_listed_and_the_rest_is_compared(study: Study, tmp_path: Path) -> None:
    good = participant(study, tmp_path)

    def mixed(message: Message, site: str) -> Message | None:
        if site == "Birch":
            return answer(replace(good, share_summary=False), message)
        if site == "Cedar":
            return Message(Error(1304, "RuntimeError: /data/Mustermann.dcm"), reply_to=message)
        return answer(good, message)

    check, _ = checked(study, mixed)
    assert list(check.summaries) == ["Alder"]
    assert check.declined == ("Birch",)
    assert [(fault.number, fault.where) for fault in check.faults] == [(304, "Cedar")]
    assert "Mustermann" not in check.data().decode()
    assert check.lines()[0] == "Birch declined to share a summary."
    silent, _ = checked(study, lambda message, site: None)
    assert [fault.where for fault in silent.faults] == ["Alder", "Birch", "Cedar"]
    assert "no summary within 0.5 s" in silent.lines()[0]


FORGED: dict[str, Callable[[str], RecordDict]] = {
    "a count that is not in tens": lambda text: said(re.sub('"images":[0-9]+', '"images":13', text, count=1)),
    "a further key": lambda text: RecordDict({CONFIG: ConfigRecord({SUMMARY_KEY: text, "age": 61})}),
    "a further record": lambda text: RecordDict({**said(text), "more": ConfigRecord({})}),
    "a number instead of a text": lambda text: RecordDict({CONFIG: ConfigRecord({SUMMARY_KEY: 7})}),
    "nothing": lambda text: RecordDict(),
}


def said(text: str) -> RecordDict:
    return RecordDict({CONFIG: ConfigRecord({SUMMARY_KEY: text})})


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_summary_is_refused_by_the_coordinator(name: str, study: Study) -> None:
    text = summarise(site_of(12), 2).text()
    check, _ = checked(study, lambda message, site: Message(FORGED[name](text), reply_to=message))
    assert not check.summaries
    assert [(fault.number, fault.where) for fault in check.faults] == [(504, name) for name in ("Alder", "Birch", "Cedar")]


def test_the_reader_of_folders_says_which_classes_a_mask_holds(tmp_path: Path, make_study) -> None:
    study = make_study()
    alder = PhantomSite(name="Alder", train_patients=4, val_patients=1, test_patients=1, lesion_share=0.5)
    write_phantoms(tmp_path / "x", seed=3, size_px=32, sites=[alder])
    slices = read_folder(tmp_path / "x", study.labels)["Alder"].slices
    from icmoe.data.slices import load_mask

    assert {item.classes for item in slices} == {(0,), (0, 1)}
    assert all((1 in item.classes) == bool((load_mask(item.mask, study.labels) == 1).any()) for item in slices)
    assert {item.modality for item in slices} == {""}
