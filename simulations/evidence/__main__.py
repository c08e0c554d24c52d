"""`python -m simulations.evidence lgg|hippocampus|sunnybrook --data DIR --out DIR`: run, score, draw up the tables.

A stopped command goes on where it was when it is given again.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from icmoe.atomic import write_atomically
from icmoe.data.sources import read_sites
from icmoe.errors import Fault, IcmoeError, exit_on_fault
from icmoe.study import Study
from icmoe.usage import Commands
from simulations.evidence.dealing import FOLDER, hippocampus_splits, split_text
from simulations.evidence.patients import read_record, score_run
from simulations.evidence.plan import PLANS, SEEDS, Plan, Run
from simulations.evidence.sites import made_sites, other_cases
from simulations.evidence.tables import section, write_tables
from simulations.folder import RunFolder
from simulations.hospitals import digests_of, held_apart
from simulations.interruption import exit_on_interruption
from simulations.rehearsal import rehearse
from simulations.scenario import chosen, read_scenario
from simulations.screen import Screen

app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
DID = "No table was drawn."
TODO = "Give the --data, --seeds and --scenario that it was made with, or choose another --out."
Data = Annotated[Path, typer.Option(help="Folder of the data set.")]
Out = Annotated[Path, typer.Option(help="Folder of runs and tables; finished work in it is kept.")]
Seeds = Annotated[int, typer.Option(min=1, max=10, help="Number of seeds, 1..N.")]
Scenario = Annotated[Path | None, typer.Option(help="TOML file with changes to the recipe in \\[study].")]
Only = Annotated[str | None, typer.Option(help="Comma-separated names of runs, for example lgg-base.")]


@app.command()
def lgg(data: Data, out: Out, seeds: Seeds = SEEDS, only: Only = None, scenario: Scenario = None) -> None:
    """Four real hospitals, and each of the larger three left out once."""
    _table("lgg", data, out, seeds, only, scenario)


@app.command()
def hippocampus(data: Data, out: Out, seeds: Seeds = SEEDS, only: Only = None, scenario: Scenario = None) -> None:
    """Two classes, four made-up sites: by intensity, by volume, uneven, one site without one class."""
    _table("hippocampus", data, out, seeds, only, scenario)


@app.command()
def sunnybrook(data: Data, out: Out, seeds: Seeds = SEEDS, only: Only = None, scenario: Scenario = None) -> None:
    """Left ventricle from native DICOM: two sites of one patient each, no claims."""
    _table("sunnybrook", data, out, seeds, only, scenario)


@app.command()
def tables(out: Out) -> None:
    """Draw up the tables of all that is there."""
    with exit_on_fault():
        if not out.is_dir():
            what, did = "folder of runs is not there", "No table was written."
            raise IcmoeError(Fault(number=205, where=str(out), what=what, did=did, todo="Correct --out."))
        print(write_tables(out))


@app.command()
def splits(data: Data) -> None:
    """Make the split files of the hippocampus volumes again."""
    with exit_on_fault():
        if not (index := data / "index.csv").is_file():
            raise IcmoeError(Fault(number=205, where=str(index), did="No split was written."))
        try:
            with index.open(newline="", encoding="utf-8-sig") as file:
                if not (rows := list(csv.DictReader(file))):
                    raise ValueError("it names no case")
            texts = {name: split_text(rows, dealt) for name, dealt in hippocampus_splits(rows).items()}
        except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
            limit = "UTF-8 with the columns name, split, family, vmax, anterior_vox and posterior_vox, each case a row"
            value = f"{type(error).__name__}: {error}".splitlines()[0]
            did, todo = "No split was written.", "Name the folder of the hippocampus data set as --data."
            raise IcmoeError(Fault(number=110, where=str(index), value=value, limit=limit, did=did, todo=todo)) from None
        for name, text in texts.items():
            write_atomically(FOLDER / f"hippocampus-{name}.csv", text.encode())


def _table(name: str, data: Path, out: Path, seeds: int, only: str | None, scenario: Path | None) -> None:
    plan = PLANS[name]
    with exit_on_fault(), exit_on_interruption("Give the same command again to go on."):
        names = chosen(only, [run.name for run in plan.runs], "--only")
        for run in (run for run in plan.runs if run.name in names):
            _rehearse(plan, run, data, out, seeds, scenario)
            score_run(RunFolder(out / run.name), personal="local" in run.methods, data=None if run.split else data)
        write_tables(out)
        for line in section(plan, out):
            print(line)


def _rehearse(plan: Plan, run: Run, data: Path, out: Path, seeds: int, scenario: Path | None) -> None:
    folder = RunFolder(out / run.name)
    finished = folder.results.exists()
    root = data
    if run.split and not finished:
        root = made_sites(data, run.split, plan.labels, out / "data" / run.name)
    options = {
        "data": str(root),
        "methods": list(run.methods),
        "seeds": list(range(1, seeds + 1)),
        "held_out": [run.held_out] if run.held_out else [],
    }
    study, simulation = read_scenario(scenario, {"labels": [label.model_dump(mode="json") for label in plan.labels]}, options)
    if finished:
        _require_asked_for(folder, run, study if scenario else None, options["seeds"])
        _require_same_data(folder, run, study, data, out / "data" / run.name)
        return
    with folder.claimed(resume=True), Screen(Console(stderr=True)) as screen:
        rehearse(study, simulation, folder, screen)


def _require_asked_for(folder: RunFolder, run: Run, study: Study | None, seeds: object) -> None:
    """Refuse a finished run of other seeds or methods, of phantoms, or of another recipe than the scenario's.

    Its table would answer something else.

    Raises
    ------
    IcmoeError
        502 with what differs, 217 where its results are damaged.
    """
    results = read_record(folder.results, "seeds", "study_digest", "methods", "phantoms")
    other = ["seeds"] if results["seeds"] != seeds else []
    other += ["study"] if study is not None and results["study_digest"] != study.digest else []
    other += ["methods"] if set(run.methods) - set(results["methods"]) else []
    other += ["data: phantoms"] if results["phantoms"] else []
    folder.require_none(other, did=DID, todo=TODO)


def _require_same_data(folder: RunFolder, run: Run, study: Study, data: Path, place: Path) -> None:
    """Refuse a finished run of other pictures or masks than those of `data`; `place` holds the copies of a split file's cases.

    Raises
    ------
    IcmoeError
        502, 217 where its results are damaged; 1xx where the data cannot be read.
    """
    results = read_record(folder.results, "data_digest")
    if run.split:
        same = not other_cases(data, run.split, place)
    else:
        held_out = [run.held_out] if run.held_out else []
        pictures, masks = digests_of(held_apart(read_sites(data, study.labels), held_out))
        same = (results["data_digest"], results.get("masks_digest", masks)) == (pictures, masks)
    folder.require_none([] if same else ["data"], did=DID, todo=TODO)


if __name__ == "__main__":
    app()
