"""One rival in one regime with one seed: rounds committed one by one, then scored once on `test`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from icmoe.atomic import write_atomically
from icmoe.backbone import Backbone
from icmoe.dataset import TrainingSet
from icmoe.errors import Fault, IcmoeError
from icmoe.evaluation import score_slices
from icmoe.exchange import State, state_digest
from icmoe.features import FeatureCache
from icmoe.metrics import PatientScore, evaluation_record
from icmoe.prepare import encode_slices
from icmoe.study import Study, canonical_json, derived_seed, taught_alone
from simulations.alone import POOLED
from simulations.evidence.rivals.catalogue import METHODS, Weights, build
from simulations.evidence.rivals.encoder import front, front_cache
from simulations.evidence.rivals.records import read_rival
from simulations.evidence.rivals.regimes import CPU, REGIMES, SHARED, Progress, Trainer, start
from simulations.evidence.rivals.segmenter import frozen_digest, put_trained, trained_count
from simulations.hospitals import Hospitals
from simulations.measuring import peak_bytes
from simulations.scoring import require_unchanged

Record = dict[str, Any]
Tell = Callable[[str], None]
VERSION = 1
_STATE = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is run.

    Parameters
    ----------
    method, regime
        Names of `METHODS` and `REGIMES`.
    seed
        Of the study.
    rounds
        Fewer rounds than the study's, where a method is dear; the learning rate falls over these. The study's where None.
    """

    method: str
    regime: str
    seed: int
    rounds: int | None = None

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.method}-{self.regime}-seed{self.seed}" + (f"-rounds{self.rounds}" if self.rounds else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all jobs share.

    Parameters
    ----------
    study
        Labels, backbone, rounds, training; also IC-MoE's shape.
    hospitals
        Data.
    backbone
        Frozen, on the CPU.
    weights
        LiteMedSAM's tensors, for its decoder.
    cache
        The study's features.
    folder
        Where states and results go.
    tell
        Shown a line per round.
    commit
        Of the code, as git names it.
    """

    study: Study
    hospitals: Hospitals
    backbone: Backbone
    weights: Weights
    cache: FeatureCache
    folder: Path
    tell: Tell
    commit: str = ""

    def result_path(self, job: Job) -> Path:
        """Return where the job's record goes."""
        return self.folder / "results" / f"{job.name}.json"

    def state_path(self, job: Job) -> Path:
        """Return where the job's rounds are committed."""
        return self.folder / ".work" / f"{job.name}.safetensors"


@dataclass(slots=True)
class Reached:
    """A committed run.

    Parameters
    ----------
    progress
        Its tensors.
    history
        One record per round.
    peak_mb
        Largest memory of the process during its rounds, MB of a million bytes.
    """

    progress: Progress
    history: list[Record]
    peak_mb: float = 0.0

    def commit(self, path: Path, identity: str) -> None:
        """Write atomically; only the owner may read, since a site's own model is in it."""
        tensors = {
            f"model|{owner}|{name}": value for owner, state in self.progress.models.items() for name, value in state.items()
        }
        tensors |= {
            f"moment|{key}|{name}": value for key, state in self.progress.moments.items() for name, value in state.items()
        }
        header = json.dumps({"identity": identity, "history": self.history, "peak_mb": self.peak_mb})
        write_atomically(path, save(dict(sorted(tensors.items())), metadata={_STATE: header}), private=True)

    @staticmethod
    def load(path: Path, identity: str) -> Reached:
        """Return what was committed.

        Raises
        ------
        IcmoeError
            525 where the file is damaged or belongs to another study, data, settings or version.
        """
        header, tensors = _read(path)
        if header["identity"] != identity:
            raise IcmoeError(
                Fault(number=525, where=path.name, what="it was begun with other settings or data", did="It was kept.")
            )
        parts: dict[str, dict[str, State]] = {"model": {}, "moment": {}}
        for key, value in tensors.items():
            kind, owner, name = key.split("|", 2)
            parts[kind].setdefault(owner, {})[name] = value
        return Reached(Progress(parts["model"], parts["moment"]), header["history"], header["peak_mb"])


def _read(path: Path) -> tuple[Record, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[_STATE])
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise IcmoeError(Fault(number=525, where=path.name, what="it is damaged", value=type(error).__name__)) from None


def study_of(job: Job, base: Study) -> Study:
    """Return `base` with the job's seed and rounds and the method's learning rate.

    Raises
    ------
    IcmoeError
        202 where the job has more rounds than `base`: its table says that they are fewer.
    """
    if job.rounds is not None and job.rounds > base.rounds:
        limit = f"1 to {base.rounds}, the study's"
        raise IcmoeError(Fault(number=202, where="--rounds", value=str(job.rounds), limit=limit, did="Nothing was trained."))
    rate = base.training.learning_rate * METHODS[job.method].rate
    training = base.training.model_copy(update={"learning_rate": rate, "proximal_mu": 0.0})
    return base.model_copy(update={"seed": job.seed, "rounds": job.rounds or base.rounds, "training": training})


def identity_of(job: Job, bench: Bench) -> str:
    """Return a SHA-256 over everything that decides the result."""
    data = {"data": bench.hospitals.digest(), "masks": bench.hospitals.masks_digest()}
    own = {"version": VERSION, "job": asdict(job), "study": bench.study.digest, **data}
    settings = {"regime": asdict(REGIMES[job.regime]), "backbone": bench.backbone.digest, "rate": METHODS[job.method].rate}
    return hashlib.sha256(canonical_json({**own, **settings}).encode()).hexdigest()


def run(job: Job, bench: Bench, *, until: Callable[[], bool] = lambda: False) -> Record | None:
    """Return the job's record, from its file where it is complete; None where `until` ended it between two rounds.

    Raises
    ------
    IcmoeError
        525 where what was committed is not this job's; 304 where a loss is not finite; 401 where a frozen part moved.
    """
    identity = identity_of(job, bench)
    if (path := bench.result_path(job)).exists():
        record = read_rival(path)
        if record["identity"] != identity:
            raise IcmoeError(
                Fault(number=525, where=path.name, what="it was made with other settings or data", did="It was kept.")
            )
        return record
    study, cache = study_of(job, bench.study), prepared_cache(job.method, bench)
    model = build(job.method, study, bench.backbone, bench.weights, seed=derived_seed(study, "model"))
    before = frozen_digest(model)
    trainer = make_trainer(job, study, bench.hospitals, cache, model)
    state = bench.state_path(job)
    reached = Reached.load(state, identity) if state.exists() else Reached(start(trainer.regime, model, trainer.sites), [])
    while len(reached.history) < study.rounds:
        if until():
            return None
        _one_round(trainer, reached)
        reached.commit(state, identity)
        bench.tell(_line(job, reached, study.rounds))
    require_unchanged(before, frozen_digest(model))
    record = {"identity": identity, **_record(job, study, bench, trainer, reached), **_scores(reached, bench, model, cache)}
    write_atomically(path, (json.dumps({**record, "frozen_digest": before}, indent=1) + "\n").encode())
    return record


def prepared_cache(method: str, bench: Bench) -> FeatureCache:
    """Return the cache that the method is fed from, with every slice in it."""
    everything = [item for split in ("train", "test") for item in bench.hospitals.slices(split)]
    cut = METHODS[method].cut
    if cut is None:
        encode_slices(everything, bench.study, bench.backbone, bench.cache)
        return bench.cache
    cache = front_cache(bench.cache, bench.backbone, cut)
    # Of a backbone, `encode_slices` asks no more than the stages have.
    encode_slices(everything, bench.study, cast("Backbone", front(bench.backbone, cut)), cache)
    return cache


def make_trainer(job: Job, study: Study, hospitals: Hospitals, cache: FeatureCache, model: nn.Module) -> Trainer:
    """Return the trainer over the sites, or over all data as one site with as many steps as the sites together."""
    regime, side = REGIMES[job.regime], METHODS[job.method].side(study)
    slices = {name: hospitals.sites[name].of("train") for name in hospitals.training}
    study = study if regime.shared else taught_alone(study)
    sites = {name: TrainingSet(items, study, cache, side=side) for name, items in slices.items()}
    steps = {name: data.steps(study.training.local_epochs) for name, data in sites.items()}
    if regime.pooled:
        together = tuple(dict.fromkeys(item for items in slices.values() for item in items))
        sites, steps = {POOLED: TrainingSet(together, study, cache, side=side)}, {POOLED: sum(steps.values())}
    return Trainer(regime=regime, model=model, study=study, sites=sites, steps=steps)


def _one_round(trainer: Trainer, reached: Reached) -> None:
    with suppress(OSError):  # sets the peak back to what is resident now; some sandboxes do not have the file
        Path("/proc/self/clear_refs").write_text("5")
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    losses = trainer.round(reached.progress, len(reached.history) + 1)
    spent = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}
    reached.history.append({"round": len(reached.history) + 1, "loss": losses, **spent})
    reached.peak_mb = max(reached.peak_mb, peak_bytes() / 1e6)


def _line(job: Job, reached: Reached, rounds: int) -> str:
    last = reached.history[-1]
    losses = "  ".join(f"{site} {loss:.3f}" for site, loss in last["loss"].items())
    return f"{job.name}  round {last['round']}/{rounds}  loss {losses}  {last['cpu_s']:.0f} core-s"


def _record(job: Job, study: Study, bench: Bench, trainer: Trainer, reached: Reached) -> Record:
    parameters = trained_count(trainer.model)
    sent = next(iter(reached.progress.models.values())).values()
    return {
        "kind": "icmoe-rival",
        "schema_version": VERSION,
        **asdict(job),
        "rounds": study.rounds,
        "short": job.rounds is not None,
        "title": METHODS[job.method].title,
        "settings": asdict(trainer.regime) | {"learning_rate": study.training.learning_rate},
        "study": study.model_dump(mode="json"),
        "data_digest": bench.hospitals.digest(),
        "masks_digest": bench.hospitals.masks_digest(),
        "backbone_digest": bench.backbone.digest,
        "commit": bench.commit,
        "torch": torch.__version__,
        "parameters": parameters,
        "bytes_each_way": sum(tensor.nbytes for tensor in sent) if trainer.regime.shared else 0,
        "steps": study.rounds * sum(trainer.steps.values()),
        "cpu_s": sum(row["cpu_s"] for row in reached.history),
        "wall_s": sum(row["wall_s"] for row in reached.history),
        "peak_mb": reached.peak_mb,
        "history": reached.history,
        "state_digest": {owner: state_digest(state) for owner, state in sorted(reached.progress.models.items())},
    }


def _scores(reached: Reached, bench: Bench, model: nn.Module, cache: FeatureCache) -> Record:
    """Return the common model's scores on all tests and the scores of the sites' own models on their own; null where none."""
    models: Mapping[str, State] = reached.progress.models
    common = next((models[owner] for owner in (SHARED, POOLED) if owner in models), None)
    test = None if common is None else _scored(common, bench, model, cache, tuple(bench.hospitals.sites))
    owners = [site for site in bench.hospitals.training if site in models]
    own = [score for site in owners for score in _scored(models[site], bench, model, cache, (site,))]
    labels = [label.name for label in bench.study.labels]
    counts = bench.hospitals.sites
    return {
        "test": None if test is None else evaluation_record(test, counts, labels),
        "own_test": evaluation_record(own, counts, labels) if owners else None,
    }


def _scored(state: State, bench: Bench, model: nn.Module, cache: FeatureCache, sites: tuple[str, ...]) -> list[PatientScore]:
    put_trained(model, state)
    slices = [item for site in sites for item in bench.hospitals.sites[site].of("test")]
    return score_slices(model.eval(), slices, bench.study.labels, cache, CPU, surfaces=False)
