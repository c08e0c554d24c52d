"""Snapshots of the studies in a coordinator's folder; files are read again when one of them changes, and only read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import TypeVar

from fl_server import audit
from fl_server.beside import audit_path, is_held
from fl_server.dashboard.aside import Aside
from fl_server.dashboard.references import References
from fl_server.dashboard.snapshot import Phase, RoundRow, SiteRow, Snapshot, Told
from fl_server.dashboard.spending import spent
from fl_server.dashboard.standing import site_rows
from fl_server.dashboard.told import refused_rows, stopping, told
from fl_server.home import Home
from fl_server.round_log import RoundRecord
from fl_server.run_state import RunState, newest_readable
from fl_server.submit import StudyFolder, sitting_out, study_folders
from fl_server.waiting import Wait, read_wait, wait_path
from icmoe.errors import Fault, IcmoeError, file_fault
from icmoe.kinds import names_of
from icmoe.study import Study, read_study

PACE_ROUNDS = 5
MOST_REFUSED = 100
"""Refusals that the page shows; the audit log has all."""

T = TypeVar("T")


def _stamps(folder: StudyFolder) -> tuple[int, ...]:
    """Return what changes when a file of a study does, without reading any."""
    beside = [folder.path / name for name in ("run.json", "study.faults.json")]
    paths = [folder.study, folder.state, folder.model, wait_path(folder.study), audit_path(folder.study), *beside]
    return tuple(map(_changed_ns, paths))


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@dataclass(slots=True)
class Feed:
    """What a page asks for snapshots.

    Parameters
    ----------
    home
        The coordinator's folder.
    only
        Name or folder of the one study to show; all, the newest first, where absent.
    references
        Reference lines of a rehearsal.
    """

    home: Home
    only: str | None = None
    references: References | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _aside: Aside = field(default_factory=Aside)
    _known: dict[str, tuple[tuple[object, ...], Snapshot]] = field(default_factory=dict)

    def folders(self) -> list[StudyFolder]:
        """Return the studies that may be shown, the one that was written to last first."""
        shown = (folder for folder in study_folders(self.home) if self.only in {None, *_names(folder)})
        return sorted(shown, key=lambda folder: (max(_stamps(folder)), folder.path.name), reverse=True)

    def current(self, name: str = "") -> Snapshot:
        """Return the snapshot of the study in a folder of this name, of the newest where it is empty.

        Raises
        ------
        IcmoeError
            524 where there is no such study.
        """
        folders = self.folders()
        names = tuple(folder.path.name for folder in folders)
        if name and name not in names:
            raise unknown(name, names)
        if not folders:
            return Snapshot(consortium=self.home.consortium.name)
        folder = folders[names.index(name) if name else 0]
        with self._lock:
            return self._read(folder, names)

    def _read(self, folder: StudyFolder, names: tuple[str, ...]) -> Snapshot:
        now, held, seen = datetime.now(UTC), is_held(folder.study), self._known.get(folder.path.name)
        wait = seen[1].wait if seen is not None else None
        stamp = (*_stamps(folder), held, wait is not None and now >= wait.until, len(self._aside.found), *names)
        if seen is not None and seen[0] == stamp:
            return seen[1]
        snapshot = _Reading(self.home, folder, now, held, self._aside).snapshot(names, self.references)
        self._known[folder.path.name] = (stamp, snapshot)
        return snapshot


def unknown(name: str, known: tuple[str, ...]) -> IcmoeError:
    """Return the refusal of a study that has no folder."""
    return IcmoeError(Fault(number=524, where=name[:80], limit=", ".join(known) or "none so far", did="Nothing is shown."))


def _names(folder: StudyFolder) -> set[str]:
    return {folder.path.name, folder.path.name.rpartition("-")[0]}


@dataclass(slots=True)
class _Reading:
    """One reading of a study's files; what cannot be read becomes a fault of the page, and the rest is shown."""

    home: Home
    folder: StudyFolder
    now: datetime
    held: bool
    aside: Aside
    faults: list[Told] = field(default_factory=list)

    def _try(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except IcmoeError as error:
            self.faults += map(told, error.faults)
        except OSError as error:
            self.faults.append(told(file_fault(error)))
        return None

    def snapshot(self, names: tuple[str, ...], references: References | None) -> Snapshot:
        """Return what the files say."""
        about = Snapshot(consortium=self.home.consortium.name, folder=self.folder.path.name, others=names, phase="not running")
        study = self._try(lambda: read_study(self.folder.study))
        if study is None:
            return about.model_copy(update={"faults": tuple(self.faults)})
        try:
            return self._of(study, about, references)
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # whole, but of another version
            fault = Fault(number=523, where=self.folder.state.name, value=type(error).__name__)
            return about.model_copy(update={"study": study.name, "faults": (*self.faults, told(fault))})

    def _of(self, study: Study, about: Snapshot, references: References | None) -> Snapshot:
        state = self._state(study)
        history = list(state.history) if state is not None else []
        wait = self._try(lambda: read_wait(self.folder.study)) if self.held else None
        refused = refused_rows(self._try(lambda: audit.read(audit_path(self.folder.study))) or [], history)
        stopped = [] if self.held else stopping(self.folder)
        phase = _phase(self.folder, state, wait, held=self.held, stopped=bool(stopped))
        pace_s = median([sum(record["seconds"].values()) for record in history[-PACE_ROUNDS:]]) if history else None
        withheld = study.privacy.site is not None and study.privacy.site.scores == "withheld"
        return Snapshot(
            consortium=about.consortium,
            folder=about.folder,
            others=about.others,
            study=study.name,
            digest=study.digest,
            run=self.folder.run_id,
            test_only=study.test_only,
            phase=phase,
            rounds=study.rounds,
            rounds_done=len(history),
            quorum=study.quorum,
            deadline_s=study.deadline_s,
            wait=wait,
            pace_s=pace_s,
            ends=self._ends(study, pace_s, len(history)) if phase == "running" else None,
            experts=names_of(study.model),
            sites=tuple(self._sites(state, history, wait, refused)),
            history=tuple(map(_round_row, history)),
            losses_withheld=study.privacy.site is not None,
            scores_withheld=withheld,
            privacy=tuple(spent(study, state, self.aside)),
            refused=tuple(refused[:MOST_REFUSED]),
            faults=(*self.faults, *stopped),
            references=references,
            references_differ=() if references is None else tuple(references.differing(study)),
        )

    def _sites(self, state: RunState | None, history: list[RoundRecord], wait: Wait | None, refused: list[Told]) -> list[SiteRow]:
        return site_rows(
            self.home.consortium.site_names,
            history,
            wait=wait,
            out=sitting_out(state),
            refused=[row.site for row in refused],
            now=self.now,
        )

    def _state(self, study: Study) -> RunState | None:
        found = self._try(lambda: newest_readable(self.folder.state, study))
        if found is None:
            return None
        self.faults += map(told, found[1])
        return found[0]

    def _ends(self, study: Study, pace_s: float | None, done: int) -> datetime | None:
        if pace_s is None or done >= study.rounds:
            return None
        last = datetime.fromtimestamp(_changed_ns(self.folder.state) / 1e9, UTC)
        return (last + timedelta(seconds=pace_s * (study.rounds - done))).replace(microsecond=0)


def _phase(folder: StudyFolder, state: RunState | None, wait: Wait | None, *, held: bool, stopped: bool) -> Phase:
    if held:
        return "waits for sites" if wait is not None and wait.kind == "connection" else "running"
    if state is not None and state.closed and folder.model.exists():
        return "complete"
    if stopped:
        return "stopped"
    return "submitted" if state is None and not wait_path(folder.study).exists() else "not running"


def _round_row(record: RoundRecord) -> RoundRow:
    return RoundRow(
        round=record["round"],
        sites=tuple(sorted(record["sites"])),
        dice=record["val_dice"],
        loss=record["loss"],
        bytes_up=record["bytes_up"],
        bytes_down=record["bytes_down"],
        seconds=sum(record["seconds"].values()),
        attempts=record.get("attempts", 1),
    )
