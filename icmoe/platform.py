"""Where the product runs: Linux on x86-64, Python 3.11 or newer (design section 12)."""

from __future__ import annotations

import platform
import sys

from icmoe.errors import Fault, IcmoeError


def require_supported_platform() -> None:
    """Stop on any other platform.

    Raises
    ------
    IcmoeError
        303 with what was found.
    """
    found = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64") or sys.version_info < (3, 11):
        raise IcmoeError(Fault(number=303, value=found, limit="Linux x86_64, Python 3.11 or newer", did="Nothing was started."))
