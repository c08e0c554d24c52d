"""A site's ledger and audit log, filled and harmed by the tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fl_client.budget import Budget, releases_of, require_room, round_spending
from fl_client.credentials import make_node_key
from fl_client.ledger import Book, Entry, new_entry
from fl_client.records import Records
from fl_client.signing import Signer
from icmoe.receipts import Head
from icmoe.study import Study

PRIVACY = {
    "noise_multiplier": 2.0,
    "delta": 1e-3,
    "patients": 20,
    "sample_rate": 0.2,
    "steps": 5,
    "accountant": "rdp",
}
"""Of the tests' private studies."""


def signed_records(state: Path, key: Path, site: str = "Alder", deadline_s: float = 20.0) -> Records:
    """Return the records of a site that signs."""
    if not key.exists():
        make_node_key(key)
    return Records(state=state, site=site, signer=Signer(key), deadline_s=deadline_s)


def budget_of(epsilon: float, delta: float = 1e-3) -> Budget:
    return Budget(epsilon=epsilon, delta=delta, accountant="rdp")


def pay(
    records: Records,
    study: Study,
    round_number: int = 1,
    *,
    budget: Budget | None = None,
    receipt: Head | None = None,
    kind: str = "train",
    patients: int = 20,
    max_epsilon: float | None = None,
) -> Entry:
    """Spend as the ClientApp does."""

    def make(book: Book) -> Entry:
        require_room(budget, book, study, kind, round_number, patients=patients, max_epsilon=max_epsilon)
        return new_entry(study, kind, round_number, "0" * 64, releases_of(round_spending(study, kind)))

    return records.spend(make, receipt)


def unsigned(records: Records) -> Records:
    return replace(records, signer=None)
