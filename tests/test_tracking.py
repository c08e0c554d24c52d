"""Tracking that cannot be done ends with a sentence; what is written `tests/test_run_sim.py` reads back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_run_sim import RUN_SIM

from icmoe.errors import IcmoeError
from simulations.tracking import tracking


def test_without_the_package_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(IcmoeError) as caught, tracking("tensorboard", tmp_path):
        pass
    assert "ICM213 --track tensorboard" in str(caught.value)
    assert "icmoe-federated[track]" in str(caught.value)


def test_an_unknown_tracker_is_refused() -> None:
    done = subprocess.run([*RUN_SIM, "--track", "wandb"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "ICM210 --track" in done.stderr
