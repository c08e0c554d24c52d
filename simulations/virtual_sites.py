"""Virtual hospitals made of real or phantom ones: chosen, repeated, or dealt anew by patient.

Virtual sites share the slices of their hospitals: `Slice.site` keeps the hospital's name, `SiteData.name` is virtual.
A patient is therefore known by (`Slice.site`, `Slice.patient`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from icmoe.data.slices import SiteData, Slice
from icmoe.errors import NOT_STARTED, Fault, IcmoeError

MAX_SITES = 10_000

Patient = tuple[Slice, ...]


def choose_sites(sites: Mapping[str, SiteData], names: Sequence[str]) -> dict[str, SiteData]:
    """Return the named sites, sorted by name.

    Parameters
    ----------
    sites
        All sites.
    names
        At least one name; a repeated one counts once.

    Raises
    ------
    IcmoeError
        210 for every name that is not known, each with its nearest.
    """
    if not names:
        raise IcmoeError(_fault("sites", "no site is chosen", "none", ", ".join(sorted(sites))))
    faults = [_unknown(name, sites) for name in dict.fromkeys(names) if name not in sites]
    if faults:
        raise IcmoeError(*faults)
    return {name: sites[name] for name in sorted(set(names))}


def repeat_sites(sites: Mapping[str, SiteData], n: int) -> dict[str, SiteData]:
    """Return n virtual sites by repetition: A, B, C, A-2, B-2, ...; below the number of sites, the first n by name.

    Parameters
    ----------
    sites
        At least one site.
    n
        Number of virtual sites, 1 to `MAX_SITES`.

    Returns
    -------
    dict
        In the order above; a name that a hospital has already is passed over.

    Raises
    ------
    IcmoeError
        210 where `n` or the number of sites is out of range.
    """
    _check(sites, n)
    originals = [sites[name] for name in sorted(sites)]
    virtual = {site.name: site for site in originals[:n]}
    turn = 1
    while len(virtual) < n:
        turn += 1
        for site in originals[: n - len(virtual)]:
            name = f"{site.name}-{turn}"
            if name not in sites:
                virtual[name] = replace(site, name=name)
    return virtual


def dirichlet_sites(sites: Mapping[str, SiteData], n: int, alpha: float, seed: int) -> dict[str, SiteData]:
    """Return n virtual sites, to which the patients of every hospital are dealt by shares drawn from Dirichlet(alpha).

    A small alpha gives sites of one or two hospitals and of very unequal size, a large one gives equal mixtures.
    Patients stay whole and keep their split. A site that got no training patient receives one from the site that has
    most. What the reader excluded belongs to no virtual site: report it with the hospitals.

    Parameters
    ----------
    sites
        At least one hospital.
    n
        Number of virtual sites, 1 to the number of training patients.
    alpha
        Concentration, 0.001 to 1e6.
    seed
        Origin of all randomness, 0 or more.

    Returns
    -------
    dict
        virtual-001, virtual-002, ... with as many images found as used.

    Raises
    ------
    IcmoeError
        210 where a parameter is out of range, naming the limits.
    """
    _check(sites, n)
    patients = {name: _patients(sites[name]) for name in sorted(sites)}
    available = sum(_trains(patient) for dealt in patients.values() for patient in dealt)
    faults = []
    if n > available:
        faults.append(_fault("sites", "more virtual sites than training patients", str(n), f"1 to {available}"))
    if not 0.001 <= alpha <= 1e6:
        faults.append(_fault("alpha", "concentration is outside its range", str(alpha), "0.001 to 1e6"))
    if seed < 0:
        faults.append(_fault("seed", "seed is outside its range", str(seed), "0 or more"))
    if faults:
        raise IcmoeError(*faults)
    hands = _deal(patients, n, alpha, np.random.default_rng(seed))
    _give_each_a_training_patient(hands)
    width = max(3, len(str(n)))
    return {
        name: _virtual(name, hand) for name, hand in zip((f"virtual-{i:0{width}d}" for i in range(1, n + 1)), hands, strict=True)
    }


def _deal(patients: Mapping[str, Sequence[Patient]], n: int, alpha: float, rng: np.random.Generator) -> list[list[Patient]]:
    hands: list[list[Patient]] = [[] for _ in range(n)]
    for hospital in patients.values():
        shares = rng.dirichlet(np.full(n, alpha))
        for patient, place in zip(hospital, rng.choice(n, size=len(hospital), p=shares / shares.sum()), strict=True):
            hands[int(place)].append(patient)
    return hands


def _give_each_a_training_patient(hands: list[list[Patient]]) -> None:
    for hand in hands:
        if not any(map(_trains, hand)):
            richest = max(hands, key=lambda other: sum(map(_trains, other)))
            last = next(patient for patient in reversed(richest) if _trains(patient))
            richest.remove(last)
            hand.append(last)


def _patients(site: SiteData) -> list[Patient]:
    groups: dict[tuple[str, str], list[Slice]] = {}
    for item in site.slices:
        groups.setdefault((item.site, item.patient), []).append(item)
    return [tuple(groups[key]) for key in sorted(groups)]


def _trains(patient: Patient) -> bool:
    return any(item.split == "train" for item in patient)


def _virtual(name: str, hand: Sequence[Patient]) -> SiteData:
    slices = sorted(
        (item for patient in hand for item in patient), key=lambda item: (item.site, item.patient, item.index, str(item.image))
    )
    return SiteData(name=name, slices=tuple(slices), images_found=len(slices), exclusions=())


def _check(sites: Mapping[str, SiteData], n: int) -> None:
    if not sites:
        raise IcmoeError(_fault("sites", "there is no site to start from", "0", "at least 1"))
    if not 1 <= n <= MAX_SITES:
        raise IcmoeError(_fault("sites", "number of virtual sites is outside its range", str(n), f"1 to {MAX_SITES}"))


def _unknown(name: str, sites: Mapping[str, SiteData]) -> Fault:
    near = difflib.get_close_matches(name.lower(), {known.lower(): known for known in sites}, n=1, cutoff=0.4)
    nearest = [known for known in sorted(sites) if near and known.lower() == near[0]]
    hint = f'Did you mean "{nearest[0]}"?' if nearest else ""
    return _fault("sites", "site is not in the data folder", repr(name), ", ".join(sorted(sites)), hint)


def _fault(where: str, what: str, value: str, limit: str, todo: str = "") -> Fault:
    return Fault(number=210, where=where, what=what, value=value, limit=limit, did=NOT_STARTED, todo=todo)
