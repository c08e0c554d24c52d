"""The loss of IC-MoE, term by term.

Every term is one value per image, so that the loss is a sum over patients and clipping per patient means something.
Targets are area fractions ("soft labels"): shape B K H W, summing to 1 over K. Shapes: M experts, N = H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LABEL_FIT_TEMPERATURE = 0.5
LOG_NOTHING = -1e4
"""Log of a probability that is zero in float32, and finite: a target of zero times it is zero."""
SMOOTH_CELLS = 1.0
"""Cells that soft Dice of a class is smoothed by where the picture shows it."""
SMOOTH_SHARE = 0.025
"""Share of the picture's cells where it does not: with fewer, a class is unlearned there faster than others teach it
(simulations/evidence/LOG.md, "Why small structures are learned late")."""


def counted_as_background(log_p: Tensor, unknown: Sequence[int], *, dim: int) -> Tensor:
    """Return log probabilities in which those of some classes are the background's, and those classes have none.

    A class that no training picture of a site shows may still be the right answer elsewhere: a loss of these neither teaches nor
    unlearns it (marginal loss, Shi et al., arXiv 2007.03868, section 3.2).

    Parameters
    ----------
    log_p
        Log probabilities with K classes along `dim`, the background first.
    unknown
        Classes that the site does not show, never the background.
    dim
        The classes' dimension.
    """
    if not unknown:
        return log_p
    by_class = list(log_p.split(1, dim=dim))
    by_class[0] = torch.cat([by_class[c] for c in (0, *unknown)], dim=dim).logsumexp(dim=dim, keepdim=True)
    for c in unknown:
        by_class[c] = torch.full_like(by_class[c], LOG_NOTHING)
    return torch.cat(by_class, dim=dim)


def cross_entropy(log_p_BKHW: Tensor, target_BKHW: Tensor) -> Tensor:
    """Return the pixel mean of -sum_c Y_c log p_c for each image, B."""
    return -(target_BKHW * log_p_BKHW).sum(dim=1).mean(dim=(1, 2))


def dice_loss(p_BKHW: Tensor, target_BKHW: Tensor) -> Tensor:
    """Return 1 - soft Dice of each image, B, averaged over the foreground classes.

    The smoothing term makes a tumour-free image with an empty prediction cost 0 rather than 0/0, and bounds what each cell of
    another prediction costs there.
    """
    p_BKN, target_BKN = p_BKHW[:, 1:].flatten(2), target_BKHW[:, 1:].flatten(2)
    both_BK = (p_BKN * target_BKN).sum(dim=2)
    total_BK = p_BKN.sum(dim=2) + target_BKN.sum(dim=2)
    smooth_BK = torch.where(target_BKN.sum(dim=2) > 0, SMOOTH_CELLS, SMOOTH_SHARE * p_BKN.shape[2])
    return 1.0 - ((2.0 * both_BK + smooth_BK) / (total_BK + smooth_BK)).mean(dim=1)


def label_consistency(router_logits_BMHW: Tensor, log_votes_BMKHW: Tensor, target_BKHW: Tensor) -> Tensor:
    """Return KL(stopgrad(q) || r) of each image, B: the router learns who is right where.

    q_e = softmax_e(-CE(v_e, Y) / 0.5) is each expert's fit to the label of the pixel.
    """
    fit_BMHW = (log_votes_BMKHW.detach() * target_BKHW[:, None]).sum(dim=2) / LABEL_FIT_TEMPERATURE
    log_q_BMHW = fit_BMHW.log_softmax(dim=1)
    log_r_BMHW = router_logits_BMHW.log_softmax(dim=1)
    return (log_q_BMHW.exp() * (log_q_BMHW - log_r_BMHW)).sum(dim=1).mean(dim=(1, 2))


def class_balance(target_BKHW: Tensor) -> Tensor:
    """Return pixel weights, B H W, summing to 1 per image, in which every class present counts alike."""
    count_BK11 = target_BKHW.sum(dim=(2, 3), keepdim=True)
    present_B111 = (count_BK11 > 0).sum(dim=1, keepdim=True)
    return (target_BKHW / count_BK11.clamp(min=1e-6) / present_B111).sum(dim=1)


def load_balance(router_logits_BMHW: Tensor, gates_BMHW: Tensor, target_BKHW: Tensor) -> Tensor:
    """Return M sum_e f_e P_e + CV^2(P) of each image, B; f and P class-balanced over pixels.

    f is the share of choices an expert got (no gradient), P its mean router probability (Fedus et al., arXiv
    2101.03961, eq. 4; the coefficient of variation is Shazeer et al., arXiv 1701.06538, eq. 6). 1 where use is even.
    """
    weight_B1HW = class_balance(target_BKHW)[:, None]
    chosen_BMHW = (gates_BMHW.detach() > 0).to(weight_B1HW.dtype)
    f_BM = (weight_B1HW * chosen_BMHW / chosen_BMHW.sum(dim=1, keepdim=True)).sum(dim=(2, 3))
    P_BM = (weight_B1HW * router_logits_BMHW.softmax(dim=1)).sum(dim=(2, 3))
    experts = P_BM.shape[1]
    return experts * (f_BM * P_BM).sum(dim=1) + P_BM.var(dim=1, unbiased=False) * experts**2


def router_z(router_logits_BMHW: Tensor) -> Tensor:
    """Return the mean of logsumexp(s)^2 of each image, B (Zoph et al., arXiv 2202.08906, eq. 5)."""
    return router_logits_BMHW.logsumexp(dim=1).square().mean(dim=(1, 2))


def router_anchor(router_logits_BMHW: Tensor, global_logits_BMHW: Tensor) -> Tensor:
    """Return KL(r_global || r) of each image, B: keeps a site's router near the round's global one."""
    log_r_BMHW, log_g_BMHW = router_logits_BMHW.log_softmax(dim=1), global_logits_BMHW.detach().log_softmax(dim=1)
    return (log_g_BMHW.exp() * (log_g_BMHW - log_r_BMHW)).sum(dim=1).mean(dim=(1, 2))


def proximal(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """Return half the squared distance to the round's global tensors (FedProx, Li et al., arXiv 1812.06127, eq. 2)."""
    return 0.5 * torch.stack([(now - then).square().sum() for now, then in zip(parameters, start, strict=True)]).sum()


def halve(target_BKHW: Tensor) -> Tensor:
    """Return the target at half the resolution: area fractions average exactly."""
    return F.avg_pool2d(target_BKHW, 2)
