"""The only way out of a site: every answer, refusals too, is made here, held against its manifest and written down first.

No other module of this package makes a message or a record of one; a test reads the sources for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fl_client.manifest import Outgoing, manifest_of
from fl_client.participant import Participant
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import state_digest
from icmoe.messages import CONFIG, ERROR_CODE, NUMBERS, UPDATE, error_reason
from icmoe.packing import HEADER_BYTES, NUMPY, PACKED, packed_bytes
from icmoe.quantise import EXPONENT
from icmoe.receipts import Head
from icmoe.study import Study

log = logging.getLogger("fl_client")

MANTISSA_BITS = 23


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a message asks of a site, after it was checked.

    Parameters
    ----------
    site
        The site.
    study
        Its own copy of the study.
    kind
        "site", "summary", "train" or "evaluate".
    round_number
        Round of the study; 0 for a query.
    message
        As it came.
    receipt, audit_receipt
        The coordinator's for the site's ledger and for its audit log, where it sent them.
    """

    site: Participant
    study: Study
    kind: str
    round_number: int
    message: Message
    receipt: Head | None = None
    audit_receipt: Head | None = None

    def about(self) -> dict[str, str | int]:
        """Return what the audit log says of it; the run's number is the same at the coordinator."""
        study, run = self.study, str(self.message.metadata.run_id)
        return {"study": study.digest, "name": study.name, "kind": self.kind, "round": self.round_number, "run": run}


def release(request: Request, outgoing: Outgoing) -> Message:
    """Return the message that carries an answer, after comparing it with its manifest and writing it down.

    Parameters
    ----------
    request
        What was asked.
    outgoing
        The answer. An update in float32 is rounded here, where the site's policy says so; one in int8 was before, since its
        rounding is made up for, and is held to it here.

    Raises
    ------
    IcmoeError
        416 where the answer is anything else than the study declares; the site's log says what. As `Records.write` where
        it cannot be written down.
    """
    site = request.site
    rounded = _rounded(outgoing, site.policy.mantissa_bits)
    _require_declared(request, rounded)
    if site.records is None:
        return _message(rounded, request.message)
    written = {**(rounded.numbers or {}), **(rounded.texts or {})}
    digest = state_digest(rounded.tensors) if rounded.tensors is not None else None
    line = site.records.write("sent", {**request.about(), "digest": digest, "numbers": written})
    if rounded.numbers is not None:
        rounded = replace(rounded, numbers={**rounded.numbers, **site.records.heads(line)})
    return _message(rounded, request.message)


def decline(number: int, message: Message, request: Request | None) -> Message:
    """Return the message that says by number why there is no answer; nothing but the number and its title leaves.

    Parameters
    ----------
    number
        Of the error.
    message
        What was asked.
    request
        The same, where it got so far that site and study are known: then the audit log has a line on it.
    """
    if request is not None and request.site.records is not None:
        try:
            request.site.records.write("declined", {**request.about(), "number": number})
        except (IcmoeError, OSError) as error:
            log.error("%s", error)  # the number leaves all the same: without it the coordinator would wait
    return Message(Error(ERROR_CODE + number, error_reason(number)), reply_to=message)


def rounded_to(tensor: Tensor, bits: int) -> Tensor:
    """Return float32 values rounded to `bits` bits of mantissa, 1 to 23, ties away from zero; what is not finite stays.

    The relative error is at most 2^-(bits + 1). A value that would round to infinity is cut off instead.
    """
    if bits >= MANTISSA_BITS:
        return tensor
    dropped = MANTISSA_BITS - bits
    pattern = tensor.contiguous().view(torch.int32)
    nearest = ((pattern + (1 << (dropped - 1))) >> dropped << dropped).view(torch.float32)
    cut = (pattern >> dropped << dropped).view(torch.float32)
    return torch.where(torch.isfinite(tensor), torch.where(torch.isfinite(nearest), nearest, cut), tensor)


def _require_declared(request: Request, outgoing: Outgoing) -> None:
    site = request.site
    bound = site.policy.largest_update_norm
    manifest = manifest_of(request.study, site.name, request.kind, exact=site.exact_counts, largest_norm=bound)
    faults = [*manifest.faults(outgoing), *_too_fine(outgoing, site.policy.mantissa_bits)]
    if not faults:
        return
    if site.records is not None:
        site.records.write("held back", {**request.about(), "why": faults[:20]})
    did = "It was held back; nothing was sent."
    raise IcmoeError(*(Fault(number=416, where=f"{site.name}, {request.kind}", value=fault, did=did) for fault in faults[:20]))


def _too_fine(outgoing: Outgoing, bits: int) -> Iterator[str]:
    """Yield what of an update in int8 has more bits than the site lets leave."""
    for name, tensor in (outgoing.tensors or {}).items():
        whole = isinstance(tensor, Tensor) and tensor.dtype == torch.int8 and not name.endswith(EXPONENT)
        if whole and not torch.equal(rounded_to(tensor.float(), bits), tensor.float()):
            yield f"{name} has more than {bits} bits of mantissa"


def _rounded(outgoing: Outgoing, bits: int) -> Outgoing:
    if outgoing.tensors is None or bits >= MANTISSA_BITS:
        return outgoing
    floats = {name: one for name, one in outgoing.tensors.items() if isinstance(one, Tensor) and one.dtype == torch.float32}
    return replace(outgoing, tensors={**outgoing.tensors, **{name: rounded_to(one, bits) for name, one in floats.items()}})


def _message(outgoing: Outgoing, asked: Message) -> Message:
    content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    if outgoing.tensors is not None:
        packed = packed_bytes({name: tensor.numpy() for name, tensor in outgoing.tensors.items()})
        content[UPDATE] = record = ArrayRecord()  # the audit log has its digest, name by name
        record[PACKED] = Array("uint8", (len(packed) - HEADER_BYTES,), NUMPY, packed)
    if outgoing.numbers is not None:
        content[NUMBERS] = MetricRecord(dict(outgoing.numbers))
    if outgoing.texts is not None:
        content[CONFIG] = ConfigRecord(dict(outgoing.texts))
    return Message(RecordDict(content), reply_to=asked)
