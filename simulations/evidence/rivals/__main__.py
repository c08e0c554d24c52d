"""`python -m simulations.evidence.rivals --data DIR`: train what people would pick instead and draw up the table."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from icmoe.errors import NOT_STARTED, Fault, IcmoeError, exit_on_fault
from icmoe.usage import OneCommand
from simulations.evidence.rivals.bench import run_all
from simulations.evidence.rivals.catalogue import METHODS
from simulations.evidence.rivals.pareto import write_pareto
from simulations.evidence.rivals.regimes import REGIMES
from simulations.evidence.rivals.run import Job
from simulations.evidence.rivals.table import read_rows, write_table
from simulations.folder import RunFolder
from simulations.scenario import Simulation, chosen

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=OneCommand)
def rivals(
    data: Annotated[Path, typer.Option(help="Folder of hospitals.")],
    out: Annotated[Path, typer.Option(help="Folder of states, results, table and plot; finished rounds in it are kept.")],
    methods: Annotated[str | None, typer.Option(help=f"Comma-separated: {', '.join(METHODS)}.")] = None,
    regimes: Annotated[str | None, typer.Option(help=f"Comma-separated: {', '.join(REGIMES)}.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "1",
    rounds: Annotated[int | None, typer.Option(min=1, help="Fewer rounds than the study's; a table of their own.")] = None,
    hours: Annotated[float, typer.Option(min=0.0, help="No round is begun after this time; start again to go on.")] = 6.0,
    scenario: Annotated[Path | None, typer.Option(help="Scenario file.")] = None,
    ours: Annotated[Path | None, typer.Option(help="results.json of run_sim.py, for IC-MoE's own rows.")] = None,
) -> None:
    """Train the chosen rivals from where they stopped, cheapest first, then write table and plot of all that is there."""
    with exit_on_fault():
        if math.isnan(hours):  # neither below the least nor above it
            raise IcmoeError(Fault(number=202, where="--hours", value="nan", limit="0 and more", did=NOT_STARTED))
        names = chosen(methods, METHODS, "--methods")
        ways = chosen(regimes, REGIMES, "--regimes")
        jobs = [
            Job(method=name, regime=way, seed=seed, rounds=rounds)
            for seed in _numbers(seeds)
            for name in names
            for way in METHODS[name].regimes
            if way in ways
        ]
        with RunFolder(out).claimed(resume=True):
            if hours > 0.0:
                run_all(jobs, data, out, scenario, time.monotonic() + 3600 * hours)
            rows = read_rows(out, ours)
            write_table(out, rows)
            write_pareto(out, rows)
            print(f"{out / 'rivals.md'} and {out / 'pareto.svg'} show what is there.")


def _numbers(text: str) -> list[int]:
    try:
        return list(Simulation(seeds=tuple(int(part) for part in text.split(","))).seeds)
    except ValueError:
        limit = "whole numbers of 0 to 2^31 - 1, comma-separated, each once"
        raise IcmoeError(Fault(number=210, where="--seeds", value=text[:80], limit=limit)) from None


if __name__ == "__main__":
    app()
