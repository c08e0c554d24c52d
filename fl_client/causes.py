"""Why a site could not do its part, as a number that may leave: full disk, lack of memory, files, or anything else."""

from __future__ import annotations

import errno

from icmoe.errors import Fault
from icmoe.parts import is_out_of_memory


def cause_of(error: BaseException) -> Fault:
    """Return what an unexpected exception means; its text is not in it.

    Parameters
    ----------
    error
        Any exception; what it was raised from counts too.
    """
    did = "The round's update was not sent."
    if is_out_of_memory(error):
        return Fault(number=334, did=did)
    if isinstance(error, OSError):
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        return Fault(number=315, did=did) if full else Fault(number=335, did=did)
    return cause_of(error.__cause__) if error.__cause__ is not None else Fault(number=304, did=did)
