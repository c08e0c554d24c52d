"""What a hospital says about its export: the section [ingest] of the site file."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from icmoe.config import PathText, Section

Part = Annotated[float, Field(ge=0.0, le=1.0)]


class IngestSettings(Section):
    """Where the export is and how to take it; paths are relative to the site file."""

    folder: PathText
    """The export: any tree of DICOM, NIfTI and PNG files; it is only read."""
    store: PathText = "ingest"
    """Where index, pixels and report go; patient data, for the owner alone."""
    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Further names and codes ("SCT:52988006") of segments and regions, by class name of the study."""
    exclude: tuple[str, ...] = ()
    """Patterns such as "*/old/*" of paths below the folder that are passed over."""
    allow: tuple[str, ...] = ()
    """Series (S-...) that somebody looked at and found free of burned-in text."""
    patient_pattern: str | None = None
    """Regular expression for paths of pictures, volumes and scans without identity; its first group names the patient."""
    split_file: PathText | None = None
    """CSV with the columns patient and split (train, val, test); other patients are split by the shares."""
    shares: tuple[Part, Part, Part] = (0.7, 0.1, 0.2)
    """Shares of train, val and test among patients."""
    processes: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that read and decode; 0 is one per core."""

    @field_validator("shares")
    @classmethod
    def _shares_sum_to_one(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(shares) - 1.0) > 1e-6:
            raise ValueError("three shares that sum to 1")
        return shares

    @field_validator("patient_pattern")
    @classmethod
    def _pattern_has_a_group(cls, pattern: str | None) -> str | None:
        try:
            if pattern is not None and re.compile(pattern).groups < 1:
                raise ValueError("a regular expression with a group in parentheses")
        except (re.error, OverflowError, RecursionError):
            raise ValueError("a valid regular expression") from None
        return pattern
