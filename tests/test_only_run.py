"""Two runs never write one study's state: the second waits for a stopped one to end, and gives way to one that goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fl_server import app
from fl_server.app import only_run_of
from icmoe.errors import IcmoeError


def test_a_run_waits_for_a_stopped_one_to_end(tmp_path: Path):
    entered, leave, order = threading.Event(), threading.Event(), []

    def lingering() -> None:
        with only_run_of(tmp_path / "study.toml"):
            entered.set()
            assert leave.wait(timeout=30)
            order.append("first ends")

    first = threading.Thread(target=lingering)
    first.start()
    assert entered.wait(timeout=30)
    threading.Timer(0.5, leave.set).start()
    with only_run_of(tmp_path / "study.toml"):
        order.append("second begins")
    first.join(timeout=30)
    assert order == ["first ends", "second begins"]


def test_a_run_that_goes_on_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "HANDOVER_S", 0.3)
    with only_run_of(tmp_path / "study.toml"), pytest.raises(IcmoeError) as refused, only_run_of(tmp_path / "study.toml"):
        pytest.fail("two runs held one study")
    assert refused.value.faults[0].number == 506
