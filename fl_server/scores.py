"""Validation scores as sites tell them, and their mean, of which no single site decides more than half."""

from __future__ import annotations

import math
from collections.abc import Collection

from flwr.app import Message, MetricRecord

from icmoe.messages import DICE_KEY, MOST_IMAGES, NUMBERS, PATIENTS_KEY

LEAST_CAPPED = 3
"""Of two sites the larger may be the honest one."""


def score_of(reply: Message) -> tuple[float, int] | None:
    """Return the validation Dice that a reply tells and of how many patients it is the mean, None where it tells none."""
    numbers = reply.content.get(NUMBERS) if reply.has_content() else None
    if not isinstance(numbers, MetricRecord):
        return None
    dice, patients = numbers.get(DICE_KEY), numbers.get(PATIENTS_KEY)
    known = isinstance(dice, float) and 0.0 <= dice <= 1.0 and isinstance(patients, int) and 1 <= patients <= MOST_IMAGES
    return (dice, patients) if known else None  # type: ignore[return-value]


def mean_score(scores: Collection[tuple[float, int]]) -> float | None:
    """Return the mean over the patients of all sites, None without scores.

    How many patients a site has is its word alone: of three sites or more none counts for more than the others together.
    """
    total = sum(patients for _, patients in scores)
    capped = len(scores) >= LEAST_CAPPED
    weighed = [(dice, min(patients, total - patients) if capped else patients) for dice, patients in scores]
    weights = sum(weight for _, weight in weighed)
    # The sum rounded once: the order in which sites answer must not show in the last digit
    return math.fsum(dice * weight for dice, weight in weighed) / weights if weights else None
