"""Commands that only read records start at once: PyTorch, a second and more to import, stays out of them."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["fl_client.status", "fl_client.history", "fl_client.approving", "fl_client.accounts", "fl_server.new_study"]
)
def test_a_command_that_only_reads_does_not_import_pytorch(module: str):
    script = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
