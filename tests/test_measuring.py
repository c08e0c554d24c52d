"""What benchmarks measure with."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALLOCATE = """
import numpy as np
from simulations.measuring import peak_bytes
before = peak_bytes()
held = np.ones(400_000_000, dtype=np.uint8)
with_it = peak_bytes()
del held
print(with_it - before, peak_bytes() - with_it)
"""


def test_the_peak_of_memory_is_in_bytes_and_stays_when_the_memory_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True, timeout=120)
    grown, after = map(int, done.stdout.split())
    assert grown == pytest.approx(400e6, rel=0.015)
    assert after < 4e6
