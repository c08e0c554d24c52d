"""The algebra of a private step: clip each patient, add, add noise, divide by a public number.

    v_p = [ clip(g_p, C_g), clip(lambda u_p, C_u) ] ;  noisy = (sum_p v_p + sigma C N(0, 1)) / (q n) ;  C^2 = C_g^2 + C_u^2

One patient more or less changes the sum by at most C. Shapes: P patients, D gradient coordinates, M experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icmoe.os_random import gaussian
from icmoe.study_privacy import SitePrivacy

_LEAST_USAGE = 0.1
"""Sum of noised shares below which nothing can be said and even use is reported; without noise the sum is about 1."""


def clipped(vector_PX: Tensor, bound: float) -> Tensor:
    """Return the rows scaled down to a norm of at most `bound`; a row that is not finite becomes 0."""
    finite_P1 = torch.isfinite(vector_PX).all(dim=1, keepdim=True)
    vector_PX = torch.where(finite_P1, vector_PX, 0.0)
    norm_P1 = torch.linalg.vector_norm(vector_PX, dim=1, keepdim=True, dtype=torch.float64)
    # In float64, since squares of float32 pass its range long before the values do.
    factor_P1: Tensor = bound / norm_P1.clamp(min=bound)
    return vector_PX * factor_P1.to(vector_PX.dtype)


def clipped_sum(gradient_PD: Tensor, usage_PM: Tensor, privacy: SitePrivacy) -> Tensor:
    """Return sum_p v_p, D + M; usage on the simplex, unscaled."""
    gradient_D = clipped(gradient_PD, privacy.clip_norm).sum(dim=0)
    usage_M = clipped(usage_PM * privacy.usage_scale, privacy.usage_clip).sum(dim=0)
    return torch.cat([gradient_D, usage_M])


def noised(sum_X: Tensor, privacy: SitePrivacy, sigma: float) -> Tensor:
    """Return the released mean: sum plus noise over the public expected batch, X, on the sum's device.

    Parameters
    ----------
    sum_X
        Of `clipped_sum`.
    privacy
        Norms and divisor.
    sigma
        Noise multiplier.
    """
    noise_X = torch.from_numpy(gaussian(len(sum_X))) * (sigma * privacy.sensitivity)
    return ((sum_X.double().cpu() + noise_X) / privacy.expected_batch).to(sum_X.dtype).to(sum_X.device)


def usage_of(mean_M: Tensor, privacy: SitePrivacy) -> tuple[float, ...]:
    """Return the noised usage as shares on the simplex, even where too little is left to tell.

    Parameters
    ----------
    mean_M
        Usage part of `noised`, averaged over the round's steps.
    privacy
        The usage's scale.
    """
    if not len(mean_M):
        return ()
    share_M = (mean_M.double() / privacy.usage_scale).clamp(min=0.0)
    if not share_M.sum() >= _LEAST_USAGE:
        return (1.0 / len(mean_M),) * len(mean_M)
    return tuple((share_M / share_M.sum()).tolist())
