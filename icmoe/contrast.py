"""Semantic-guided contrast: InfoNCE over pixels of one image, positives weighted by the frozen features' similarity.

Anchors are drawn per class and image, half of them pixels that the vote gets wrong. Everything stays within one
image, and the class prototypes it meets are those of the round's global model, constant within the round: the term
is a sum over images, as differential privacy at patient level needs.

InfoNCE: van den Oord et al., arXiv 1807.03748; over pixels with class labels: Wang et al., arXiv 2101.11939.
Shapes: B images, K classes, A = K * per_class anchors, D width of the projection, C of the embedding, N pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ANCHORS_PER_CLASS = 64
TEMPERATURE = 0.1


def draw_anchors(
    class_BN: Tensor, wrong_BN: Tensor, classes: int, generator: torch.Generator, per_class: int = ANCHORS_PER_CLASS
) -> tuple[Tensor, Tensor]:
    """Return anchor pixels and which of them are real: indices B A and a mask B A.

    Half of a class's places go to wrong pixels where there are enough. The rest goes to others of the class by the same draw,
    most of them right: the luckiest of the wrong ones have their places already. A class with fewer pixels than places leaves
    places empty (mask False).

    Parameters
    ----------
    class_BN
        Class index of each pixel.
    wrong_BN
        Whether the fused vote gets the pixel wrong.
    classes
        K.
    generator
        Source of the draw.
    per_class
        Places per class, even.
    """
    per_class = min(per_class, 2 * (class_BN.shape[1] // 2))
    member_BKN = class_BN[:, None] == torch.arange(classes, device=class_BN.device)[:, None]
    luck_BKN = torch.rand(member_BKN.shape, generator=generator, device=class_BN.device)
    first_BKN = luck_BKN + 2.0 * (member_BKN & wrong_BN[:, None]) + member_BKN
    hard_BKa = first_BKN.topk(per_class // 2, dim=2).indices
    rest_BKN = (luck_BKN + member_BKN).scatter(2, hard_BKa, value=-1.0)
    index_BKA = torch.cat([hard_BKa, rest_BKN.topk(per_class // 2, dim=2).indices], dim=2)
    return index_BKA.flatten(1), member_BKN.gather(2, index_BKA).flatten(1)


def semantic_contrast(
    z_BDN: Tensor,
    frozen_BCN: Tensor,
    class_BN: Tensor,
    wrong_BN: Tensor,
    prototypes_KD: Tensor,
    generator: torch.Generator,
    per_class: int = ANCHORS_PER_CLASS,
) -> Tensor:
    """Return the contrast loss of each image, B.

    Parameters
    ----------
    z_BDN
        Normalised projections of all pixels.
    frozen_BCN
        Frozen embedding; its cosine weighs the positives.
    class_BN, wrong_BN, generator, per_class
        As in `draw_anchors`.
    prototypes_KD
        Normalised class prototypes of the round, constant.
    """
    classes = prototypes_KD.shape[0]
    index_BA, valid_BA = draw_anchors(class_BN, wrong_BN, classes, generator, per_class)
    z_BAD = z_BDN.gather(2, index_BA[:, None].expand(-1, z_BDN.shape[1], -1)).transpose(1, 2)
    frozen_BAC = frozen_BCN.gather(2, index_BA[:, None].expand(-1, frozen_BCN.shape[1], -1)).transpose(1, 2)
    class_BA = class_BN.gather(1, index_BA)

    guide_BAC = F.normalize(frozen_BAC, dim=2)
    with torch.autocast(z_BDN.device.type, enabled=False):  # bfloat16 would round what the temperature makes ten times as large
        pair_BAA = z_BAD @ z_BAD.transpose(1, 2) / TEMPERATURE
        proto_BAK = z_BAD @ prototypes_KD.T / TEMPERATURE
        similar_BAA = (guide_BAC @ guide_BAC.transpose(1, 2)).clamp(min=0.0)
    itself_AA = torch.eye(index_BA.shape[1], dtype=torch.bool, device=z_BDN.device)
    usable_BAA = valid_BA[:, None] & ~itself_AA
    logits_BAX = torch.cat([pair_BAA.masked_fill(~usable_BAA, float("-inf")), proto_BAK], dim=2)
    log_share_BAX = logits_BAX - logits_BAX.logsumexp(dim=2, keepdim=True)

    same_BAA = (class_BA[:, :, None] == class_BA[:, None]) & usable_BAA
    own_BAK = _one_hot(class_BA, classes).to(z_BDN.dtype)
    weight_BAX = torch.cat([similar_BAA * same_BAA, own_BAK], dim=2)
    # A masked pair has log share -inf and weight 0; their product must be 0, not nan.
    gain_BA = (weight_BAX * log_share_BAX.masked_fill(weight_BAX == 0, 0.0)).sum(dim=2) / weight_BAX.sum(dim=2)
    return -(gain_BA * valid_BA).sum(dim=1) / valid_BA.sum(dim=1).clamp(min=1)


def prototype_pull(z_BDN: Tensor, class_BN: Tensor, prototypes_KD: Tensor) -> Tensor:
    """Return the cross-entropy of each image, B, that trains the prototypes alone: the projections are constants here.

    Each class present in an image counts alike, however few its pixels.

    Parameters
    ----------
    z_BDN
        Normalised projections.
    class_BN
        Class index of each pixel.
    prototypes_KD
        Normalised class prototypes, trained.
    """
    classes = prototypes_KD.shape[0]
    member_BKN = _one_hot(class_BN, classes).transpose(1, 2).to(z_BDN.dtype)
    count_BK1 = member_BKN.sum(dim=2, keepdim=True)
    with torch.autocast(z_BDN.device.type, enabled=False):
        mean_BKD = (member_BKN / count_BK1.clamp(min=1)) @ z_BDN.detach().transpose(1, 2)
        log_BKK = (F.normalize(mean_BKD, dim=2) @ prototypes_KD.T / TEMPERATURE).log_softmax(dim=2)
    present_BK = count_BK1.squeeze(2) > 0
    return -(log_BKK.diagonal(dim1=1, dim2=2) * present_BK).sum(dim=1) / present_BK.sum(dim=1)


def _one_hot(class_BX: Tensor, classes: int) -> Tensor:
    """Return whether each class is meant, B X K; unlike `F.one_hot` it can be mapped over samples."""
    return class_BX[..., None] == torch.arange(classes, device=class_BX.device)
