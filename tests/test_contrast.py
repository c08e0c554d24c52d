"""Semantic-guided contrast against a slow sum over anchors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from icmoe.contrast import TEMPERATURE, draw_anchors, prototype_pull, semantic_contrast


def drawn(batch: int = 2, pixels: int = 12, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(batch, 5, pixels, generator=generator), dim=1)
    frozen = torch.randn(batch, 7, pixels, generator=generator)
    label = torch.randint(0, 2, (batch, pixels), generator=generator)
    wrong = torch.rand(batch, pixels, generator=generator) < 0.3
    prototypes = F.normalize(torch.randn(2, 5, generator=generator), dim=1)
    return z, frozen, label, wrong, prototypes


def slow_loss(z, frozen, label, prototypes, anchors: list[int]) -> float:
    losses = []
    for i in anchors:
        others = [j for j in anchors if j != i]
        logits = {("pixel", j): float(z[:, i] @ z[:, j]) / TEMPERATURE for j in others}
        logits |= {("class", k): float(z[:, i] @ prototypes[k]) / TEMPERATURE for k in range(len(prototypes))}
        norm = math.log(sum(math.exp(value) for value in logits.values()))
        weights = {("class", int(label[i])): 1.0}
        for j in others:
            cosine = float(F.cosine_similarity(frozen[:, i], frozen[:, j], dim=0))
            if label[i] == label[j]:
                weights["pixel", j] = max(0.0, cosine)
        losses.append(-sum(w * (logits[key] - norm) for key, w in weights.items()) / sum(weights.values()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("per_class", "full"), [(4, True), (10, False)])
def test_the_loss_is_the_weighted_mean_over_anchors(per_class: int, *, full: bool) -> None:
    z, frozen, label, wrong, prototypes = drawn()
    found = semantic_contrast(z, frozen, label, wrong, prototypes, torch.Generator().manual_seed(4), per_class=per_class)
    index, valid = draw_anchors(label, wrong, 2, torch.Generator().manual_seed(4), per_class=per_class)
    assert bool(valid.all()) == full  # places that stay empty are no anchors
    for b in range(2):
        anchors = index[b][valid[b]].tolist()
        assert found[b].item() == pytest.approx(slow_loss(z[b], frozen[b], label[b], prototypes, anchors), rel=1e-4)


def test_beyond_the_half_that_is_wrong_most_anchors_are_right() -> None:
    label, wrong = torch.ones(300, 200, dtype=torch.long), torch.arange(200).expand(300, 200) < 100
    index, _ = draw_anchors(label, wrong, 2, torch.Generator().manual_seed(0), per_class=64)
    hard, rest = index[:, 64:].split(32, dim=1)
    assert bool(wrong.gather(1, hard).all())
    assert wrong.gather(1, rest).float().mean() < 0.2  # 68 of the 168 others are wrong: drawn anew it would be 0.4


def test_anchors_are_of_their_class_distinct_and_half_of_them_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.cat([torch.zeros(1, 50), torch.ones(1, 50)], dim=1).long()
    wrong = torch.zeros(1, 100, dtype=torch.bool)
    wrong[0, 40:60] = True  # ten of each class
    index, valid = draw_anchors(label, wrong, 2, generator, per_class=16)
    assert valid.all()
    for k in range(2):
        places = index[0, k * 16 : (k + 1) * 16]
        assert (label[0, places] == k).all()
        assert len(set(places.tolist())) == 16
        assert wrong[0, places].sum() >= 8


def test_a_class_with_few_pixels_leaves_places_empty() -> None:
    label = torch.zeros(1, 20).long()
    label[0, 3] = 1
    index, valid = draw_anchors(label, torch.zeros(1, 20, dtype=torch.bool), 2, torch.Generator().manual_seed(0), per_class=8)
    assert valid[0, :8].all()
    assert index[0, 8:][valid[0, 8:]].tolist() == [3]


def test_images_do_not_meet_and_frozen_features_get_no_gradient() -> None:
    z, frozen, label, wrong, prototypes = drawn()
    z, frozen = z.requires_grad_(), frozen.requires_grad_()
    loss = semantic_contrast(z, frozen, label, wrong, prototypes, torch.Generator().manual_seed(4), per_class=4)
    loss[0].backward()
    assert z.grad[0].abs().sum() > 0
    assert z.grad[1].abs().sum() == 0
    assert torch.isfinite(z.grad).all()


def test_projections_of_one_class_together_cost_less() -> None:
    _, frozen, label, wrong, prototypes = drawn()
    sorted_out = F.normalize(prototypes[label].transpose(1, 2), dim=1)
    mixed = F.normalize(prototypes[1 - label].transpose(1, 2), dim=1)

    def loss(z: torch.Tensor) -> float:
        return semantic_contrast(z, frozen, label, wrong, prototypes, torch.Generator().manual_seed(1), 4).mean().item()

    assert loss(sorted_out) < loss(mixed)


def test_the_pull_trains_the_prototypes_alone_and_skips_absent_classes() -> None:
    z, _, label, _, prototypes = drawn()
    label[0] = 0
    z, prototypes = z.requires_grad_(), prototypes.requires_grad_()
    loss = prototype_pull(z, label, prototypes)
    loss.sum().backward()
    assert z.grad is None
    assert prototypes.grad.abs().sum() > 0
    mean = F.normalize(z[0].mean(dim=1), dim=0)
    log_share = (prototypes @ mean / TEMPERATURE).log_softmax(dim=0)
    assert loss[0].item() == pytest.approx(-log_share[0].item(), rel=1e-5)


def test_mixed_precision_does_not_round_what_the_temperature_makes_larger() -> None:
    z, frozen, label, wrong, prototypes = drawn()
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            contrast = semantic_contrast(z, frozen, label, wrong, prototypes, torch.Generator().manual_seed(4))
            losses.append(torch.stack([contrast, prototype_pull(z, label, prototypes)]))
    assert torch.equal(*losses)
