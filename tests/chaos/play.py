"""One study from its first round to its model, with what happens to it, and what was seen of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from consortium import ROOT
from safetensors.numpy import load_file

from fl_server.run_state import RunState

from . import clocks, events
from .events import LIAR, MALICIOUS, Event, Plan
from .machines import Service
from .scene import NAMES, Scene, study_of
from .watch import Watch

Row = dict[str, Any]
Say = Callable[[str], None]
TAMPERING = Path(__file__).with_name("tampering")
LOOK_S = 0.1
STUDY_S = 1800.0
# Quorum and deadline. With all hospitals in each round, the bits are those of the calm run whatever is killed.
QUORUM = {events.COORDINATOR: (3, 240.0), events.BOTH: (3, 75.0)}
OTHERS = (2, 75.0)
DEADLINE_ROUNDS = 2.5  # on a machine so busy that a calm round takes longer, the deadline is this many calm rounds


class Player:
    """Plays studies of one seed on one consortium and compares each with the calm one.

    Parameters
    ----------
    scene
        The consortium.
    seed
        Of the studies' training.
    say
        Takes a line for people.
    rounds
        Of each study.
    """

    def __init__(self, scene: Scene, seed: int, say: Say, rounds: int) -> None:
        self.scene, self.seed, self.say, self.rounds = scene, seed, say, rounds
        self.round_s = 10.0

    def add(self, name: str, family: str) -> None:
        quorum, deadline_s = QUORUM.get(family, OTHERS)
        deadline_s = max(deadline_s, round(DEADLINE_ROUNDS * self.round_s))
        self.scene.add_study(study_of(name, self.seed, quorum=quorum, deadline_s=deadline_s, rounds=self.rounds))

    def play(self, plan: Plan) -> Row:
        """Return what became of a study."""
        self.add(plan.name, plan.family)
        with ExitStack() as stack:
            self._prepare(plan, stack)
            began = time.monotonic()
            run, watch = self.scene.start_run(plan.name), Watch(self.scene, plan.name)
            rows: list[Row] = []
            try:
                rows = self._happen(plan, run, watch)
                self._wait(run, watch, lambda: not run.wanted, began + STUDY_S)
            finally:
                self.scene.services.stop("run")
            row = {"study": plan.index, "family": plan.family, "seed": self.seed, "rounds": self.rounds, "events": rows}
            return {**row, "seconds": time.monotonic() - began, "repeated": watch.repeated, **self._seen(plan, run)}

    def calm(self, name: str, schedule: dict[str, str]) -> tuple[dict[str, np.ndarray], Row]:
        """Return weights and numbers of the study to which nothing happens, or whose liar stays away in some rounds."""
        self.add(name, events.COORDINATOR if not schedule else MALICIOUS)
        with ExitStack() as stack:
            if schedule:
                self._lie(schedule, stack)
            began = time.monotonic()
            run, watch = self.scene.start_run(name), Watch(self.scene, name)
            self._wait(run, watch, lambda: not run.wanted, began + STUDY_S)
            self.scene.services.stop("run")
        seen = self._seen(Plan(-1, name, ()), run, name)
        seconds = time.monotonic() - began
        if not seen["finished"]:
            raise RuntimeError(f"{name} did not finish: {seen['why']}")
        return load_file(self.scene.folder(name).model), {"family": name, "seconds": seconds, "repeated": watch.repeated, **seen}

    def _prepare(self, plan: Plan, stack: ExitStack) -> None:
        if plan.family == MALICIOUS:
            self._lie({str(event.after_round + 1): event.kind for event in plan.events}, stack)
        for site in sorted({event.site for event in plan.events if event.kind == events.CLOCK and not clocks.why_not()}):
            self.scene.restart_site(site, **clocks.settings(self.scene.clock(site)))
            stack.callback(self.scene.restart_site, site)

    def _lie(self, schedule: dict[str, str], stack: ExitStack) -> None:
        """Start the last hospital as a liar, and as itself again afterwards."""
        path = self.scene.root / "schedule.json"
        path.write_text(json.dumps(schedule))
        path.with_suffix(".npz").unlink(missing_ok=True)
        folders = os.pathsep.join([str(TAMPERING), str(ROOT), str(ROOT / "tests")])
        self.scene.restart_site(LIAR, PYTHONPATH=folders, ICMOE_CHAOS_POISON=str(path))
        stack.callback(self.scene.restart_site, LIAR)

    def _happen(self, plan: Plan, run: Service, watch: Watch) -> list[Row]:
        ends, rows = time.monotonic() + STUDY_S, []
        for event in plan.events if plan.family != MALICIOUS else ():
            if why := events.why_not(self.scene, event.kind):
                self.say(f"{event.kind}: not possible here: {why}")
                rows.append({"kind": event.kind, "not_possible": why})
                continue
            self._wait(run, watch, lambda event=event: watch.round >= event.after_round, ends)
            at = watch.committed_s + event.share * self.round_s
            self._wait(run, watch, lambda at=at: time.monotonic() >= at, ends)
            if not run.wanted or watch.closed or time.monotonic() > ends:
                break
            rows.append(self._one(event, run, watch, ends))
        if plan.family == MALICIOUS:
            rows = [{"kind": event.kind, "site": LIAR, "after_round": event.after_round} for event in plan.events]
        return rows

    def _one(self, event: Event, run: Service, watch: Watch, ends: float) -> Row:
        round_, repeated, struck = watch.round, watch.repeated, time.monotonic()
        self.say(f"  round {round_} is committed; {event.kind} {event.site}")
        row = {"kind": event.kind, "site": event.site, "after_round": round_}
        try:
            heal = events.strike(self.scene, event)
        except TimeoutError as error:  # the process to be killed is not there, which it should be
            self.say(f"  {error}")
            return {**row, "fault": str(error)}
        struck = time.monotonic() if heal is None else struck
        try:
            if heal is not None:
                self._wait(run, watch, lambda: time.monotonic() >= struck + event.hold_s, ends)
        finally:
            if heal is not None:
                heal()
                row["held_s"] = time.monotonic() - struck
        self._wait(run, watch, lambda: watch.closed or watch.round > round_, ends)
        if watch.closed or watch.round > round_:
            row["recovered_s"] = watch.committed_s - struck
            self.say(f"  round {watch.round} is committed, {row['recovered_s']:.0f} s after it")
        return {**row, "repeated": watch.repeated - repeated}

    def _wait(self, run: Service, watch: Watch, true: Callable[[], bool], ends: float) -> None:
        """Look at the study until it is as wanted, has ended or took too long."""
        while not true() and run.wanted and time.monotonic() < ends:
            watch.look()
            time.sleep(LOOK_S)
        watch.look()

    def _seen(self, plan: Plan, run: Service, name: str = "") -> Row:
        name = name or plan.name
        state = self.scene.progress(name)
        finished = bool(run.ends) and run.ends[-1] == 0 and self.scene.folder(name).model.exists()
        row: Row = {"finished": finished, "starts": len(run.ends), "why": ""}
        if not finished or state is None:
            return {**row, "why": self.scene.said(f"run-{name}")[-600:]}
        return {**row, **what_became(state, self.scene.studies[name].quorum), **refusals(plan, state)}


def what_became(state: RunState, quorum: int) -> Row:
    """Return what a finished study's state says: quorum, finite weights, Dice, rounds that each hospital missed."""
    finite = all(bool(np.isfinite(tensor).all()) for tensor in state.arrays.values())
    missed = {site: sum(site not in record["sites"] for record in state.history) for site in NAMES}
    held = all(len(record["sites"]) >= quorum for record in state.history)
    return {"finite": finite, "quorum": held, "dice": state.history[-1]["val_dice"], "missed": missed}


def refusals(plan: Plan, state: RunState) -> Row:
    """Return by which number each poison was refused, 0 where it was used."""
    if plan.family != MALICIOUS:
        return {}
    found = {}
    for event in plan.events:
        record = state.history[event.after_round]
        numbers = [fault["number"] for fault in record["faults"] if fault["where"] == LIAR]
        found[event.kind] = numbers[0] if numbers and LIAR not in record["sites"] else 0
    return {"refused": found}


def identical(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)
