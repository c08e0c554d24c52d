"""What a hospital's IT meets on a bad day: commands at once, folders in place of files, logs without room."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from exports import write_series
from test_client import command, hospital, write_site_file, write_study_file

from fl_client.approval import read_approvals, standing
from fl_client.approving import withdraw_study
from fl_client.audit import read_log
from fl_client.records import Records
from fl_client.screen import Run, screen
from fl_client.site import read_named
from fl_client.supervisor import Hearing, _log_file
from fl_server import supervise
from icmoe.data.ingest import index
from icmoe.data.ingest.pseudonyms import forgotten
from icmoe.data.ingest.run import forget

__all__ = ["hospital"]
SITE = """name = "Alder"
cache = "cache"
allow_test_only = true
[ingest]
folder = "export"
store = "ingest"
"""


def test_of_an_approval_and_a_withdrawal_at_once_list_and_log_tell_the_same(
    hospital: Path, make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = write_site_file(tmp_path, hospital), write_study_file(tmp_path / "study.toml", make_study())
    assert command(path, "approve", str(file), "--yes").exit_code == 0
    add, other = Records.add, threading.Thread(target=withdraw_study, args=(path, "Alder", "tiny"))

    def beside(self: Records, event: str, values: dict[str, object]) -> object:
        head = add(self, event, values)
        if event == "approved":  # its line is written, its file not yet
            other.start()
            other.join(2.0)
        return head

    monkeypatch.setattr(Records, "add", beside)
    assert command(path, "approve", str(file), "--yes").exit_code == 0
    other.join()
    state = tmp_path / "state"
    assert [line["event"] for line in read_log(state)][-2:] == ["approved", "withdrawn"]
    assert standing(read_approvals(state)) == ()


@pytest.fixture
def ingested(make_study, tmp_path: Path, in_this_process: None) -> Path:
    """A site that approved the study and ran ingest over two patients."""
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    for seed, name in enumerate(("one", "two")):  # equal pictures stay with one of the two, by their pseudonyms
        write_series(tmp_path / "export" / name, name, seed=seed)
    for words in (["approve", str(write_study_file(tmp_path / "study.toml", make_study())), "--yes"], ["ingest", "--no-encode"]):
        assert command(path, *words).exit_code == 0
    return path


def test_who_forgets_a_patient_beside_an_ingest_is_told_to_do_it_again(ingested: Path) -> None:
    folder = ingested.parent / "ingest"
    store = next(folder.glob(f"*/{index.INDEX}")).parent
    with index.claimed(store):
        done = command(ingested, "forget", "one")
    assert (done.exit_code, "ICM130" in done.stderr) == (1, True)
    assert "not removed yet. Wait for the other process, or stop it; then forget the patient again." in done.stderr
    assert len(forgotten(folder)) == 1
    done = command(ingested, "forget", "one")
    assert (done.exit_code, "images and" in done.stdout) == (0, True), done.stdout


def test_who_forgets_a_patient_again_after_a_kill_is_told_what_was_still_there(ingested: Path) -> None:
    assert command(ingested, "ingest").exit_code == 0
    cache = ingested.parent / "cache"
    before = len(list(cache.rglob("*.safetensors")))
    forget(ingested.parent / "ingest", "one")  # and killed before the features
    done = command(ingested, "forget", "one")
    removed = before - len(list(cache.rglob("*.safetensors")))
    assert removed > 0
    assert done.stdout.startswith(
        f"{removed} cached views removed that an interrupted command had left. No image of this patient"
    )
    assert command(ingested, "forget", "one").stdout.startswith("No image of this patient was in use here: check the number.")


def test_an_index_that_is_a_folder_is_refused_by_number(ingested: Path) -> None:
    path = next(ingested.parent.glob(f"ingest/*/{index.INDEX}"))
    path.unlink()
    path.mkdir()
    (path / "x").touch()
    for words in (["forget", "one"], ["ingest"], ["show"]):
        done = command(ingested, *words)
        assert (done.exit_code, isinstance(done.exception, SystemExit), "ICM1" in done.stderr) == (1, True, True)


class Full:
    """A stream of a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("form", ["plain", "json"])
def test_a_site_stays_though_nothing_it_says_finds_room(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "site.toml"
    path.write_text('name = "Alder"\ndata = "nowhere"\n')
    monkeypatch.setattr("sys.stderr", Full())
    monkeypatch.setattr("sys.stdout", Full())
    with screen(path, read_named(path, "Alder"), form, Run()) as say:
        hear = Hearing(say, lambda line: None)
        hear("INFO :      Starting Flower SuperNode")
        say("connecting")
    assert '"connecting"' in (tmp_path / "state/said.json").read_text()


def test_lines_of_flower_that_find_no_room_are_lost_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with _log_file(Path("/dev/full")) as log:
        log("a line")
    assert capsys.readouterr() == ("", "")


def test_a_coordinator_starts_a_child_again_though_it_cannot_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(supervise, "print_faults", full)
    child = supervise.Child("brief", ["/bin/true"], {})
    child.look()
    assert child.process is not None
    child.process.wait()
    child.look()
    assert child.process is None
    assert child.delay_s > 0
