"""Sites whose data differ from the others', by medians and factors: with three or four sites a z-score says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low

from icmoe.summary import BETWEEN_STEP_MM, IN_PLANE_STEP_MM, SIDE_STEP_PX, TENS, LabelSummary, SiteSummary

LEAST_SITES = 3
"""Of two sites that differ neither is the odd one."""
SMALL_FACTOR = 3.0
"""A site is far smaller with fewer images than the others' median over this."""
RANGE_FACTOR = 1.5
"""Ranges are far apart when one begins beyond the other's end times this."""
ODDS_FACTOR = 4.0
"""Shares differ when their odds do by this; odds, since 0.5 and 0.95 differ as much as 0.5 and 0.05."""

Ends = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing in which a site differs from the others.

    Parameters
    ----------
    site
        Name of the site.
    about
        What was compared.
    value
        The site's value with its unit.
    others
        The others' values with their unit.
    """

    site: str
    about: str
    value: str
    others: str

    def __str__(self) -> str:
        """Return the finding as a sentence."""
        return f"{self.site}: {self.about} {self.value}; the other sites have {self.others}."


def outliers(summaries: Mapping[str, SiteSummary], labels: Sequence[str]) -> list[Finding]:
    """Return what differs, by site name; nothing for fewer than three sites.

    A site is compared with the median of the others. Where their number is even it is compared with the nearer of the two
    middle ones: of three sites, two that agree are no outliers because the third is one.

    Parameters
    ----------
    summaries
        By site.
    labels
        Names of the study's classes, the background first.
    """
    if len(summaries) < LEAST_SITES:
        return []
    found: list[Finding] = []
    for site in sorted(summaries):
        mine, others = summaries[site], [summaries[name] for name in sorted(summaries) if name != site]
        found += _small(site, mine, others)
        found += _modalities(site, mine, others)
        for index, name in enumerate(labels[1:]):
            found += _label(site, name, mine, others, index)
        found += _far(site, "pixel distance", "mm", IN_PLANE_STEP_MM, [one.in_plane_mm for one in (mine, *others)])
        found += _far(site, "slice distance", "mm", BETWEEN_STEP_MM, [one.between_mm for one in (mine, *others)])
        found += _far(site, "image side", "pixels", SIDE_STEP_PX, [one.side_px for one in (mine, *others)])
    return found


def nearest_median(value: float, others: Sequence[float]) -> float:
    """Return the median of the others, of two middle values the one nearer to `value`, or `value` where it lies between."""
    return min(max(value, median_low(others)), median_high(others))


def _small(site: str, mine: SiteSummary, others: Sequence[SiteSummary]) -> Iterator[Finding]:
    counts = [other.images for other in others]
    if mine.images * SMALL_FACTOR < nearest_median(mine.images, counts):
        yield Finding(site, "training images", f"at most {mine.images}", _span(counts))


def _modalities(site: str, mine: SiteSummary, others: Sequence[SiteSummary]) -> Iterator[Finding]:
    known = [set(other.modalities) for other in others if other.modalities]
    if len(known) >= LEAST_SITES - 1:
        for term in sorted(set(mine.modalities) - set().union(*known)):
            yield Finding(site, "modality", term, ", ".join(sorted(set().union(*known))))


def _label(site: str, name: str, mine: SiteSummary, others: Sequence[SiteSummary], index: int) -> Iterator[Finding]:
    """Compare the share of images with a class; the share of patients where the images are withheld."""
    large = [one for one in (mine, *others) if one.labels]
    if not mine.labels or len(large) < LEAST_SITES:
        return
    if mine.labels[index].images is not None and sum(one.labels[index].images is not None for one in large) >= LEAST_SITES:
        yield from _share(site, f"share of images with {name}", large, index, _images)
    else:
        yield from _share(site, f"share of patients with {name}", large, index, _patients)


Count = Callable[[SiteSummary | LabelSummary], int | None]


def _images(part: SiteSummary | LabelSummary) -> int | None:
    return part.images


def _patients(part: SiteSummary | LabelSummary) -> int | None:
    return part.patients


def _share(site: str, about: str, large: Sequence[SiteSummary], index: int, count_of: Count) -> Iterator[Finding]:
    pairs = [(count_of(one.labels[index]), count_of(one)) for one in large]
    mine, *others = [(part, whole) for part, whole in pairs if part is not None and whole is not None]
    odds = [_odds(*pair) for pair in others]
    ratio = _odds(*mine) / nearest_median(_odds(*mine), odds)
    if not 1.0 / ODDS_FACTOR <= ratio <= ODDS_FACTOR:
        yield Finding(site, about, _percent(*mine), _span([round(100 * part / whole) for part, whole in others]) + " %")


def _odds(part: int, whole: int) -> float:
    """Return the odds of a share of two counts in tens; what is missing to the whole counts at least ten."""
    return part / max(whole - part, TENS)


def _percent(part: int, whole: int) -> str:
    return ("at most " if part == TENS else "") + f"{round(100 * part / whole)} %"


def _far(site: str, about: str, unit: str, step: float, ends: Sequence[Ends | None]) -> Iterator[Finding]:
    mine, others = ends[0], [pair for pair in ends[1:] if pair is not None]
    if mine is None or len(others) < LEAST_SITES - 1:
        return
    lows, highs = [low for low, _ in others], [high for _, high in others]
    # One step less on either side: two values that differ by rounding alone are equal.
    above = mine[0] - step > RANGE_FACTOR * nearest_median(mine[0], highs)
    below = nearest_median(mine[1], lows) - step > RANGE_FACTOR * mine[1]
    if above or below:
        yield Finding(site, about, f"{_span(mine)} {unit}", f"{_span([*lows, *highs])} {unit}")


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
