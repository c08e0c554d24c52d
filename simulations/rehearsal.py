"""A rehearsal from its scenario to its results: prepare, run, score, publish."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from fl_server.data_check import DataCheck
from fl_server.run_state import RunState
from icmoe.atomic import write_atomically
from icmoe.backbone import Backbone, chosen_backbone
from icmoe.cache_entries import default_cache_folder
from icmoe.data.splits import SPLITS
from icmoe.device import available_device
from icmoe.exchange import State
from icmoe.features import FeatureCache
from icmoe.modelfile import ModelHeader, write_model
from icmoe.prepare import encode_slices
from icmoe.study import Study
from simulations.alone import POOLED, of_site, part_of
from simulations.cards import write_cards
from simulations.commit import commit
from simulations.exhibits import overlays
from simulations.expert_use import expert_use
from simulations.federation import Engine, Job, require_cluster, run_jobs, write_sites
from simulations.folder import FIGURE, REPORT, RESULTS, RunFolder
from simulations.hospitals import Hospitals, find_hospitals, make_sites
from simulations.methods import AFTERWARDS, ALONE, study_for
from simulations.overlays import Overlay
from simulations.personalised import NAME as PERSONALISED
from simulations.personalised import NEEDS, personalised_record
from simulations.readme_figure import figure_from_results
from simulations.report import write_report
from simulations.results import results_record
from simulations.scenario import Simulation
from simulations.scoring import (
    Examiner,
    federated_test,
    local_test,
    pooled_test,
    require_unchanged,
    tensors,
)
from simulations.screen import MOST_ROWS, Screen, check_table

Record = dict[str, Any]


@dataclass(slots=True)
class Clock:
    """Seconds by phase.

    Parameters
    ----------
    screen
        Told of each phase.
    seconds
        Filled as phases end.
    """

    screen: Screen
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase.

        Yields
        ------
        None
        """
        began = time.perf_counter()
        with self.screen.step(name):
            yield
        self.seconds[name] = time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class CheckHeard:
    """Shows what the data check found and keeps it.

    Parameters
    ----------
    path
        Where it is kept.
    screen
        Where it is shown.
    """

    path: Path
    screen: Screen

    def __call__(self, check: DataCheck) -> None:
        """Show and keep the outcome."""
        write_atomically(self.path, check.data())
        self.screen.say(check_table(check.record()))
        for line in check.lines()[:MOST_ROWS]:
            self.screen.say(f"[yellow]{escape(line)}[/yellow]")


def rehearse(study: Study, simulation: Simulation, folder: RunFolder, screen: Screen) -> Record:
    """Run everything and return what was written to results.json.

    Parameters
    ----------
    study
        The router-aware study.
    simulation
        Data, methods, seeds, device.
    folder
        Claimed by this process.
    screen
        For people.

    Raises
    ------
    IcmoeError
        With its faults; no results are written then, and --resume continues.
    """
    clock, began, origin = Clock(screen), time.perf_counter(), commit()
    device = available_device(simulation.device)
    require_cluster(simulation.address)
    torch.set_num_threads(os.cpu_count() or 1)
    with clock.phase("read"):
        hospitals = find_hospitals(simulation, study, folder.phantoms, lambda done, total: screen.progress("read", done, total))
    report_sites(hospitals, screen)
    with clock.phase("encode"):
        backbone = backbone_of(study, simulation, device)
        before = backbone.weights_digest()
        cache = _encoded(hospitals, study, backbone, screen)
    jobs = make_jobs(study, simulation, hospitals, folder)
    folder.check_identity(identity_of(jobs, simulation, hospitals, backbone.digest))
    studies, path = tuple(job.study for job in jobs), folder.work / "sites.json"
    sites = make_sites(hospitals, studies, cache=cache, state_folder=folder.work / "sites", simulation=simulation)
    write_sites(path, sites)
    heard = CheckHeard(folder.work / "data_check.json", screen)
    with clock.phase("train"):
        engine = engine_of(simulation, device)
        states = run_jobs(jobs, path, engine, screen.on_event, on_scored=screen.on_scored, on_check=heard)
    with clock.phase("score"):
        examiner = Examiner(hospitals=hospitals, cache=cache, site=sites[0])
        methods, staged = _scores(jobs, states, simulation, examiner, folder.work)
        use, shown = first_use(jobs, states, examiner), exhibits(jobs, states, examiner)
    require_unchanged(before, after := backbone.weights_digest())
    clock.seconds |= _seconds_of(methods) | {"total": time.perf_counter() - began}
    results = results_record(
        study=study,
        simulation=simulation,
        hospitals=hospitals,
        backbone=study.backbone.model_dump(mode="json") | {"weights_digest_before": before, "weights_digest_after": after},
        methods=methods,
        data_check=json.loads(heard.path.read_bytes()),
        expert_use=use,
        seconds=clock.seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=origin,
    )
    _publish(results, shown, staged, folder)
    return results


def _encoded(hospitals: Hospitals, study: Study, backbone: Backbone, screen: Screen) -> FeatureCache:
    """Return the user's feature cache, with every slice of every split in it."""
    cache = FeatureCache.of(default_cache_folder(), study)
    everything = [item for split in SPLITS for item in hospitals.slices(split)]
    encode_slices(everything, study, backbone, cache, on_progress=lambda done, total: screen.progress("encode", done, total))
    return cache


def _scores(
    jobs: list[Job], states: Mapping[tuple[str, int], RunState], simulation: Simulation, examiner: Examiner, work: Path
) -> tuple[dict[str, dict[str, Record]], Path]:
    """Return what is known of every method by seed, and the folder of the models, in which what is published is gathered."""
    staged = work / "publish"
    shutil.rmtree(staged, ignore_errors=True)
    methods = score_methods(jobs, states, simulation, examiner, RunFolder(staged))
    if PERSONALISED in simulation.methods:
        methods[PERSONALISED] = score_personalised(jobs, states, examiner, work, RunFolder(staged))
    return methods, staged


def _publish(results: Record, shown: list[Overlay], staged: Path, folder: RunFolder) -> None:
    """Write results, report and cards beside the models, and move all of it into the folder."""
    write_report(results, shown, staged / REPORT)
    if shown:
        figure_from_results(results, shown, staged / FIGURE)
    write_atomically(staged / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    write_cards(results, staged)
    folder.publish(staged)


def backbone_of(study: Study, simulation: Simulation, device: torch.device) -> Backbone:
    """Return the study's frozen backbone, from the weights that the simulation names."""
    checkpoint = Path(simulation.checkpoint) if simulation.checkpoint else None
    return chosen_backbone(study.backbone, checkpoint=checkpoint, device=device)


def report_sites(hospitals: Hospitals, screen: Screen) -> None:
    """Say what was found, used and left out, and that phantoms are phantoms."""
    if hospitals.phantoms:
        screen.say("These hospitals are [bold]phantoms[/bold]: drawn heads with drawn lesions, no patients.")
    for name, site in hospitals.sources.items():
        patients = len({item.patient for item in site.of("train")})
        screen.say(f"{escape(name)}: found {site.images_found}, used {site.images_used} images; patients in training: {patients}")
        for fault in site.exclusions[:10]:
            screen.say(f"  [yellow]{escape(str(fault))}[/yellow]")
        if len(site.exclusions) > 10:
            screen.say(f"  [yellow]and {len(site.exclusions) - 10} more, all in results.json[/yellow]")


def make_jobs(study: Study, simulation: Simulation, hospitals: Hospitals, folder: RunFolder) -> list[Job]:
    """Return one job per method and seed; local and pooled share one, since neither waits for the other."""
    federated = [name for name in simulation.methods if name not in (*ALONE, *AFTERWARDS)]
    alone = [name for name in simulation.methods if name in ALONE]
    jobs: list[Job] = []
    for seed in simulation.seeds:
        jobs += [_job(method, study_for(method, study, seed), hospitals.training, folder) for method in federated]
        if alone:
            names = (hospitals.training if "local" in alone else ()) + ((POOLED,) if "pooled" in alone else ())
            jobs.append(_job("alone", study_for(alone[0], study, seed), names, folder))
    return jobs


def _job(method: str, study: Study, names: tuple[str, ...], folder: RunFolder) -> Job:
    path = folder.work / f"{method}-seed{study.seed}.safetensors"
    return Job(method=method, study=study, names=names, state_path=path)


def engine_of(simulation: Simulation, device: torch.device) -> Engine:
    """Return where the virtual sites run; on a GPU they share it evenly."""
    cpus = os.cpu_count() or 1
    return Engine(address=simulation.address, cpus=cpus, gpus_per_site=1.0 / cpus if device.type == "cuda" else 0.0)


def identity_of(jobs: list[Job], simulation: Simulation, hospitals: Hospitals, backbone: str) -> dict[str, str]:
    """Return what a run must have in common with the one that it continues; `backbone` is the digest of its weights."""
    return {
        "studies": ",".join(f"{job.method}:{job.study.digest}" for job in jobs),
        "data": hospitals.digest(),
        "masks": hospitals.masks_digest(),
        "backbone": backbone,
        "methods": ",".join(simulation.methods),
        "device": simulation.device,
        "exact counts": str(simulation.exact_counts),
    }


def score_methods(
    jobs: list[Job], states: Mapping[tuple[str, int], RunState], simulation: Simulation, examiner: Examiner, out: RunFolder
) -> dict[str, dict[str, Record]]:
    """Return rounds, test scores and model path by method and seed; the models are written to `out`."""
    methods: dict[str, dict[str, Record]] = {name: {} for name in simulation.methods}
    for job in jobs:
        run = states[job.method, job.study.seed]
        seed = str(job.study.seed)
        if job.method != "alone":
            found = federated_test(examiner, job.study, run, examiner.site.state_folder)
            record = {"rounds": list(run.history), **found}
            methods[job.method][seed] = record | _write(out, examiner, job, job.method, tensors(run.arrays))
            continue
        if "local" in simulation.methods:
            record = {"rounds": part_of(run.history, examiner.hospitals.training), **local_test(examiner, job.study, run)}
            models = {
                name: _write(out, examiner, job, "local", tensors(of_site(run.arrays, name)), name)["model"]
                for name in examiner.hospitals.training
            }
            methods["local"][seed] = record | {"model": None, "models": models}
        if "pooled" in simulation.methods:
            record = {"rounds": part_of(run.history, (POOLED,)), "test": pooled_test(examiner, job.study, run), "own_test": None}
            methods["pooled"][seed] = record | _write(out, examiner, job, "pooled", tensors(of_site(run.arrays, POOLED)))
    return methods


def score_personalised(
    jobs: list[Job], states: Mapping[tuple[str, int], RunState], examiner: Examiner, work: Path, out: RunFolder
) -> dict[str, Record]:
    """Return the record of the sites' own models by seed."""
    return {
        str(job.study.seed): personalised_record(
            examiner, job.study, states[job.method, job.study.seed], states["alone", job.study.seed], work, out
        )
        for job in jobs
        if job.method == NEEDS[0]
    }


def _write(out: RunFolder, examiner: Examiner, job: Job, method: str, state: State, site: str = "") -> Record:
    header = ModelHeader(
        study=job.study,
        method=method,
        round=job.study.rounds,
        phantoms=examiner.hospitals.phantoms,
    )
    path = out.model(method, job.study.seed, site)
    write_model(path, state, header)
    return {"model": str(path.relative_to(out.root))}


def _seconds_of(methods: Mapping[str, Mapping[str, Record]]) -> dict[str, float]:
    """Return seconds of the rounds by method, summed over the seeds; methods without rounds are part of the scoring."""
    return {
        name: sum(sum(row["seconds"].values()) for run in by_seed.values() for row in run["rounds"])
        for name, by_seed in methods.items()
        if any(run["rounds"] for run in by_seed.values())
    }


def first_use(jobs: list[Job], states: Mapping[tuple[str, int], RunState], examiner: Examiner) -> Record | None:
    """Return what the experts of the first federated method and seed do on the test patients."""
    job = next((job for job in jobs if job.method != "alone"), None)
    if job is None:
        return None
    model = examiner.model(job.study, tensors(states[job.method, job.study.seed].arrays))
    slices = list(dict.fromkeys(examiner.hospitals.slices("test")))
    return expert_use(model, slices, job.study, examiner.cache, examiner.site.torch_device())


def exhibits(jobs: list[Job], states: Mapping[tuple[str, int], RunState], examiner: Examiner) -> list[Overlay]:
    """Return the overlays of the first federated method and seed, none where only local and pooled were run."""
    job = next((job for job in jobs if job.method != "alone"), None)
    if job is None:
        return []
    state = tensors(states[job.method, job.study.seed].arrays)
    return overlays(examiner, job.study, examiner.model(job.study, state), examiner.scores(job.study, state))
