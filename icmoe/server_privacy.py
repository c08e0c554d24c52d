"""Section [privacy.server] of a study: what the global models promise to each site as a whole, in public constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from icmoe.config import Section

Positive = Annotated[float, Field(gt=0.0, le=1e6)]


class ServerPrivacy(Section):
    """Clip and noise at the coordinator, which is trusted with the updates. Unit: the site, with all that it holds.

    Needs many sites: with 4 to 10 the noise of an honest epsilon drowns the model, and DP at the sites is the better form.
    """

    unit: Literal["site"] = "site"
    """What one part's data are."""
    adjacency: Literal["add/remove", "replace"] = "add/remove"
    """One site more or less, or another one in its place, which doubles the sensitivity and so the noise."""
    epsilon: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """Limit for all rounds together; without `noise_multiplier` the noise is computed from it."""
    noise_multiplier: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """z: noise of a round in units of its sensitivity, all that the round releases together."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Probability with which epsilon may not hold; at most 1 / sites."""
    sites: Annotated[int, Field(ge=1, le=10**6)]
    """Public number of sites that are expected in a round."""
    max_weight: Positive = 1.0
    """w_max: largest weight of a site in any tensor."""
    divisor: Positive
    """W: what the weighted sum is divided by; about the sum of the weights that are expected, never measured."""
    clip_norm: Positive = 0.1
    """C: largest norm of a site's whole update; where the quantile is set, in the first round only."""
    clip_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the sites whose updates C should leave whole; C then follows it from round to round."""
    clip_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Step of log C per round."""
    count_noise: Positive | None = None
    """Standard deviation of the noise on the count of updates left whole; sites / 20 where absent."""

    @model_validator(mode="after")
    def _promise_is_whole(self) -> ServerPrivacy:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("epsilon, noise_multiplier or both")
        if self.delta > 1.0 / self.sites:
            raise ValueError(f"delta at most 1 / sites = {1.0 / self.sites:g}")
        return self


def spending_sentence(spent: Mapping[str, str | float]) -> str:
    """Return what a round's record says of privacy in one line: no epsilon without delta, unit, adjacency and accountant."""
    return (
        f"epsilon {spent['epsilon']:.3f} at delta {spent['delta']:g} per {spent['unit']} ({spent['adjacency']}; "
        f"{spent['accountant']}; noise {spent['noise_multiplier']:.3g}, clip {spent['clip_norm']:.3g})"
    )
