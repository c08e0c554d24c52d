"""What the coordinator's commands do and print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fl_server import flower, submit
from fl_server.beside import lift
from fl_server.home import read_home
from fl_server.round_log import RoundRecord
from icmoe.bundle import installed_digest
from icmoe.errors import Fault, IcmoeError, print_faults

STOPPED = 3
"""Exit code of `fl_server run` where the run was stopped: a service must not go on with it at once, as after a failure."""


def run_study(root: Path, path: Path, *, resume: bool, as_json: bool) -> None:
    """Submit a study and follow it; the exit code is 0 only where it completed, `STOPPED` where a person stopped it."""
    home = read_home(root)
    study, folder = submit.start(home, path, resume=resume)
    say = Console(stderr=as_json, highlight=False, markup=False, soft_wrap=True).print
    if folder.is_complete:
        say(f"{study.name} is complete: {folder.model}")
        return
    say(f"study      {study.name} {study.digest}\npackage    {installed_digest()}")
    say(f"run        {folder.run_id}, deadline of each wait {study.deadline_s:.0f} s")

    def tell(record: RoundRecord) -> None:
        say(submit.sentence(record, study))
        if as_json:
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()

    try:
        submit.follow(home, study, folder, tell, say)
    except KeyboardInterrupt:
        say(f"The run goes on. See fl_server status {folder.run_id}, or fl_server stop {folder.run_id}.")
        sys.exit(130)
    except IcmoeError as error:
        if 509 not in {fault.number for fault in error.faults}:
            raise
        print_faults(error.faults)
        sys.exit(STOPPED)
    state = folder.progress()
    scored = [record for record in state.history if record["val_dice"] is not None] if state is not None else []
    for record in scored:
        say(submit.dice_sentence(record))
    say(f"model {folder.model}")


def show_runs(root: Path, *, run_id: str | None, newest: bool, as_json: bool) -> None:
    """Print all runs, one run, or the newest."""
    rows = submit.summary(read_home(root))
    if run_id is not None:
        rows = [row for row in rows if row["run"] == run_id]
        if not rows:
            raise IcmoeError(Fault(number=508, value=run_id))
    elif newest:
        rows = rows[:1]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    Console().print(_table(rows))


def lift_site(root: Path, site: str, run_id: str) -> None:
    """Let a site in again that sits out."""
    folder = submit.folders(read_home(root)).get(run_id)
    if folder is None:
        raise IcmoeError(Fault(number=508, value=run_id))
    done = lift(folder.study, site)
    Console().print(f"{site} is asked again from the next round on, after round {done}.", highlight=False)


def stop_run(root: Path, run_id: str) -> None:
    """Stop a run; what its rounds committed stays."""
    home = read_home(root)
    run = flower.run_of(home, run_id)
    if run.finished:
        raise IcmoeError(Fault(number=508, what="run has ended already", value=f"{run_id}, {run.status}"))
    flower.stop(home, run_id)
    Console().print(f"run {run_id} was stopped; its finished rounds are kept.", highlight=False)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(Column("run", no_wrap=True), "study", Column("status", overflow="fold"), "rounds", "Dice", "since")
    for row in rows:
        rounds = "" if row["rounds_done"] is None else f"{row['rounds_done']} of {row['rounds']}"
        dice = "" if row["val_dice"] is None else f"{row['val_dice']:.4f}"
        status = row["status"] + (f" ({row['details']})" if row["details"] else "")
        table.add_row(row["run"], row["study"] or "", Text(status), rounds, dice, row["since"])
    return table
