"""Which rehearsals each table rests on; the recipe is the study's default for all sets."""

from __future__ import annotations

from dataclasses import dataclass

from icmoe.study import Label
from simulations.methods import DEFAULT_METHODS

SEEDS = 3
BACKGROUND = Label(name="background", values=(0,))
LESION = (BACKGROUND, Label(name="lesion", values=(1, 255)))
HIPPOCAMPUS = (BACKGROUND, Label(name="anterior", values=(1,)), Label(name="posterior", values=(2,)))
CAVITY = (BACKGROUND, Label(name="LV cavity", values=(255,)))
SPLITS = ("intensity", "volume", "dirichlet", "one-class")
"""Ways in which the hippocampus volumes are dealt to four sites; files of `splits/`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One rehearsal.

    Parameters
    ----------
    name
        Of its folder.
    methods
        As in run_sim.py.
    held_out
        Hospital that does not train; empty where all do.
    split
        Split file that makes the sites; empty where the data have sites.
    """

    name: str
    methods: tuple[str, ...] = DEFAULT_METHODS
    held_out: str = ""
    split: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One data set.

    Parameters
    ----------
    title
        Of its section.
    labels
        Of the study.
    runs
        The first one has all hospitals.
    mean_gain
        Dice by which the sites' own models shall beat local ones.
    claims
        Whether there are patients enough for bars.
    """

    title: str
    labels: tuple[Label, ...]
    runs: tuple[Run, ...]
    mean_gain: float = 0.0
    claims: bool = True


PLANS = {
    "lgg": Plan(
        title="lgg-multisite: low-grade glioma, four real hospitals",
        labels=LESION,
        runs=(
            Run(name="lgg-base"),
            *(Run(name=f"lgg-without-{site}", methods=("router-aware",), held_out=site) for site in ("CS", "DU", "HT")),
        ),
        mean_gain=0.02,
    ),
    "hippocampus": Plan(
        title="hippocampus-nifti: two classes, four made-up sites",
        labels=HIPPOCAMPUS,
        runs=tuple(Run(name=f"hippocampus-{split}", split=f"hippocampus-{split}") for split in SPLITS),
    ),
    "sunnybrook": Plan(
        title="sunnybrook-lv-dicom: left ventricle, transfer and prediction only",
        labels=CAVITY,
        runs=(Run(name="sunnybrook", split="sunnybrook"),),
        claims=False,
    ),
}
