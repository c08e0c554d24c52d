"""A study whose updates travel in int8: what a site keeps and sends, and what the coordinator lets in."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from safetensors.torch import save
from test_client import ask, hospital, number_of, request, site
from test_guard import run as guarded_run
from test_rounds import ROSTER, SITES, Wire, honest

from fl_client.audit import read_log
from fl_client.by_round import FINISHED, KEPT
from fl_client.egress import rounded_to
from fl_client.manifest import Outgoing, manifest_of, update_shapes
from fl_client.participant import Participant
from fl_client.policy import Policy
from fl_server.app import make_strategy, start_state
from fl_server.private import contribution, norm_of
from fl_server.replies import parse_update
from icmoe.exchange import state_digest
from icmoe.messages import UPDATE
from icmoe.quantise import EXPONENT, Dequantised, quantised, sent_shapes
from icmoe.study import Study

__all__ = ["hospital", "site"]
INT8 = {"form": "int8"}
NAME = "head.classify.weight"


@pytest.fixture(scope="module")
def study(make_study) -> Study:
    return make_study(rounds=8, update=INT8)


@pytest.fixture
def here(site: Participant, study: Study, tmp_path: Path) -> Participant:
    """A site of a simulation, with a state folder of its own."""
    return replace(site, studies=(study,), state_folder=tmp_path / "state")


@pytest.fixture
def audited(here: Participant) -> Participant:
    return replace(here, audited=True)


def sent(site: Participant, number: int = 1, seed: int = 1) -> dict[str, bytes]:
    reply = ask(site, request(site.studies[0], number, seed))
    assert not reply.has_error(), reply.error
    return {name: array.data for name, array in reply.content[UPDATE].items()}


def kept(site: Participant) -> list[str]:
    return sorted(path.name for path in site.state_folder.rglob("owed-*"))


# At the site


def test_a_fourth_of_the_bytes_leaves_in_int8_arrays_alone(here: Participant, site: Participant, study: Study) -> None:
    arrays = ask(here, request(study)).content[UPDATE]
    assert {name: array.numpy().shape for name, array in arrays.items()} == sent_shapes(update_shapes(study))
    assert {array.numpy().dtype for array in arrays.values()} == {np.dtype(np.int8)}
    whole = ask(site, request(site.studies[0])).content[UPDATE]
    values, floats = (sum(array.numpy().nbytes for array in record.values()) for record in (arrays, whole))
    assert 0.25 * floats < values < 0.3 * floats


def test_the_same_round_again_gives_the_same_bytes_and_the_next_builds_on_it(here: Participant) -> None:
    first, again, second = sent(here), sent(here), sent(here, 2)
    assert first == again
    assert first != second
    assert sent(here, 2) == second  # from what round 1 left, not from its own
    fresh = replace(here, state_folder=here.state_folder.with_name("fresh"))
    assert sent(fresh, 2) != second  # without round 1 nothing is owed


def test_a_coordinator_that_goes_back_gets_the_same_bytes_again(audited: Participant) -> None:
    rounds = [sent(audited, number) for number in (1, 2, 3)]
    for path in audited.state_folder.rglob(f"{FINISHED}/*"):
        path.unlink()  # so that each is trained again
    assert [sent(audited, number) for number in (2, 3)] == rounds[1:]


def test_a_finished_update_is_sent_again_as_it_was(audited: Participant) -> None:
    first = sent(audited)
    (path,) = audited.state_folder.rglob("owed-*")
    before = path.read_bytes()
    assert sent(audited) == first
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [line["event"] for line in read_log(audited.state_folder)] == ["received", "spent", "sent", "received", "sent"]


def test_killed_before_the_update_was_kept_the_round_ends_with_the_same_bytes(audited: Participant, monkeypatch) -> None:
    undisturbed = [sent(replace(audited, state_folder=audited.state_folder.with_name("other")), number) for number in (1, 2)]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    sent(audited)
    with monkeypatch.context() as patched:
        patched.setattr("fl_client.finished.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(audited, request(audited.studies[0], 2))
    assert kept(audited) == ["owed-00001.safetensors", "owed-00002.safetensors"]
    assert sent(audited, 2) == undisturbed[1]


def test_a_round_that_was_missed_changes_nothing_of_what_is_owed(here: Participant) -> None:
    other = replace(here, state_folder=here.state_folder.with_name("other"))
    sent(here)
    after_a_gap = sent(here, 3)
    sent(other)
    sent(other, 2)
    assert sent(other, 3) != after_a_gap
    (path,) = here.state_folder.rglob("owed-00003*")
    path.unlink()
    assert sent(here, 3) == after_a_gap


@pytest.mark.parametrize("harm", ["cut short", "a bit", "another study's"])
def test_what_is_owed_and_damaged_is_dropped_and_training_goes_on(harm: str, here: Participant, caplog) -> None:
    without = sent(replace(here, state_folder=here.state_folder.with_name("fresh")), 2)
    sent(here)
    (path,) = here.state_folder.rglob("owed-*")
    data = bytearray(path.read_bytes())
    if harm == "cut short":
        del data[100:]
    elif harm == "a bit":
        data[-1] ^= 64
    else:
        other = {"x": torch.zeros(3)}
        data = bytearray(save(other, metadata={"digest": state_digest(other)}))
    path.write_bytes(data)
    assert sent(here, 2) == without
    assert "is not made up for" in caplog.text


def test_few_rounds_are_kept_and_none_of_rounds_that_are_asked_anew(audited: Participant, here: Participant) -> None:
    for number in range(1, KEPT + 3):
        sent(audited, number)
    assert kept(audited) == [f"owed-{number:05d}.safetensors" for number in range(3, KEPT + 3)]
    sent(audited, 4, seed=2)
    assert kept(audited) == ["owed-00003.safetensors", "owed-00004.safetensors"]
    simulated = replace(here, state_folder=here.state_folder.with_name("simulated"))
    for number in range(1, 5):
        sent(simulated, number)
    assert kept(simulated) == ["owed-00003.safetensors", "owed-00004.safetensors"]


def test_the_audit_log_has_the_digest_of_the_bytes_that_left(audited: Participant, study: Study) -> None:
    arrays = ask(audited, request(study)).content[UPDATE]
    tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    assert read_log(audited.state_folder)[-1]["digest"] == state_digest(tensors)


def test_a_site_that_lets_four_bits_leave_sends_four(audited: Participant, study: Study) -> None:
    finer = dict[int, int]()
    for bits in (4, 23):
        one = replace(audited, policy=Policy(mantissa_bits=bits), state_folder=audited.state_folder.with_name(f"bits-{bits}"))
        arrays = ask(one, request(study)).content[UPDATE]
        values = [torch.from_numpy(tensor) for tensor in Dequantised({key: one.numpy() for key, one in arrays.items()}).values()]
        finer[bits] = sum(int((rounded_to(tensor, 4) != tensor).sum()) for tensor in values)
    assert finer[4] == 0 < finer[23]


def test_an_update_that_was_finished_before_fewer_bits_may_leave_leaves_with_fewer(audited: Participant, study: Study) -> None:
    ask(audited, request(study))
    coarse = replace(audited, policy=Policy(mantissa_bits=4))
    first, again = (ask(coarse, request(study)).content[UPDATE] for _ in "ab")
    sent = {name: array.numpy() for name, array in first.items()}
    assert all(torch.equal(rounded_to(one, 4), one) for one in map(torch.from_numpy, Dequantised(sent).values()))
    assert {name: array.data for name, array in first.items()} == {name: array.data for name, array in again.items()}


def usual(study: Study) -> dict[str, torch.Tensor]:
    found = {}
    for name, shape in update_shapes(study).items():
        for key, array in zip((name, name + EXPONENT), quantised(np.full(shape, 1e-3, np.float32)), strict=True):
            found[key] = torch.from_numpy(array)
    return found


BAD: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "float32 in place of int8": lambda sent: sent.update({NAME: sent[NAME].float()}),
    "a float32 scale": lambda sent: sent.update({NAME + EXPONENT: sent[NAME + EXPONENT].float()}),
    "uint8": lambda sent: sent.update({NAME: sent[NAME].view(torch.uint8)}),
    "-128": lambda sent: sent.update({NAME: torch.full_like(sent[NAME], -128)}),
    "an exponent too high": lambda sent: sent.update({NAME + EXPONENT: torch.full_like(sent[NAME + EXPONENT], 121)}),
    "an exponent too low": lambda sent: sent.update({NAME + EXPONENT: torch.full_like(sent[NAME + EXPONENT], -127)}),
    "a scale missing": lambda sent: sent.pop(NAME + EXPONENT),
    "a scale of a row missing": lambda sent: sent.update({NAME + EXPONENT: sent[NAME + EXPONENT][:1]}),
    "a scale too many": lambda sent: sent.update({"stranger" + EXPONENT: sent[NAME + EXPONENT]}),
    "another shape": lambda sent: sent.update({NAME: sent[NAME][:1]}),
    "a tensor missing": lambda sent: sent.pop(NAME),
}


def faults(study: Study, tensors: dict[str, torch.Tensor]) -> list[str]:
    numbers = {"slices": 10, "usage": [1 / 3] * 3, "loss": 0.7, "steps": 4, "seconds": 0.5, "val-dice": 0.4, "val-patients": 1}
    return list(manifest_of(study, "Alder", "train").faults(Outgoing(tensors=tensors, numbers=numbers)))


@pytest.mark.parametrize("name", BAD)
def test_a_site_holds_back_what_is_no_update_in_int8(name: str, study: Study) -> None:
    tensors = usual(study)
    assert faults(study, tensors) == []
    BAD[name](tensors)
    assert len(faults(study, tensors)) == 1


def test_a_site_bounds_the_norm_of_what_will_be_read(study: Study) -> None:
    tensors = usual(study)
    tensors[NAME + EXPONENT] = torch.full_like(tensors[NAME + EXPONENT], 100)
    (fault,) = faults(study, tensors)
    assert fault.startswith("norm of the update is above ")


def test_more_bits_than_the_site_allows_are_held_back(audited: Participant, study: Study, monkeypatch) -> None:
    monkeypatch.setattr("fl_client.owed.rounded_to", lambda tensor, bits: tensor)  # training forgets to round
    coarse = replace(audited, policy=Policy(mantissa_bits=4))
    assert number_of(ask(coarse, request(study))) == 416
    assert read_log(audited.state_folder)[-2]["why"][0].endswith("has more than 4 bits of mantissa")


# At the coordinator's door


def honest_in_int8(message: Message, site: str) -> Message:
    """Answer as an honest site would in int8, with nothing owed."""
    reply = honest(message, site)
    if message.metadata.message_type == "train":
        reply.content[UPDATE] = in_int8({name: array.numpy() for name, array in reply.content[UPDATE].items()})
    return reply


def in_int8(update: dict[str, np.ndarray]) -> ArrayRecord:
    arrays = {}
    for name, tensor in update.items():
        steps, exponent_R = quantised(tensor)
        arrays[name], arrays[name + EXPONENT] = Array(steps), Array(exponent_R)
    return ArrayRecord(arrays)


REFUSED = {
    "float32 in place of int8": (f"{NAME} has another type or shape", "float32 (2, "),
    "a float32 scale": (f"{NAME + EXPONENT} has another type or shape", "float32 (2,)"),
    "uint8": (f"{NAME} has another type or shape", "uint8 "),
    "-128": (f"{NAME} holds what no update in int8 does", "values"),
    "an exponent too high": (f"{NAME + EXPONENT} holds what no update in int8 does", "2 of 2 values"),
    "an exponent too low": (f"{NAME + EXPONENT} holds what no update in int8 does", "2 of 2 values"),
    "a scale missing": ("its tensors are not the study's", "1 missing, 0 extra"),
    "a scale of a row missing": (f"{NAME + EXPONENT} has another type or shape", "int8 (1,)"),
    "a scale too many": ("its tensors are not the study's", "0 missing, 1 extra"),
    "another shape": (f"{NAME} has another type or shape", "int8 (1, "),
    "a tensor missing": ("its tensors are not the study's", "1 missing, 0 extra"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_update_in_int8_is_refused_and_moves_no_bit(kind: str, make_study) -> None:
    study = make_study(update=INT8)

    def answer(message: Message, site: str) -> Message | None:
        reply = honest_in_int8(message, site)
        if site == "Cedar" and message.metadata.message_type == "train":
            tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in reply.content[UPDATE].items()}
            BAD[kind](tensors)
            reply.content[UPDATE] = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})
        return reply

    poisoned = guarded_run(study, answer)
    without = guarded_run(study, honest_in_int8, sites={node: name for node, name in SITES.items() if name != "Cedar"})
    assert all(np.array_equal(poisoned.arrays[name], tensor) for name, tensor in without.arrays.items())
    for record in poisoned.history:
        (fault,) = record["faults"]
        assert (fault["number"], fault["where"]) == (504, "Cedar")
        assert REFUSED[kind][0] in fault["what"]
        assert REFUSED[kind][1] in fault["value"]
        assert fault["limit"]


def test_an_update_in_the_other_form_is_refused(make_study) -> None:
    for form, answer in (("int8", honest), ("float32", honest_in_int8)):
        study = make_study(rounds=1, update={"form": form}, quorum=2)

        def mixed(message: Message, site: str, answer=answer, form=form) -> Message:
            usual = honest_in_int8 if form == "int8" else honest
            return (answer if site == "Cedar" else usual)(message, site)

        (record,) = guarded_run(study, mixed).history
        assert [(fault["number"], fault["where"]) for fault in record["faults"]] == [(504, "Cedar")]


def test_the_norm_is_that_of_the_values_and_not_of_the_bytes(make_study) -> None:
    study = make_study(rounds=1, update=INT8)

    def answer(message: Message, site: str) -> Message:
        reply = honest_in_int8(message, site)
        if site == "Cedar" and message.metadata.message_type == "train":
            arrays = dict(reply.content[UPDATE])
            arrays[NAME + EXPONENT] = Array(np.full(2, 120, np.int8))
            reply.content[UPDATE] = ArrayRecord(arrays)
        return reply

    (record,) = guarded_run(study, answer).history
    (fault,) = record["faults"]
    assert (fault["number"], fault["where"]) == (511, "Cedar")
    assert "e+3" in fault["value"]


def test_a_replayed_update_is_known_by_its_values(make_study) -> None:
    study, first = make_study(rounds=2, update=INT8), dict[str, ArrayRecord]()

    def answer(message: Message, site: str) -> Message:
        reply = honest_in_int8(message, site)
        if site == "Cedar" and message.metadata.message_type == "train":
            reply.content[UPDATE] = first.setdefault(site, reply.content[UPDATE])
        return reply

    assert [[fault["number"] for fault in record["faults"]] for record in guarded_run(study, answer).history] == [[], [512]]


def test_the_servers_clipping_comes_after_the_rounding(make_study) -> None:
    """A site's rounding may lift the norm above C; what enters the private sum is clipped afterwards."""
    server = {"noise_multiplier": 1.0, "delta": 1e-3, "sites": 3, "divisor": 2.0, "clip_norm": 0.5}
    rule = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0, "largest_size": 30}
    study = make_study(update=INT8, aggregation=rule, privacy={"server": server})
    current = start_state(study).arrays
    wire = Wire(honest_in_int8)
    strategy = make_strategy(study, ROSTER)
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in current.items()})
    for reply in wire.pull_messages(list(wire.push_messages(strategy.configure_train(1, arrays, ConfigRecord(), None)))):
        update = parse_update(reply, "Alder", study, current)
        assert norm_of(update.tensors) > 0.5
        assert norm_of(contribution(update, study, 0.5)) <= 0.5 * (1 + 1e-9)
