"""What can happen to a study, and what a seed draws of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import clocks, disks, kills, links
from .scene import NAMES, ROUNDS, Scene

Heal = Callable[[], None]
HELD_S = (15.0, 90.0)
FROZEN = ("fl_client.supernode ", "/flwr-clientapp ")
SHIFTS = ("+1h", "-1h")
POISONS = (
    *("NaN", "Inf", "1e30", "sign flip x10", "wrong shape", "missing key", "extra key", "float64"),
    *("zero weight", "negative weight", "usage off the simplex", "replay"),
)
LIAR = NAMES[-1]
POISONED_ROUNDS = (2, 3, 5, 6, 8, 9)  # after three refusals in a row a site sits out

COORDINATOR, SITES, BOTH = "coordinator kills", "site kills", "kills of both"
MACHINES, MALICIOUS = "lines and machines", "malicious site"
CYCLE = (COORDINATOR, SITES, MACHINES, MALICIOUS, BOTH, MALICIOUS)
CUT, BAD, SLOW, FROZE, FULL, CLOCK = "link cut", "5% loss, 200 ms", "1 MB/s", "frozen process", "full disk", "clock wrong by 1 h"
KINDS: dict[str, Sequence[str]] = {
    COORDINATOR: tuple(kills.COORDINATOR),
    SITES: tuple(kills.SITE),
    MACHINES: (CUT, BAD, SLOW, FROZE, FULL, CLOCK),
    MALICIOUS: POISONS,
}
DECKS = {COORDINATOR: (COORDINATOR,), SITES: (SITES,), BOTH: (COORDINATOR, SITES), MACHINES: (MACHINES,), MALICIOUS: (MALICIOUS,)}
PER_STUDY = {COORDINATOR: 8, SITES: 8, BOTH: 8, MACHINES: 6, MALICIOUS: len(POISONED_ROUNDS)}


@dataclass(frozen=True)
class Event:
    """One thing that happens.

    Parameters
    ----------
    kind
        What.
    site
        Where; empty at the coordinator.
    after_round
        Committed round after which it happens.
    share
        Of a calm round's length, after that commit.
    hold_s
        Seconds until it is healed, where that is not of itself.
    chance
        Seed of what is drawn within it.
    """

    kind: str
    site: str
    after_round: int
    share: float
    hold_s: float
    chance: int


@dataclass(frozen=True)
class Plan:
    """A study and what happens to it."""

    index: int
    family: str
    events: tuple[Event, ...]

    @property
    def name(self) -> str:
        return f"s{self.index:03d}-{self.family.replace(' ', '-')}"


def deck(kinds: Sequence[str], chance: random.Random) -> Iterator[str]:
    """Each kind once before any comes twice."""
    while True:
        yield from chance.sample(kinds, len(kinds))


def plans(seed: int, rounds: int = ROUNDS, cycle: Sequence[str] = CYCLE) -> Iterator[Plan]:
    """Studies without end, fixed by the seed."""
    decks = {family: deck(KINDS[family], random.Random(f"{seed}/{family}")) for family in KINDS}
    for index in range(10**6):
        family = cycle[index % len(cycle)]
        chance = random.Random(f"{seed}/{index}")
        most = min(PER_STUDY[family], rounds - 2)
        after = sorted(chance.sample(range(1, rounds - 1), most))
        after = [number - 1 for number in POISONED_ROUNDS if number < rounds] if family == MALICIOUS else after
        turns = [DECKS[family][number % len(DECKS[family])] for number in range(len(after))]
        drawn = tuple(_event(next(decks[turn]), turn, number, chance) for turn, number in zip(turns, after, strict=True))
        yield Plan(index, family, drawn)


def _event(kind: str, family: str, after_round: int, chance: random.Random) -> Event:
    site = {COORDINATOR: "", MALICIOUS: LIAR}.get(family, chance.choice(NAMES))
    return Event(kind, site, after_round, chance.random(), chance.uniform(*HELD_S), chance.randrange(2**31))


def why_not(scene: Scene, kind: str) -> str:
    """Why this cannot happen on this machine; empty where it can."""
    if kind in {CUT, BAD, SLOW} and not scene.cables:
        return scene.cannot["namespaces"]
    return {SLOW: links.why_not_slow, CLOCK: clocks.why_not, FULL: lambda: scene.cannot.get("disks", "")}.get(kind, str)()


def strike(scene: Scene, event: Event) -> Heal | None:
    """Let it happen; returns what ends it."""
    site, chance = event.site, random.Random(event.chance)
    if event.kind in kills.COORDINATOR or event.kind in kills.SITE:
        kills.kill(scene, event.kind, site)
        return None
    if event.kind == FROZE:
        pids = kills.freeze(scene, site, chance.choice(FROZEN))
        return lambda: kills.thaw(pids)
    if event.kind == FULL:
        disks.fill(scene.site_folder(site))
        return lambda: disks.make_room(scene.site_folder(site))
    if event.kind == CLOCK:
        clocks.set_clock(scene.clock(site), chance.choice(SHIFTS))
        return lambda: clocks.set_clock(scene.clock(site), clocks.RIGHT)
    cable = scene.cables[site]
    if event.kind == BAD:
        return links.BadLine(cable, event.chance).end
    begin, end = {CUT: (links.cut, links.heal), SLOW: (links.slow, links.fast)}[event.kind]
    begin(cable)
    return lambda: end(cable)
