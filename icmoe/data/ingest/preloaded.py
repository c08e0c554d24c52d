"""What every worker has from its first moment on, because the process that it is forked from imported it."""

from __future__ import annotations

import gc

from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
from pydicom.sr.codedict import codes

from icmoe.data.ingest import decoding, reading

__all__ = ["decoding", "reading"]

# highdicom reads its tables of the standard, a quarter of a second, with the first description that it checks.
_kind = codes.SCT.Tissue
SegmentDescription.from_dataset(SegmentDescription(1, "any", _kind, _kind, SegmentAlgorithmTypeValues.MANUAL))
gc.collect()
gc.freeze()
