"""A new ledger: whole or not there, and nothing that was emptied or is gone passes for one."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import NoReturn

import pytest
from books import pay
from test_ledger import ROOMY, number_of, private, records

from fl_client.audit import LOG
from fl_client.ledger import FILE, read_ledger
from fl_client.records import Records
from icmoe.errors import IcmoeError
from icmoe.study import Study

__all__ = ["private", "records"]


def test_a_ledger_that_is_gone_is_no_new_one(records: Records, private: Study) -> None:
    pay(records, private, budget=ROOMY)
    (records.state / FILE).unlink()
    assert number_of(records, private, 2, budget=ROOMY)[0] == 413


def test_an_emptied_ledger_is_no_new_one_though_the_audit_log_is_gone_too(records: Records, private: Study) -> None:
    pay(records, private, budget=ROOMY)
    (records.state / FILE).write_bytes(b"")
    (records.state / LOG).unlink()
    assert number_of(records, private, 2, budget=ROOMY)[0] == 412
    with pytest.raises(IcmoeError, match="ICM412"):
        read_ledger(records.state, "Alder")
    assert (records.state / FILE).read_bytes() == b""


def test_a_new_ledger_that_finds_no_room_leaves_no_empty_one(records: Records, private: Study) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # the ledger has more
    try:
        assert number_of(records, private, budget=ROOMY)[0] == 205
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(records.state.iterdir()) == []
    assert pay(records, private, budget=ROOMY).count == 1


@pytest.mark.parametrize("links", [True, False])
def test_of_two_new_ledgers_the_one_that_was_first_stays(
    links: bool, records: Records, private: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link if links else refused)
        pay(records, private, budget=ROOMY)  # by another process
        os.link(source, target)

    def refused(source: Path, target: Path) -> NoReturn:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", late)
    assert pay(records, private, 2, budget=ROOMY).count == 2
    assert (records.state / FILE).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in records.state.iterdir()) == [LOG, FILE]
