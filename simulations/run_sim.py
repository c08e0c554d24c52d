"""Rehearse a federated study with virtual hospitals on this machine: `python simulations/run_sim.py --help`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from icmoe.backbones import BACKBONES, choices
from icmoe.errors import NOT_STARTED, Fault, IcmoeError, exit_on_fault
from icmoe.platform import require_supported_platform
from icmoe.usage import OneCommand
from simulations.interruption import exit_on_interruption

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

Option = typer.Option


@app.command(cls=OneCommand)
def rehearse_command(
    data: Annotated[
        Path | None,
        Option(
            help="Folder of real hospitals: DIR/<site>/{images,masks} and DIR/splits/{train,val,test}.csv. Phantoms if absent."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        Option(help="Comma-separated: router-aware, fedavg, fedprox, fedadam, fedyogi, personal, personalised, local, pooled."),
    ] = None,
    rounds: Annotated[int | None, Option(help="Rounds of the federation.")] = None,
    local_epochs: Annotated[int | None, Option(help="Passes over a site's images per round.")] = None,
    sites: Annotated[
        int | None, Option(help="Number of virtual sites: hospitals are repeated, or dealt anew with --alpha.")
    ] = None,
    alpha: Annotated[
        float | None, Option(help="Deal patients to the virtual sites by Dirichlet(alpha); small is uneven.")
    ] = None,
    backbone: Annotated[str | None, Option(help=f"{choices(seeded=True)}.")] = None,
    checkpoint: Annotated[Path | None, Option(help="Weights file of a backbone that brings none.")] = None,
    image_size: Annotated[int | None, Option(help="Side of the encoder's input, pixels, a multiple of 32.")] = None,
    t: Annotated[
        float | None, Option(help="Exponent of the usage weights; 0 leaves usage out. FedAvg is --methods fedavg.")
    ] = None,
    seed: Annotated[int | None, Option(help="One seed.")] = None,
    seeds: Annotated[int | None, Option(help="Number of seeds 1..N, for mean and spread.")] = None,
    device: Annotated[str | None, Option(help="cpu, cuda or cuda:N.")] = None,
    out: Annotated[Path | None, Option(help="Folder for results.json, report.html and models. Default: runs/<name>.")] = None,
    resume: Annotated[bool, Option("--resume", help="Continue a stopped run in --out.")] = False,
    as_json: Annotated[
        bool, Option("--json", help="Print results.json on standard output, everything else on standard error.")
    ] = False,
    scenario: Annotated[Path | None, Option(help="TOML file with \\[study] and \\[simulation]; options go on top.")] = None,
    address: Annotated[str | None, Option(help="Existing Ray cluster: auto or HOST:PORT.")] = None,
    track: Annotated[str | None, Option(help="tensorboard or mlflow: also write its runs to --out; extra \\[track].")] = None,
) -> None:
    """Train one IC-MoE across virtual hospitals and compare it with FedAvg, each hospital alone, and pooled data."""
    study_options = _given(
        {
            "rounds": rounds,
            "training": _given({"local_epochs": local_epochs}),
            "backbone": _given({"name": backbone, "image_size": image_size}),
            "aggregation": _given({"usage_exponent": t}),
            "test_only": True if backbone in BACKBONES and BACKBONES[backbone].seeded else None,
        }
    )
    with exit_on_fault():
        require_supported_platform()
        simulation_options = _given(
            {
                "data": str(data) if data else None,
                "methods": [name.strip() for name in methods.split(",")] if methods is not None else None,
                "seeds": _seeds(seed, seeds),
                "sites": sites,
                "alpha": alpha,
                "device": device,
                "address": address,
                "checkpoint": str(checkpoint) if checkpoint else None,
            }
        )
        if track not in {None, "tensorboard", "mlflow"}:
            raise IcmoeError(Fault(number=210, where="--track", value=str(track), limit="tensorboard, mlflow", did=NOT_STARTED))
        with exit_on_interruption("Continue with --resume."):
            _run(scenario, study_options, simulation_options, out, resume=resume, as_json=as_json, track=track)


def _run(
    scenario: Path | None,
    study_options: dict[str, Any],
    simulation_options: dict[str, Any],
    out: Path | None,
    *,
    resume: bool,
    as_json: bool,
    track: str | None,
) -> None:
    # Imported late: --help answers at once, and a wrong setting is not paid for with seconds of Ray's and Flower's imports.
    from simulations.scenario import read_scenario

    study, simulation = read_scenario(scenario, study_options, simulation_options)
    from simulations.folder import RunFolder
    from simulations.rehearsal import rehearse
    from simulations.screen import Screen, comparison_lines, cross_table, final_table
    from simulations.tracking import tracking

    console = Console(stderr=as_json)
    name = Path(os.path.realpath(simulation.data)).name if simulation.data else "phantoms"
    folder = RunFolder(out or Path("runs") / f"{name}-{study.digest[:8]}")
    told = folder.new_though(resume=resume)
    with folder.claimed(resume=resume), tracking(track, folder.root) as heard, Screen(console, *heard) as screen:
        if told:
            screen.say(escape(told))
        if resume and folder.results.exists():
            results = folder.finished(study, simulation)
            screen.say(escape(f"{folder.root} is complete; nothing was left to do."))
        else:
            results = rehearse(study, simulation, folder, screen)
    if (everywhere := cross_table(results, console)) is not None:
        console.print(everywhere)
    console.print(final_table(results))
    for line in comparison_lines(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {folder.root / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        sys.stdout.write(folder.results.read_text())


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {key: value for key, value in options.items() if value is not None and value != {}}


def _seeds(seed: int | None, seeds: int | None) -> list[int] | None:
    if seed is not None and seeds is not None:
        raise IcmoeError(Fault(number=210, value="--seed and --seeds", limit="one of them", did=NOT_STARTED))
    if seeds is not None and not 1 <= seeds <= 100:
        raise IcmoeError(Fault(number=202, where="--seeds", value=str(seeds), limit="1 to 100", did=NOT_STARTED))
    return [seed] if seed is not None else list(range(1, seeds + 1)) if seeds else None


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
