"""Epsilon of a history of releases, and the noise that keeps a history within an epsilon. No state, no files.

A release is the Poisson-subsampled Gaussian mechanism; adjacency is add or remove one patient. The composition is
Opacus': numerical privacy loss distributions ("prv", Gopi et al., arXiv 2106.02848) or Renyi divergences ("rdp",
Mironov et al., arXiv 1908.10530). An epsilon means nothing without its delta, unit and accountant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from icmoe.errors import NOT_STARTED, Fault, IcmoeError
from icmoe.gaussian import least_kept
from icmoe.study import Study
from icmoe.study_privacy import Accountant, SitePrivacy

# Slack of PRV's upper bound: absolute at first, and relative where that would be coarse. Finer meshes cost gigabytes.
_ROUGH_ERROR, _RELATIVE_ERROR, _LEAST_ERROR = 0.01, 0.004, 1e-3
# PRV's mesh grows with epsilon until it fits no memory or overflows; an RDP bound beyond this is given as it is.
_PRV_LIMIT = 60.0
_NOISE_PRECISION = 2e-3
_MOST_NOISE = 1000.0


@dataclass(frozen=True, slots=True)
class Spending:
    """Equal releases in a row.

    Parameters
    ----------
    noise_multiplier
        Standard deviation of the noise in units of the sensitivity, above 0.
    sample_rate
        Probability with which a patient takes part, in (0, 1].
    steps
        Number of releases, at least 0; empty batches count.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def epsilon(history: Sequence[Spending], *, delta: float, accountant: Accountant) -> float:
    """Return the epsilon of all releases together, an upper bound; 0 of an empty history.

    Parameters
    ----------
    history
        In any order; equal neighbours may be merged or not.
    delta
        In (0, 1).
    accountant
        "prv" or "rdp"; beyond an epsilon of 60, which protects nobody, both give the bound of rdp.

    Raises
    ------
    IcmoeError
        213 where Opacus is not installed.
    """
    return _epsilon(merged(history), delta, accountant)


def noise_multiplier(
    target_epsilon: float,
    *,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant,
    besides: Sequence[Spending] = (),
) -> float:
    """Return the least noise multiplier, to two parts in a thousand upwards, with which the history keeps the target.

    Parameters
    ----------
    target_epsilon
        Above 0.
    sample_rate, steps
        Of the releases that get the noise.
    delta, accountant
        As in `epsilon`.
    besides
        Further releases of the same history, whose noise is given.

    Raises
    ------
    IcmoeError
        403 where no noise keeps the target, 213 where Opacus is not installed.
    """

    def kept(sigma: float, by: Accountant) -> bool:
        return epsilon([Spending(sigma, sample_rate, steps), *besides], delta=delta, accountant=by) <= target_epsilon

    least = _least(lambda sigma: kept(sigma, "rdp"), 0.0, 0.5, target_epsilon)
    if accountant == "rdp":
        return least
    # RDP is fast and lies somewhat above PRV, so that PRV needs few looks from there.
    return _least(lambda sigma: kept(sigma, "prv"), 0.5 * least, least, target_epsilon)


def _least(kept: Callable[[float], bool], low: float, high: float, target: float) -> float:
    """Return the least sigma above `low` that is kept, to `_NOISE_PRECISION` upwards; kept is monotone."""
    while not kept(high):
        low, high = high, 2.0 * high
        if high > _MOST_NOISE:
            limit = f"noise multiplier at most {_MOST_NOISE:g}"
            raise IcmoeError(Fault(number=403, value=f"epsilon {target:g}", limit=limit, did=NOT_STARTED))
    return least_kept(kept, low, high, _NOISE_PRECISION)


def merged(history: Sequence[Spending]) -> tuple[Spending, ...]:
    """Return the history with equal releases added up: composition does not depend on their order."""
    steps: dict[tuple[float, float], int] = {}
    for one in history:
        key = (one.noise_multiplier, one.sample_rate)
        steps[key] = steps.get(key, 0) + one.steps
    return tuple(Spending(*key, count) for key, count in sorted(steps.items()) if count)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Spending, ...], delta: float, accountant: Accountant) -> float:
    if not history:
        return 0.0
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant  # four seconds of import, for private studies only
    except ImportError as error:
        todo = "Install icmoe-federated[privacy]."
        raise IcmoeError(Fault(number=213, value=str(error.name), did=NOT_STARTED, todo=todo)) from None
    entries = [(one.noise_multiplier, one.sample_rate, one.steps) for one in history]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # orders of RDP that do not matter; logarithms of 0 that are masked
        rdp = RDPAccountant()
        rdp.history = entries
        bound = max(0.0, float(rdp.get_epsilon(delta)))  # below 0 where delta alone covers the loss
        if accountant == "rdp" or bound > _PRV_LIMIT:
            return bound
        prv = PRVAccountant()
        prv.history = entries
        rough = float(prv.get_epsilon(delta, eps_error=_ROUGH_ERROR))
        finer = max(_RELATIVE_ERROR * rough, _LEAST_ERROR)
        if finer < _ROUGH_ERROR:
            rough = float(prv.get_epsilon(delta, eps_error=finer))
        return max(0.0, min(rough, bound))


def training_spending(privacy: SitePrivacy, *, rounds: int) -> Spending:
    """Return what the steps of one round spend.

    Parameters
    ----------
    privacy
        Of the study.
    rounds
        Of the whole study, over which a target epsilon is spread.
    """
    sigma = privacy.noise_multiplier or _noise_for(privacy, rounds)
    return Spending(sigma, privacy.sample_rate, privacy.steps)


def score_spending(privacy: SitePrivacy) -> tuple[Spending, ...]:
    """Return what one message with validation scores spends; nothing where they are withheld.

    It is charged like training, although a validation patient never takes part in that.
    """
    return (Spending(privacy.score_noise, 1.0, 1),) if privacy.scores == "noised" else ()


def study_spending(study: Study) -> tuple[Spending, ...]:
    """Return all that a study spends at a site; empty without privacy at the site.

    Every round trains and scores the incoming model; one closing evaluation scores the last.
    """
    privacy = study.privacy.site
    if privacy is None:
        return ()
    training = training_spending(privacy, rounds=study.rounds)
    whole = Spending(training.noise_multiplier, training.sample_rate, training.steps * study.rounds)
    return (whole, *score_spending(privacy) * (study.rounds + 1))


def study_epsilon(study: Study) -> float:
    """Return the epsilon of the whole study at a site; infinite without privacy at the site."""
    return epsilon_under(study, study_spending(study))


def epsilon_under(study: Study, history: Sequence[Spending]) -> float:
    """Return the epsilon of a history at a study's own delta, by its accountant; infinite without privacy at the site."""
    privacy = study.privacy.site
    return math.inf if privacy is None else epsilon(history, delta=privacy.delta, accountant=privacy.accountant)


@lru_cache(maxsize=64)
def _noise_for(privacy: SitePrivacy, rounds: int) -> float:
    assert privacy.epsilon is not None
    return noise_multiplier(
        privacy.epsilon,
        sample_rate=privacy.sample_rate,
        steps=privacy.steps * rounds,
        delta=privacy.delta,
        accountant=privacy.accountant,
        besides=score_spending(privacy) * (rounds + 1),
    )
