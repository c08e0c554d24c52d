"""How far a site's records have come, in numbers that travel with an update, and the coordinator's receipt for them.

A site's ledger and audit log are chains: each entry holds the digest of the one before. Count and digest of the last entry
therefore speak for all. A site sends both with each update; the coordinator keeps the furthest of each that it saw and hands
them back as receipts, from which a site notices that its records are older than what it once sent, or were written anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from icmoe.chain import START

LEDGER_KEY, AUDIT_KEY = "ledger", "audit"
RECEIPT_KEY, AUDIT_RECEIPT_KEY = "receipt", "audit_receipt"
WORDS, WORD_BITS = 8, 32
MOST = 10**15  # fifteen digits, as a receipt has at most
_RECEIPT = re.compile(r"(0|[1-9][0-9]{0,14}):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Head:
    """The last entry of a chain.

    Parameters
    ----------
    count
        Entries, 0 for an empty chain.
    digest
        SHA-256 of the last entry, 64 hexadecimal digits; zeros for an empty chain.
    """

    count: int
    digest: str


EMPTY = Head(0, START)


def numbers_of(head: Head) -> list[int]:
    """Return the head as nine whole numbers: the count, then the digest in words of 32 bits, the first ones first.

    >>> numbers_of(Head(3, "00000001" + "0" * 55 + "f"))
    [3, 1, 0, 0, 0, 0, 0, 0, 15]
    """
    whole = int(head.digest, 16)
    return [head.count, *(whole >> WORD_BITS * place & (2**WORD_BITS - 1) for place in reversed(range(WORDS)))]


def head_of(numbers: object) -> Head | None:
    """Return the head that `numbers_of` made, None for anything else."""
    if not isinstance(numbers, Sequence) or isinstance(numbers, str | bytes) or len(numbers) != WORDS + 1:
        return None
    if not all(type(number) is int and 0 <= number < (2**WORD_BITS if place else MOST) for place, number in enumerate(numbers)):
        return None
    count, *words = numbers
    return Head(count, "".join(f"{word:08x}" for word in words))


def receipt_text(head: Head) -> str:
    """Return the receipt for a head as a message carries it, "count:digest"."""
    return f"{head.count}:{head.digest}"


def receipt_of(text: object) -> Head | None:
    """Return the head that a receipt is for, None for anything that is no receipt."""
    match = _RECEIPT.fullmatch(text) if isinstance(text, str) else None
    return Head(int(match[1]), match[2]) if match else None
