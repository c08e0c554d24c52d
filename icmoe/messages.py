"""The names of what is in a message, and the ranges of its numbers, for both sides; needs no PyTorch."""

from __future__ import annotations

from icmoe.errors import CATALOGUE

MOST_IMAGES, MOST_STEPS, LARGEST_LOSS, LONGEST_S = 10**8, 10**8, 1e6, 30 * 86400.0
"""Ranges of the numbers about a round: a site sends none outside, a coordinator takes none."""
SIMPLEX_TOLERANCE = 1e-3
"""By which the usage of the experts may miss a sum of 1, at both."""

# Names of records and keys in messages; anything else in a message is refused by number.
ARRAYS, UPDATE, CONFIG, NUMBERS = "arrays", "update", "config", "numbers"
STUDY_KEY, ROUND_KEY = "study", "server-round"
SITE_KEY, SUMMARY_KEY = "site", "summary"
SLICES_KEY, USAGE_KEY, LOSS_KEY, STEPS_KEY, SECONDS_KEY = "slices", "usage", "loss", "steps", "seconds"
DICE_KEY, PATIENTS_KEY = "val-dice", "val-patients"

ERROR_CODE = 1000
"""Plus the number of an error: the code of the reply that says it; Flower's own codes are below."""


def error_reason(number: int) -> str:
    """Return all that an error reply says: the number of the error and its title."""
    return f"ICM{number} {CATALOGUE[number].title}"
