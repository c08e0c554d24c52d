"""`python -m simulations.benchmarks`: where time, memory and bytes go, each figure beside the limit it is compared with.

Every part runs in a process of its own, one after the other, and takes turns with what it is compared with: the ratios
count, not the seconds. Nothing here is a test of how fast the machine is; run it where nothing else runs.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from icmoe.errors import exit_on_fault
from icmoe.usage import OneCommand
from simulations.benchmarks.row import Row, show
from simulations.scenario import chosen

PARTS = {
    "aggregation": "aggregation",
    "training-step": "training_step",
    "bytes": "bytes_up",
    "step-bound": "step_bound",
    "private-step": "private_step",
    "rounds-needed": "rounds_needed",
    "round": "federated_round",
    "ingest": "ingest",
    "encoding": "encoding",
    "loading": "loading",
    "site-memory": "site_memory",
    "simulation": "simulation",
}
"""Modules of this package with a function `rows(quick=...)`, by the names for --only, in the order of their running."""
DEADLINE_S = 5400.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=OneCommand)
def main(
    only: Annotated[str | None, typer.Option(help=f"Comma-separated parts of {', '.join(PARTS)}.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few turns: shows that it runs, not how fast.")] = False,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure and print a table of ratios, each with its bar."""
    with exit_on_fault():
        if part is not None:
            show(importlib.import_module(f"simulations.benchmarks.{PARTS[part]}").rows(quick=quick), as_json=True)
            return
        rows = measured(chosen(only, list(PARTS), "--only"), quick=quick)
    show(rows, as_json=as_json)
    raise typer.Exit(0 if all(row.met for row in rows) or quick else 1)


def measured(names: list[str], *, quick: bool) -> list[Row]:
    """Run parts one after the other and return their rows; how long each took goes to stderr."""
    rows: list[Row] = []
    console = Console(stderr=True)
    console.print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} before the first part")
    for name in names:
        began = time.perf_counter()
        with console.status(name):
            found = _in_a_process(name, quick=quick)
        rows += found
        console.print(f"{name}: {sum(row.met for row in found)} of {len(found)} bars met, {time.perf_counter() - began:.0f} s")
    return rows


def _in_a_process(name: str, *, quick: bool) -> list[Row]:
    command = [sys.executable, "-m", "simulations.benchmarks", "--part", name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=DEADLINE_S)
    if done.returncode:  # it said why
        raise typer.Exit(done.returncode)
    records = json.loads(done.stdout)
    return [Row(**{key: value for key, value in record.items() if key not in {"ratio", "met"}}) for record in records]


if __name__ == "__main__":
    app()
