"""The audit log and the bounds of the incoming model: what a hospital can show afterwards, and compare with others."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_client import ask, command, hospital, number_of, request, site, write_site_file

from fl_client.audit import LOG, digests_of_round, read_log, record
from fl_client.incoming import LARGEST_RMS, STEPS, accept, bound_faults
from fl_client.participant import Participant
from fl_client.records import Records
from fl_server.weights import balance_step
from icmoe.chain import START, linked
from icmoe.errors import IcmoeError
from icmoe.exchange import State, global_state, state_digest
from icmoe.kinds import BALANCE_BIAS
from icmoe.messages import ARRAYS, UPDATE
from icmoe.model import build_model
from icmoe.study import Study

__all__ = ["hospital", "site"]


@pytest.fixture
def audited(site: Participant, tmp_path: Path) -> Participant:
    return replace(site, audited=True, state_folder=tmp_path / "state")


def tensors_of(message_arrays: ArrayRecord) -> State:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in sorted(message_arrays.items())}


def moved(study: Study, by: float, name: str = "head.classify.weight", seed: int = 1) -> ArrayRecord:
    tensors = global_state(build_model(study, seed=seed))
    tensors[name] = tensors[name] + by
    return ArrayRecord({key: Array(tensor.numpy()) for key, tensor in tensors.items()})


def test_what_comes_in_and_what_leaves_is_written_down_with_its_digest(audited: Participant) -> None:
    study = audited.studies[0]
    content = request(study)
    reply = ask(audited, content)
    received, spent, sent = read_log(audited.state_folder)
    assert (received["event"], received["kind"], received["round"]) == ("received", "train", 1)
    assert received["digest"] == state_digest(tensors_of(content[ARRAYS]))
    assert received["within_bounds"] is True
    assert (spent["event"], spent["entry"], spent["releases"]) == ("spent", 1, None)
    assert sent["digest"] == state_digest(tensors_of(reply.content[UPDATE]))
    assert sent["numbers"]["slices"] == 10
    ask(audited, request(study), "evaluate")
    last = read_log(audited.state_folder)[-1]
    assert (last["event"], last["kind"], set(last["numbers"])) == ("sent", "evaluate", {"val-dice", "val-patients"})
    assert stat.S_IMODE((audited.state_folder / LOG).stat().st_mode) == 0o600


def test_a_simulation_writes_no_log(site: Participant, tmp_path: Path) -> None:
    quiet = replace(site, state_folder=tmp_path / "state")
    assert not ask(quiet, request(quiet.studies[0])).has_error()
    assert not (tmp_path / "state").exists()


def test_a_global_model_that_jumps_is_refused_and_its_digest_kept(audited: Participant) -> None:
    study = audited.studies[0]
    assert not ask(audited, request(study)).has_error()
    jump = 1.5 * STEPS * study.training.learning_rate
    content = request(study, 2)
    content[ARRAYS] = moved(study, jump)
    assert number_of(ask(audited, content)) == 322
    line, declined = read_log(audited.state_folder)[-2:]
    assert (line["event"], line["within_bounds"], line["round"]) == ("received", False, 2)
    assert (declined["event"], declined["number"]) == ("declined", 322)
    assert line["digest"] == state_digest(tensors_of(content[ARRAYS]))
    content[ARRAYS] = moved(study, 0.5 * jump / 1.5)
    assert not ask(audited, content).has_error()  # the refused model did not become the last one


def test_a_first_global_model_is_bounded_in_size(audited: Participant) -> None:
    study = audited.studies[0]
    content = request(study)
    for by in (2 * LARGEST_RMS, 11.0):  # the initial tensors have a root mean square of 1 at most
        content[ARRAYS] = moved(study, by)
        assert number_of(ask(audited, content)) == 322
    content[ARRAYS] = moved(study, 8.0)
    assert not ask(audited, content).has_error()


def test_the_bound_on_change_grows_with_the_rounds_between(make_study) -> None:
    study = make_study()
    start = global_state(build_model(study, seed=1))
    step = STEPS * study.training.learning_rate
    far = {name: tensor + 2.5 * step for name, tensor in start.items()}
    assert {fault.where for fault in bound_faults(study, far, start, rounds=2)} == set(start)
    assert bound_faults(study, far, start, rounds=3) == []
    assert bound_faults(study, far, None, rounds=1) == []
    assert bound_faults(study, start, start, rounds=1) == []


@pytest.mark.parametrize(
    ("first", "then", "between"),
    [
        (("train", 5), ("train", 6), 1),
        (("train", 5), ("train", 8), 3),
        (("train", 5), ("evaluate", 5), 1),
        (("train", 5), ("evaluate", 6), 2),  # what is trained in a round has not had it yet, what is scored has
        (("evaluate", 5), ("train", 6), 1),
        (("evaluate", 5), ("train", 7), 1),
    ],
)
def test_only_the_rounds_since_the_last_model_let_the_next_one_change(
    first: tuple[str, int], then: tuple[str, int], between: int, make_study, tmp_path: Path
) -> None:
    study, records = make_study(rounds=9), Records(state=tmp_path, site="Alder")
    start, step = global_state(build_model(study, seed=1)), STEPS * study.training.learning_rate
    asked = {"study": study.digest, "name": study.name, "run": "1"}
    accept(records, study, {**asked, "kind": first[0], "round": first[1]}, start)
    about = {**asked, "kind": then[0], "round": then[1]}
    with pytest.raises(IcmoeError, match="ICM322"):
        accept(records, study, about, {name: tensor + (between + 0.1) * step for name, tensor in start.items()})
    accept(records, study, about, {name: tensor + (between - 0.1) * step for name, tensor in start.items()})


def test_the_balance_bias_may_move_as_the_study_says_however_small_its_learning_rate(make_study) -> None:
    study = make_study(rounds=900, training={"learning_rate": 1e-6}, aggregation={"balance_step": 0.05})
    start, one_site, bias_M = global_state(build_model(study, seed=1)), np.ones(1), np.zeros(3)
    for number in range(study.rounds):
        last_M, bias_M = bias_M, balance_step(bias_M, one_site, np.array([[1.0, 0.0, 0.0]]), study.aggregation.balance_step)
        last, now = (start | {BALANCE_BIAS: torch.from_numpy(b_M).float()} for b_M in (last_M, bias_M))
        assert bound_faults(study, now, last if number else None, rounds=1) == []
    assert bound_faults(study, now, start, rounds=study.rounds) == []
    assert [fault.where for fault in bound_faults(study, now, start, rounds=100)] == [BALANCE_BIAS]


def test_training_itself_stays_far_below_the_bound(audited: Participant) -> None:
    study = audited.studies[0]
    content = request(study)
    update = tensors_of(ask(audited, content).content[UPDATE])
    start = tensors_of(content[ARRAYS])
    after = {name: start[name] + update.get(name, 0.0) for name in start}
    assert bound_faults(study, after, start, rounds=1) == []
    largest = max(float(tensor.square().mean().sqrt()) for tensor in update.values())
    assert 0.0 < largest < 0.1 * STEPS * study.training.learning_rate


def test_the_last_global_model_must_be_whole(audited: Participant) -> None:
    study = audited.studies[0]
    ask(audited, request(study))
    kept = audited.state_folder / study.digest[:16] / "last-global.safetensors"
    other = save({"head.classify.bias": torch.zeros(3)}, metadata={"age": "0"})
    for damaged in (b"\x00" * 20, other):
        kept.unlink()
        kept.write_bytes(damaged)
        assert number_of(ask(audited, request(study))) == 321
    for target in (kept.name, "nothing"):  # of a loop and of a link to nothing, a path only says that it is not there
        kept.unlink()
        kept.symlink_to(target)
        assert number_of(ask(audited, request(study))) == 321


def test_hospitals_compare_the_digests_of_a_round(audited: Participant, hospital: Path, tmp_path: Path) -> None:
    study = audited.studies[0]
    path = write_site_file(tmp_path, hospital)
    for number in (1, 2):
        assert not ask(audited, request(study, number)).has_error()
    whole = command(path, "audit")
    assert whole.exit_code == 0
    assert "6 lines, unbroken; hash of the last: " + read_log(audited.state_folder)[-1]["hash"] in whole.output
    rows = json.loads(command(path, "audit", "digest", "2", "--json").output)
    assert [(row["event"], row["round"]) for row in rows] == [("received", 2), ("sent", 2)]
    assert rows[0]["digest"] == state_digest(global_state(build_model(study, seed=1)))
    by_name = command(path, "audit", "digest", "1", "--study", study.name)
    assert rows[0]["digest"] in by_name.output
    for words in (["digest", "3"], ["digest"], ["nonsense", "1"], ["digest", "1", "--study", "other"]):
        refused = command(path, "audit", *words)
        assert refused.exit_code == 1
        assert "ICM210" in refused.stderr


def fill(folder: Path, lines: int) -> bytes:
    for number in range(lines):
        record(folder, "sent", {"round": number})
    return (folder / LOG).read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), new=st.integers(0, 255))
def test_any_byte_changed_in_the_log_shows(tmp_path: Path, at: int, new: int) -> None:
    folder = tmp_path / "state"
    whole = (folder / LOG).read_bytes() if folder.exists() else fill(folder, 5)
    (tmp_path / "copy").mkdir(exist_ok=True)
    changed = bytearray(whole)
    changed[at % len(whole)] = new
    (tmp_path / "copy" / LOG).write_bytes(changed)
    if bytes(changed) == whole:
        assert len(read_log(tmp_path / "copy")) == 5
    elif at % len(whole) == len(whole) - 1:
        assert len(read_log(tmp_path / "copy")) == 4  # the last line has no end: it was never finished
    else:
        with pytest.raises(IcmoeError, match="ICM321"):
            read_log(tmp_path / "copy")


@pytest.mark.parametrize("harm", ["taken out", "swapped"])
def test_lines_taken_out_or_moved_show(harm: str, tmp_path: Path) -> None:
    lines = fill(tmp_path, 4).splitlines(keepends=True)
    lines = [lines[0], *lines[2:]] if harm == "taken out" else [lines[1], lines[0], *lines[2:]]
    (tmp_path / LOG).write_bytes(b"".join(lines))
    with pytest.raises(IcmoeError, match=r"ICM321 .*line"):
        read_log(tmp_path)


def test_a_line_that_a_crash_cut_short_is_dropped_and_the_log_goes_on(tmp_path: Path) -> None:
    whole = fill(tmp_path, 3)
    (tmp_path / LOG).write_bytes(whole[:-10])
    assert len(read_log(tmp_path)) == 2
    record(tmp_path, "sent", {"round": 9})
    assert [entry.get("round") for entry in read_log(tmp_path)] == [0, 1, 9]


def test_processes_that_write_at_once_keep_one_chain(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom fl_client.audit import record\n"
        "for number in range(20): record(Path(sys.argv[1]), 'sent', {'round': number})"
    )
    command_line = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen(command_line, cwd=Path(__file__).parents[1]) for _ in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    entries = read_log(tmp_path)
    assert [entry["line"] for entry in entries] == list(range(1, 61))
    assert entries[0]["previous"] == START


def test_an_empty_log_is_no_error(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    with pytest.raises(IcmoeError, match="ICM210"):
        digests_of_round([], 1)


ROUND = {"version": 2, "time": "2026-03-01T12:00:00+00:00", "kind": "train", "study": "b" * 64, "name": "[/x]", "round": 1}
FORGED = {
    "without its time": {"event": "received", "kind": "train"},
    "a time that is none": {**ROUND, "event": "received", "time": None},
    "an event that is a list": {**ROUND, "event": ["sent"]},
    "a round that is a text": {**ROUND, "event": "received", "round": "x"},
    "spent without its entry": {**ROUND, "event": "spent"},
    "spent, entry a text": {**ROUND, "event": "spent", "entry": "x", "entry_hash": "y"},
    "spent, entry below 1": {**ROUND, "event": "spent", "entry": -5, "entry_hash": "y"},
    "numbers that are a list": {**ROUND, "event": "sent", "numbers": [1]},
    "a loss that is a list": {**ROUND, "event": "sent", "numbers": {"loss": [1]}},
    "approved without a study": {"time": "x", "event": "approved"},
}


@pytest.mark.parametrize("values", FORGED.values(), ids=FORGED)
def test_a_line_of_another_form_is_refused_though_its_place_in_the_chain_is_right(values: dict, hospital: Path, tmp_path) -> None:
    path, state = write_site_file(tmp_path, hospital), tmp_path / "state"
    record(state, "sent", {"round": 0})
    with (state / LOG).open("a") as log:
        log.write(json.dumps(linked(values, read_log(state)[-1])) + "\n")
    for words in ("status", "history", "audit", "audit verify", "report"):
        done = command(path, *words.split())
        assert (done.exit_code, "ICM321" in done.stderr) == (1, True), words
    with pytest.raises(IcmoeError, match="ICM321"):
        record(state, "sent", {"round": 1})


def test_names_in_the_log_are_printed_as_they_are(hospital: Path, tmp_path: Path) -> None:
    path, state = write_site_file(tmp_path, hospital), tmp_path / "state"
    record(state, "received", {key: value for key, value in ROUND.items() if key not in {"version", "time"}})
    (state / "said.json").write_text('{"says": "[/bold]", "since": 0, "run": null}')
    for words, shown in (("status", "[/bold]"), ("history", "[/x]"), ("audit", "[/x]"), ("report", "")):
        done = command(path, *words.split())
        assert (done.exit_code, shown in done.output) == (0, True), words
