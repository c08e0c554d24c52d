"""What every worker has from its first moment on, because the process that it is forked from imported it."""

from __future__ import annotations

import gc

gc.disable()  # there is no garbage yet, and looking for it takes a sixth of the time

from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription  # noqa: E402
from pydicom.sr.codedict import codes  # noqa: E402

from icmoe.data.ingest import decoding, reading  # noqa: E402

__all__ = ["decoding", "reading"]

# highdicom reads its tables of the standard, a quarter of a second, with the first description that it checks.
_kind = codes.SCT.Tissue
SegmentDescription.from_dataset(SegmentDescription(1, "any", _kind, _kind, SegmentAlgorithmTypeValues.MANUAL))
gc.freeze()
gc.enable()
