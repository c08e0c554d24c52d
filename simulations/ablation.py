"""Which parts of IC-MoE earn their place: each variant trained by the same federation, compared on `val`.

`python simulations/ablation.py --data DIR`; never looks at `test`. Each variant is a change of the study's values.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icmoe.atomic import write_atomically
from icmoe.cache_entries import default_cache_folder
from icmoe.config import parse
from icmoe.device import available_device
from icmoe.errors import Fault, IcmoeError, exit_on_fault
from icmoe.exchange import global_state
from icmoe.features import FeatureCache
from icmoe.model import build_model
from icmoe.prepare import encode_slices
from icmoe.profiles import merged
from icmoe.study import Study
from icmoe.usage import OneCommand
from simulations.federation import Job, require_cluster, run_jobs, write_sites
from simulations.folder import RunFolder
from simulations.hospitals import find_hospitals, make_sites
from simulations.interruption import exit_on_interruption
from simulations.rehearsal import backbone_of, engine_of, report_sites
from simulations.scenario import Simulation, chosen, read_scenario
from simulations.screen import Screen

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no basic experts": {"model": {"basic_experts": 0}},
    "no semantic experts": {"model": {"semantic_experts": 0}},
    "no adaptive experts": {"model": {"adaptive_experts": 0}},
    "mask head alone": {"model": {"basic_experts": 0, "semantic_experts": 0, "adaptive_experts": 0}},
    "no consensus voting": {"model": {"voting": False}},
    "no vote loss": {"loss": {"vote": 0.0}},
    "no label consistency": {"loss": {"label_consistency": 0.0}},
    "no load balance": {"loss": {"load_balance": 0.0}, "aggregation": {"balance_step": 0.0}},
    "no contrast": {"loss": {"contrast": 0.0}},
    "no block features": {"backbone": {"block_features": False}},
    "two experts fused": {"model": {"top_k": 2}},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def variant(base: Study, name: str, seed: int) -> Study:
    """Return the study of a variant and seed."""
    values = merged(base.model_dump(mode="json"), VARIANTS[name])
    return parse(Study, {**values, "seed": seed, "name": "ablation-" + name.replace(" ", "-")}, where=name)


@app.command(cls=OneCommand)
def ablate(
    data: Annotated[Path | None, typer.Option(help="Folder of hospitals; phantoms if absent.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("runs/ablation"),
    seeds: Annotated[int | None, typer.Option(min=1, max=20, help="Seeds 1..N; the scenario's if absent.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    only: Annotated[str | None, typer.Option(help="Comma-separated variants; all if absent.")] = None,
    scenario: Annotated[Path | None, typer.Option(help="Scenario file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,  # noqa: FBT002
) -> None:
    """Train each variant across the same hospitals and print its validation Dice."""
    with exit_on_fault():
        names = chosen(only, VARIANTS, "--only")
        options = {"data": str(data) if data else None, "seeds": list(range(1, seeds + 1)) if seeds else None}
        given = {key: value for key, value in options.items() if value is not None}
        study, simulation = read_scenario(scenario, {} if rounds is None else {"rounds": rounds}, given)
        folder = RunFolder(out)
        told, going_on = folder.new_though(resume=resume), exit_on_interruption("Continue with --resume.")
        with going_on, folder.claimed(resume=resume), Screen(Console()) as screen:
            if told:
                screen.say(escape(told))
            engine = engine_of(simulation, available_device(simulation.device))
            require_cluster(simulation.address)
            hospitals = find_hospitals(simulation, study, folder.phantoms)
            report_sites(hospitals, screen)
            if not any(hospitals.sites[name].of("val") for name in hospitals.training):
                what = "no image of the split is usable at a site that trains"
                raise IcmoeError(Fault(number=108, where="val", what=what, did="Nothing was trained."))
            jobs = [
                Job(
                    method=name,
                    study=(own := variant(study, name, seed)),
                    names=hospitals.training,
                    state_path=folder.work / f"{own.name}-seed{seed}.safetensors",
                )
                for seed in simulation.seeds
                for name in names
            ]
            slices = [item for split in ("train", "val") for item in hospitals.slices(split)]
            for own in {job.study.backbone: job.study for job in jobs}.values():
                _encode(own, slices, simulation, screen)
            # Each variant's state knows its study, but not what it was trained on.
            folder.check_identity({"data": hospitals.digest(), "masks": hospitals.masks_digest()})
            cache = FeatureCache.of(default_cache_folder(), study)
            state_folder = folder.work / "sites"
            studies = tuple(job.study for job in jobs)
            sites = make_sites(hospitals, studies, cache=cache, state_folder=state_folder, simulation=simulation)[:-1]
            write_sites(folder.work / "sites.json", sites)
            states = run_jobs(jobs, folder.work / "sites.json", engine, screen.on_event, on_scored=screen.on_scored)
        rows = {name: [float(states[name, seed].history[-1]["val_dice"]) for seed in simulation.seeds] for name in names}
        whole = study.model_dump(mode="json")
        record = {"rounds": study.rounds, "seeds": list(simulation.seeds), "val_dice": rows, "study": whole}
        write_atomically(folder.root / "ablation.json", (json.dumps(record, indent=1) + "\n").encode())
        Console().print(_table(rows, study))


def _encode(study: Study, slices: list[Any], simulation: Simulation, screen: Screen) -> None:
    backbone = backbone_of(study, simulation, available_device(simulation.device))
    cache = FeatureCache.of(default_cache_folder(), study)
    encode_slices(slices, study, backbone, cache, on_progress=lambda done, total: screen.progress("encode", done, total))


def _table(rows: dict[str, list[float]], study: Study) -> Table:
    table = Table(title=f"Validation Dice per patient after {study.rounds} rounds", title_justify="left")
    for column in ("variant", "Dice", "spread", "against full", "parameters"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    base = fmean(rows["full"]) if "full" in rows else None
    for name, values in rows.items():
        spread = f"{stdev(values):.3f}" if len(values) > 1 else "-"
        against = "-" if base is None or name == "full" else f"{fmean(values) - base:+.3f}"
        size = sum(tensor.numel() for tensor in global_state(build_model(variant(study, name, 1), seed=0)).values())
        table.add_row(name, f"{fmean(values):.3f}", spread, against, f"{size:,}")
    return table


if __name__ == "__main__":
    app()
