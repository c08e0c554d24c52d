"""The store of approvals: each study once, a damaged one named, an older one still read."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from pathlib import Path

import pytest
from test_approval import BUNDLE, NOW

from fl_client.approval import approve, approved_studies, approved_study, read_approvals, withdraw
from icmoe.errors import IcmoeError
from icmoe.study import canonical, canonical_json


def test_the_store_keeps_each_study_once_and_the_latest_first(make_study, tmp_path: Path) -> None:
    first, second = make_study(name="first"), make_study(name="second")
    with pytest.raises(IcmoeError, match="ICM316"):
        approved_studies(tmp_path)
    for minutes, study in enumerate((first, second, first)):
        approve(tmp_path, study, BUNDLE, NOW + timedelta(minutes=minutes))
    assert approved_studies(tmp_path) == (first, second)
    assert approved_study(tmp_path, "Alder", second.digest, BUNDLE) == second
    withdraw(tmp_path, "first", NOW)
    assert approved_studies(tmp_path) == (second,)
    approve(tmp_path, first, BUNDLE, NOW + timedelta(minutes=9))
    assert approved_studies(tmp_path) == (first, second)


def test_a_damaged_approval_stops_the_site_with_its_name(make_study, tmp_path: Path) -> None:
    approve(tmp_path, make_study(), BUNDLE, NOW)
    (tmp_path / "approvals/broken.json").write_text("{")
    with pytest.raises(IcmoeError, match=r"ICM321 .*broken\.json"):
        read_approvals(tmp_path)


@pytest.mark.parametrize("when", ["yesterday", "2026-11-26T12:00:00"])
def test_an_approval_of_no_certain_time_stops_the_site_with_its_name(when: str, make_study, tmp_path: Path) -> None:
    approve(tmp_path, make_study(), BUNDLE, NOW)
    (path,) = (tmp_path / "approvals").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"approved_at": when}))
    with pytest.raises(IcmoeError, match=rf"ICM321 .*{path.name}"):
        read_approvals(tmp_path)


def test_an_approval_whose_digest_a_later_schema_would_change_is_no_damage(make_study, tmp_path: Path) -> None:
    study = make_study()
    values = json.loads(canonical(study))
    del values["aggregation"]["server_learning_rate"]  # as if written before the schema had this setting
    digest = hashlib.sha256(canonical_json(values).encode()).hexdigest()
    kept = {"digest": digest, "study": values, "bundle": BUNDLE, "approved_at": NOW.isoformat()}
    (tmp_path / "approvals").mkdir()
    (tmp_path / "approvals" / f"{digest}.json").write_text(json.dumps(kept))
    assert [approval.study for approval in read_approvals(tmp_path)] == [study]
    with pytest.raises(IcmoeError, match="ICM318"):
        approved_study(tmp_path, "Alder", digest, "c" * 64)
    with pytest.raises(IcmoeError, match="ICM302"):
        approved_study(tmp_path, "Alder", study.digest, BUNDLE)
