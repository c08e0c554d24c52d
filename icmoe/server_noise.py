"""Noise of a study with [privacy.server], from its public constants alone: coordinator and sites reckon it alike."""

from __future__ import annotations

from dataclasses import dataclass

from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.gaussian import noise_for
from icmoe.server_privacy import ServerPrivacy


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise of each release of a study, in units of the sensitivity.

    Parameters
    ----------
    whole
        z, of all that a round releases together: what is charged.
    update
        z_delta, on the sum; larger than z where the count of clipped updates takes its part.
    count
        sigma_b, standard deviation on the count; 0 where C is fixed.
    """

    whole: float
    update: float
    count: float


def sensitivity_of(settings: ServerPrivacy, clip_norm: float) -> float:
    """Return by how much one site changes the weighted sum of the updates that were clipped to `clip_norm`."""
    return clip_norm * settings.max_weight * (2.0 if settings.adjacency == "replace" else 1.0)


def noise_of(settings: ServerPrivacy, rounds: int) -> Noise:
    """Return the noise of every round of the study.

    Raises
    ------
    IcmoeError
        421 where the count of clipped updates alone tells more than the round may.
    """
    whole = settings.noise_multiplier
    if whole is None:
        assert settings.epsilon is not None
        whole = noise_for(settings.epsilon, settings.delta, rounds)
    if settings.clip_quantile is None:
        return Noise(whole, whole, 0.0)
    count = settings.count_noise or settings.sites / 20
    if 2.0 * count <= whole:
        limit = f"above {whole / 2:.3g}, half of the noise multiplier"
        raise IcmoeError(Fault(number=421, value=f"count_noise = {count:.3g}", limit=limit, did=NOT_STARTED))
    # A replaced site changes sum and count by twice as much each: all noise doubles, and the split stays.
    doubled = 2.0 if settings.adjacency == "replace" else 1.0
    return Noise(whole, (whole**-2 - (2.0 * count) ** -2) ** -0.5, doubled * count)
