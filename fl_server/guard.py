"""Guarded aggregation: only updates that are whole, in bounds and new reach the wrapped strategy.

Per update: it answers this round's message to this node, holds the study's tensors in their shapes and types, finite, with
a size that the site announced, usage on the simplex, a norm below the study's bound and, from three updates on, not far
above the round's median; its bytes are none that the site sent before. What fails is refused by number with value and
limit and written to the audit log, and the round goes on without it. A site refused in three rounds in a row sits out
until a person lifts it.

Under [privacy.server] an update is not compared with the others: whether one site's update counts must not depend on
another site (`fl_server.private`), and clipping bounds it anyway.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fl_server.private import norm_of
from fl_server.replies import Refusal, Update, parse_update, require_finite, site_fault
from fl_server.round_strategy import RoundReport, RoundStrategy, State, unheard
from fl_server.wrapping import Wrapping
from icmoe.errors import Fault
from icmoe.packing import tensors_digest
from icmoe.study import Study

UNREADABLE = 504
"""Stands in the place of an update that could not be read at all (`fl_server.arriving`)."""
MOST_REFUSALS = 3
LEAST_COMPARED = 3
"""Of two updates of different norm neither is the odd one."""
SIZE_FACTOR = 2
"""A site's n_k may grow to this times what it announced when the run began."""
MOST_SEEN = 256
"""Digests remembered per site."""
MEMORY = "guard.memory"

Note = Callable[[str, Mapping[str, Any]], object]


@dataclass(slots=True)
class Memory:
    """What the guard knows from earlier rounds; part of the checkpoint.

    Parameters
    ----------
    refused
        By site: rounds in a row in which its update was refused, and the last of them.
    seen
        By site: digests of its updates that were used, in order.
    """

    refused: dict[str, tuple[int, int]] = field(default_factory=dict)
    seen: dict[str, list[str]] = field(default_factory=dict)

    def sits_out(self, site: str) -> bool:
        """Return whether the site is neither asked nor heard."""
        return self.refused.get(site, (0, 0))[0] >= MOST_REFUSALS

    def sitting_out(self) -> list[str]:
        """Return the sites that sit out, by name."""
        return sorted(filter(self.sits_out, self.refused))

    def refuse(self, site: str, server_round: int) -> None:
        """Count a refusal, once per round however often the round is tried."""
        count, last = self.refused.get(site, (0, 0))
        if last != server_round:
            self.refused[site] = (count + 1, server_round)

    def use(self, site: str, digest: str) -> None:
        """Remember an update that was used."""
        self.refused.pop(site, None)
        self.seen[site] = [*self.seen.get(site, []), digest][-MOST_SEEN:]

    def lift(self, site: str, after_round: int) -> bool:
        """Let a site in again unless it was refused later than that; return whether it sat out."""
        out = self.sits_out(site) and self.refused[site][1] <= after_round
        if out:
            del self.refused[site]
        return out

    def packed(self) -> State:
        """Return the memory as an array of bytes, for the checkpoint."""
        text = json.dumps({"refused": self.refused, "seen": self.seen}, sort_keys=True)
        return {MEMORY: np.frombuffer(text.encode(), dtype=np.uint8)}

    @staticmethod
    def unpacked(state: State) -> Memory:
        """Return the memory of a checkpoint, an empty one where it holds none."""
        values = json.loads(state[MEMORY].tobytes()) if MEMORY in state else {"refused": {}, "seen": {}}
        return Memory({site: (count, last) for site, (count, last) in values["refused"].items()}, values["seen"])


@dataclass(frozen=True, slots=True)
class _Candidate:
    reply: Message
    update: Update
    norm: float
    digest: str


class Guard(Wrapping):
    """Let only sound updates through to the wrapped strategy, and none below the quorum.

    Parameters
    ----------
    inner
        Any strategy of this package.
    study
        Bounds, quorum, tensors.
    sites
        Names by node.
    sizes
        Announced n_k by name; a site without one is not held to it.
    note
        Called with each event and its values, for the audit log.
    lifted
        Returns, by site, the round after which a person let it in again.
    """

    def __init__(
        self,
        inner: RoundStrategy,
        study: Study,
        sites: Mapping[int, str],
        sizes: Mapping[str, int] | None = None,
        *,
        note: Note = unheard,
        lifted: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        super().__init__(inner)
        self.study, self.sites, self.sizes = study, sites, {} if sizes is None else sizes
        self.memory, self._note, self._lifted = Memory(), note, lifted
        self._round, self._asked = 0, list[Message]()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Return the wrapped strategy's messages without those to sites that sit out; a round may be asked more than once."""
        for site, after_round in sorted(self._lifted().items()):
            if self.memory.lift(site, after_round):
                self._note("lifted", {"site": site, "round": server_round})
        messages = [
            message
            for message in super().configure_train(server_round, arrays, config, grid)
            if not self.memory.sits_out(self.sites.get(message.metadata.dst_node_id, ""))
        ]
        self._asked = [*(self._asked if server_round == self._round else []), *messages]
        self._round = server_round
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return what the wrapped strategy makes of the sound updates, or None below the quorum: nothing moves then."""
        faults = [
            Fault(number=514, where=site, value=f"{MOST_REFUSALS} rounds refused", did="It was not asked.")
            for site in self.memory.sitting_out()
            if site in self.sites.values()
        ]
        candidates, errors = self._candidates(server_round, replies)
        sound, refused = self._compared(candidates)
        faults += errors + refused
        for fault in refused:
            self.memory.refuse(fault.where, server_round)
        for fault in [*errors, *refused]:
            if fault.number in {504, 511, 512, 513}:
                self._note("refused", {"round": server_round, "site": fault.where, "number": fault.number, "said": str(fault)})
        self.report = RoundReport([one.update.without_tensors() for one in sound], faults)
        if len(sound) < self.study.quorum:
            return None, None
        arrays, metrics = self.inner.aggregate_train(server_round, [one.reply for one in sound])
        self.report.weights, self.report.privacy = self.inner.report.weights, self.inner.report.privacy
        for one in sound if arrays is not None else []:
            self.memory.use(one.update.site, one.digest)
        return arrays, metrics

    def _candidates(self, server_round: int, replies: Iterable[Message]) -> tuple[list[_Candidate], list[Fault]]:
        """Return, in site order, what each site sent for this round where it can be read, and a fault for all else."""
        found: dict[str, list[_Candidate]] = defaultdict(list)
        faults: list[Fault] = []
        asked = {(message.metadata.dst_node_id, message.metadata.message_id) for message in self._asked}
        for reply in replies:
            site = self.sites.get(reply.metadata.src_node_id, "")
            if (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) not in asked:
                if not reply.has_error():
                    faults.append(Fault(number=513, where=site, did="It was not used; the site may take part in this round."))
            elif reply.has_error():
                faults.append(site_fault(site, reply.error.reason))
                if faults[-1].number == UNREADABLE:
                    self.memory.refuse(site, server_round)
            elif not self.memory.sits_out(site):
                try:
                    candidate = self._checked(reply, site)
                    found[site].append(candidate)
                except Refusal as refusal:
                    self.memory.refuse(site, server_round)
                    faults.append(refusal.fault(site))
        singles = {site: one for site, one in found.items() if len({candidate.digest for candidate in one}) == 1}
        for site in sorted(set(found) - set(singles)):
            self.memory.refuse(site, server_round)
            what = "site sent two different updates for one round"
            faults.append(Fault(number=512, where=site, what=what, did="Neither was used."))
        return [singles[site][0] for site in sorted(singles)], faults

    def _checked(self, reply: Message, site: str) -> _Candidate:
        """Return an update that is sound by itself."""
        update = parse_update(reply, site, self.study, self._current, values=False)
        loaded = update.loaded()  # once, for all that looks at its values
        require_finite(loaded)
        most = SIZE_FACTOR * self.sizes.get(site, update.size)
        if update.size > most:
            raise Refusal("its size is far above what the site announced", str(update.size), f"at most {most}")
        return _Candidate(reply, update, norm_of(loaded.tensors), tensors_digest(loaded.tensors))

    def _compared(self, candidates: list[_Candidate]) -> tuple[list[_Candidate], list[Fault]]:
        """Return the candidates that pass the bounds on the norm and are new, and a fault for each of the others."""
        bounds = self.study.guard
        norms = [one.norm for one in candidates if one.norm > 0.0]
        limit = bounds.largest_norm
        if len(norms) >= LEAST_COMPARED and self.study.privacy.server is None:
            limit = min(limit, bounds.median_factor * median(norms))
        sound, faults, did = list[_Candidate](), list[Fault](), "The round went on without it."
        for one in candidates:
            site = one.update.site
            if one.norm > limit:
                value = f"norm {one.norm:.4g}"
                faults.append(Fault(number=511, where=site, value=value, limit=f"at most {limit:.4g}", did=did))
            elif one.norm > 0.0 and one.digest in self.memory.seen.get(site, []):
                faults.append(Fault(number=512, where=site, value=one.digest[:12], did=did))
            else:
                sound.append(one)
        return sound, faults

    def state(self) -> State:
        """Return the guard's memory beside the wrapped strategy's state."""
        return {**super().state(), **self.memory.packed()}

    def load_state(self, state: State) -> None:
        """Take both back from a checkpoint."""
        super().load_state(state)
        self.memory = Memory.unpacked(state)
