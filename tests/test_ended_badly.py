"""What the coordinator reads where a run ended: its own reason, or that it had no time to give one."""

from __future__ import annotations

import errno
import json
import math
import os
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
from clocks import Clock
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.config import parse_config_args
from shown import make_home, play
from test_rounds import Wire, honest

from fl_server import commands, flower, submit
from fl_server.app import main
from fl_server.beside import audit_path, waiting_path
from fl_server.new_study import study_toml
from fl_server.submit import StudyFolder, follow
from icmoe.atomic import write_atomically
from icmoe.errors import Fault, IcmoeError, exit_on_fault

REASON = Fault(number=515, where="tiny", value="1", limit="2").record()
KILLED = "Task failed with unknown error."


@pytest.mark.parametrize(
    ("status", "reasons", "numbers", "said"),
    [
        ("finished:failed", [], [507], "run ended without a word, as when its process is killed or lacks memory"),
        ("finished:failed", [REASON], [515, 507], "ICM507 run failed: run 5, "),
        ("finished:stopped", [], [509], "run was stopped"),
    ],
)
def test_a_run_that_ended(make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status, reasons, numbers, said) -> None:
    study, folder = make_study(), StudyFolder(tmp_path)
    folder.study.write_text(study_toml(study))
    folder.note_run("5")
    if reasons:
        (tmp_path / "study.faults.json").write_text(json.dumps(reasons))
    ended = flower.Run(run_id="5", status=status, details=KILLED, since="", fab_sha256="")
    monkeypatch.setattr(submit.flower, "run_of", lambda home, run_id: ended)
    with pytest.raises(IcmoeError) as caught:
        follow(None, study, folder, print, print)
    assert [fault.number for fault in caught.value.faults] == numbers
    assert said in str(caught.value)


@pytest.mark.parametrize(("status", "code"), [("finished:stopped", commands.STOPPED), ("finished:failed", 1)])
def test_a_run_that_a_person_stopped_has_an_exit_code_of_its_own(
    status: str, code: int, make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    study, folder = make_study(), StudyFolder(tmp_path)
    folder.study.write_text(study_toml(study))
    folder.note_run("5")
    ended = flower.Run(run_id="5", status=status, details="", since="", fab_sha256="")
    monkeypatch.setattr(submit.flower, "run_of", lambda home, run_id: ended)
    monkeypatch.setattr(commands, "read_home", lambda root: None)
    monkeypatch.setattr(submit, "start", lambda home, path, resume: (study, folder))
    with pytest.raises(SystemExit) as caught, exit_on_fault():
        commands.run_study(tmp_path, tmp_path / "study.toml", resume=True, as_json=False)
    assert caught.value.code == code
    assert ("ICM509" if code == commands.STOPPED else "ICM507") in capsys.readouterr().err


@pytest.mark.parametrize("file", ["study.state.safetensors", "study.waiting.json"])
def test_a_full_disk_of_the_coordinator_is_named_where_it_costs_a_round(file: str, make_study, tmp_path, monkeypatch) -> None:
    folder = StudyFolder(tmp_path / "runs/tiny")
    folder.path.mkdir(parents=True)
    folder.study.write_text(study_toml(make_study(quorum=3)))

    def full(path: Path, data: bytes, **how: bool) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_atomically(path, data, **how)

    for module in ("run_state", "waiting"):
        monkeypatch.setattr(f"fl_server.{module}.write_atomically", full)
    monkeypatch.setattr("fl_server.app.sweep_often", lambda: None)
    context = Context(run_id=5, node_id=1, node_config={}, state=RecordDict(), run_config={"study": str(folder.study)})
    with nullcontext() if "waiting" in file else pytest.raises(OSError, match="No space left"):
        main(Wire(declining), context)
    assert [(fault.number, fault.value) for fault in folder.faults()] == (
        [] if "waiting" in file else [(205, "No space left on device")]
    )
    assert folder.model.exists() == ("waiting" in file)


def declining(message: Message, site: str) -> Message | None:
    if message.metadata.message_type == "query.summary":
        return Message(Error(1214, "ICM214 not shared"), reply_to=message)
    return honest(message, site)


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_is_followed_as_long_as_it_says_what_it_waits_for(alive: bool, make_study, tmp_path: Path, monkeypatch) -> None:
    study, folder, looks = make_study(rounds=1, retries=20, deadline_s=0.05), StudyFolder(tmp_path), count()
    monkeypatch.setattr(submit, "time", Clock())
    for name, seconds in (("LOOK_S", 0.01), ("STATUS_S", 0.0), ("RESTART_S", 0.2)):
        monkeypatch.setattr(submit, name, seconds)
    folder.study.write_text(study_toml(study))
    folder.note_run("5")

    def run_of(home: object, run_id: str) -> flower.Run:
        look = next(looks)
        if alive:
            waiting_path(folder.study).write_text(f"round 1 of 1, attempt {look} of 21: waiting for nobody")
        return flower.Run("5", "finished:completed" if look > 100 else "running", "", "", "")

    monkeypatch.setattr(submit.flower, "run_of", run_of)
    with nullcontext() if alive else pytest.raises(IcmoeError, match="ICM510"):
        follow(None, study, folder, print, print)
    assert (next(looks) > 100) == alive


RUNS = [flower.Run(number, "finished:stopped", "", "", "") for number in ("4243", "4242", "7")]


def test_an_earlier_run_is_listed_with_its_study_and_how_far_it_came(make_study, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(flower, "runs", lambda _: RUNS)
    home, study = make_home(tmp_path), make_study(rounds=3)
    play(home, study, rounds=1)
    monkeypatch.setattr(flower, "submit", lambda *_: "4243")
    (tmp_path / "study.toml").write_text(study_toml(study))
    folder = submit.start(home, tmp_path / "study.toml")[1]
    play(home, study, rounds=3, run_id=folder.run_id)
    newest, earlier, foreign = submit.summary(home)
    assert [row["study"] for row in (newest, earlier, foreign)] == [study.name, study.name, None]
    assert [(row["rounds_done"], row["rounds"]) for row in (newest, earlier, foreign)] == [(3, 3), (1, 3), (None, None)]
    assert submit.folders(home)["4242"] == folder, "a site that sits out since then is lifted by that number too"


def test_a_study_whose_state_is_damaged_hides_no_other_run(make_study, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(flower, "runs", lambda _: RUNS)
    home = make_home(tmp_path)
    damaged = play(home, make_study(name="damaged"), rounds=1, run_id="4242")
    for path in damaged.path.glob("study.state*"):
        path.write_bytes(b"damaged")
    play(home, make_study(), rounds=1, run_id="4243")
    rows = submit.summary(home)
    assert [(row["study"], row["rounds_done"]) for row in rows] == [("tiny", 1), ("damaged", None), (None, None)]
    assert "ICM502" in capsys.readouterr().err


@pytest.mark.parametrize(
    "came",
    [
        {"val_dice": "high"},
        {"rounds_done": [1]},
        {"run": 5},
        {"study": ["tiny"]},
        1,
        *({"val_dice": dice} for dice in (math.nan, math.inf, -1.0, True)),
    ],
)
def test_what_an_earlier_run_cannot_have_reached_is_passed_over(
    came: object, make_study, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(flower, "runs", lambda _: RUNS)
    home = make_home(tmp_path)
    folder = play(home, make_study(), rounds=1, run_id="4243")
    (folder.path / "run.json").write_text(json.dumps({"run": "4243", "earlier": {"4242": came}}))
    monkeypatch.setattr(commands, "read_home", lambda _: home)
    commands.show_runs(tmp_path, run_id=None, newest=False, as_json=False)
    assert [row["rounds_done"] for row in submit.summary(home)] == [1, None, None]
    capsys.readouterr()
    commands.show_runs(tmp_path, run_id=None, newest=False, as_json=True)
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_a_log_that_cannot_be_opened_hides_no_other_run(make_study, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(flower, "runs", lambda _: RUNS)
    home = make_home(tmp_path)
    audit_path(play(home, make_study(name="damaged"), rounds=1, run_id="4242").study).mkdir()
    play(home, make_study(), rounds=1, run_id="4243")
    assert [(row["study"], row["rounds_done"]) for row in submit.summary(home)] == [("tiny", 1), ("damaged", None), (None, None)]
    assert "ICM205" in capsys.readouterr().err


def test_the_words_of_flower_are_printed_as_they_are(make_study, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(flower, "runs", lambda _: [flower.Run("7", "finished:failed", "no [/x] [red]", "", "")])
    monkeypatch.setattr(commands, "read_home", lambda _: make_home(tmp_path))
    commands.show_runs(tmp_path, run_id=None, newest=False, as_json=False)
    assert "no [/x] [red]" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_run_that_was_killed_between_model_and_card_is_gone_on_with(make_study, tmp_path: Path, monkeypatch) -> None:
    submitted, home, study = list[Path](), make_home(tmp_path), make_study()
    monkeypatch.setattr(flower, "runs", lambda _: RUNS)
    monkeypatch.setattr(flower, "submit", lambda home, app, path: submitted.append(path) or str(len(submitted)))
    (tmp_path / "study.toml").write_text(study_toml(study))
    folder = submit.folder_of(home, study)
    folder.path.mkdir(parents=True)
    folder.model.write_bytes(b"model")
    for _ in range(2):
        assert submit.start(home, tmp_path / "study.toml")[1] == folder
        folder.card.write_text("card")
    assert submitted == [folder.study]


def test_a_path_with_any_letter_reaches_the_run(tmp_path: Path, monkeypatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(flower, "flwr", lambda home, arguments: asked.extend(arguments) or {"run-id": "1"})
    path = Path("/srv/J\u00fcrgen's \U0001f9e0 a=b/study.toml")
    assert flower.submit(make_home(tmp_path), tmp_path, path) == "1"
    assert parse_config_args(asked[-1:]) == {"study": str(path)}
