"""What every worker has from its first moment on, because the process that it is forked from imported this.

highdicom and nibabel, each longer to import than a hundred headers to read, come with the first file that needs them.
"""

from __future__ import annotations

import gc

collecting = gc.isenabled()
gc.disable()  # imports leave no garbage, and looking for it takes a sixth of the time

from icmoe.data.ingest import decoding, reading  # noqa: E402
from icmoe.data.ingest.forms import MASKS, VOLUMES, module_of  # noqa: E402

__all__ = ["decoding", "reading"]

for volume in VOLUMES.values():
    module_of(volume)
for mask in MASKS.values():
    module_of(mask)

if collecting:
    gc.enable()
