"""Replies that once ended the run, bent its record or passed a check that they should not have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from test_rounds import SITES, Wire, honest, run

from fl_server.roster import meet
from icmoe.errors import IcmoeError
from icmoe.messages import CONFIG, NUMBERS, ROUND_KEY, UPDATE
from icmoe.receipts import Head, head_of, numbers_of, receipt_of, receipt_text


def told(**numbers: object) -> Callable[[Message, str], Message]:
    """Return sites of which Cedar tells these numbers."""

    def answer(message: Message, site: str) -> Message:
        reply = honest(message, site)
        if site == "Cedar" and NUMBERS in reply.content:
            reply.content[NUMBERS].update(numbers)
        return reply

    return answer


@pytest.mark.parametrize("patients", [-4, -2, 10**9])
def test_a_score_of_no_possible_number_of_patients_is_not_entered(patients: int, make_study, tmp_path: Path) -> None:
    """The others have two patients each: with -4 the mean over all was a division by zero, and the run over."""
    state = run(make_study(rounds=1), tmp_path / "s", told(**{"val-patients": patients}))
    assert state.history[0]["val_dice"] == pytest.approx(0.9)
    assert state.history[0]["sites"]["Cedar"]["val_dice"] is None


@pytest.mark.parametrize("numbers", [{"loss": 1e308}, {"seconds": -1.0}, {"steps": 2**62}, {"seconds": 1e300}])
def test_numbers_that_no_round_has_are_refused_and_the_record_stays_plain(numbers, make_study, tmp_path: Path) -> None:
    """Three losses of 1e308 made a mean of infinity, which JSON knows no word for."""
    state = run(make_study(rounds=1), tmp_path / "s", told(**numbers))
    (fault,) = state.history[0]["faults"]
    assert (fault["number"], fault["where"]) == (504, "Cedar")
    json.dumps(list(state.history), allow_nan=False)


def test_a_site_that_claims_all_the_patients_counts_for_half(make_study, tmp_path: Path) -> None:
    wire = told(**{"val-patients": 9_999_999, "val-dice": 0.0})
    state = run(make_study(rounds=1), tmp_path / "s", wire)
    assert state.history[0]["val_dice"] == pytest.approx(0.45)


def test_the_loss_of_a_round_counts_each_site_by_its_size(make_study, tmp_path: Path) -> None:
    state = run(make_study(rounds=1), tmp_path / "s", told(loss=2.0))
    assert state.history[0]["loss"] == pytest.approx((30 * 0.5 + 20 * 0.5 + 10 * 2.0) / 60)


@pytest.mark.parametrize("size", [True, 0, -3, 10**9, 2.0])
def test_a_size_that_is_none_keeps_a_site_out(size: object, make_study) -> None:
    def answer(message: Message, site: str) -> Message:
        if site == "Cedar":
            return Message(RecordDict({CONFIG: ConfigRecord({"site": site, "slices": size})}), reply_to=message)
        return honest(message, site)

    study = make_study(deadline_s=0.5)
    assert set(meet(Wire(answer), 2, study, poll_s=0.01).sizes) == {"Alder", "Birch"}
    with pytest.raises(IcmoeError, match="ICM301 Cedar"):
        meet(Wire(answer), 3, study, poll_s=0.01)


def other_claims(array: Array) -> Array:
    """Return the same values under other claims, with a header of another length."""
    head = array.data[:10] + array.data[10 : 10 + int.from_bytes(array.data[8:10], "little")].rstrip() + b"   \n"
    length = (len(head) - 10).to_bytes(2, "little")
    return Array(
        "whatever",
        (7,),
        array.stype,
        head[:8] + length + head[10:] + array.data[10 + int.from_bytes(array.data[8:10], "little") :],
    )


def test_a_replay_is_one_however_it_is_written_down(make_study, tmp_path: Path) -> None:
    sent: dict[str, Array] = {}

    def answer(message: Message, site: str) -> Message:
        reply = honest(message, site)
        if site == "Cedar" and message.metadata.message_type == "train":
            if message.content[CONFIG][ROUND_KEY] == 1:
                sent.update(reply.content[UPDATE])
            else:
                reply.content[UPDATE] = ArrayRecord({name: other_claims(array) for name, array in sent.items()})
        return reply

    assert np.array_equal(other_claims(Array(np.ones((2, 3), np.float32))).numpy(), np.ones((2, 3), np.float32))
    state = run(make_study(rounds=2), tmp_path / "s", answer)
    assert [[fault["number"] for fault in row["faults"]] for row in state.history] == [[], [512]]


def test_a_head_that_is_kept_can_be_handed_back() -> None:
    last = Head(10**15 - 1, "ab" * 32)
    assert receipt_of(receipt_text(last)) == last == head_of(numbers_of(last))
    assert head_of([10**15, *numbers_of(last)[1:]]) is None


@pytest.mark.parametrize("first", ["Alder", "Birch", "Cedar"])
def test_a_rounds_score_does_not_tell_who_answered_first(first: str, make_study, tmp_path: Path) -> None:
    dice = {"Alder": 0.25382154283682900, "Birch": 0.27021494370522003, "Cedar": 0.43075302790942600}

    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if NUMBERS in reply.content:
            reply.content[NUMBERS]["val-dice"] = dice[site]
        return reply

    class Hasty(Wire):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return sorted(super().pull_messages(message_ids), key=lambda reply: SITES[reply.metadata.src_node_id] != first)

    state = run(make_study(rounds=1), tmp_path / "s", wire=Hasty(answer))
    assert state.history[0]["val_dice"] == math.fsum(2 * score for score in dice.values()) / 6
