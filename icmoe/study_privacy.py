"""Section [privacy] of a study: what is promised to a patient, by a site and by the server, in public constants.

Nothing here is derived from a hospital's patients. What a site holds is compared with these constants when the study is
approved and before each round (`icmoe/privacy.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from icmoe.config import Section
from icmoe.server_privacy import ServerPrivacy

Accountant = Literal["prv", "rdp"]


class SitePrivacy(Section):
    """DP-SGD at every site. Unit: the patient with all its slices; adjacency: add or remove one patient.

    Per step each patient is drawn with probability `sample_rate`; its gradient is clipped to C_g and its usage of the
    experts, times `usage_scale`, to C_u; the sum gets Gaussian noise of standard deviation
    `noise_multiplier` * sqrt(C_g^2 + C_u^2) and is divided by the public `sample_rate * patients`.
    """

    unit: Literal["patient"] = "patient"
    """What one person's data are."""
    epsilon: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """Target for the whole study; the noise is computed from it."""
    noise_multiplier: Annotated[float, Field(gt=0.0, le=1000.0)] | None = None
    """Noise given instead of a target, in units of the clipping norm."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Probability with which epsilon may not hold; at most 1 / patients."""
    accountant: Accountant = "prv"
    """Opacus' accountant that composes the steps; prv is tighter, rdp faster."""
    patients: Annotated[int, Field(ge=1, le=10**7)]
    """Public number of training patients of a site: the divisor, n_k and the limit of delta follow from it."""
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    """Probability with which a patient takes part in a step."""
    steps: Annotated[int, Field(ge=1, le=100000)]
    """Steps of a round; they take the place of `local_epochs`."""
    slices_per_patient: Annotated[int, Field(ge=1, le=1024)] = 8
    """Most slices of a patient per step, drawn anew each time; together they are one sample."""
    clip_norm: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    """C_g: largest norm of a patient's gradient."""
    usage_clip: Annotated[float, Field(gt=0.0, le=1e6)] = 0.2
    """C_u: largest norm of a patient's scaled usage."""
    usage_scale: Annotated[float, Field(gt=0.0, le=1e6)] = 0.2
    """Factor of the usage before clipping; a patient's usage has a norm of at most 1."""
    scores: Literal["withheld", "noised"] = "withheld"
    """Validation scores leave a site not at all, or noised out of the same budget; losses never do."""
    score_noise: Annotated[float, Field(gt=0.0, le=1000.0)] = 10.0
    """Noise multiplier of a score release, where scores are noised."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What follows the noised gradients; sgd has a momentum of 0.9."""
    average_last: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of a round's last steps whose parameters are averaged into the result; it costs no privacy."""
    frozen_router: bool = False
    """Whether the router stays as it is: fewer noised coordinates."""
    slices_at_once: Annotated[int, Field(ge=1, le=65536)] = 16
    """Limit of memory: slices whose gradients are computed together; it changes no result."""

    @model_validator(mode="after")
    def _promise_can_be_kept(self) -> SitePrivacy:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("either epsilon or noise_multiplier")
        if self.delta > 1.0 / self.patients:
            raise ValueError(f"delta at most 1 / patients = {1.0 / self.patients:g}")
        if self.expected_batch < 1.0:
            raise ValueError(f"sample_rate * patients at least 1, not {self.expected_batch:g}")
        return self

    @property
    def expected_batch(self) -> float:
        """Expected patients of a step, the public divisor."""
        return self.sample_rate * self.patients

    @property
    def sensitivity(self) -> float:
        """C: largest change of a step's sum when one patient comes or goes."""
        return float((self.clip_norm**2 + self.usage_clip**2) ** 0.5)


class Privacy(Section):
    """Differential privacy of the study; none where the section is absent."""

    site: SitePrivacy | None = None
    """At the sites, for each patient."""
    server: ServerPrivacy | None = None
    """At the coordinator, for each site as a whole."""
