"""The names of what is in a message, and the ranges of its numbers, for both sides; needs no PyTorch."""

from __future__ import annotations

MOST_IMAGES, MOST_STEPS, LARGEST_LOSS, LONGEST_S = 10**8, 10**8, 1e6, 30 * 86400.0
"""Ranges of the numbers about a round: a site sends none outside, a coordinator takes none."""

# Names of records and keys in messages; anything else in a message is refused by number.
ARRAYS, UPDATE, CONFIG, NUMBERS = "arrays", "update", "config", "numbers"
STUDY_KEY, ROUND_KEY = "study", "server-round"
SITE_KEY, SUMMARY_KEY = "site", "summary"
SLICES_KEY, USAGE_KEY, LOSS_KEY, STEPS_KEY, SECONDS_KEY = "slices", "usage", "loss", "steps", "seconds"
DICE_KEY, PATIENTS_KEY = "val-dice", "val-patients"
