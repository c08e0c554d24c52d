"""The output folder of a rehearsal: one run at a time, committed work apart from results, results all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icmoe.atomic import read_regular, regular, write_atomically
from icmoe.compare import read_results
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.locks import hold
from simulations.hospitals import find_hospitals

if TYPE_CHECKING:
    from icmoe.study import Study
    from simulations.scenario import Simulation

RESULTS = "results.json"
ABLATION = "ablation.json"
REPORT = "report.html"
FIGURE = "figure.png"
DECIDING = ("methods", "seeds", "sites", "alpha", "held_out", "exact_counts", "phantom_seed")
"""Settings of a simulation on which its results depend, beside study and data."""


class RunFolder:
    """Where a rehearsal writes.

    Parameters
    ----------
    root
        The folder given by --out.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / ".work"
        self.phantoms = root / "phantoms"
        self.results = root / RESULTS

    def model(self, method: str, seed: int, site: str = "") -> Path:
        """Return where a final model goes."""
        name = f"{method}-{site}-seed{seed}" if site else f"{method}-seed{seed}"
        return self.root / "models" / f"{name}.safetensors"

    def new_though(self, *, resume: bool) -> str:
        """Return what to say where a run shall be continued and there is none: another --out may be meant."""
        kept = self._holds_results() or (self.work.is_dir() and any(path.name != "lock" for path in self.work.iterdir()))
        return f"{self.root} holds no run to continue: a new one begins." if resume and not kept else ""

    @contextmanager
    def claimed(self, *, resume: bool) -> Iterator[None]:
        """Hold the folder for this process; a start that is refused before anything is committed leaves no trace.

        Parameters
        ----------
        resume
            Whether committed work of the same run may be there.

        Yields
        ------
        None

        Raises
        ------
        IcmoeError
            502 where another process holds it, or where it holds a run and `resume` is off.
        """
        if not resume and (self._holds_results() or self.work.exists()):
            raise IcmoeError(Fault(number=502, where=str(self.root), what="folder holds a run already", did=NOT_STARTED))
        had_phantoms = self.phantoms.exists()
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = os.fdopen(regular(self.work / "lock", os.O_WRONLY | os.O_CREAT), "w")
        except OSError as error:
            fault = Fault(number=205, where=str(self.root), what="output folder cannot be written", value=error.strerror or "")
            raise IcmoeError(fault) from None
        with lock:
            try:
                hold(lock, name=self.work, deadline_s=0.0)
            except OSError:
                raise IcmoeError(Fault(number=502, where=str(self.root), what="another process writes here")) from None
            try:
                yield
            except (IcmoeError, OSError):
                self._leave_as_found(had_phantoms=had_phantoms)
                raise

    def _holds_results(self) -> bool:
        """Return whether a rehearsal or an ablation ended here: its .work may have been deleted since."""
        return any((self.root / name).exists() for name in (RESULTS, ABLATION))

    def finished(self, study: Study, simulation: Simulation) -> dict[str, Any]:
        """Return the results of a run that was completed.

        Raises
        ------
        IcmoeError
            205 or 217 where they cannot be read, 502 where they are of another study, other methods, seeds, sites or data;
            as `find_hospitals` for the data.
        """
        self._require_whole()
        results: dict[str, Any] = json.loads(read_regular(self.results))
        settings, kept = simulation.model_dump(mode="json"), results["configuration"].get("simulation", {})
        other = ["study"] if results["study_digest"] != study.digest else []
        other += [name for name in DECIDING if kept.get(name) != settings[name]]
        if not other and not self._is_of(results, simulation, study):
            other = ["data"]
        self.require_none(other, did=NOT_STARTED)
        return results

    def _require_whole(self) -> None:
        """Refuse results that cannot be read; finished rounds outlast them."""
        try:
            read_results(self.results, did=NOT_STARTED)
        except IcmoeError as error:
            todo = "Remove it: --resume makes it again, from the finished rounds as long as .work is there."
            raise IcmoeError(*(replace(one, todo=todo) if one.number == 217 else one for one in error.faults)) from None

    def require_none(self, other: Sequence[str], *, did: str, todo: str = "") -> None:
        """Refuse the results where anything about them is other than what was asked for.

        Raises
        ------
        IcmoeError
            502 with what differs.
        """
        if other:
            what, value = "folder holds the results of another run", f"other {', '.join(other)}"
            raise IcmoeError(Fault(number=502, where=str(self.root), what=what, value=value, did=did, todo=todo))

    def _is_of(self, results: Mapping[str, Any], simulation: Simulation, study: Study) -> bool:
        """Return whether the simulation has the data of the results, which may lie elsewhere by now."""
        if results["phantoms"] or simulation.data is None:  # phantoms are what their seed makes
            return bool(results["phantoms"]) == (simulation.data is None)
        found = find_hospitals(simulation, study, self.phantoms)
        masks = found.masks_digest()
        return found.digest() == str(results["data_digest"]) and results.get("masks_digest", masks) == masks

    def _leave_as_found(self, *, had_phantoms: bool) -> None:
        """Remove what a refused start made: the corrected command needs no other --out and no --resume."""
        if any(path.name != "lock" for path in self.work.iterdir()):
            return  # something is committed
        shutil.rmtree(self.work)
        if not had_phantoms:  # written for settings that were refused
            shutil.rmtree(self.phantoms, ignore_errors=True)
        with suppress(OSError):  # it held something else
            self.root.rmdir()

    def check_identity(self, identity: Mapping[str, str]) -> None:
        """Write what the run is, or compare with what was written by the run that is continued.

        Raises
        ------
        IcmoeError
            502 where study, data, masks or backbone differ, naming which, or where what was written is damaged.
        """
        path = self.work / "run.json"
        if not path.exists():
            write_atomically(path, json.dumps(dict(identity), sort_keys=True).encode())
            return
        try:
            before = dict(json.loads(read_regular(path)))
        except (ValueError, TypeError):
            what, todo = "what the run was begun with cannot be read", "Choose another --out."
            raise IcmoeError(Fault(number=502, where=str(path), what=what, did=NOT_STARTED, todo=todo)) from None
        changed = sorted(key for key in before if identity.get(key) != before[key])  # a former version wrote fewer keys
        if changed:
            what, value = "the committed run differs", ", ".join(changed)
            raise IcmoeError(Fault(number=502, where=str(self.root), what=what, value=value, did=NOT_STARTED))

    def publish(self, staged: Path) -> None:
        """Move what is complete in `staged` into the folder, results.json last: where it is, everything is."""
        files = sorted((path for path in staged.rglob("*") if path.is_file()), key=lambda path: (path.name == RESULTS, path))
        for path in files:
            target = self.root / path.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        shutil.rmtree(staged)
