"""What the table reads of a rival's record and of a rehearsal of IC-MoE: whole, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from icmoe.atomic import read_regular
from icmoe.errors import Fault, IcmoeError

Record = dict[str, Any]


class _Read(BaseModel):
    """Tolerant of what it does not know: records have more."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Dice(_Read):
    dice: float | None


class _OfSite(_Read):
    dice: float | None
    hd95_mm: float | None


class _Test(_Read):
    sites: dict[str, _OfSite]
    pooled: _Dice
    mean: _Dice
    worst_site: _Dice


def _scored(run: Any) -> Any:  # noqa: ANN401  (of either kind)
    if run.test is None and run.own_test is None:
        raise ValueError("it has no score")
    return run


class _Rival(_Read):
    identity: str
    method: str
    regime: str
    seed: int
    rounds: int
    short: bool
    data_digest: str
    backbone_digest: str
    study: dict[str, Any]
    parameters: int
    bytes_each_way: float
    cpu_s: float
    peak_mb: float
    test: _Test | None
    own_test: _Test | None
    _is_scored = model_validator(mode="after")(_scored)


class _Site(_Read):
    seconds: float


class _Round(_Read):
    bytes_up: int
    sites: Annotated[dict[str, _Site], Field(min_length=1)]


class _Run(_Read):
    rounds: Annotated[tuple[_Round, ...], Field(min_length=1)]
    test: _Test | None
    own_test: _Test | None
    _is_scored = model_validator(mode="after")(_scored)


_Runs = dict[str, _Run]


class _Configuration(_Read):
    study: dict[str, Any]


class _Methods(_Read):
    """The methods that have rows."""

    router_aware: _Runs = Field({}, alias="router-aware")
    fedavg: _Runs = {}
    personal: _Runs = {}
    pooled: _Runs = {}
    local: _Runs = {}


class _Digest(_Read):
    digest: str


class _Ours(_Read):
    data_digest: str
    backbone: _Digest
    configuration: _Configuration
    methods: _Methods


def read_rival(path: Path) -> Record:
    """Return the record of a rival.

    Raises
    ------
    IcmoeError
        525 where it is damaged.
    """
    return _read(path, _Rival, Fault(number=525, where=path.name, what="it is damaged", did="It was kept."))


def read_ours(path: Path) -> Record:
    """Return results.json of a rehearsal of IC-MoE.

    Raises
    ------
    IcmoeError
        205 where it is not there, 217 where it is no such file or damaged.
    """
    did = "No table was written."
    if not path.is_file():
        raise IcmoeError(Fault(number=205, where=str(path), did=did))
    refused = Fault(number=217, where=str(path), did=did, todo="Name the results.json that run_sim.py wrote.")
    return _read(path, _Ours, refused)


def _read(path: Path, kind: type[BaseModel], refused: Fault) -> Record:
    data = read_regular(path)
    try:
        kind.model_validate_json(data)
    except ValidationError:
        raise IcmoeError(refused) from None
    record: Record = json.loads(data)
    return record
