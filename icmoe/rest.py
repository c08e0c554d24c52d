"""What comes after the cut of a backbone that is cut before its last stage: frozen, and run in every step.

A site computes it once from the backbone's weights and keeps it beside the features, so that whoever reads features needs no
weights. The model's own state does not hold it: what is exchanged, noised, bounded and saved is what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from icmoe.atomic import write_atomically
from icmoe.backbones import Inner, architecture_of
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import state_digest
from icmoe.study import BackboneChoice
from icmoe.tensor_file import METADATA_KEY, read_tensors

FORMAT = "icmoe-rest-1"


def inner_of(name: str) -> Inner:
    """Return the cut of a backbone that has one, which every study that asks for it was checked for."""
    inner = architecture_of(name).inner
    assert inner is not None
    return inner


def built(choice: BackboneChoice, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """Return the rest of the chosen backbone with these tensors, frozen, on `device`.

    Raises
    ------
    ValueError
        Where they are not its tensors.
    """
    rest = inner_of(choice.name).rest(choice.image_size)
    try:
        rest.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return rest.to(device)


def drawn_rest(choice: BackboneChoice, *, seed: int) -> nn.Module:
    """Return the rest with random weights on the CPU, for checks of what is trained before it; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inner_of(choice.name).rest(choice.image_size)


def _shapes(choice: BackboneChoice) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in inner_of(choice.name).rest(choice.image_size).state_dict().items()}


def size_bytes(choice: BackboneChoice) -> int:
    """Return what the rest takes, in memory and on disk."""
    return 4 * sum(shape.numel() for shape in _shapes(choice).values())


def rest_path(folder: Path, choice: BackboneChoice) -> Path:
    """Return the file of the rest in a folder of features."""
    return folder / "rest" / f"{choice.name}-{choice.image_size}-{choice.digest[:32]}.safetensors"


def keep_rest(folder: Path, choice: BackboneChoice, rest: nn.Module) -> None:
    """Write the rest beside the features, unless the very same is there."""
    state = {name: tensor.cpu().contiguous() for name, tensor in sorted(rest.state_dict().items())}
    found, digest = _found(folder, choice), state_digest(state)
    if found is not None and state_digest(found) == digest:
        return
    header = json.dumps({"format": FORMAT, "backbone": choice.digest, "sha256": digest}, sort_keys=True)
    write_atomically(rest_path(folder, choice), save(state, metadata={METADATA_KEY: header}), durable=False, private=True)


def is_kept(folder: Path, choice: BackboneChoice) -> bool:
    """Return whether the rest is beside the features, whole and of its shapes."""
    found = _found(folder, choice)
    return found is not None and {name: tensor.shape for name, tensor in found.items()} == _shapes(choice)


@lru_cache(maxsize=2)
def kept_rest(folder: Path, choice: BackboneChoice, device: torch.device) -> nn.Module:
    """Return the rest that is kept beside the features, frozen, on `device`.

    Raises
    ------
    IcmoeError
        111 where it is absent or damaged.
    """
    path = rest_path(folder, choice)
    try:
        return built(choice, _state_in(path, choice), device)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        what, did = "the backbone's last stage is absent beside the features, or damaged", "Nothing was trained or scored."
        todo = "Run prepare at a hospital; elsewhere start again: it is computed anew."
        value = type(error).__name__
        raise IcmoeError(Fault(number=111, where=str(path), what=what, value=value, did=did, todo=todo)) from None


def _found(folder: Path, choice: BackboneChoice) -> dict[str, Tensor] | None:
    """Return the tensors that are kept, None where there are none or they are damaged."""
    try:
        return _state_in(rest_path(folder, choice), choice)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _state_in(path: Path, choice: BackboneChoice) -> dict[str, Tensor]:
    state, metadata = read_tensors(path)
    if json.loads(metadata[METADATA_KEY]) != {"format": FORMAT, "backbone": choice.digest, "sha256": state_digest(state)}:
        raise ValueError("damaged")
    return state
