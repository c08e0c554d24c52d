"""Model files: safetensors with the study in the header (design section 12). Nothing is ever unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icmoe import __version__
from icmoe.atomic import write_atomically
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import load_state
from icmoe.model import ICMoE, build_model
from icmoe.study import Study, canonical

FORMAT = "icmoe-model"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHeader:
    """What a model file says of itself.

    Parameters
    ----------
    study
        The study that trained it, with its backbone's digest.
    method
        For example "router-aware".
    round
        Rounds behind the weights.
    phantoms
        Whether it was trained on phantoms.
    """

    study: Study
    method: str
    round: int
    phantoms: bool

    def metadata(self) -> dict[str, str]:
        """Return the header as safetensors metadata."""
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "study": canonical(self.study),
            "study_digest": self.study.digest,
            "method": self.method,
            "round": str(self.round),
            "phantoms": json.dumps(self.phantoms),
            "written_by": f"icmoe-federated {__version__}",
        }

    def record(self) -> dict[str, object]:
        """Return the header as plain values for JSON."""
        study = self.study
        return {
            "method": self.method,
            "round": self.round,
            "seed": study.seed,
            "study": study.name,
            "study_digest": study.digest,
            "backbone": study.backbone.model_dump(mode="json"),
            "phantoms": self.phantoms,
            "test_only": study.test_only,
        }


def write_model(path: Path, state: dict[str, Tensor], header: ModelHeader) -> None:
    """Write the model atomically; equal states and headers give equal bytes."""
    write_atomically(path, save(dict(sorted(state.items())), metadata=header.metadata()))


def read_model(path: Path) -> tuple[ICMoE, ModelHeader]:
    """Return the model, in evaluation mode on the CPU, and its header.

    Raises
    ------
    IcmoeError
        205 where the file is absent, 209 where it is not a model, 208 where another version wrote it, 301 where a
        tensor does not fit the study in the header.
    """
    if not path.is_file():
        raise IcmoeError(Fault(number=205, where=str(path), what="model file is not there", did="Nothing was scored."))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise IcmoeError(Fault(number=209, where=str(path), value=str(error), did="Nothing was scored.")) from None
    header = _parse_header(path, metadata)
    model = build_model(header.study, seed=0)
    load_state(model, state)
    return model.eval(), header


def _parse_header(path: Path, metadata: dict[str, str]) -> ModelHeader:
    if metadata.get("format") != FORMAT:
        raise IcmoeError(Fault(number=209, where=str(path), value=metadata.get("format", "no header"), limit=FORMAT))
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise IcmoeError(Fault(number=208, where=str(path), value=version, limit=str(FORMAT_VERSION), did="Nothing was scored."))
    try:
        study = Study.model_validate_json(metadata["study"])
        header = ModelHeader(
            study=study,
            method=metadata["method"],
            round=int(metadata["round"]),
            phantoms=bool(json.loads(metadata["phantoms"])),
        )
    except (KeyError, ValueError, TypeError, ValidationError) as error:
        raise IcmoeError(
            Fault(number=209, where=str(path), value=str(error).splitlines()[0], did="Nothing was scored.")
        ) from None
    if study.digest != metadata.get("study_digest"):
        raise IcmoeError(
            Fault(number=209, where=str(path), what="study and digest in the header differ", did="Nothing was scored.")
        )
    return header
