"""What the coordinator reads where a run ended: its own reason, or that it had no time to give one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fl_server import flower, submit
from fl_server.new_study import study_toml
from fl_server.submit import StudyFolder, follow
from icmoe.errors import Fault, IcmoeError

REASON = Fault(number=515, where="tiny", value="1", limit="2").record()
KILLED = "Task failed with unknown error."


@pytest.mark.parametrize(
    ("status", "reasons", "numbers", "said"),
    [
        ("finished:failed", [], [507], "run ended without a word, as when its process is killed or lacks memory"),
        ("finished:failed", [REASON], [515, 507], "ICM507 run failed: run 5, "),
        ("finished:stopped", [], [509], "run was stopped"),
    ],
)
def test_a_run_that_ended(make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status, reasons, numbers, said) -> None:
    study, folder = make_study(), StudyFolder(tmp_path)
    folder.study.write_text(study_toml(study))
    folder.note_run("5")
    if reasons:
        (tmp_path / "study.faults.json").write_text(json.dumps(reasons))
    ended = flower.Run(run_id="5", status=status, details=KILLED, since="", fab_sha256="")
    monkeypatch.setattr(submit.flower, "run_of", lambda home, run_id: ended)
    with pytest.raises(IcmoeError) as caught:
        follow(None, study, folder, print, print)
    assert [fault.number for fault in caught.value.faults] == numbers
    assert said in str(caught.value)
