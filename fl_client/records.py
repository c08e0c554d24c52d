"""A site's two records, ledger and audit log, each of which shows what is missing from the other.

The ledger keeps number and hash of the audit log's last line; the audit log has a line for each entry of the ledger, with
its hash. A folder restored as a whole agrees with itself: that it is old, or was written
anew without the site's key, shows against the coordinator's receipts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_client import audit, ledger
from fl_client.audit import Signatures, check_signatures, read_log, require_line
from fl_client.ledger import LOCK_S, Book, Entry, read_ledger
from fl_client.signing import Signer, fingerprint_of
from icmoe import chain
from icmoe.errors import NOTHING_SENT, Fault, IcmoeError
from icmoe.receipts import AUDIT_KEY, LEDGER_KEY, Head, numbers_of

COORDINATOR = "the coordinator's receipt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Where a site's records are and who signs them.

    Parameters
    ----------
    state
        The site's state folder.
    site
        Its name.
    signer
        Its key; lines are not signed where absent.
    deadline_s
        Seconds to wait for another process.
    """

    state: Path
    site: str
    signer: Signer | None = None
    deadline_s: float = LOCK_S

    def write(self, event: str, values: Mapping[str, Any]) -> Head:
        """Add a line to the audit log, let the ledger know of it, and return its number and hash.

        Raises
        ------
        IcmoeError
            321 where the audit log is damaged or lacks lines, 412, 414 or 415 where the ledger cannot be used, 205, 306 or
            307 where the key cannot.
        """
        head = self.add(event, values)
        self.keep(head)
        return head

    def add(self, event: str, values: Mapping[str, Any]) -> Head:
        """Add a line to the audit log, of which the ledger is to be told by `keep`, and return its number and hash.

        Raises
        ------
        IcmoeError
            As `write`.
        """
        line = audit.record(self.state, event, values, signer=self.signer, known=self.book().audit)
        return Head(line["line"], line["hash"])

    def keep(self, head: Head) -> None:
        """Let the ledger know of the audit log's last line.

        Raises
        ------
        IcmoeError
            412, 414 or 415 where the ledger cannot be used.
        """
        ledger.keep_audit_head(self.state, self.site, head, deadline_s=self.deadline_s)

    def book(self) -> Book:
        """Return the ledger.

        Raises
        ------
        IcmoeError
            412, 414 or 415 where it cannot be used.
        """
        return read_ledger(self.state, self.site, deadline_s=self.deadline_s)

    def spend(self, make: Callable[[Book], Entry], receipt: Head | None = None) -> Entry:
        """Write an entry into the ledger and a line on it into the audit log, after comparing the two with each other.

        Parameters
        ----------
        make
            As in `ledger.spend`.
        receipt
            The coordinator's, where it sent one.

        Raises
        ------
        IcmoeError
            As `agreement` and `write`; 413 where the receipt is for entries that the ledger lacks; what `make` raises.
        """
        require_receipt(self.agreement()[0], receipt, self.state / ledger.FILE)
        entry = ledger.spend(self.state, self.site, make, deadline_s=self.deadline_s)
        about = {"study": entry.study, "name": entry.name, "kind": entry.kind, "round": entry.round}
        self.write("spent", {**about, "entry": entry.count, "entry_hash": entry.hash, "releases": entry.releases})
        return entry

    def require(self, receipt: Head | None, line: Head | None = None) -> None:
        """Refuse records that do not agree with each other or do not go on from what the coordinator was told.

        Parameters
        ----------
        receipt, line
            The coordinator's receipts for the ledger and for the audit log, where it sent any.

        Raises
        ------
        IcmoeError
            As `agreement`; 413 where the receipt is for entries that the ledger lacks, 321 where the log lacks the line.
        """
        book, lines = self.agreement()
        require_receipt(book, receipt, self.state / ledger.FILE)
        if line is not None and line.count:
            require_line(self.state, line, len(lines), lines[line.count - 1] if line.count <= len(lines) else None, COORDINATOR)

    def agreement(self) -> tuple[Book, list[chain.Entry]]:
        """Return ledger and audit log after checking both chains and comparing them.

        Raises
        ------
        IcmoeError
            321 where the log is damaged or lacks lines that the ledger knows, 413 where the ledger lacks entries of which the
            log speaks, 412, 414 or 415 where the ledger cannot be used.
        """
        known = self.book().audit
        lines = read_log(self.state)
        require_line(self.state, known, len(lines), lines[known.count - 1] if 0 < known.count <= len(lines) else None)
        book = self.book()  # after the log: another process may have spent and written meanwhile
        spent = [Head(line["entry"], line["entry_hash"]) for line in lines if line["event"] == "spent"]
        for head in spent:
            require_receipt(book, head, self.state / ledger.FILE)
        return book, lines

    def verify(self) -> tuple[Book, list[chain.Entry], Signatures]:
        """Check everything: both chains, each against the other, and every signature.

        Raises
        ------
        IcmoeError
            As `agreement`; 321 where a signature does not hold.
        """
        book, lines = self.agreement()
        return book, lines, check_signatures(self.state, lines)

    def foreign_key(self, signatures: Signatures) -> Fault | None:
        """Return what is wrong where the last lines were signed by another key than the site's present one."""
        if self.signer is None or not signatures.keys:
            return None
        last, present = fingerprint_of(signatures.keys[-1][1]), fingerprint_of(self.signer.public())
        if last == present:
            return None
        what = "last line of the audit log is signed by another key than the site's"
        todo = "After init --new-key it is the old one until the next line is written; otherwise find out who changed the log."
        return Fault(number=321, where=str(self.state / audit.LOG), what=what, value=last, limit=present, todo=todo)

    def heads(self, line: Head) -> dict[str, list[int]]:
        """Return how far the records have come, as an update carries it; `line` is the audit log's last line."""
        return {LEDGER_KEY: numbers_of(self.book().head), AUDIT_KEY: numbers_of(line)}


def require_receipt(book: Book, receipt: Head | None, path: Path) -> None:
    """Refuse a ledger that does not go on from an entry that is known to have been in it.

    Raises
    ------
    IcmoeError
        413 where it does not.
    """
    if receipt is None or not receipt.count:
        return
    if book.head.count < receipt.count:
        value, limit = f"{book.head.count} entries", f"at least {receipt.count}"
        raise IcmoeError(Fault(number=413, where=str(path), value=value, limit=limit, did=NOTHING_SENT))
    if book.entries[receipt.count - 1].hash != receipt.digest:
        what = "ledger does not go on from what the site has sent"
        raise IcmoeError(Fault(number=413, where=str(path), what=what, value=f"entry {receipt.count}", did=NOTHING_SENT))
