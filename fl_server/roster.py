"""Who takes part: the connected nodes, each under the name that the coordinator registered with its key."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fl_server.exchanging import ask
from fl_server.replies import site_fault
from icmoe.errors import Fault, IcmoeError, print_faults
from icmoe.messages import CONFIG, MOST_IMAGES, SITE_KEY, SLICES_KEY, STUDY_KEY
from icmoe.study import Study

# An introduction is a name and a number: a site that needs longer than a process start would hold up all others.
INTRODUCTION_S = 300.0
NOT_NOW = 320
"""What a site answers outside its hours, which come again while the run lasts."""


@dataclass(frozen=True, slots=True)
class Roster:
    """Who takes part.

    Parameters
    ----------
    sites
        Name by node.
    sizes
        Announced n_k by name.
    turned_away
        Nodes that asked in vain.
    """

    sites: dict[int, str]
    sizes: dict[str, int]
    turned_away: set[int] = field(default_factory=set, compare=False)


def online(grid: Grid) -> dict[int, str]:
    """Return the registered names of the nodes that are connected now, by node; empty names in a simulation."""
    return {node.node_id: node.name for node in grid.get_nodes() if node.status == "online"}


def await_online(
    grid: Grid, count: int, *, deadline_s: float, poll_s: float, among: Mapping[int, str] | None = None
) -> dict[int, str]:
    """Return the connected nodes as soon as `count` of them are there.

    Parameters
    ----------
    grid
        Flower's Grid.
    count
        Nodes to wait for.
    deadline_s
        Seconds after which the wait ends.
    poll_s
        Seconds between looks.
    among
        Nodes that count; all where absent.

    Raises
    ------
    IcmoeError
        501 where fewer are there at the deadline.
    """
    ends = time.monotonic() + deadline_s
    while True:
        nodes = {node: name for node, name in online(grid).items() if among is None or node in among}
        if len(nodes) >= count:
            return nodes
        if time.monotonic() > ends:
            raise IcmoeError(Fault(number=501, what="too few sites connected", value=str(len(nodes)), limit=f"at least {count}"))
        time.sleep(poll_s)


def meet(grid: Grid, count: int, study: Study, *, trust_answers: bool = False, poll_s: float = 1.0) -> Roster:
    """Return the sites behind the connected nodes; one that cannot be used is left out and named, and others are waited for.

    Parameters
    ----------
    grid
        Flower's Grid.
    count
        Sites without which nothing is started.
    study
        Its digest is the question, its deadline bounds the wait.
    trust_answers
        Whether a node without a registered name goes by its own answer: in a simulation only.
    poll_s
        Seconds between looks.

    Raises
    ------
    IcmoeError
        501 where fewer than `count` can be used until the deadline, with the reason for each of the others.
    """
    ends, roster, asked = time.monotonic() + study.deadline_s, Roster({}, {}), set[int]()
    names, faults = await_online(grid, count, deadline_s=study.deadline_s, poll_s=poll_s), list[Fault]()
    while True:
        if new := {node: name for node, name in names.items() if node not in asked}:
            found = _introduced(grid, new, roster, study, trust_answers=trust_answers, poll_s=poll_s)
            asked, faults = asked | new.keys(), faults + found
            print_faults(found)
        if len(roster.sites) >= count:
            return roster
        if trust_answers or time.monotonic() > ends:  # in a simulation nobody else comes
            what = "too few sites can take part"
            raise IcmoeError(*faults, Fault(number=501, what=what, value=str(len(roster.sites)), limit=f"at least {count}"))
        time.sleep(poll_s)
        names = online(grid)


def welcome(grid: Grid, roster: Roster, study: Study, *, poll_s: float = 1.0) -> list[str]:
    """Enter the sites that connected since, or refused for the hour; return their names.

    A node that was turned away for anything else is not asked again in this run.

    Parameters
    ----------
    grid
        Flower's Grid.
    roster
        Who takes part so far; changed in place, and with it what the strategy and its wrappers know.
    study
        As for `meet`.
    poll_s
        Seconds between looks.
    """
    known = roster.sites.keys() | roster.turned_away
    names = {node: name for node, name in online(grid).items() if node not in known}
    if not names:
        return []
    before = set(roster.sizes)
    print_faults(_introduced(grid, names, roster, study, trust_answers=False, poll_s=poll_s))
    return sorted(set(roster.sizes) - before)


def _introduced(
    grid: Grid, names: Mapping[int, str], roster: Roster, study: Study, *, trust_answers: bool, poll_s: float
) -> list[Fault]:
    """Ask nodes who they are and enter them; return why the others cannot take part."""
    content = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: study.digest})})
    questions = [Message(content, dst_node_id=node, message_type="query.site") for node in names]
    replies = ask(grid, questions, deadline_s=min(study.deadline_s, INTRODUCTION_S), poll_s=poll_s)
    answers = {reply.metadata.src_node_id: reply for reply in replies}
    faults: list[Fault] = []
    for node, registered in sorted(names.items(), key=lambda item: (item[1], item[0])):
        try:
            name, size = _introduction(answers.get(node), registered, trust_answers=trust_answers)
            if name in roster.sizes:
                raise IcmoeError(Fault(number=301, where=name, what="two nodes go by one name", did="The second is not asked."))
            roster.sites[node], roster.sizes[name] = name, size
        except IcmoeError as error:
            if error.faults[0].number != NOT_NOW:
                roster.turned_away.add(node)
            faults += error.faults
    return faults


def _introduction(reply: Message | None, registered: str, *, trust_answers: bool) -> tuple[str, int]:
    """Return a site's name and size, or say why it cannot take part."""
    did = "The site is not asked."
    if not registered and not trust_answers:
        raise IcmoeError(Fault(number=331, what="node has no registered name", did=did))
    if reply is None:
        raise IcmoeError(Fault(number=332, where=registered, what="site did not introduce itself in time", did=did))
    if reply.has_error():
        raise IcmoeError(site_fault(registered, reply.error.reason))
    about = reply.content.config_records.get(CONFIG, ConfigRecord())
    name, size = about.get(SITE_KEY), about.get(SLICES_KEY)
    if not isinstance(name, str) or type(size) is not int or not 1 <= size <= MOST_IMAGES:
        what = "a site introduced itself by something else than a name and a size"
        raise IcmoeError(Fault(number=301, where=registered, what=what, value=repr(name)[:40], did=did))
    if registered and name != registered:
        raise IcmoeError(Fault(number=331, where=registered, value=repr(name)[:40], limit=registered, did=did))
    return name, size
