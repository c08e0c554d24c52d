"""How the split files of `splits/` were made: cases of one source dealt to four sites that differ in one thing.

The files hold case names alone and are fixed; `python -m simulations.evidence splits` makes them again from the index.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SITES = ("A", "B", "C", "D")
FOLDER = Path(__file__).parent / "splits"
COLUMNS = ("site", "case", "split")
ALPHA = 0.5
ONE_CLASS_SITE = "D"
"""In the split `one-class`, the site whose training and validation volumes end before the posterior part."""

Row = Mapping[str, str]


def quarters(rows: Sequence[Row], key: str) -> dict[str, str]:
    """Return the site of each case: within each split the cases are ordered by a number and cut into four."""
    dealt: dict[str, str] = {}
    for split in sorted({row["split"] for row in rows}):
        ordered = sorted((float(row[key]), row["name"]) for row in rows if row["split"] == split)
        for site, part in zip(SITES, np.array_split(np.arange(len(ordered)), len(SITES)), strict=True):
            dealt |= {ordered[at][1]: site for at in part}
    return dealt


def shuffled(rows: Sequence[Row], seed: int) -> dict[str, str]:
    """Return the site of each case: the cases of each split, dealt in turn after a shuffle."""
    rng = np.random.default_rng(seed)
    dealt: dict[str, str] = {}
    for split in sorted({row["split"] for row in rows}):
        names = sorted(row["name"] for row in rows if row["split"] == split)
        dealt |= {name: SITES[at % len(SITES)] for at, name in enumerate(rng.permutation(names).tolist())}
    return dealt


def uneven(rows: Sequence[Row], seed: int) -> dict[str, str]:
    """Return the site of each case: every family of intensities has its own shares of the sites, from Dirichlet(0.5).

    Each site keeps at least one case of each split, so that it can train, choose and be tested.
    """
    rng = np.random.default_rng(seed)
    shares = {family: rng.dirichlet(np.full(len(SITES), ALPHA)) for family in sorted({row["family"] for row in rows})}
    dealt: dict[str, str] = {}
    for split in sorted({row["split"] for row in rows}):
        mine = sorted((row["name"], row["family"]) for row in rows if row["split"] == split)
        sure = rng.permutation(len(mine))[: len(SITES)].tolist()
        for at, (name, family) in enumerate(mine):
            drawn = SITES[int(rng.choice(len(SITES), p=shares[family]))]
            dealt[name] = SITES[sure.index(at)] if at in sure else drawn
    return dealt


def hippocampus_splits(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Return the site of each case by name of the split file.

    Parameters
    ----------
    rows
        Of the data set's index.csv: name, split, family, vmax and voxels per class.
    """
    sized = [{**row, "voxels": str(int(row["anterior_vox"]) + int(row["posterior_vox"]))} for row in rows]
    return {
        "intensity": quarters(sized, "vmax"),
        "volume": quarters(sized, "voxels"),
        "dirichlet": uneven(sized, seed=1),
        "one-class": shuffled(sized, seed=1),
    }


def split_text(rows: Sequence[Row], dealt: Mapping[str, str]) -> str:
    """Return a split file: site, case and split, sorted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(sorted((dealt[row["name"]], row["name"].partition(".")[0], row["split"]) for row in rows))
    return text.getvalue()


def read_split(name: str) -> list[dict[str, str]]:
    """Return the rows of a committed split file."""
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
