"""Every model of a finished rehearsal on every patient that it may be scored on, one line each.

Test patients always; of a hospital that a model never saw, all patients, since none of them taught it anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from icmoe.atomic import read_regular, write_atomically
from icmoe.backbone import chosen_backbone
from icmoe.cache_entries import default_cache_folder
from icmoe.data.slices import SiteData
from icmoe.data.sources import read_sites
from icmoe.data.splits import SPLITS
from icmoe.errors import Fault, IcmoeError
from icmoe.evaluation import score_slices
from icmoe.exchange import global_state
from icmoe.features import FeatureCache
from icmoe.mixture import mixture_of
from icmoe.modelfile import read_model
from icmoe.personalise import GLOBAL, OWN, TUNED, OwnData, personalise, tune
from icmoe.prepare import encode_slices
from icmoe.study import Study
from simulations.commit import UNKNOWN, commit
from simulations.folder import RunFolder
from simulations.hospitals import digests_of, held_apart

Record = dict[str, Any]
FILE = "patients.json"
CPU = torch.device("cpu")
ORIGIN = ("study_digest", "data_digest", "configuration")
"""Keys of results.json that scores share with the training that they are of."""
LATER = ("masks_digest", "created")
"""The same; a former version wrote no masks_digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One patient, scored as a volume.

    Parameters
    ----------
    method, seed
        Of the model.
    trained_at
        Site that trained it alone or made it its own; empty for a model of all.
    site, patient, split
        Whom it was scored on.
    dice
        Mean over the classes.
    """

    method: str
    seed: int
    trained_at: str
    site: str
    patient: str
    split: str
    dice: float


def score_run(folder: RunFolder, *, personal: bool, data: Path | None = None) -> Record:
    """Return the scores of a finished rehearsal; read where they are written already.

    Parameters
    ----------
    folder
        With results.json and models.
    personal
        Whether to make and score each site's own model.
    data
        Where the data of the run are by now; where they were if absent.

    Raises
    ------
    IcmoeError
        217 where a file of the run is damaged; 520 where the results were made of other data than those that are there now.
    """
    path = folder.root / FILE
    results = read_record(folder.results, *ORIGIN)
    if path.exists():
        kept = read_record(path, *ORIGIN, "scores")
        if all(kept.get(key) == results.get(key) for key in (*ORIGIN, *LATER)):  # the folder may have been trained anew since
            return kept
    bench = Bench.of(results, data)
    scores = [asdict(score) for score in _scores(results, bench, folder)]
    chosen: Record = {}
    if personal:
        for site, seed, found, own in _personal(results, bench, folder):
            scores += [asdict(score) for score in own]
            chosen.setdefault(site, {})[seed] = found
    record = {
        "commit": results.get("commit", UNKNOWN),
        "scored_by": commit(),
        "backbone_digest": results["backbone"]["digest"],
        "scored_data": bench.digest,
        **{key: results.get(key) for key in (*ORIGIN, *LATER)},
        "scores": scores,
        "chosen": chosen,
    }
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    return record


def read_record(path: Path, *needed: str) -> Record:
    """Return a file that a run left.

    Raises
    ------
    IcmoeError
        217 where it is damaged or lacks a key.
    """
    try:
        record = json.loads(read_regular(path))
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and set(needed) <= set(record):
        return record
    raise IcmoeError(damaged(path))


def damaged(path: Path) -> Fault:
    """Return what is said of a damaged file of a run."""
    did, todo = "No table was drawn.", "Remove it, then give the same command again."
    return Fault(number=217, where=str(path), what="file of a run is damaged", did=did, todo=todo)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where models are scored.

    Parameters
    ----------
    sites
        All patients of all hospitals.
    training
        Hospitals that took part in the run.
    study
        Labels and backbone.
    cache
        With the identity view of every slice.
    digest
        Of all patients of all hospitals, pictures and masks; runs without a hospital share it with the run of all.
    """

    sites: dict[str, SiteData]
    training: tuple[str, ...]
    study: Study
    cache: FeatureCache
    digest: str

    @staticmethod
    def of(results: Record, data: Path | None) -> Bench:
        """Return the bench of a run, its features computed."""
        simulation, study = (
            results["configuration"]["simulation"],
            Study.model_validate_json(json.dumps(results["configuration"]["study"])),
        )
        sites = read_sites(data or Path(simulation["data"]), study.labels)
        training = tuple(name for name, row in results["sites"].items() if row["slices"]["train"])
        _require_same(results, sites)
        cache = FeatureCache.of(default_cache_folder(), study)
        checkpoint = Path(simulation["checkpoint"]) if simulation.get("checkpoint") else None
        backbone = chosen_backbone(study.backbone, checkpoint=checkpoint, device=CPU)
        everything = [item for site in sites.values() for item in site.slices]
        encode_slices(everything, study, backbone, cache, views=("identity",))
        return Bench(sites, training, study, cache, ":".join(digests_of(sites)))

    def scores(self, model: nn.Module, *, method: str, seed: int, trained_at: str, sites: Iterable[str]) -> Iterator[Score]:
        """Yield the score of each patient of the sites named."""
        seen = {trained_at} if trained_at else set(self.training)
        for name in sites:
            for split in ("test",) if name in seen else SPLITS:
                rows = self.sites[name].of(split)
                for found in score_slices(model, rows, self.study.labels, self.cache, CPU, surfaces=False):
                    yield Score(
                        method=method,
                        seed=seed,
                        trained_at=trained_at,
                        site=name,
                        patient=found.patient,
                        split=split,
                        dice=found.dice,
                    )


def _require_same(results: Record, sites: dict[str, SiteData]) -> None:
    """Refuse data whose pictures or masks are not those that the run was made of."""
    held_out = results["configuration"]["simulation"]["held_out"]
    found = digests_of(held_apart(sites, held_out))
    made_of = results["data_digest"], results.get("masks_digest", found[1])
    for name, now, then in zip(("pictures", "masks"), found, made_of, strict=True):
        if now != then:
            value, did = f"{name} {now[:12]}", "Nothing was scored."
            raise IcmoeError(
                Fault(number=520, where=results["study_digest"][:12], value=value, limit=f"{name} {then[:12]}", did=did)
            )


def _scores(results: Record, bench: Bench, folder: RunFolder) -> Iterator[Score]:
    for method, by_seed in results["methods"].items():
        for seed, run in by_seed.items():
            files = run.get("models") or {"": run["model"]}
            for trained_at, name in files.items():
                model, _ = read_model(folder.root / name)
                sites = [trained_at] if method == "personalised" else list(bench.sites)
                yield from bench.scores(model, method=method, seed=int(seed), trained_at=trained_at, sites=sites)


def _personal(results: Record, bench: Bench, folder: RunFolder) -> Iterator[tuple[str, str, Record, list[Score]]]:
    """Yield the own model of each site and seed: what was chosen, and its scores."""
    if "personalised" in results["methods"]:
        return
    torch.set_num_threads(1)  # as in every training: equal seeds, equal bytes
    for seed, run in results["methods"]["router-aware"].items():
        model, header = read_model(folder.root / run["model"])
        study = header.study
        for site, name in results["methods"]["local"][seed]["models"].items():
            rows = bench.sites[site]
            data = OwnData(site=site, train=rows.of("train"), val=rows.of("val"), cache=bench.cache, device=CPU)
            own = global_state(read_model(folder.root / name)[0])
            state = global_state(model)
            found = personalise(study, {GLOBAL: state, TUNED: tune(state, study, data), OWN: own}, data)
            mixed = mixture_of(study, found.states, found.weights)
            about = {
                "choice": found.choice,
                "weights": found.weights,
                "val_dice": found.val_dice,
                "untaught": found.untaught,
            }
            yield (
                site,
                seed,
                about,
                list(bench.scores(mixed, method="personalised", seed=int(seed), trained_at=site, sites=[site])),
            )
