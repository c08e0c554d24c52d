"""How the sites' models become one: FedAvg and the adaptive server steps, as pure functions on named tensors.

FedAvg: McMahan et al., arXiv 1602.05629. FedAdam and FedYogi: Reddi et al., arXiv 2003.00295, algorithm 2, with the
bias correction that Flower's FedAdam has; equal to Flower's classes, which a test holds them to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch

from icmoe.exchange import State

BETA_1, BETA_2, TAU = 0.9, 0.99, 1e-3
Adaptive = Literal["adam", "yogi"]


def weighted_mean(states: Mapping[str, State], sizes: Mapping[str, int]) -> State:
    """Return sum_k n_k theta_k / N, summed in site-name order.

    Parameters
    ----------
    states
        Trained tensors per site.
    sizes
        n_k, training slices per site.
    """
    total = sum(sizes[site] for site in states)
    names = next(iter(states.values()))
    return {name: torch.stack([sizes[site] / total * states[site][name] for site in sorted(states)]).sum(dim=0) for name in names}


def adaptive_step(
    kind: Adaptive, before: State, mean: State, moments: dict[str, State], *, rate: float, round_number: int
) -> tuple[State, dict[str, State]]:
    """Return the tensors after the step that takes ``mean - before`` as pseudo-gradient, and the new moments.

    Parameters
    ----------
    kind
        Second moment of Adam or of Yogi.
    before, mean
        The round's global tensors and the sites' mean.
    moments
        "m" and "v"; empty in the first round.
    rate
        eta of the server.
    round_number
        From 1.
    """
    m, v, after = {}, {}, {}
    corrected = rate
    if kind == "adam":
        corrected *= math.sqrt(1 - BETA_2 ** (round_number + 1)) / (1 - BETA_1 ** (round_number + 1))
    for name, start in before.items():
        delta = mean[name] - start
        old_m, old_v = (moments[key][name] if moments else torch.zeros_like(start) for key in ("m", "v"))
        m[name] = BETA_1 * old_m + (1 - BETA_1) * delta
        square = delta.square()
        pull = (old_v - square) if kind == "adam" else square * torch.sign(old_v - square)
        v[name] = old_v - (1 - BETA_2) * pull
        after[name] = start + corrected * m[name] / (v[name].sqrt() + TAU)
    return after, {"m": m, "v": v}
