"""A study as a run: laid out on the coordinator, submitted by Flower's own command, followed to its real end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_server import audit, flower
from fl_server.beside import audit_path, waiting_path
from fl_server.guard import Memory
from fl_server.home import Home
from fl_server.round_log import RoundRecord, last_score
from fl_server.run_state import RunState, latest_state
from icmoe.atomic import read_regular, write_atomically
from icmoe.bundle import PACKAGES, bundle_files
from icmoe.errors import Fault, IcmoeError, faults_of, print_faults
from icmoe.server_privacy import spending_sentence
from icmoe.study import Study, read_study

LOOK_S = 1.0
STATUS_S = 10.0
STOP_S = 60.0
# A run says what it waits for, and that for no longer than the deadline; it also aggregates, and a restarted SuperLink may take
# some minutes more.
QUIET_WAITS = 2
RESTART_S = 600.0


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """Where a study's runs keep what they write; the same study goes on where it stopped.

    Parameters
    ----------
    path
        Folder below the coordinator's runs.
    """

    path: Path

    @property
    def study(self) -> Path:
        """The coordinator's copy of the study file."""
        return self.path / "study.toml"

    @property
    def state(self) -> Path:
        """State after the last round."""
        return self.path / "study.state.safetensors"

    @property
    def model(self) -> Path:
        """The final model."""
        return self.path / "study.model.safetensors"

    @property
    def card(self) -> Path:
        """Its card, which is written last."""
        return self.model.with_suffix(".md")

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do; a run of a closed study only writes both again."""
        return self.model.exists() and self.card.exists()

    @property
    def run_id(self) -> str:
        """Number of the last run; empty before the first."""
        return str(self._runs().get("run", ""))

    @property
    def earlier(self) -> dict[str, dict[str, Any]]:
        """By the number of each earlier run, how far the study had come when the next one began."""
        found = self._runs().get("earlier")
        return {run: came for run, came in found.items() if _is_reached(came)} if isinstance(found, dict) else {}

    def _runs(self) -> dict[str, Any]:
        try:
            found = json.loads(read_regular(self.path / "run.json"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def note_run(self, run_id: str) -> None:
        """Remember the number of the last run, and of the one before how far the study has come."""
        before = self.run_id
        earlier = {**self.earlier, before: self._reached()} if before not in {"", run_id} else self.earlier
        write_atomically(self.path / "run.json", json.dumps({"run": run_id, "earlier": earlier}).encode())

    def _reached(self) -> dict[str, Any]:
        """Return how far the study has come, nothing where its state cannot be read: the next run says why."""
        try:
            return reached(self.progress() if self.state.exists() else None)
        except IcmoeError:
            return {}

    def progress(self) -> RunState | None:
        """Return the committed state, None before the first round."""
        return latest_state(self.state, read_study(self.study))

    def stamp(self) -> tuple[int, int]:
        """Return what changes with each commit, without reading it."""
        try:
            found = self.state.stat()
        except OSError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def waiting(self) -> str:
        """Return whom the run waits for and until when, as it said last."""
        try:
            return read_regular(waiting_path(self.study)).decode()
        except (OSError, ValueError):
            return ""

    def faults(self) -> list[Fault]:
        """Return what stopped the last run, where it could say."""
        try:
            rows = json.loads(read_regular(self.path / "study.faults.json"))
            return [Fault(**{key: value for key, value in row.items() if key != "sentence"}) for row in rows]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return []


def _is_reached(came: object) -> bool:
    """Return whether a value is of the form of `reached`, or empty, as where the state could not be read."""
    if not isinstance(came, dict) or not came.keys() <= {"rounds_done", "val_dice"}:
        return False
    dice = came.get("val_dice")
    return type(came.get("rounds_done", 0)) is int and (dice is None or (type(dice) in {int, float} and 0.0 <= dice <= 1.0))


def folder_of(home: Home, study: Study) -> StudyFolder:
    """Return the study's folder: its name and the start of its digest."""
    return StudyFolder(home.runs / f"{study.name}-{study.digest[:12]}")


def study_folders(home: Home) -> list[StudyFolder]:
    """Return the folders of all studies, sorted by name."""
    return [StudyFolder(path) for path in sorted(home.runs.glob("*")) if (path / "study.toml").is_file()]


def folders(home: Home) -> dict[str, StudyFolder]:
    """Return the folder of each study by the numbers of its runs."""
    return {run_id: folder for folder in study_folders(home) for run_id in (*folder.earlier, folder.run_id) if run_id}


def start(home: Home, path: Path, *, resume: bool = False) -> tuple[Study, StudyFolder]:
    """Check the study, lay out the app and submit it; a finished study is not submitted again.

    Parameters
    ----------
    home
        The coordinator's folder.
    path
        Study file.
    resume
        Whether a run of the study that Flower still holds is stopped first and its rounds gone on with; else it is an error.

    Raises
    ------
    IcmoeError
        201-205 for the study, 330 where the SuperLink does not answer, 506 where the study is running.
    """
    study = read_study(path)
    folder = folder_of(home, study)
    if folder.is_complete:
        return study, folder
    known = {run.run_id: run for run in flower.runs(home)}
    last = known.get(folder.run_id)
    if last is not None and not last.finished and resume:
        stop_and_wait(home, last.run_id)
    elif last is not None and not last.finished:
        value = f"run {last.run_id}, {last.status}"
        raise IcmoeError(Fault(number=506, where=study.name, value=value, did="Nothing was submitted."))
    write_atomically(folder.study, read_regular(path))
    (folder.path / "study.faults.json").unlink(missing_ok=True)
    app = home.folder / "app"
    write_app(app)
    folder.note_run(flower.submit(home, app, folder.study))
    return study, folder


def stop_and_wait(home: Home, run_id: str) -> None:
    """Stop a run and return once the SuperLink says that it has ended.

    Raises
    ------
    IcmoeError
        510 where it has not after a minute.
    """
    flower.stop(home, run_id)
    ends = time.monotonic() + STOP_S
    while not flower.run_of(home, run_id).finished:
        if time.monotonic() > ends:
            raise IcmoeError(Fault(number=510, value=f"run {run_id}", did="It was told to stop; nothing was submitted."))
        time.sleep(LOOK_S)


def write_app(folder: Path) -> None:
    """Lay out the app from this installation, as the sites build it from theirs, and remove what is not part of it."""
    files = bundle_files()
    for package in PACKAGES:
        for path in (folder / package).rglob("*.py"):
            if path.relative_to(folder).as_posix() not in files:
                path.unlink()
    for name, data in files.items():
        write_atomically(folder / name, data, durable=False)


def follow(
    home: Home, study: Study, folder: StudyFolder, tell: Callable[[RoundRecord], None], say: Callable[[str], None]
) -> None:
    """Tell of each round once it is committed, say whom the run waits for, and return when it has completed.

    Flower's own stream ends without an error when a run fails or the SuperLink restarts; here the SuperLink is asked.

    Raises
    ------
    IcmoeError
        What stopped the study, with 507 where the run failed, 509 where it was stopped, 510 where it said nothing any more for
        longer than any of its waits.
    """
    quiet_s = QUIET_WAITS * study.deadline_s + RESTART_S
    ends = time.monotonic() + quiet_s
    run_id = folder.run_id  # another run of the study may take the folder over, after it has stopped this one
    told, next_status, closed, said = 0, 0.0, False, folder.waiting()
    state, seen = None, (-1, -1)
    while time.monotonic() < ends:
        if (stamp := folder.stamp()) != seen:
            state, seen, ends = folder.progress(), stamp, time.monotonic() + quiet_s
            for record in state.history[told:] if state is not None else []:
                tell(record)
                told += 1
        if (line := folder.waiting()) != said:
            say(line)
            said, ends = line, time.monotonic() + quiet_s
        just_closed = state is not None and state.closed and not closed
        closed = closed or just_closed
        if just_closed or time.monotonic() >= next_status:
            if _completed(home, folder, run_id):
                return
            next_status = time.monotonic() + (LOOK_S if closed else STATUS_S)
        time.sleep(LOOK_S)
    raise IcmoeError(Fault(number=510, where=study.name, value=f"run {run_id}"))


def _completed(home: Home, folder: StudyFolder, run_id: str) -> bool:
    try:
        run = flower.run_of(home, run_id)
    except IcmoeError as error:
        if error.faults[0].number == 330:
            return False  # it may be restarting; the deadline of `follow` still holds
        raise
    if run.status == "finished:completed":
        return True
    if run.finished:
        raise IcmoeError(*_ended_badly(run, folder.faults()))
    return False


def _ended_badly(run: flower.Run, known: list[Fault]) -> list[Fault]:
    """Return what stopped a run; where it could not say, that its process was ended from outside."""
    value = f"run {run.run_id}, {run.details or run.status}"
    if run.status == "finished:stopped":
        return [*known, Fault(number=509, value=value)]
    what = "" if known else "run ended without a word, as when its process is killed or lacks memory"
    return [*known, Fault(number=507, what=what, value=value)]


def sentence(record: RoundRecord, study: Study) -> str:
    """Return a round in one line: sites used of those found, loss, who was missing."""
    used, missing = sorted(record["sites"]), sorted({fault["where"] for fault in record["faults"]} - set(record["sites"]))
    loss = "loss withheld" if record["loss"] is None else f"loss {record['loss']:.4f}"
    line = f"round {record['round']} of {study.rounds}: {len(used)} of {len(used) + len(missing)} sites, {loss}"
    line += f"; without {', '.join(missing)}" if missing else ""
    return line + (f"; {spending_sentence(record['privacy'])}" if record.get("privacy") else "")


def sitting_out(state: RunState | None) -> list[str]:
    """Return the sites that are not asked after refused updates, by name."""
    return [] if state is None else Memory.unpacked(state.extra).sitting_out()


def dice_sentence(record: RoundRecord) -> str:
    """Return the validation score of the model that a round left."""
    return f"validation Dice after round {record['round']}: {record['val_dice']:.4f}"


def reached(state: RunState | None) -> dict[str, Any]:
    """Return how far a study has come, as plain values."""
    return {"rounds_done": state.round if state else 0, "val_dice": last_score(state.history) if state else None}


def summary(home: Home) -> list[dict[str, Any]]:
    """Return every run with its study and how far it came, the newest first; what keeps one from being known is printed."""
    by_run = folders(home)
    rows = []
    for run in flower.runs(home):
        row: dict[str, Any] = {"run": run.run_id, "status": run.status, "details": run.details, "since": run.since}
        row |= {"fab_sha256": run.fab_sha256, "study": None, "rounds_done": None, "rounds": None, "val_dice": None}
        if (folder := by_run.get(run.run_id)) is not None:
            try:
                study = read_study(folder.study)
                row |= {"study": study.name, "rounds": study.rounds}
                row |= folder.earlier[run.run_id] if run.run_id in folder.earlier else _standing(folder)
            except (IcmoeError, OSError) as error:
                print_faults(faults_of(error))
        rows.append(row)
    return rows


def _standing(folder: StudyFolder) -> dict[str, Any]:
    state = folder.progress()
    return {**reached(state), "sits_out": sitting_out(state), "audit_head": audit.head(audit_path(folder.study))}
