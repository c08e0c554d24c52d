"""Model files: safetensors with the study in the header. Nothing is ever unpickled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icmoe import __version__
from icmoe.atomic import write_atomically
from icmoe.config import Section, parse
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import State
from icmoe.mixture import SUM_TOLERANCE, Mixture, mixture_of, parted
from icmoe.model import ICMoE, model_of
from icmoe.study import Study
from icmoe.tensor_file import METADATA_KEY

FORMAT = "icmoe-model"
FORMAT_VERSION = 1


class ModelHeader(Section):
    """What a model file says of itself."""

    study: Study
    """The study that trained it, with its backbone's digest."""
    method: str
    """For example "router-aware"."""
    round: Annotated[int, Field(ge=0)]
    """Rounds behind the weights."""
    phantoms: bool
    """Whether it was trained on phantoms."""
    weights: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] | None = None
    """Members of a mixture and their weights; their tensors are named "member|tensor". None for one model."""

    @field_validator("weights")
    @classmethod
    def _make_a_mean(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and not abs(sum(weights.values()) - 1.0) <= SUM_TOLERANCE:
            raise ValueError("weights that sum to 1")
        return weights

    def metadata(self) -> dict[str, str]:
        """Return the header as safetensors metadata: one key, since the library writes several in random order."""
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "study_digest": self.study.digest,
            "written_by": f"icmoe-federated {__version__}",
        }
        return {METADATA_KEY: json.dumps({**about, **self.model_dump(mode="json", exclude_none=True)}, sort_keys=True)}

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


def write_model(path: Path, state: dict[str, Tensor], header: ModelHeader, *, private: bool = False) -> None:
    """Write the model atomically; equal states and headers give equal bytes. `private`: for its owner alone."""
    write_atomically(path, save(dict(sorted(state.items())), metadata=header.metadata()), private=private)


def read_model(path: Path) -> tuple[ICMoE | Mixture, ModelHeader]:
    """Return the model, or mixture of models, in evaluation mode on the CPU, and its header.

    Raises
    ------
    IcmoeError
        205 where the file is absent, 209 where it is not a model, 208 where another version wrote it, 301 where a
        tensor does not fit the study in the header.
    """
    if not path.is_file():
        what = "a model is a file, and this is a folder" if path.is_dir() else "model file is not there"
        raise IcmoeError(Fault(number=205, where=str(path), what=what, did="It was not used."))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise IcmoeError(Fault(number=209, where=str(path), value=str(error), did="It was not used.")) from None
    header = _parse_header(path, metadata)
    try:
        return _model_of(header, state), header
    except IcmoeError as error:
        did, todo = "It was not used.", "Fetch the file again and compare its digest."
        raise IcmoeError(*(replace(one, where=f"{path}, {one.where}", did=did, todo=todo) for one in error.faults)) from None


def _model_of(header: ModelHeader, state: State) -> ICMoE | Mixture:
    if header.weights is not None:
        return mixture_of(header.study, parted(state), header.weights)
    return model_of(header.study, state).eval()


def _parse_header(path: Path, metadata: dict[str, str]) -> ModelHeader:
    def refused(number: int, value: str, limit: str = "") -> IcmoeError:
        return IcmoeError(Fault(number=number, where=str(path), value=value, limit=limit, did="It was not used."))

    try:
        found = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        raise refused(209, "header is not JSON") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise refused(209, "no header of an IC-MoE model", FORMAT)
    if found.get("format_version") != FORMAT_VERSION:
        raise refused(208, str(found.get("format_version")), str(FORMAT_VERSION))
    try:
        header = parse(ModelHeader, {key: found[key] for key in ModelHeader.model_fields if key in found}, where=str(path))
    except IcmoeError as error:
        wrong = error.faults[0]
        raise refused(209, f"its header does not fit in {wrong.value}", wrong.limit) from None
    if header.study.digest != found.get("study_digest"):
        raise refused(209, "study and digest in the header differ")
    return header
