"""Poisoned updates at the guard: refused by number with value and limit, and none of them moves the global model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from poisons import changed
from test_rounds import ROSTER, SITES, Answer, Wire, honest

from fl_server import audit
from fl_server.app import make_strategy, start_state
from fl_server.beside import audit_path, lift, read_lifted
from fl_server.guard import MOST_REFUSALS, MOST_SEEN, Memory
from fl_server.round_strategy import unheard
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState
from icmoe.errors import Fault, IcmoeError
from icmoe.messages import CONFIG, NUMBERS, ROUND_KEY, UPDATE
from icmoe.study import Study

# Few enough rounds that the attacker is still asked in the last one.
ROUNDS = 2


def run(study: Study, answer: Answer, log: Path | None = None, sites: dict[int, str] = SITES) -> RunState:
    strategy = make_strategy(study, ROSTER, note=unheard if log is None else partial(audit.note, log))
    return run_rounds(Wire(answer), strategy, study, start_state(study), sites=sites, commit=unheard, poll_s=0.005)


POISONS = {
    "NaN": (504, "values"),
    "Inf": (504, "values"),
    "1e30": (511, "norm 1e+30"),
    "sign flip x10": (511, "norm "),
    "wrong shape": (504, "float32 (1, "),
    "missing key": (504, "1 missing, 0 extra"),
    "extra key": (504, "0 missing, 1 extra"),
    "float64": (504, "float64 "),
    "zero weight": (504, "0"),
    "negative weight": (504, "-30"),
    "size far above announced": (504, "1000000"),
    "usage off the simplex": (504, "sum 2.7"),
    "a broken header": (504, " bytes"),
    "an archive": (504, "22 bytes"),
}


@pytest.mark.parametrize("kind", POISONS)
def test_a_poisoned_update_does_not_move_the_model_by_a_bit(kind: str, make_study, tmp_path: Path) -> None:
    study, log = make_study(rounds=ROUNDS), tmp_path / "audit.jsonl"

    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        return changed(reply, kind) if site == "Cedar" and message.metadata.message_type == "train" else reply

    poisoned = run(study, answer, log)
    without = run(study, honest, sites={node: name for node, name in SITES.items() if name != "Cedar"})
    assert all(np.array_equal(poisoned.arrays[name], tensor) for name, tensor in without.arrays.items())
    number, value = POISONS[kind]
    for record in poisoned.history:
        (fault,) = record["faults"]
        assert (fault["number"], fault["where"]) == (number, "Cedar")
        assert value in fault["value"]
        assert fault["limit"]
    noted = audit.read(log)
    assert [(line["event"], line["site"], line["number"], line["round"]) for line in noted] == [
        ("refused", "Cedar", number, number_) for number_ in (1, 2)
    ]


@pytest.mark.parametrize(("size", "refused"), [(20, []), (21, [(504, "21", "at most 20")])])
def test_a_site_counts_for_at_most_twice_what_it_announced(size: int, refused: list[tuple[int, str, str]], make_study) -> None:
    """A site that claims more data than it has would draw the model to itself."""

    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if site == "Cedar" and message.metadata.message_type == "train":
            reply.content[NUMBERS]["slices"] = size  # 10 were announced
        return reply

    (record,) = run(make_study(rounds=1), answer).history
    assert [(fault["number"], fault["value"], fault["limit"]) for fault in record["faults"]] == refused
    assert ("Cedar" in record["sites"]) == (not refused)


def test_a_replayed_update_is_used_once(make_study) -> None:
    study, sent = make_study(rounds=ROUNDS), dict[str, dict[str, Array]]()

    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if site == "Cedar" and message.metadata.message_type == "train":
            arrays = sent.setdefault(site, dict(reply.content[UPDATE]))
            reply.content[UPDATE] = ArrayRecord(arrays)
        return reply

    def once(message: Message, site: str) -> Message | None:
        return None if site == "Cedar" and message.content[CONFIG].get(ROUND_KEY) == 2 else honest(message, site)

    replayed, absent = run(study, answer), run(make_study(rounds=ROUNDS, deadline_s=0.2), once)
    assert [[fault["number"] for fault in record["faults"]] for record in replayed.history] == [[], [512]]
    assert all(np.array_equal(replayed.arrays[name], tensor) for name, tensor in absent.arrays.items())


def test_equal_bytes_twice_are_one_update_and_different_ones_none(make_study) -> None:
    study = make_study()
    for second, used in ((1.0, 3), (2.0, 2)):
        strategy = make_strategy(study, ROSTER)
        arrays = ArrayRecord({name: Array(tensor) for name, tensor in start_state(study).arrays.items()})
        wire = Wire(honest)
        ids = list(wire.push_messages(strategy.configure_train(1, arrays, ConfigRecord(), grid=None)))
        replies = list(wire.pull_messages(ids))
        again = honest(wire.asked[0], "Alder")
        again.metadata.__dict__.update(replies[0].metadata.__dict__)
        again.content[UPDATE] = ArrayRecord(
            {key: Array(np.float32(second) * array.numpy()) for key, array in again.content[UPDATE].items()}
        )
        strategy.aggregate_train(1, [*replies, again])
        assert len(strategy.report.updates) == used
        assert [fault.number for fault in strategy.report.faults] == ([] if used == 3 else [512])


def test_a_site_refused_three_rounds_in_a_row_sits_out_until_a_person_lifts_it(make_study, tmp_path: Path) -> None:
    study, path = make_study(rounds=8), tmp_path / "study.toml"
    path.write_text(_toml(study))
    committed, asked = path.with_suffix(".state.safetensors"), list[int]()

    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if site == "Cedar" and message.metadata.message_type == "train":
            asked.append(message.content[CONFIG][ROUND_KEY])
            return changed(reply, "NaN") if asked[-1] <= 5 else reply
        return reply

    def commit(state: RunState) -> None:
        state.commit(committed)
        if state.round == 5:
            assert lift(path, "Cedar") == 5
            with pytest.raises(IcmoeError, match="ICM518"):
                lift(path, "Alder")

    strategy = make_strategy(study, ROSTER, lifted=lambda: read_lifted(path))
    state = run_rounds(Wire(answer), strategy, study, start_state(study), sites=SITES, commit=commit, poll_s=0.005)
    assert asked == [1, 2, 3, 6, 7, 8]
    assert [[fault["number"] for fault in row["faults"]] for row in state.history] == [[504]] * 3 + [[514]] * 2 + [[]] * 3
    assert set(state.history[-1]["sites"]) == set(SITES.values())


def test_a_lift_that_cannot_be_noted_is_none_and_one_lift_leaves_the_others(make_study, tmp_path: Path) -> None:
    study, path = make_study(), tmp_path / "study.toml"
    path.write_text(_toml(study))
    memory = Memory({"Birch": (MOST_REFUSALS, 4), "Cedar": (MOST_REFUSALS, 4)})
    RunState(study.digest, start_state(study).arrays, 4, extra=memory.packed()).commit(path.with_suffix(".state.safetensors"))
    audit_path(path).write_bytes(b"damaged\n")
    with pytest.raises(IcmoeError, match="ICM516"):
        lift(path, "Cedar")
    assert read_lifted(path) == {}
    audit_path(path).unlink()
    assert (lift(path, "Cedar"), lift(path, "Birch")) == (4, 4)
    assert read_lifted(path) == {"Birch": 4, "Cedar": 4}
    assert [(line["event"], line["site"]) for line in audit.read(audit_path(path))] == [
        ("lift asked", "Cedar"),
        ("lift asked", "Birch"),
    ]


def test_a_lift_does_not_cover_refusals_that_come_after_it() -> None:
    memory = Memory({"Cedar": (MOST_REFUSALS, 5)})
    assert not memory.lift("Cedar", 4)
    assert memory.sits_out("Cedar")
    assert memory.lift("Cedar", 5)
    assert not memory.sits_out("Cedar")
    assert not memory.lift("Cedar", 5)


def test_of_many_updates_the_last_are_remembered() -> None:
    memory = Memory()
    for number in range(MOST_SEEN + 3):
        memory.use("Alder", f"{number}")
    assert (memory.seen["Alder"][0], memory.seen["Alder"][-1]) == ("3", f"{MOST_SEEN + 2}")


def _toml(study: Study) -> str:
    """Return the study as TOML, the plain way: every value is also valid JSON."""
    lines, tables = [], []
    for key, value in study.model_dump(mode="json", exclude={"privacy"}).items():
        rows = value if key == "labels" else [value] if isinstance(value, dict) else None
        if rows is None:
            lines.append(f"{key} = {json.dumps(value)}")
        for row in rows or []:
            tables.append(f"[[{key}]]" if key == "labels" else f"[{key}]")
            tables += [f"{name} = {json.dumps(item)}" for name, item in row.items()]
    return "\n".join([*lines, *tables]) + "\n"


def test_what_the_guard_remembers_survives_a_commit(make_study, tmp_path: Path) -> None:
    study = make_study()
    memory = Memory({"Cedar": (2, 7)}, {"Alder": ["ab", "cd"]})
    state = RunState(study.digest, start_state(study).arrays, extra=memory.packed())
    state.commit(tmp_path / "s")
    assert Memory.unpacked(RunState.load(tmp_path / "s", study).extra) == memory
    assert Memory.unpacked({}) == Memory()


@given(st.lists(st.sampled_from(["refuse", "use", "absent", "retry"]), max_size=20))
@settings(max_examples=100)
def test_a_site_sits_out_exactly_after_three_refused_rounds_without_a_used_one(events: list[str]) -> None:
    memory, count = Memory(), 0
    for number, event in enumerate(events, start=1):
        if memory.sits_out("A"):
            break
        if event in {"refuse", "retry"}:
            for _ in range(2 if event == "retry" else 1):  # a round that is tried twice is one round
                memory.refuse("A", number)
            count += 1
        elif event == "use":
            memory.use("A", f"{number}")
            count = 0
    assert memory.sits_out("A") == (count >= MOST_REFUSALS)


def test_the_median_is_asked_only_where_there_are_three_and_never_under_server_privacy(make_study) -> None:
    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        return changed(reply, "sign flip x10") if site == "Cedar" and message.metadata.message_type == "train" else reply

    two = {node: name for node, name in SITES.items() if name != "Alder"}
    assert run(make_study(rounds=1), answer, sites=two).history[0]["faults"] == []
    plain = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0}
    server = {"noise_multiplier": 1.0, "delta": 0.01, "sites": 3, "divisor": 1.0}
    private = make_study(rounds=1, aggregation=plain, privacy={"server": server})
    assert run(private, answer).history[0]["faults"] == []


def test_updates_that_are_all_too_large_do_not_make_each_other_fit(make_study) -> None:
    """The median of three lifts no site above the study's own bound."""
    with pytest.raises(IcmoeError) as caught:
        run(make_study(rounds=1, retries=0, guard={"largest_norm": 1e-3}), honest)
    refused = [(fault.where, fault.limit) for fault in caught.value.faults if fault.number == 511]
    assert refused == [(site, "at most 0.001") for site in SITES.values()]


def test_updates_of_nothing_are_no_measure_for_the_others(make_study) -> None:
    """Two sites that trained nothing do not turn the third into the odd one."""

    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if site != "Cedar" and message.metadata.message_type == "train":
            nothing = {key: Array(np.zeros_like(array.numpy())) for key, array in reply.content[UPDATE].items()}
            reply.content[UPDATE] = ArrayRecord(nothing)
        return reply

    rounds = run(make_study(rounds=2), answer).history
    assert [record["faults"] for record in rounds] == [[], []]  # nor is nothing, twice, a replay


def test_a_norm_at_the_bound_is_within_it(make_study) -> None:
    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if message.metadata.message_type == "train":
            arrays = {key: np.zeros_like(array.numpy()) for key, array in reply.content[UPDATE].items()}
            next(iter(arrays.values())).flat[0] = 0.5
            reply.content[UPDATE] = ArrayRecord({key: Array(array) for key, array in arrays.items()})
        return reply

    assert run(make_study(rounds=1, guard={"largest_norm": 0.5}), answer).history[0]["faults"] == []


@pytest.mark.parametrize("damage", ["edit", "remove", "swap", "garbage"])
def test_the_audit_log_shows_what_was_done_to_it(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in range(4):
        audit.note(path, "refused", {"round": number, "site": "Cedar"})
    assert [line["round"] for line in audit.read(path)] == [0, 1, 2, 3]
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "edit":
        lines[1] = lines[1].replace(b"Cedar", b"Alder")
    elif damage == "remove":
        del lines[1]
    elif damage == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines[1] = b"{}\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(IcmoeError) as caught:
        audit.read(path)
    assert caught.value.faults[0].number == 516


def test_a_line_that_a_crash_left_unfinished_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit.note(path, "refused", {"round": 1})
    with path.open("ab") as file:
        file.write(b'{"line": 2, "ev')
    audit.note(path, "refused", {"round": 2})
    assert [line["round"] for line in audit.read(path)] == [1, 2]
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_a_refusal_says_value_and_limit_in_one_sentence() -> None:
    fault = Fault(number=511, where="Cedar", value="norm 12.1", limit="at most 6.05", did="The round went on without it.")
    assert str(fault).startswith("ICM511 Cedar: update is too large: norm 12.1 (allowed: at most 6.05). The round went on")
