"""Where the product runs: Linux on x86-64, Python 3.11 or newer."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version

from icmoe.errors import NOT_STARTED, Fault, IcmoeError

FLOWER = "1.41"
"""Version of Flower whose private names `fl_client/flower_private.py` and `fl_server/flower_private.py` use."""


def require_supported_platform() -> None:
    """Stop on any other platform.

    Raises
    ------
    IcmoeError
        303 with what was found.
    """
    found = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64") or sys.version_info < (3, 11):
        raise IcmoeError(Fault(number=303, value=found, limit="Linux x86_64, Python 3.11 or newer", did=NOT_STARTED))


def require_flower() -> None:
    """Stop where another version of Flower is installed than the one whose private names are known.

    Raises
    ------
    IcmoeError
        303 with both versions.
    """
    found = version("flwr")
    if not found.startswith(f"{FLOWER}."):
        todo = "Install icmoe-federated again; it names the versions that fit."
        what, limit = "this version is not supported", f"{FLOWER}.x"
        raise IcmoeError(Fault(number=303, where="flwr", what=what, value=found, limit=limit, did=NOT_STARTED, todo=todo))
