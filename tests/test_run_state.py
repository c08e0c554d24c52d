"""A committed state is whole or refused: its tensors, its rounds, its history, its study."""

from __future__ import annotations

from pathlib import Path

import pytest
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
