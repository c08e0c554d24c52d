"""Every message that arrives made wrong: the coordinator's round goes on, the site answers with a number, nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from fuzzing import TEXTS, fuzz
from fuzzing_messages import contents_of
from hypothesis import given
from hypothesis import strategies as st
from test_client import ask, hospital, number_of, request, site
from test_rounds import ROSTER, SITES, Answer, Wire, honest

from fl_client.participant import Participant
from fl_server.app import make_strategy, start_state
from fl_server.data_check import check_data
from fl_server.receipts import Receipted
from fl_server.roster import meet
from fl_server.round_strategy import unheard
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState
from icmoe.errors import CATALOGUE
from icmoe.messages import CONFIG, NUMBERS, STUDY_KEY, SUMMARY_KEY
from icmoe.receipts import EMPTY, RECEIPT_KEY, receipt_text
from icmoe.study import Study
from icmoe.summary import summarise

__all__ = ["hospital", "site"]
TWO = {node: name for node, name in SITES.items() if name != "Cedar"}
SMALL = {"basic_experts": 0, "semantic_experts": 1, "adaptive_experts": 1}


class Honest:
    """The sites of `test_rounds`, each of whose answers is made once: there is one round here, and many runs of it."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], RecordDict] = {}

    def __call__(self, message: Message, name: str) -> Message:
        key = name, message.metadata.message_type
        if key not in self._made:
            self._made[key] = honest(message, name).content
            self._made[key].get(NUMBERS, {})["usage"] = [0.25, 0.75]
        return Message(self._made[key], reply_to=message)


@pytest.fixture(scope="module")
def study(make_study) -> Study:
    return make_study(rounds=1, model=SMALL)


@pytest.fixture(scope="module")
def sites() -> Honest:
    return Honest()


def run(study: Study, answer: Answer, folder: Path, sites: dict[int, str] = SITES) -> RunState:
    """Run the study's one round as the coordinator's app does, commit included, and return what was committed."""
    path = folder / "study.state.safetensors"
    grid = Receipted(Wire(answer, sites=sites), sites, folder / "receipts")
    strategy = make_strategy(study, ROSTER)
    state = run_rounds(grid, strategy, study, start_state(study), sites=sites, commit=unheard, poll_s=0.001)
    path.unlink(missing_ok=True)
    state.commit(path)
    return RunState.load(path, study)


@pytest.fixture(scope="module")
def without(study: Study, sites: Honest, tmp_path_factory: pytest.TempPathFactory) -> RunState:
    """What the two honest sites reach by themselves."""
    return run(study, sites, tmp_path_factory.mktemp("without"), TWO)


@given(data=st.data(), kind=st.sampled_from(["train", "train", "train", "evaluate"]))
@fuzz(80)
def test_a_reply_made_wrong_is_refused_by_number_and_the_round_goes_on(
    data: st.DataObject, kind: str, study: Study, sites: Honest, without: RunState, tmp_path: Path
) -> None:
    def answer(message: Message, name: str) -> Message | None:
        right = sites(message, name)
        if name != "Cedar" or message.metadata.message_type != kind:
            return right
        if data.draw(st.integers(0, 9)) == 0:
            return Message(Error(data.draw(st.integers(0, 5000)), data.draw(TEXTS)), reply_to=message)
        return Message(data.draw(contents_of(lambda: right.content)), reply_to=message)

    state = run(study, answer, tmp_path)
    (row,) = state.history
    json.dumps(row, allow_nan=False)  # others than Python read it
    assert {"Alder", "Birch"} <= set(row["sites"])
    assert row["val_dice"] is None or 0.0 <= row["val_dice"] <= 1.0
    if "Cedar" in row["sites"]:
        assert row["faults"] == []
        assert all(np.isfinite(tensor).all() for tensor in state.arrays.values())
        return
    (fault,) = row["faults"]
    assert fault["where"] == "Cedar"
    assert fault["number"] in CATALOGUE
    assert fault["sentence"].isprintable()
    assert all(np.array_equal(state.arrays[name], tensor) for name, tensor in without.arrays.items())


def test_what_is_made_wrong_above_is_right_at_first(study: Study, sites: Honest, tmp_path: Path) -> None:
    (row,) = run(study, sites, tmp_path).history
    assert set(row["sites"]) == set(SITES.values())
    assert row["faults"] == []


@given(data=st.data())
@fuzz(40)
def test_an_introduction_or_a_summary_made_wrong_leaves_the_others_alone(
    data: st.DataObject, study: Study, site: Participant
) -> None:
    text = summarise(site.train, study.classes).text()

    def answer(message: Message, name: str) -> Message | None:
        if message.metadata.message_type == "query.summary":
            reply = Message(RecordDict({CONFIG: ConfigRecord({SUMMARY_KEY: text})}), reply_to=message)
        else:
            reply = honest(message, name)
        return Message(data.draw(contents_of(lambda: reply.content)), reply_to=message) if name == "Cedar" else reply

    wire = Wire(answer)
    met = meet(wire, 2, study, poll_s=0.001)
    assert {"Alder": 30, "Birch": 20}.items() <= met.sizes.items()
    check = check_data(wire, SITES, study, poll_s=0.001)
    assert {"Alder", "Birch"} <= set(check.summaries)
    assert {fault.where for fault in check.faults} <= {"Cedar"}
    assert all(line.isprintable() for line in check.lines())


KINDS = {"train": "train", "evaluate": "evaluate", "site": "query.site", "summary": "query.summary"}


def question(study: Study, kind: str) -> RecordDict:
    if kind in {"train", "evaluate"}:
        return request(study, **({RECEIPT_KEY: receipt_text(EMPTY)} if kind == "train" else {}))
    return RecordDict({CONFIG: ConfigRecord({STUDY_KEY: study.digest})})


@pytest.fixture(scope="module")
def audited(site: Participant, tmp_path_factory: pytest.TempPathFactory) -> Participant:
    return replace(site, audited=True, share_summary=True, state_folder=tmp_path_factory.mktemp("audited"))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@fuzz(30)
def test_a_question_made_wrong_is_answered_as_declared_or_by_a_number(
    kind: str, data: st.DataObject, audited: Participant, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    reply = ask(audited, data.draw(contents_of(lambda: question(audited.studies[0], kind))), KINDS[kind])
    if reply.has_error():
        assert number_of(reply) in set(CATALOGUE) - {304}
        assert reply.error.reason == f"ICM{number_of(reply)} {CATALOGUE[number_of(reply)].title}"
    said = [record for record in caplog.records if record.name == "fl_client"]
    assert not [record for record in said if record.exc_info], "no exception was caught by the last net"
    assert all(line.isprintable() for record in said for line in record.getMessage().split("\n"))
    audited.records.verify()


@pytest.mark.parametrize("kind", KINDS)
def test_the_question_made_wrong_is_right_at_first(kind: str, audited: Participant) -> None:
    assert ask(audited, question(audited.studies[0], kind), KINDS[kind]).has_content()
