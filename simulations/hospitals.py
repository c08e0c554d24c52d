"""The hospitals of a rehearsal: phantoms or a folder, dealt to virtual sites, with their features in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fl_client.participant import Participant
from icmoe.data.slices import SiteData, Slice
from icmoe.data.sources import read_sites
from icmoe.dataset import steps_of
from icmoe.errors import Fault, IcmoeError
from icmoe.features import FeatureCache
from icmoe.study import Study
from simulations.alone import POOLED
from simulations.phantoms import require_drawn_alike, write_phantoms
from simulations.scenario import Simulation
from simulations.virtual_sites import choose_sites, dirichlet_sites, repeat_sites

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hospitals:
    """Sites and where they came from.

    Parameters
    ----------
    root
        Folder that was read.
    phantoms
        Whether they are phantoms.
    sites
        By name, sites without any usable training slice included.
    sources
        The hospitals behind virtual sites, with what was found and excluded; the sites themselves otherwise.
    """

    root: Path
    phantoms: bool
    sites: dict[str, SiteData]
    sources: dict[str, SiteData]

    @property
    def training(self) -> tuple[str, ...]:
        """Names of the sites that can train."""
        return tuple(name for name, site in self.sites.items() if site.of("train"))

    def slices(self, split: str) -> list[Slice]:
        """Return the slices of a split over all sites."""
        return [item for site in self.sites.values() for item in site.of(split)]

    def digest(self) -> str:
        """Return a SHA-256 over the pictures that the sites hold, so that a resumed run is known to see the same data."""
        rows = [
            f"{name}|{item.patient}|{item.index}|{item.split}|{item.image_digest}"
            for name, site in self.sites.items()
            for item in site.slices
        ]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def masks_digest(self) -> str:
        """Return a SHA-256 over what is marked on the pictures, which are in `digest`."""
        marks = [item.marks for site in self.sites.values() for item in site.slices]
        return hashlib.sha256("\n".join(marks).encode()).hexdigest()


def find_hospitals(simulation: Simulation, study: Study, phantom_root: Path, progress: Progress | None = None) -> Hospitals:
    """Return the hospitals that the simulation asks for.

    Raises
    ------
    IcmoeError
        1xx where the data stop the run, 108 where no site can train, 210 where the virtual sites cannot be made, 502 where
        other phantoms are there.
    """
    root = phantom_root if simulation.data is None else Path(simulation.data)
    if simulation.data is None:
        draw = require_drawn_alike if root.exists() else write_phantoms
        draw(root, seed=simulation.phantom_seed, size_px=study.backbone.image_size)
    sites = sources = held_apart(read_sites(root, study.labels, progress=progress), simulation.held_out)
    if simulation.alpha is not None:
        sites = dirichlet_sites(sites, simulation.sites or len(sites), simulation.alpha, simulation.seeds[0])
    elif simulation.sites is not None:
        sites = repeat_sites(sites, simulation.sites)
    hospitals = Hospitals(root=root, phantoms=simulation.data is None, sites=sites, sources=sources)
    if not hospitals.training:
        faults = [fault for site in sites.values() for fault in site.exclusions][:20]
        raise IcmoeError(*faults, Fault(number=108, where=root.name, what="no site has a usable training image"))
    return hospitals


def digests_of(sites: dict[str, SiteData]) -> tuple[str, str]:
    """Return the digests of the sites' pictures and of what is marked on them."""
    hospitals = Hospitals(root=Path(), phantoms=False, sites=sites, sources=sites)
    return hospitals.digest(), hospitals.masks_digest()


def held_apart(sites: dict[str, SiteData], names: Sequence[str]) -> dict[str, SiteData]:
    """Return the sites, those named with their test patients alone.

    Raises
    ------
    IcmoeError
        210 for names that no site has.
    """
    unseen = choose_sites(sites, names) if names else {}
    return sites | {name: replace(site, slices=site.of("test")) for name, site in unseen.items()}


def make_sites(
    hospitals: Hospitals,
    studies: tuple[Study, ...],
    *,
    cache: FeatureCache,
    state_folder: Path,
    simulation: Simulation,
) -> tuple[Participant, ...]:
    """Return the training sites and, last, one that holds all data, for the pooled reference.

    The pooled site takes as many steps per round as all sites together.
    """

    def site(name: str, train: tuple[Slice, ...], val: tuple[Slice, ...], steps: int | None) -> Participant:
        return Participant(
            name=name,
            studies=studies,
            train=train,
            val=val,
            cache_folder=cache.folder,
            state_folder=state_folder,
            device=simulation.device,
            exact_counts=simulation.exact_counts,
            share_summary=True,
            steps_per_round=steps,
        )

    data: Mapping[str, SiteData] = {name: hospitals.sites[name] for name in hospitals.training}
    single = tuple(site(name, item.of("train"), item.of("val"), None) for name, item in data.items())
    training = studies[0].training
    steps = sum(steps_of(len(one.train), training.batch_size, training.local_epochs) for one in single)
    # Repeated sites share their slices; pooled data hold each of them once.
    everything = tuple(dict.fromkeys(item for one in single for item in one.train))
    val = tuple(dict.fromkeys(item for one in single for item in one.val))
    return (*single, site(POOLED, everything, val, steps))
