"""Pixel-probability adaptive voting: which experts decide a pixel, and with what weight.

    r_e = softmax_e s_e ;  vbar = sum_e r_e v_e ;  k_e = sum_c vbar_c v_ec
    a_e = log r_e + beta k_e + b_e ;  T = top-k(a) ;  g = softmax over T of a

Selection and fusion use the experts' own class probabilities v: an expert that agrees with the consensus gains.
No label is needed, so training and inference vote alike. Shapes: B images, M experts, K classes, H x W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def agreement(router_logits_BMHW: Tensor, votes_BMKHW: Tensor) -> Tensor:
    """Return k, B M H W in [0, 1]: each expert's agreement with the router's consensus.

    Parameters
    ----------
    router_logits_BMHW
        Logits s of the router.
    votes_BMKHW
        Class probabilities v of each expert, summing to 1 over K.
    """
    r_BM1HW = router_logits_BMHW.softmax(dim=1).unsqueeze(2)
    consensus_B1KHW = (r_BM1HW * votes_BMKHW).sum(dim=1, keepdim=True)
    return (consensus_B1KHW * votes_BMKHW).sum(dim=2)


def top_k_gates(scores_BMHW: Tensor, top_k: int) -> Tensor:
    """Return gates, B M H W: the softmax over the `top_k` best experts of each pixel, exactly 0 elsewhere, sum 1.

    Parameters
    ----------
    scores_BMHW
        Finite scores a.
    top_k
        Number of experts per pixel, at most M.
    """
    if top_k >= scores_BMHW.shape[1]:
        return scores_BMHW.softmax(dim=1)
    chosen_BTHW = scores_BMHW.topk(top_k, dim=1).indices
    # A tensor of zeros, since torch.jit cannot trace scatter with a plain number that is a bool.
    closed_BMHW = torch.ones_like(scores_BMHW, dtype=torch.bool).scatter(
        1, chosen_BTHW, torch.zeros_like(chosen_BTHW, dtype=torch.bool)
    )
    return scores_BMHW.masked_fill(closed_BMHW, float("-inf")).softmax(dim=1)


def vote(router_logits_BMHW: Tensor, votes_BMKHW: Tensor, balance_bias_M: Tensor, *, top_k: int, consensus: float) -> Tensor:
    """Return the gates g, B M H W, non-negative and summing to 1 over the experts of each pixel.

    Parameters
    ----------
    router_logits_BMHW
        Logits s of the router.
    votes_BMKHW
        Class probabilities of each expert.
    balance_bias_M
        b, moved by the server once per round towards even use.
    top_k
        Experts fused per pixel.
    consensus
        beta; 0 is a plain top-k router.
    """
    a_BMHW = router_logits_BMHW.log_softmax(dim=1) + balance_bias_M[:, None, None]
    if consensus > 0.0:
        a_BMHW = a_BMHW + consensus * agreement(router_logits_BMHW, votes_BMKHW)
    return top_k_gates(a_BMHW, top_k)


def disagreement(votes_BMKHW: Tensor, gates_BMHW: Tensor) -> Tensor:
    """Return how far the experts that decide a pixel disagree, B H W in [0, 1].

    The Jensen-Shannon divergence of their votes, H(sum_e g_e v_e) - sum_e g_e H(v_e), divided by log K: 0 where all vote
    alike, however unsure they are, 1 where all K classes have an equal weight of experts that are sure.

    Parameters
    ----------
    votes_BMKHW
        Class probabilities of each expert, K at least 2.
    gates_BMHW
        Non-negative, summing to 1 over the experts.
    """
    fused_BKHW = (gates_BMHW.unsqueeze(2) * votes_BMKHW).sum(dim=1)
    own_BHW = (gates_BMHW * _entropy(votes_BMKHW, dim=2)).sum(dim=1)
    return ((_entropy(fused_BKHW, dim=1) - own_BHW) / math.log(votes_BMKHW.shape[2])).clamp(0.0, 1.0)


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(dim=dim)
