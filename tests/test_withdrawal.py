"""Which approval a few digits of a digest name."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from fl_client.approval import approve, approved_studies, named, withdraw
from icmoe.errors import IcmoeError

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def test_fewer_than_eight_digits_of_a_digest_withdraw_nothing(make_study, tmp_path: Path) -> None:
    """A slip of the pen would end a study that runs."""
    study = make_study()
    approve(tmp_path, study, "b" * 64, NOW)
    for which in ("", study.digest[:1], study.digest[:7], f"{study.digest[:7]}x", study.digest[8:16], study.name[:-1]):
        with pytest.raises(IcmoeError, match="ICM316"):
            withdraw(tmp_path, which, NOW)
    assert approved_studies(tmp_path) == (study,)
    assert [one.study for one in named(tmp_path, study.digest[:8])] == [study]
    assert [one.withdrawn_at is None for one in withdraw(tmp_path, study.digest[:8], NOW)] == [False]
