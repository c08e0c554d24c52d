"""A site's summary of its training images: the whole list of what a site may tell about its data.

The rules are those of statistical disclosure control: counts in tens, nothing about a group of at most ten patients, no
end of a range that fewer than three patients reach. They hide the single patient in one summary; they are no
differential privacy, and two summaries taken before and after a patient came may differ by one step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from icmoe.config import Section
from icmoe.data.ingest.records import MODALITIES
from icmoe.data.slices import Slice
from icmoe.errors import Fault, IcmoeError

TENS = 10
"""Step of every count, and the size up to which a group of patients counts as small."""
END_PATIENTS = 3
"""Patients who lie at or beyond each end of a range."""
IN_PLANE_STEP_MM, BETWEEN_STEP_MM, SIDE_STEP_PX = 0.1, 0.5, 32
"""Steps of the ranges."""
MOST_MM, MOST_PX = 100.0, 16384
"""Greatest values that a range names; what is beyond counts as this."""
MOST_CHARACTERS = 4096
"""Longest summary that is read."""


def tens(count: int) -> int:
    """Return a count as it may leave: rounded up to ten; 10 says "at most ten, perhaps none"."""
    return TENS * max(1, math.ceil(count / TENS))


def rounded(value: float, step: float) -> float:
    """Return the nearest positive multiple of `step`, exactly as it is written with one decimal."""
    return round(max(1, math.floor(value / step + 0.5)) * step, 1)


def _is_term(text: str) -> str:
    if text not in MODALITIES:
        raise ValueError("a modality of DICOM")
    return text


def _on_grid(step: float) -> AfterValidator:
    def check(value: float) -> float:
        if rounded(value, step) != value:
            raise ValueError(f"a multiple of {step}")
        return value

    return AfterValidator(check)


Tens = Annotated[int, Field(ge=TENS, le=10**9, multiple_of=TENS)]
Modality = Annotated[str, AfterValidator(_is_term)]
InPlane = Annotated[float, Field(gt=0.0, le=MOST_MM), _on_grid(IN_PLANE_STEP_MM)]
Between = Annotated[float, Field(gt=0.0, le=MOST_MM), _on_grid(BETWEEN_STEP_MM)]
Side = Annotated[int, Field(ge=SIDE_STEP_PX, le=MOST_PX, multiple_of=SIDE_STEP_PX)]


class LabelSummary(Section):
    """How often one class occurs; its share is the receiver's to divide, so that no number is finer than tens."""

    patients: Tens
    """Patients with the class in any image, rounded up to ten."""
    images: Tens | None
    """Images with the class, rounded up to ten; withheld where at most ten patients have it."""


class SiteSummary(Section):
    """What a site tells of its training images; everything else stays."""

    images: Tens
    """Training images, rounded up to ten: the n_k that the site announces anyway."""
    patients: Tens
    """Patients behind them, rounded up to ten; where this is 10, all below is withheld."""
    labels: tuple[LabelSummary, ...] = ()
    """One per class of the study without the background, in the study's order; no name travels."""
    modalities: tuple[Modality, ...] = ()
    """Modalities that more than ten patients have, sorted; DICOM's terms only, none for PNG folders."""
    in_plane_mm: tuple[InPlane, InPlane] | None = None
    """Least and greatest pixel distance in steps of 0.1 mm, each end reached by three patients."""
    between_mm: tuple[Between, Between] | None = None
    """Least and greatest distance of slices in steps of 0.5 mm, each end reached by three patients."""
    side_px: tuple[Side, Side] | None = None
    """Least and greatest longer side of the images in steps of 32 pixels, each end reached by three patients."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        ranges = [ends for ends in (self.in_plane_mm, self.between_mm, self.side_px) if ends is not None]
        if any(low > high for low, high in ranges):
            raise ValueError("ranges from low to high")
        if self.patients == TENS and (self.labels or self.modalities or ranges):
            raise ValueError("nothing but counts where at most ten patients are")
        if self.patients > self.images or list(self.modalities) != sorted(set(self.modalities)):
            raise ValueError("as many images as patients, each modality once")
        for label in self.labels:
            if (label.images is None) != (label.patients == TENS):
                raise ValueError("images of a class where more than ten patients have it, else none")
            if label.patients > self.patients or (label.images or 0) > self.images or label.patients > (label.images or TENS):
                raise ValueError("parts no greater than the whole")
        return self

    def text(self) -> str:
        """Return the summary as it travels: JSON in one form."""
        return self.model_dump_json()


def summarise(slices: Iterable[Slice], classes: int) -> SiteSummary:
    """Return what may be told of a site's training images.

    Parameters
    ----------
    slices
        At least one training image.
    classes
        Classes K of the study, the background counted.
    """
    patients: dict[tuple[str, str], list[Slice]] = defaultdict(list)
    for item in slices:
        patients[item.site, item.patient].append(item)
    groups = list(patients.values())
    images = tens(sum(map(len, groups)))
    if len(groups) <= TENS:
        return SiteSummary(images=images, patients=TENS)
    return SiteSummary(
        images=images,
        patients=tens(len(groups)),
        labels=tuple(_label(groups, index) for index in range(1, classes)),
        modalities=tuple(sorted(term for term in MODALITIES if _many_have(groups, term))),
        in_plane_mm=_range(groups, lambda item: item.spacing_mm and max(item.spacing_mm[1:]), IN_PLANE_STEP_MM, MOST_MM),
        between_mm=_range(groups, lambda item: item.spacing_mm and item.spacing_mm[0], BETWEEN_STEP_MM, MOST_MM),
        side_px=_sides(groups),
    )


def _label(groups: Sequence[Sequence[Slice]], index: int) -> LabelSummary:
    counts = [count for group in groups if (count := sum(index in item.classes for item in group))]
    return LabelSummary(patients=tens(len(counts)), images=tens(sum(counts)) if len(counts) > TENS else None)


def _many_have(groups: Sequence[Sequence[Slice]], modality: str) -> bool:
    """Return whether more than ten patients have an image of the modality."""
    return sum(any(item.modality == modality for item in group) for group in groups) > TENS


def _range(
    groups: Sequence[Sequence[Slice]], value_of: Callable[[Slice], float | None], step: float, most: float
) -> tuple[float, float] | None:
    """Return the third least and third greatest of the patients' medians on the grid; None for at most ten patients."""
    known = ([value for item in group if (value := value_of(item)) is not None] for group in groups)
    medians = sorted(median(values) for values in known if values)
    if len(medians) <= TENS:
        return None
    low, high = (rounded(min(medians[place], most), step) for place in (END_PATIENTS - 1, -END_PATIENTS))
    return low, high


def _sides(groups: Sequence[Sequence[Slice]]) -> tuple[int, int] | None:
    ends = _range(groups, lambda item: max(item.shape), SIDE_STEP_PX, MOST_PX)
    return None if ends is None else (round(ends[0]), round(ends[1]))


def parse_summary(text: object, classes: int, *, where: str) -> SiteSummary:
    """Return a received summary.

    Parameters
    ----------
    text
        What came.
    classes
        Classes K of the study.
    where
        Name of the site, for the fault.

    Raises
    ------
    IcmoeError
        504 where it is not a summary in its one form: unknown or missing keys, other types, values off their grid or
        out of range, parts greater than the whole, another number of classes, more or other characters than needed.
    """
    what, did = "summary was refused", "The site takes part without it."
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        value = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise IcmoeError(Fault(number=504, where=where, what=what, value=value, limit=f"{MOST_CHARACTERS} characters", did=did))
    try:
        summary = SiteSummary.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        value = ascii(".".join(map(str, first["loc"])))[:80]
        raise IcmoeError(Fault(number=504, where=where, what=what, value=value, limit=first["msg"][:80], did=did)) from None
    expected = 0 if summary.patients == TENS else classes - 1
    if len(summary.labels) != expected or summary.text() != text:
        what = "summary was refused: not in the form in which this version writes it"
        raise IcmoeError(Fault(number=504, where=where, what=what, did=did))
    return summary
