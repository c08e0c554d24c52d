"""A committed state is whole or refused: its tensors, its rounds, its history, its study."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_checking import SERVER, UNCOUPLED
from test_rounds import run

from fl_server.run_state import RunState
from icmoe.errors import IcmoeError


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"round\\": 2, \\"closed', b'\\"round\\": 1, \\"closed'),
        (b'\\"closed\\": true', b'\\"closed\\": null'),
        (b'\\"settled\\"', b'\\"settlet\\"'),
        (b'\\"size_bytes\\"', b'\\"size_pages\\"'),
    ],
    ids=["round", "closed", "a key", "a key of the log"],
)
def test_a_state_whose_header_was_changed_is_refused(old: bytes, new: bytes, make_study, tmp_path: Path) -> None:
    study, path = make_study(rounds=2), tmp_path / "s"
    run(study, path)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.unlink()
    path.write_bytes(content.replace(old, new))
    with pytest.raises(IcmoeError, match="ICM502"):
        RunState.load(path, study)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "another study"])
def test_a_damaged_or_foreign_state_is_refused(damage: str, make_study, tmp_path: Path) -> None:
    study, path = make_study(), tmp_path / "s"
    run(study, path)
    if damage == "garbage":
        path.write_bytes(b"\x00" * 100)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        study = make_study(seed=99)
    with pytest.raises(IcmoeError) as caught:
        RunState.load(path, study)
    assert caught.value.faults[0].number == 502


def test_who_removes_a_damaged_state_begins_anew_as_he_was_told(make_study, tmp_path: Path) -> None:
    study, path = make_study(rounds=2), tmp_path / "s"
    run(study, path)
    rounds = RunState.load(path, study).history[:]
    path.write_bytes(b"")
    told = r"ICM502 .*/s: committed state is damaged: .* from a backup\. Once it is removed, training begins anew\.$"
    with pytest.raises(IcmoeError, match=told):
        run(study, path)
    path.unlink()
    run(study, path)
    assert [row["round"] for row in RunState.load(path, study).history] == [row["round"] for row in rounds]


def test_of_a_study_with_privacy_at_the_server_nothing_is_begun_anew(make_study, tmp_path: Path) -> None:
    study = make_study(privacy={"server": SERVER | {"epsilon": 8.0}}, aggregation=UNCOUPLED)
    path = tmp_path / "s"
    path.write_bytes(b"")
    with pytest.raises(IcmoeError, match=r"Restore it from a backup\.$"):
        RunState.load(path, study)
