"""What a hospital sees of its own part: status, history, report, and the three forms of the running screen."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_client import ask, hospital, request, site
from typer.testing import CliRunner

from fl_client import cli
from fl_client.doing import FILE, SAID, Doing, doing_now, telling
from fl_client.history import rounds_of
from fl_client.own_lines import TAG
from fl_client.participant import Participant
from fl_client.screen import Panel, Run, screen
from fl_client.site import read_named
from fl_client.site_report import HEIGHT, WIDTH, points
from fl_client.status import _connection
from fl_client.supervisor import Hearing, only_one
from icmoe.model import ICMoE

__all__ = ["hospital", "site"]


@pytest.fixture
def here(site: Participant, tmp_path: Path) -> tuple[Path, Participant]:
    """A site file, and the participant whose records lie beside it: two rounds sent, one declined."""
    path = tmp_path / "Alder.toml"
    path.write_text('name = "Alder"\ndata = "nowhere"\nstate = "state"\n')
    own = replace(site, audited=True, state_folder=tmp_path / "state")
    study = own.studies[0]
    for number in (1, 2):
        assert not ask(own, request(study, number)).has_error()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ICMoE, "losses", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert ask(own, request(study, 2, seed=9)).has_error()
    return path, own


def run(path: Path, *words: str) -> str:
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(path), *words], terminal_width=200)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_history_has_each_attempt_with_what_came_of_it(here: tuple[Path, Participant]) -> None:
    path, own = here
    rows = json.loads(run(path, "history", "--json"))
    assert [(row["round"], row["outcome"], row["number"]) for row in rows] == [
        (1, "sent", None),
        (2, "sent", None),
        (2, "declined", 334),
    ]
    assert all(row["run"].isdigit() for row in rows)
    assert {row["digest"] for row in rows} == {own.studies[0].digest}
    assert all(0.0 <= row["val_dice"] <= 1.0 and row["steps"] > 0 for row in rows[:2])
    assert rows[2]["val_dice"] is None
    assert "ICM334" in run(path, "history")


def test_status_tells_of_the_last_round_and_the_last_release(here: tuple[Path, Participant]) -> None:
    path, own = here
    status = json.loads(run(path, "status", "--json"))
    assert (status["running"], status["connection"], status["doing"]) == (False, None, None)
    assert (status["last_round"]["outcome"], status["last_release"]["round"]) == ("declined", 2)
    assert "has not taken part yet" in run(path, "status")
    with only_one(own.state_folder), screen(path, read_named(path, "Alder"), "plain", Run()) as say:
        say("connected; waiting for the coordinator to ask")
        status = json.loads(run(path, "status", "--json"))
    assert status["running"]
    assert status["connection"]["says"] == "connected; waiting for the coordinator to ask"
    assert json.loads(run(path, "status", "--json"))["running"] is False


def test_a_round_in_training_is_told_step_by_step_and_gone_afterwards(site: Participant, tmp_path: Path, monkeypatch) -> None:
    own, seen = replace(site, audited=True, state_folder=tmp_path), []
    monkeypatch.setattr("fl_client.doing.EVERY_S", 0.0)
    losses = ICMoE.losses

    def watched(*given):
        seen.append(doing_now(tmp_path))
        return losses(*given)

    monkeypatch.setattr(ICMoE, "losses", watched)
    assert not ask(own, request(own.studies[0], 1)).has_error()
    assert seen[0] == replace(seen[0], study="tiny", round=1, rounds=2, step=0, device="cpu")
    assert [doing.step for doing in seen] == list(range(len(seen)))
    assert seen[-1].steps == len(seen)
    assert seen[-1].memory_bytes > 10**7
    assert doing_now(tmp_path) is None


KILLED = """
import os, signal, sys
from pathlib import Path
from fl_client.doing import Doing, doing_now, telling
with telling(Path(sys.argv[1]), Doing(run="1", study="tiny", round=1, rounds=2)):
    assert doing_now(Path(sys.argv[1])) is not None
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_training_that_was_killed_is_not_shown_as_going_on(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / FILE).exists()
    assert doing_now(tmp_path) is None


def test_what_is_being_done_is_never_worth_a_round(tmp_path: Path) -> None:
    doing = Doing(run="1", study="tiny", round=1, rounds=2)
    with telling(None, doing) as on_step:
        on_step(1, 2)
    (tmp_path / FILE).write_text('{"run": "1", "study": 5')
    assert doing_now(tmp_path) is None
    (tmp_path / "file").write_text("")
    with telling(tmp_path / "file", doing) as on_step:  # no folder can be there
        on_step(1, 2)


def test_the_report_holds_every_round_and_escapes_what_it_prints(here: tuple[Path, Participant]) -> None:
    path, own = here
    said = run(path, "report")
    page = own.state_folder / "report.html"
    assert str(page) in said.replace("\n", "")
    text = page.read_text()
    assert oct(page.stat().st_mode & 0o777) == "0o600"
    assert text.count("<tr><td>") == 3
    assert "2 updates sent, 1 requests declined" in text
    assert text.count("<circle") == 1 + 1
    assert "http" not in text.replace("http-equiv", "")  # nothing is loaded from anywhere
    path.write_text(path.read_text().replace("Alder", "A<b>"))
    done = CliRunner().invoke(cli.app, ["--site", "A<b>", "--config", str(path), "report"])
    assert done.exit_code == 1  # a name like this is no site's
    assert "Traceback" not in done.output


def test_an_empty_site_has_a_status_a_history_and_a_report(tmp_path: Path) -> None:
    path = tmp_path / "Alder.toml"
    path.write_text('name = "Alder"\ndata = "nowhere"\nstate = "state"\n')
    assert json.loads(run(path, "history", "--json")) == []
    assert json.loads(run(path, "status", "--json"))["studies"] == []
    run(path, "report")
    assert "No round of any study" in (tmp_path / "state" / "report.html").read_text()


def test_json_lines_carry_the_run_that_flower_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, number = tmp_path / "Alder.toml", Run()
    path.write_text('name = "Alder"\ndata = "nowhere"\nstate = "state"\n')
    with screen(path, read_named(path, "Alder"), "json", number) as say:
        hear = Hearing(say, lambda line: None, number)
        for line in ("SuperNode ID: 5", "[RUN 712, ROUND 1]", "Receiving: train message", f"{TAG} ICM304 Alder: no. Look."):
            hear(f"INFO :      {line}\n")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["run"], line["number"]) for line in lines] == [(None, None), ("712", None), ("712", 304)]
    assert {line["site"] for line in lines} == {"Alder"}
    assert json.loads(run(path, "status", "--json"))["connection"]["run"] == "712"


def test_the_panel_follows_the_records(here: tuple[Path, Participant]) -> None:
    path, own = here
    panel, console = Panel(path, read_named(path, "Alder")), Console(width=120)

    def shown() -> str:
        with console.capture() as found:
            console.print(panel.render())
        return found.get()

    assert "no round" in shown()
    with telling(own.state_folder, Doing(run="1", study="tiny", round=2, rounds=2)):
        assert "tiny, round 2 of 2" in shown()
    log = own.state_folder / "audit.jsonl"
    log.write_bytes(log.read_bytes()[:-30] + b"\n")
    os.utime(log, ns=(1, 1))
    assert "ICM321" in shown()


SHOW = """
import sys, time
from pathlib import Path
from fl_client.screen import Run, form_of, screen
from fl_client.site import read_named
from fl_client.site_report import HEIGHT, WIDTH, points
path = Path(sys.argv[1])
with screen(path, read_named(path, "Alder"), form_of(plain="--plain" in sys.argv, as_json=False), Run()) as say:
    say("connected; waiting for the coordinator to ask")
    time.sleep(2.0)
"""


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_gets_a_panel_unless_it_asks_for_none(here: tuple[Path, Participant], plain: bool) -> None:
    path, _ = here
    master, slave = pty.openpty()
    command = [sys.executable, "-c", SHOW, str(path), *(["--plain"] if plain else [])]
    environment = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as child:
        os.close(slave)
        text, ends = b"", time.monotonic() + 60
        with suppress(OSError):  # Linux reports the end of a terminal as an error
            while time.monotonic() < ends and (read := os.read(master, 65536)):
                text += read
        assert child.wait(timeout=10) == 0
    os.close(master)
    assert b"connected; waiting" in text
    assert (b"validation Dice" in text) is not plain


def test_a_round_that_is_declined_before_its_model_is_written_down_has_a_row_of_its_own() -> None:
    about = {"kind": "train", "study": "s", "name": "tiny", "round": 1, "run": "7"}
    sent = {**about, "event": "sent", "time": "2", "numbers": {"val-dice": 0.5}}
    lines = [{**about, "event": "received", "time": "1"}, sent, {**about, "event": "declined", "time": "3", "number": 304}]
    assert [(row["time"], row["outcome"], row["val_dice"]) for row in rounds_of(lines)] == [
        ("1", "sent", 0.5),
        ("3", "declined", None),
    ]


@pytest.mark.parametrize(("patients", "shown"), [(0, None), (2, 0.0)])
def test_a_score_of_no_patient_is_no_score(patients: int, shown: float | None) -> None:
    about = {"kind": "train", "study": "s", "name": "tiny", "round": 1, "run": "7", "time": "1"}
    sent = {**about, "event": "sent", "numbers": {"val-dice": 0.0, "val-patients": patients}}
    assert [row["val_dice"] for row in rounds_of([{**about, "event": "received"}, sent])] == [shown]


def test_the_curve_rises_with_dice_from_left_to_right() -> None:
    assert points({1: 0.0, 3: 1.0}) == [(0.0, HEIGHT), (WIDTH, 0.0)]
    assert points({}) == []


@pytest.mark.parametrize("since", ["NaN", "1e999", "-1e999", "[" * 100_000, '"soon"', "1" * 400])
def test_a_damaged_note_of_what_was_said_last_is_none(since: str, tmp_path: Path) -> None:
    (tmp_path / SAID).write_text(f'{{"says": "connected", "run": "", "since": {since}}}')
    assert _connection(tmp_path) is None
