"""Which parts and settings of IC-MoE earn their place: each variant trained by the same federation; never looks at `test`.

`python simulations/ablation.py --data DIR` compares them on `val`; with `--unseen` each site is left out in turn, and the others'
model is scored on that site's patients, several times as many. Each variant is a change of the study's values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from icmoe.atomic import write_atomically
from icmoe.cache_entries import default_cache_folder
from icmoe.config import parse
from icmoe.device import available_device
from icmoe.errors import NOT_STARTED, Fault, IcmoeError, exit_on_fault
from icmoe.features import FeatureCache
from icmoe.prepare import encode_slices
from icmoe.profiles import merged
from icmoe.study import Study
from icmoe.usage import OneCommand
from simulations.evidence.bars import Patients, by_site, mean_of_sites
from simulations.evidence.patients import read_record
from simulations.federation import require_cluster, run_jobs, write_sites
from simulations.folder import ABLATION, RunFolder
from simulations.hospitals import Hospitals, find_hospitals, make_sites
from simulations.interruption import exit_on_interruption
from simulations.methods import DEFAULT_METHODS
from simulations.rehearsal import backbone_of, engine_of, report_sites
from simulations.scenario import Simulation, chosen, read_scenario
from simulations.screen import Screen
from simulations.trials import Trial, compared, left_out, score_trial, views_of

PARTS: dict[str, dict[str, Any]] = {
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
SETTINGS: dict[str, dict[str, Any]] = {
    "before the last stage": {"backbone": {"cut": "last-stage"}},
    "three experts": {"model": {"basic_experts": 1, "semantic_experts": 1, "adaptive_experts": 1, "top_k": 3}},
    "twelve experts": {"model": {"basic_experts": 4, "semantic_experts": 4, "adaptive_experts": 4, "top_k": 12}},
    "consensus 1": {"model": {"consensus": 1.0}},
    "consensus 4": {"model": {"consensus": 4.0}},
    "contrast 0.3": {"loss": {"contrast": 0.3}},
    "contrast 1": {"loss": {"contrast": 1.0}},
    "router anchor 0.1": {"loss": {"router_anchor": 0.1}},
    "proximal term 0.01": {"training": {"proximal_mu": 0.01}},
    "four views": {"training": {"views": ["identity", "flip", "dark", "bright"]}},
    "one view": {"training": {"views": ["identity"]}},
    "t 0": {"aggregation": {"usage_exponent": 0.0}},
    "t 2": {"aggregation": {"usage_exponent": 2.0}},
    "server Adam": {"aggregation": {"optimizer": "adam"}},
    "server Yogi": {"aggregation": {"optimizer": "yogi"}},
}
"""Values that were chosen, moved; asked for by name."""
VARIANTS = {**PARTS, **SETTINGS}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def variant(base: Study, name: str, seed: int) -> Study:
    """Return the study of a variant and seed."""
    values = merged(base.model_dump(mode="json"), VARIANTS[name])
    return parse(
        Study, {**values, "seed": seed, "name": "ablation-" + name.lower().replace(" ", "-").replace(".", "-")}, where=name
    )


@app.command(cls=OneCommand)
def ablate(
    data: Annotated[Path | None, typer.Option(help="Folder of hospitals; phantoms if absent.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("runs/ablation"),
    seeds: Annotated[int | None, typer.Option(min=1, max=20, help="Seeds 1..N; the scenario's if absent.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    only: Annotated[str | None, typer.Option(help="Comma-separated variants; the parts, each switched off, if absent.")] = None,
    unseen: Annotated[  # noqa: FBT002
        bool, typer.Option("--unseen", help="Leave each site out in turn and score the others' model on its patients.")
    ] = False,
    scenario: Annotated[Path | None, typer.Option(help="Scenario file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,  # noqa: FBT002
) -> None:
    """Train each variant across the same hospitals and print its Dice on patients that it did not see, never of `test`."""
    with exit_on_fault():
        names = list(PARTS) if only is None else chosen(only, VARIANTS, "--only")
        options = {"data": str(data) if data else None, "seeds": list(range(1, seeds + 1)) if seeds else None}
        given = {key: value for key, value in options.items() if value is not None}
        study, simulation = read_scenario(scenario, {} if rounds is None else {"rounds": rounds}, given)
        _require_default_methods(simulation)
        folder, on = RunFolder(out), "unseen" if unseen else "val"
        told, going_on = folder.new_though(resume=resume), exit_on_interruption("Continue with --resume.")
        with going_on, folder.claimed(resume=resume), Screen(Console()) as screen:
            if told:
                screen.say(escape(told))
            _require_no_other(folder, names, _settings(study, simulation, on))
            found = _run(names, study, simulation, folder, screen, unseen=unseen)
        _write(found, study, simulation, folder, on=on)


def _require_default_methods(simulation: Simulation) -> None:
    """Refuse a scenario's choice of methods, which would be passed over.

    Raises
    ------
    IcmoeError
        210 with the methods.
    """
    if simulation.methods != DEFAULT_METHODS:
        value, limit = ", ".join(simulation.methods), "no choice: each variant is trained as the study says"
        raise IcmoeError(Fault(number=210, where="simulation.methods", value=value, limit=limit, did=NOT_STARTED))


def _settings(study: Study, simulation: Simulation, on: str) -> dict[str, Any]:
    """Return what an ablation's scores hang on, beside its data and its variants."""
    whole = study.model_dump(mode="json")
    return {"rounds": study.rounds, "seeds": list(simulation.seeds), "scored_on": on, "study": whole}


def _require_no_other(folder: RunFolder, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuse to write over what was found with other settings, or for variants that are not asked for again.

    Raises
    ------
    IcmoeError
        502 with what differs, 217 where the file that is there is damaged.
    """
    if not (path := folder.root / ABLATION).exists():
        return
    kept = read_record(path, *settings, "dice")
    other = [key.replace("_", " ") for key, value in settings.items() if kept[key] != value]
    other += ["variants: " + ", ".join(left)] if (left := sorted(set(kept["dice"]) - set(names))) else []
    folder.require_none(other, did=NOT_STARTED, todo="Name all variants and the former settings, or choose another --out.")


def _run(
    names: Sequence[str], study: Study, simulation: Simulation, folder: RunFolder, screen: Screen, *, unseen: bool
) -> dict[str, list[Patients]]:
    """Return the scores of each variant, a seed after the other."""
    device = available_device(simulation.device)
    engine = engine_of(simulation, device)
    require_cluster(simulation.address)
    hospitals = find_hospitals(simulation, study, folder.phantoms)
    report_sites(hospitals, screen)
    trials = _trials(names, study, simulation, hospitals, unseen=unseen)
    _encode(trials, simulation, hospitals, screen)
    # Each variant's state knows its study, but not what it was trained on.
    folder.check_identity(
        {
            "data": hospitals.digest(),
            "masks": hospitals.masks_digest(),
            "device": simulation.device,
            "exact counts": str(simulation.exact_counts),
        }
    )
    cache = FeatureCache.of(default_cache_folder(), study)
    studies = tuple({trial.study.digest: trial.study for trial in trials}.values())
    sites = make_sites(hospitals, studies, cache=cache, state_folder=folder.work / "sites", simulation=simulation)[:-1]
    write_sites(folder.work / "sites.json", sites)
    jobs = [trial.job(hospitals, folder.work) for trial in trials]
    states = run_jobs(jobs, folder.work / "sites.json", engine, screen.on_event, on_scored=screen.on_scored)
    found: dict[tuple[str, int], Patients] = {}
    for trial, job in zip(trials, jobs, strict=True):
        seed = trial.study.seed
        found.setdefault((trial.name, seed), {}).update(score_trial(trial, states[job.method, seed], hospitals, device))
    return {name: [found[name, seed] for seed in simulation.seeds] for name in names}


def _trials(names: Sequence[str], study: Study, simulation: Simulation, hospitals: Hospitals, *, unseen: bool) -> list[Trial]:
    if not unseen and not any(hospitals.sites[name].of("val") for name in hospitals.training):
        what = "no image of the split is usable at a site that trains"
        raise IcmoeError(Fault(number=108, where="val", what=what, did="Nothing was trained."))
    left = left_out(hospitals) if unseen else ("",)
    return [
        Trial(name=name, study=variant(study, name, seed), left=site)
        for seed in simulation.seeds
        for name in names
        for site in left
    ]


def _encode(trials: Sequence[Trial], simulation: Simulation, hospitals: Hospitals, screen: Screen) -> None:
    """Fill the cache with what the variants are trained and scored on, each backbone being loaded once."""
    slices, told = [item for split in ("train", "val") for item in hospitals.slices(split)], partial(screen.progress, "encode")
    for choice, study in {trial.study.backbone: trial.study for trial in trials}.items():
        views = views_of([trial for trial in trials if trial.study.backbone == choice])
        backbone = backbone_of(study, simulation, available_device(simulation.device))
        cache = FeatureCache.of(default_cache_folder(), study)
        encode_slices(slices, study, backbone, cache, views=views, on_progress=told)


def _write(found: dict[str, list[Patients]], study: Study, simulation: Simulation, folder: RunFolder, *, on: str) -> None:
    record = {
        **_settings(study, simulation, on),
        "dice": {name: list(map(mean_of_sites, seeds)) for name, seeds in found.items()},
        "patients": {name: list(map(by_site, seeds)) for name, seeds in found.items()},
    }
    write_atomically(folder.root / ABLATION, (json.dumps(record, indent=1) + "\n").encode())
    patients = "patients of the site left out" if on == "unseen" else "validation patients"
    title = f"Dice of the {patients} after {study.rounds} rounds, mean of sites"
    Console().print(compared(found, {name: variant(study, name, simulation.seeds[0]) for name in found}, title))


if __name__ == "__main__":
    app()
