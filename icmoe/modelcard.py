"""The card beside each model file: who trained it on what, how well it does per site, what it is for and what it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from icmoe import __version__
from icmoe.atomic import write_atomically
from icmoe.backbones import BACKBONES, file_digest
from icmoe.kinds import names_of
from icmoe.modelfile import ModelHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLine:
    """What the card says of one site.

    Parameters
    ----------
    name
        As it is registered.
    patients
        Training patients rounded up to ten, 0 at a site that only tested; None where the site does not tell.
    dice
        Mean Dice per patient there, in [0, 1]; None where it was not scored or withheld.
    """

    name: str
    patients: int | None
    dice: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySpent:
    """What all rounds together spent at most, of one patient's or one site's privacy.

    Parameters
    ----------
    epsilon, delta
        Of (epsilon, delta)-differential privacy.
    unit
        "patient" or "site": whose presence is hidden.
    adjacency
        "add/remove" or "replace".
    accountant
        For example "PRV".
    """

    epsilon: float
    delta: float
    unit: str
    adjacency: str
    accountant: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> PrivacySpent:
        """Return what a record of a round or of a study says under these names, whatever else it says."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


def write_card(
    model: Path, header: ModelHeader, sites: Sequence[SiteLine], *, scored_on: str, privacy: Sequence[PrivacySpent] = ()
) -> Path:
    """Write the card of a written model file beside it and return its path, the file's with the ending .md.

    Parameters
    ----------
    model
        The model file; its digest stands in the card.
    header
        What the file says of itself.
    sites
        That trained it.
    scored_on
        What their Dice was measured on, as part of a sentence: "test patients".
    privacy
        One line each, where the training was differentially private.
    """
    environment = Environment(
        loader=PackageLoader("icmoe", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  # Markdown; `cell` keeps a name inside its cell
    )
    environment.filters["cell"] = _cell
    text = environment.get_template("model_card.md.j2").render(
        header=header,
        study=header.study,
        digest=file_digest(model),
        version=__version__,
        licence=BACKBONES[header.study.backbone.name].licence,
        experts=names_of(header.study.model),
        sites=sites,
        scored_on=scored_on,
        privacy=privacy,
    )
    path = model.with_suffix(".md")
    write_atomically(path, text.encode())
    return path


def _cell(text: str) -> str:
    """Return a text that neither ends a table's cell nor its row, nor is read as markup."""
    plain = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]" else letter for letter in plain)
