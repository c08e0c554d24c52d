"""What a rehearsal is asked to do: a scenario file, `[study]` + `[simulation]`, with the command line on top."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from icmoe.backbone import backbone_digest, require_taken
from icmoe.backbones import BACKBONES, DEFAULT
from icmoe.config import PathText, Section, parse, read_toml
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.profiles import merged, spelled_out
from icmoe.study import Study
from simulations.methods import AFTERWARDS, DEFAULT_METHODS, METHODS

DEFAULT_LABELS = [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1, 255]}]
PHANTOM_STUDY: dict[str, Any] = {"rounds": 6, "training": {"local_epochs": 3}}
"""The embedded default: small enough for two cores and three minutes."""


class Simulation(Section):
    """How a study is rehearsed."""

    data: PathText | None = None
    """Folder of real hospitals; phantoms where absent."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """What is compared."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...], Field(min_length=1)] = (1,)
    """One run per seed; the study's own where `[study]` alone has one."""
    sites: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Number of virtual sites; the data's own where absent."""
    alpha: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Dirichlet concentration with which patients are dealt to the virtual sites."""
    held_out: tuple[str, ...] = ()
    """Hospitals that do not train; their test patients are scored as those of an unseen hospital."""
    device: str = "cpu"
    """Of the training: cpu, cuda or cuda:N."""
    address: str = "local"
    """Ray cluster: local, auto or HOST:PORT."""
    checkpoint: PathText | None = None
    """Weights file of a backbone that brings none."""
    exact_counts: bool = True
    """Whether sites announce their exact size; at real hospitals it is rounded up to ten."""
    phantom_seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 7
    """Seed of the phantom hospitals."""

    @field_validator("methods")
    @classmethod
    def _methods_are_known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if not methods or set(methods) - set(METHODS) or len(set(methods)) < len(methods):
            raise ValueError(f"each once of {', '.join(METHODS)}")
        for name, needed in AFTERWARDS.items():
            if name in methods and not set(needed) <= set(methods):
                raise ValueError(f"{name} together with {' and '.join(needed)}")
        return methods

    @field_validator("seeds")
    @classmethod
    def _seeds_are_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("each seed once")
        return seeds


def read_scenario(
    path: Path | None, study_options: Mapping[str, Any], simulation_options: Mapping[str, Any]
) -> tuple[Study, Simulation]:
    """Return study and simulation of a scenario file with the command line's options on top.

    Parameters
    ----------
    path
        TOML with `[study]` and `[simulation]`; None for the embedded default.
    study_options, simulation_options
        What the command line gives; nested like the file.

    Raises
    ------
    IcmoeError
        201-205, every fault at once; 206 or 207 where the backbone is not the study's.
    """
    where = str(path) if path else "command line"
    tables, faults = _tables(read_toml(path) if path else {}, where)
    simulation = Simulation()
    given = {**tables["simulation"], **simulation_options}
    if "seed" in tables["study"]:  # a study file is rehearsed as it is written, unless seeds are asked for
        given = {"seeds": [tables["study"]["seed"]], **given}
    try:
        simulation = parse(Simulation, given, where=where)
    except IcmoeError as error:
        faults += error.faults
    try:
        study = _study(tables, study_options, simulation, where)
    except IcmoeError as error:
        raise IcmoeError(*faults, *error.faults) from None
    if faults:
        raise IcmoeError(*faults)
    return study, simulation


def chosen(given: str | None, known: Iterable[str], option: str) -> list[str]:
    """Return those of the known names that a comma-separated option gives, in the order of `known`; all where it is absent.

    Raises
    ------
    IcmoeError
        210 for names that are not known.
    """
    names = list(known)
    wanted = names if given is None else [name.strip() for name in given.split(",")]
    if unknown := sorted(set(wanted) - set(names)):
        raise IcmoeError(Fault(number=210, where=option, value=", ".join(unknown), limit=", ".join(names)))
    return [name for name in names if name in wanted]


def _tables(found: Mapping[str, Any], where: str) -> tuple[dict[str, Mapping[str, Any]], list[Fault]]:
    """Return the two tables of a scenario, empty where absent, and what is wrong with its outermost keys."""
    tables = {key: found.get(key, {}) for key in ("study", "simulation")}
    unknown, wrong = sorted(set(found) - set(tables)), [key for key, table in tables.items() if not isinstance(table, Mapping)]
    faults = [Fault(number=201, where=where, value=key, limit="[study] and [simulation]") for key in unknown]
    for key in wrong:
        value = f"{key} = {repr(tables[key])[:80]}"
        faults.append(Fault(number=202, where=where, value=value, limit=f"one table [{key}]", did=NOT_STARTED))
    return {key: table if isinstance(table, Mapping) else {} for key, table in tables.items()}, faults


def _study(tables: Mapping[str, Any], options: Mapping[str, Any], simulation: Simulation, where: str) -> Study:
    default: dict[str, Any] = {"name": "rehearsal", "seed": simulation.seeds[0], "labels": DEFAULT_LABELS}
    if simulation.data is None:
        default = merged(default, PHANTOM_STUDY)
    values = spelled_out(merged(merged(default, tables["study"]), options), where=where)
    study = parse(Study, with_backbone(values, simulation.checkpoint), where=where)
    require_taken(study.backbone.name, Path(simulation.checkpoint) if simulation.checkpoint else None, where="checkpoint")
    return study


def with_backbone(values: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    """Return the study's values with the digest of the backbone that is at hand, where they name none.

    A digest that the scenario names stays; loading the weights compares it.
    """
    backbone = values.get("backbone", {})
    if not isinstance(backbone, dict) or "digest" in backbone:
        return values
    name = backbone.get("name", DEFAULT)
    if not isinstance(name, str) or name not in BACKBONES:
        return merged(values, {"backbone": {"digest": "0" * 64}})
    return merged(values, {"backbone": {"digest": backbone_digest(name, Path(checkpoint) if checkpoint else None)}})
