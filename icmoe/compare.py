"""Two rehearsals side by side: what was set differently, and what that changed, seed by seed where both have the seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from icmoe.atomic import read_regular
from icmoe.config import flat
from icmoe.errors import Fault, IcmoeError

FILE = "results.json"


class _Read(BaseModel):
    """Tolerant of what it does not know: results of later versions have more."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class _Dice(_Read):
    dice: float | None


class _Test(_Read):
    pooled: _Dice
    worst_site: _Dice
    sites: dict[str, _Dice]


class _Training(_Read):
    test: _Test


class Results(_Read):
    """What a comparison needs of `results.json`, schema version 1."""

    schema_version: Literal[1]
    kind: Literal["icmoe-simulation"]
    study_digest: str
    data_digest: str
    masks_digest: str | None = None
    phantoms: bool
    configuration: dict[str, Any]
    methods: dict[str, dict[str, _Training]]


@dataclass(frozen=True, slots=True)
class Change:
    """One score of one method in both rehearsals.

    Parameters
    ----------
    method
        Name.
    score
        "all patients", "worst site", or a site's name.
    a, b
        Mean Dice over the common seeds, over each one's own where none is common; None where there is no test patient.
    difference
        Mean over the common seeds of b - a; None without any.
    spread
        Standard deviation of it over these seeds; None below two.
    seeds
        Common seeds.
    """

    method: str
    score: str
    a: float | None
    b: float | None
    difference: float | None
    spread: float | None
    seeds: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two rehearsals side by side.

    Parameters
    ----------
    settings
        By dotted key, the values of both where they differ; None for a key that one of them lacks.
    same_data
        Whether both saw the same slices in the same splits; differences of scores say little otherwise.
    phantoms
        Whether either was made of phantoms.
    changes
        Scores of the methods that both have.
    only_a, only_b
        Methods that one alone has.
    """

    settings: dict[str, tuple[Any, Any]]
    same_data: bool
    phantoms: bool
    changes: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        return asdict(self)


def read_results(path: Path, *, did: str = "Nothing was compared.") -> Results:
    """Return the results of a rehearsal.

    Parameters
    ----------
    path
        `results.json`, or the folder that holds it.
    did
        What a fault says of the consequence.

    Raises
    ------
    IcmoeError
        205 where the file cannot be opened, 217 where it is not the results of a rehearsal.
    """
    file = path / FILE if path.is_dir() else path
    try:
        return Results.model_validate_json(read_regular(file))
    except OSError as error:
        raise IcmoeError(Fault(number=205, where=str(file), value=error.strerror or "", did=did)) from None
    except ValidationError as error:
        first = error.errors()[0]
        value = ".".join(map(str, first["loc"])) or first["msg"]
        raise IcmoeError(Fault(number=217, where=str(file), value=value, did=did)) from None


def compare(a: Results, b: Results) -> Comparison:
    """Return two rehearsals side by side, b against a."""
    left, right = dict(flat(a.configuration)), dict(flat(b.configuration))
    settings = {key: (left.get(key), right.get(key)) for key in sorted({*left, *right}) if left.get(key) != right.get(key)}
    return Comparison(
        settings=settings,
        same_data=a.data_digest == b.data_digest and len({a.masks_digest, b.masks_digest} - {None}) < 2,
        phantoms=a.phantoms or b.phantoms,
        changes=tuple(change for name in a.methods if name in b.methods for change in _changes(name, a, b)),
        only_a=tuple(name for name in a.methods if name not in b.methods),
        only_b=tuple(name for name in b.methods if name not in a.methods),
    )


def _changes(method: str, a: Results, b: Results) -> Iterator[Change]:
    left, right = ({seed: _scores(run.test) for seed, run in side.methods[method].items()} for side in (a, b))
    names = dict.fromkeys(name for run in (*left.values(), *right.values()) for name in run)
    for name in names:
        pairs = [(left[seed].get(name), right[seed].get(name)) for seed in left if seed in right]
        common = [(before, after) for before, after in pairs if before is not None and after is not None]
        gains = [after - before for before, after in common]
        yield Change(
            method=method,
            score=name,
            a=fmean(before for before, _ in common) if common else _mean(left, name),
            b=fmean(after for _, after in common) if common else _mean(right, name),
            difference=fmean(gains) if gains else None,
            spread=stdev(gains) if len(gains) > 1 else None,
            seeds=len(gains),
        )


def _scores(test: _Test) -> dict[str, float | None]:
    overall = {"all patients": test.pooled.dice, "worst site": test.worst_site.dice}
    return {**overall, **{name: site.dice for name, site in test.sites.items()}}


def _mean(runs: Mapping[str, Mapping[str, float | None]], name: str) -> float | None:
    known = [value for run in runs.values() if (value := run.get(name)) is not None]
    return fmean(known) if known else None


def shown(value: object) -> str:
    """Return a setting as a file of settings has it."""
    return "absent" if value is None else json.dumps(value)
