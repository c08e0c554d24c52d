"""The weights of router-aware FedAvg, as pure functions.

    p_ke  = n_k u_ke^t / sum_j n_j u_je^t ;  p_ke <- max(p_ke, eta n_k / N), normalised ;  capped at c by water-filling
    s_e   = min(1, sum_k n_k u_ke / (0.05 N / M))

Shapes: S sites whose update was accepted, M experts. All in float64; the result is cast where tensors are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icmoe.study import Aggregation

Array = npt.NDArray[np.float64]

FULL_STEP_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """How the updates of the experts are combined.

    Parameters
    ----------
    share_SM
        p, each column sums to 1.
    step_M
        s in [0, 1]; 0 keeps the old expert.
    contributors_M
        K_e, number of sites that really used the expert.
    """

    share_SM: Array
    step_M: Array
    contributors_M: npt.NDArray[np.int64]


def plain_share(size_S: Array) -> Array:
    """Return n_k / N, the weights of FedAvg (McMahan et al., arXiv 1602.05629, algorithm 1)."""
    share_S: Array = size_S / size_S.sum()
    return share_S


def expert_weights(size_S: Array, usage_SM: Array, settings: Aggregation) -> ExpertWeights:
    """Return the weights of every expert.

    Parameters
    ----------
    size_S
        n_k > 0.
    usage_SM
        u, each row on the simplex.
    settings
        t, eta, cap, minimum contributors, shrinkage.
    """
    sites = len(size_S)
    plain_S = plain_share(size_S)
    share_SM = usage_share(size_S, usage_SM, settings.usage_exponent)
    if settings.floor > 0.0:
        share_SM = np.maximum(share_SM, settings.floor * plain_S[:, None])
        share_SM /= share_SM.sum(axis=0)
    cap = max(settings.cap, 1.0 / sites)
    share_SM = np.stack([water_fill(column, cap) for column in share_SM.T], axis=1)
    step_M = step_sizes(size_S, usage_SM) if settings.shrinkage else np.ones(usage_SM.shape[1])
    contributors_M = (usage_SM > settings.min_usage).sum(axis=0)
    starved_M = contributors_M < settings.min_contributors
    if settings.usage_exponent > 0.0:
        share_SM = np.where(starved_M, plain_S[:, None], share_SM)
        if settings.starved == "keep":
            step_M = np.where(starved_M, 0.0, step_M)
    return ExpertWeights(share_SM, step_M, contributors_M)


def usage_share(size_S: Array, usage_SM: Array, exponent: float) -> Array:
    """Return n_k u_ke^t / sum_j n_j u_je^t; n_k / N for an expert that no site used, and for t = 0."""
    mass_SM = size_S[:, None] * usage_SM**exponent
    total_M = mass_SM.sum(axis=0)
    plain_SM = np.broadcast_to(plain_share(size_S)[:, None], mass_SM.shape)
    share_SM: Array = np.where(total_M > 0.0, mass_SM / np.where(total_M > 0.0, total_M, 1.0), plain_SM)
    return share_SM


def step_sizes(size_S: Array, usage_SM: Array) -> Array:
    """Return s: rarely used experts move less, an unused one not at all."""
    mass_M = (size_S[:, None] * usage_SM).sum(axis=0)
    full = FULL_STEP_SHARE * size_S.sum() / usage_SM.shape[1]
    step_M: Array = np.minimum(1.0, mass_M / full)
    return step_M


def water_fill(share_S: Array, cap: float) -> Array:
    """Return weights that sum to 1, none above `cap`, the excess spread over the others in proportion.

    Parameters
    ----------
    share_S
        Non-negative, sums to 1.
    cap
        At least 1 / S.
    """
    capped_S = share_S.astype(np.float64, copy=True)
    full_S = np.zeros(len(share_S), dtype=bool)
    # Each pass fills at least one more site, so there are at most S of them.
    while np.any(over_S := (capped_S > cap) & ~full_S):
        full_S |= over_S
        rest = 1.0 - cap * full_S.sum()
        free_S = np.where(full_S, 0.0, share_S)
        spread_S = free_S / free_S.sum() if free_S.sum() > 0.0 else ~full_S / max(1, (~full_S).sum())
        capped_S = np.where(full_S, cap, max(rest, 0.0) * spread_S)
    return capped_S


def balance_step(bias_M: Array, size_S: Array, usage_SM: Array, step: float) -> Array:
    """Return the balance bias moved towards even use, centred on 0.

    The bias evens the use of the experts without a loss that would pull at the router (Wang et al., arXiv 2408.15664); here
    it is part of the gates too, not of the selection alone, and its step is proportional to how far the mean usage is from
    1/M, at most `step`.
    """
    return move_bias(bias_M, plain_share(size_S) @ usage_SM, step)


def move_bias(bias_M: Array, mean_M: Array, step: float) -> Array:
    """Return the balance bias after a round of which the mean usage is known; as `balance_step`."""
    moved_M = bias_M + step * np.clip(1.0 - len(bias_M) * mean_M, -1.0, 1.0)
    centred_M: Array = moved_M - moved_M.mean()
    return centred_M


def usage_spread(usage_SM: Array) -> float:
    """Return the mean over experts of the standard deviation of usage between sites; near 0, usage weights are FedAvg's."""
    return float(usage_SM.std(axis=0).mean()) if usage_SM.size else 0.0
