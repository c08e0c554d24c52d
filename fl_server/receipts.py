"""Receipts for the sites' ledgers and audit logs: how far these had come at the last answer, handed back with each round.

A hospital that restored an old backup of its records would spend its privacy budget twice. It notices when a receipt is for
entries that its ledger does not have; an answer that falls behind the receipt it was given is refused here. Receipts are
kept across rounds, runs and studies, in one small file per site.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fl_server.grid import InFront
from icmoe.atomic import regular, write_atomically
from icmoe.errors import Fault, print_faults
from icmoe.locks import hold
from icmoe.messages import CONFIG, ERROR_CODE, NUMBERS, ROUND_KEY, error_reason
from icmoe.receipts import (
    AUDIT_KEY,
    AUDIT_RECEIPT_KEY,
    EMPTY,
    LEDGER_KEY,
    RECEIPT_KEY,
    Head,
    head_of,
    receipt_of,
    receipt_text,
)

LEDGER, AUDIT = ".receipt", ".audit"
"""Endings of the files with receipts for ledgers and for audit logs."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A message to a site that no answer came to yet: as much of it as an answer needs, its round and its receipt."""

    message: Message
    round: object
    receipt: Head


class Receipted(InFront):
    """Flower's Grid, with receipts in its training messages; a site without one yet gets none.

    Parameters
    ----------
    grid
        The Grid that sends and receives.
    sites
        Names by node.
    folder
        Where the receipts are kept; made where absent.
    """

    def __init__(self, grid: Grid, sites: Mapping[int, str], folder: Path) -> None:
        super().__init__(grid)
        self._sites, self._folder = sites, folder
        self._sent: dict[str, _Question] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send the messages, the training ones with the receipts of their sites."""
        asked = list(messages)
        given = [self._put_receipt(message) for message in asked]
        ids = list(self._grid.push_messages(asked))
        self._forget_before(asked)
        self._sent |= {
            number: _Question(_without_content(one), _round_of(one), head)
            for number, one, head in zip(ids, asked, given, strict=True)
        }
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies; one that is behind its receipt comes as an error."""
        return [self._taken(reply) for reply in self._grid.pull_messages(message_ids)]

    def _forget_before(self, asked: Iterable[Message]) -> None:
        """Forget what these sites were asked in other rounds: the guard takes no answer to it, silent sites would fill memory."""
        now = {message.metadata.dst_node_id: _round_of(message) for message in asked}
        self._sent = {
            number: question
            for number, question in self._sent.items()
            if now.get(question.message.metadata.dst_node_id, question.round) == question.round
        }

    def _put_receipt(self, message: Message) -> Head:
        """Put the site's receipts into the message itself, which others know by its identity, and return the ledger's."""
        if message.metadata.message_type != "train":
            return EMPTY
        site = self._sites.get(message.metadata.dst_node_id, "")
        heads = {RECEIPT_KEY: receipt(self._folder, site), AUDIT_RECEIPT_KEY: receipt(self._folder, site, AUDIT)}
        given = {key: receipt_text(head) for key, head in heads.items() if head != EMPTY}
        if given:
            config = ConfigRecord({**message.content.config_records[CONFIG], **given})
            message.content = RecordDict({**message.content, CONFIG: config})  # the old content may be shared with other sites
        return heads[RECEIPT_KEY]

    def _taken(self, reply: Message) -> Message:
        site = self._sites.get(reply.metadata.src_node_id, "")
        asked = self._sent.pop(reply.metadata.reply_to_message_id, None)
        head = _head_in(reply, LEDGER_KEY)
        if not site or reply.has_error():
            return reply
        if asked is not None and behind(head, asked.receipt):
            value = f"{head.count} entries" if head is not None else "no ledger"
            did = "Its answer was refused."
            fault = Fault(number=418, where=site, value=value, limit=f"at least {asked.receipt.count}", did=did)
            print_faults([fault])
            return Message(Error(ERROR_CODE + fault.number, error_reason(fault.number)), reply_to=asked.message)
        if head is not None:
            keep_receipt(self._folder, site, head)
        if (line := _head_in(reply, AUDIT_KEY)) is not None:
            keep_receipt(self._folder, site, line, AUDIT)
        return reply


def _without_content(message: Message) -> Message:
    """Return the message, by its identity, without the tensors that it carries."""
    bare = copy.copy(message)
    bare.content = RecordDict()
    return bare


def _round_of(message: Message) -> object:
    config = message.content.config_records.get(CONFIG)
    return message.metadata.message_type, None if config is None else config.get(ROUND_KEY)


def behind(head: Head | None, given: Head) -> bool:
    """Return whether an answer's ledger cannot go on from the receipt that was given with the question."""
    return given != EMPTY and (head is None or head.count < given.count or (head.count == given.count and head != given))


def receipt(folder: Path, site: str, kind: str = LEDGER) -> Head:
    """Return how far the records of a site had come; the empty head where there is no receipt, or none that can be read."""
    path = folder / f"{site}{kind}"
    return (receipt_of(path.read_text(encoding="utf-8", errors="replace")) if site and path.is_file() else None) or EMPTY


def keep_receipt(folder: Path, site: str, head: Head, kind: str = LEDGER) -> None:
    """Keep the further one of a site's receipt and this head; several studies may run at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a", opener=regular) as lock:
        hold(lock, name=folder)
        if head.count > receipt(folder, site, kind).count:
            write_atomically(folder / f"{site}{kind}", receipt_text(head).encode())


def _head_in(reply: Message, key: str) -> Head | None:
    numbers = reply.content.metric_records.get(NUMBERS) if reply.has_content() else None
    value = None if numbers is None else numbers.get(key)
    return head_of(list(value)) if isinstance(value, list) else None
