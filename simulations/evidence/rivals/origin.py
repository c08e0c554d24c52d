"""Whether records may stand in one table: made on one study, one set of data and one backbone. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from icmoe.config import parse
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Study
from simulations.evidence.rivals.catalogue import METHODS

Record = dict[str, Any]
OF_A_JOB = ("name", "seed", "rounds")
"""Keys of a study that a job sets; learning rate and proximal term are its method's and its regime's."""
PARTS = ("pictures", "masks", "backbone", "training", "study", "rounds")


def require_one_origin(records: Sequence[Record], ours: Record | None) -> None:
    """Refuse records of which one was made otherwise than the others.

    Parameters
    ----------
    records
        Of rivals.
    ours
        results.json of IC-MoE, whose losses and parts are its own: held to the data, the backbone and the training.

    Raises
    ------
    IcmoeError
        526 with what differs.
    """
    origins = [_origin(record) for record in records]
    if ours is not None and records:
        origins.append(_origin_of_ours(ours))
    other = [name for name in PARTS if len({origin[name] for origin in origins if origin.get(name) is not None}) > 1]
    if other:
        value = f"they differ in {', '.join(other)}"
        raise IcmoeError(Fault(number=526, value=value, limit="one study, data and backbone", did="No table was written."))


def _origin(record: Record) -> Record:
    method = METHODS.get(record["method"])
    study = _whole(record["study"])
    training = _training(study, rate=1.0 if method is None else method.rate)
    rest = {key: value for key, value in study.items() if key not in (*OF_A_JOB, "training")}
    return {
        "pictures": record["data_digest"],
        "masks": record.get("masks_digest"),  # a former version wrote none
        "backbone": record["backbone_digest"],
        "training": training,
        "study": json.dumps(rest, sort_keys=True),
        "rounds": None if record["short"] else record["rounds"],
    }


def _origin_of_ours(results: Record) -> Record:
    return {
        "pictures": results["data_digest"],
        "masks": results.get("masks_digest"),
        "backbone": results["backbone"]["digest"],
        "training": _training(_whole(results["configuration"]["study"]), rate=1.0),
    }


def _whole(study: Mapping[str, Any]) -> Record:
    """Return a study with today's defaults for what it does not name, which a former version did not know."""
    try:
        return parse(Study, dict(study), where="study").model_dump(mode="json")
    except IcmoeError:  # of another version altogether: compared as it is
        return dict(study)


def _training(study: Record, *, rate: float) -> str:
    """Return the training section, its learning rate over that of the method, without the regime's proximal term."""
    section = {key: value for key, value in study.get("training", {}).items() if key != "proximal_mu"}
    if isinstance(base := section.get("learning_rate"), float):
        section["learning_rate"] = f"{base / rate:.9g}"  # a tenth of 0.001 times ten is not 0.001 to the last digit
    return json.dumps(section, sort_keys=True)
