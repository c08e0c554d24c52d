"""The three kinds of experts, the router and the wiring of the losses, each against a slow and obvious reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from icmoe import losses
from icmoe.contrast import prototype_pull, semantic_contrast
from icmoe.experts import BODIES, AdaptiveExpert, BasicExpert, SemanticExpert, make_experts
from icmoe.kinds import KINDS, is_personal, is_usage_weighted, names_of
from icmoe.model import build_model
from icmoe.router import Router
from icmoe.study import ModelShape

C, b, H, W = 6, 4, 7, 9


@pytest.fixture
def x_BCHW() -> torch.Tensor:
    return torch.randn(2, C, H, W, generator=torch.Generator().manual_seed(1))


def per_pixel(layer: torch.nn.Module, image_CHW: torch.Tensor) -> torch.Tensor:
    """Apply a pointwise layer pixel by pixel."""
    rows = [layer.weight @ image_CHW[:, y, x] + layer.bias for y in range(H) for x in range(W)]
    return torch.stack(rows, dim=1).view(-1, H, W)


def depthwise(conv: torch.nn.Conv2d, image_bHW: torch.Tensor, dilation: int) -> torch.Tensor:
    """Apply a depthwise 3x3 convolution by its definition, zero outside the image."""
    out = torch.empty_like(image_bHW)
    for c in range(b):
        for y in range(H):
            for x in range(W):
                total = conv.bias[c].clone()
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        v, u = y + i * dilation, x + j * dilation
                        if 0 <= v < H and 0 <= u < W:
                            total += conv.weight[c, 0, i + 1, j + 1] * image_bHW[c, v, u]
                out[c, y, x] = total
    return out


@torch.no_grad()
def test_basic_expert_is_down_then_local(x_BCHW: torch.Tensor) -> None:
    expert = BasicExpert(C, b)
    wanted = torch.stack([F.gelu(depthwise(expert.local, F.gelu(per_pixel(expert.down, image)), 1)) for image in x_BCHW])
    assert torch.allclose(expert(x_BCHW), wanted, atol=1e-5)


@torch.no_grad()
def test_semantic_expert_reads_the_image_and_is_read_by_each_pixel(x_BCHW: torch.Tensor) -> None:
    expert = SemanticExpert(C, b, prototypes=3)
    for image, found in zip(x_BCHW, expert(x_BCHW), strict=True):
        h_bN = F.gelu(per_pixel(expert.down, image)).flatten(1)
        meanings = []
        for p in range(3):
            score_N = torch.stack([expert.read.weight[p] @ h_bN[:, n] + expert.read.bias[p] for n in range(H * W)]) / b**0.5
            read_b = sum(share * h_bN[:, n] for n, share in enumerate(score_N.softmax(dim=0)))
            meanings.append(F.gelu(expert.think(read_b)))
        for n in range(H * W):
            query_b = expert.query.weight @ h_bN[:, n] + expert.query.bias
            share_P = torch.stack([meaning @ query_b / b**0.5 for meaning in meanings]).softmax(dim=0)
            wanted = h_bN[:, n] + sum(share * meaning for share, meaning in zip(share_P, meanings, strict=True))
            assert torch.allclose(found[:, n // W, n % W], wanted, atol=1e-5)


@torch.no_grad()
def test_adaptive_expert_mixes_three_scales_and_is_modulated_by_its_own_image(x_BCHW: torch.Tensor) -> None:
    expert = AdaptiveExpert(C, b)
    for image, found in zip(x_BCHW, expert(x_BCHW), strict=True):
        h_bHW = F.gelu(per_pixel(expert.down, image))
        mixed = per_pixel(expert.mix, sum(depthwise(conv, h_bHW, d) for conv, d in zip(expert.scales, (1, 2, 4), strict=True)))
        film = expert.modulate.weight @ image.mean(dim=(1, 2)) + expert.modulate.bias
        wanted = F.gelu(mixed * (1 + film[:b, None, None]) + film[b:, None, None])
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", [BasicExpert, AdaptiveExpert, lambda *widths: SemanticExpert(*widths, 3)])
def test_no_image_of_a_batch_sees_another(kind, x_BCHW: torch.Tensor) -> None:
    expert = kind(C, b)
    assert torch.allclose(expert(x_BCHW)[:1], expert(x_BCHW[:1]), atol=1e-6)


def test_experts_come_in_a_fixed_order_with_names() -> None:
    shape = ModelShape(basic_experts=2, semantic_experts=1, adaptive_experts=1, bottleneck=b)
    experts = make_experts(shape, channels=C, classes=2)
    assert names_of(shape) == ("basic-1", "basic-2", "semantic-1", "adaptive-1")
    assert [type(expert.body) for expert in experts] == [BasicExpert, BasicExpert, SemanticExpert, AdaptiveExpert]
    assert all(not expert.up.weight.any() and not expert.up.bias.any() for expert in experts)


def test_the_study_counts_each_kind_once() -> None:
    counts = [name for name in ModelShape.model_fields if name.endswith("_experts")]
    assert counts == [f"{kind.name}_experts" for kind in KINDS] == [f"{name}_experts" for name in BODIES]
    assert ModelShape(basic_experts=3, semantic_experts=0, adaptive_experts=1).experts == 4


def test_a_kind_says_itself_how_the_server_and_personal_mode_treat_it() -> None:
    shape = ModelShape(basic_experts=1, semantic_experts=2, adaptive_experts=1)
    tensors = [f"experts.{index}.up.weight" for index in range(5)]
    assert [is_usage_weighted(name, shape) for name in tensors] == [False, True, True, True, False]  # there is no fifth
    assert [is_personal(name, shape) for name in [*tensors, "router.logits.weight"]] == [False, False, False, True, False, True]


def test_a_semantic_expert_holds_four_prototypes_per_class() -> None:
    shape = ModelShape(basic_experts=0, semantic_experts=1, adaptive_experts=0, bottleneck=b, top_k=1)
    (expert,) = make_experts(shape, channels=C, classes=3)
    assert expert.body.read.weight.shape == (12, b)


@torch.no_grad()
def test_the_router_scores_each_pixel_from_its_own_feature_through_one_hidden_layer(x_BCHW: torch.Tensor) -> None:
    router = Router(C, 3, b, noise=0.5)
    wanted = torch.stack([per_pixel(router.score, F.gelu(per_pixel(router.down, image))) for image in x_BCHW])
    assert torch.allclose(router(x_BCHW), wanted, atol=1e-5)


def test_each_logit_of_the_router_has_noise_of_its_own(x_BCHW: torch.Tensor) -> None:
    router = Router(C, 3, b, noise=0.5)
    noise = router(x_BCHW, torch.Generator().manual_seed(1)) - router(x_BCHW)
    assert len(noise.detach().mul(1e4).round().unique()) > 0.95 * noise.numel()


def test_the_router_is_noisy_in_training_only(x_BCHW: torch.Tensor) -> None:
    router = Router(C, 3, b, noise=0.5)
    quiet = router(x_BCHW)
    assert torch.equal(quiet, router(x_BCHW))
    noisy = router(x_BCHW, torch.Generator().manual_seed(1))
    assert torch.equal(noisy, router(x_BCHW, torch.Generator().manual_seed(1)))
    assert (noisy - quiet).std().item() == pytest.approx(0.5, rel=0.2)
    router.noise = 0.0
    assert torch.equal(quiet, router(x_BCHW, torch.Generator().manual_seed(1)))


def test_each_loss_term_of_the_model_is_its_formula(make_study, make_features) -> None:
    # A grid of 16 x 16 has more pixels than anchors, so that the preference for wrong ones shows.
    study = make_study(loss={"router_anchor": 0.1}, model={"router_noise": 0.0}, backbone={"image_size": 256})
    features, target = make_features(study)
    model = build_model(study, seed=1)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    model.start_round()
    anchor = Router(features.embedding_BCHW.shape[1], 3, study.model.bottleneck, 0.0)
    terms, output = model.losses(features, target, study.loss, torch.Generator().manual_seed(4), anchor)
    votes, half = output.experts, losses.halve(target)
    log_p = output.logits_BKhw.log_softmax(dim=1)
    fused = (votes.gates_BMHW[:, :, None] * votes.log_votes_BMKHW.exp()).sum(dim=1)
    z_BDN = F.normalize(model.project(output.fused_BCHW), dim=1).flatten(2)
    class_BN = half.argmax(dim=1).flatten(1)
    wrong_BN = fused.argmax(dim=1).flatten(1) != class_BN
    now_KD, frozen = F.normalize(model.prototypes_KD, dim=1), features.embedding_BCHW.flatten(2)
    assert torch.allclose(model.round_prototypes_KD, now_KD)
    contrast = semantic_contrast(z_BDN, frozen, class_BN, wrong_BN, now_KD.detach(), torch.Generator().manual_seed(4))
    wanted = {
        "cross_entropy": losses.cross_entropy(log_p, target),
        "dice": losses.dice_loss(log_p.exp(), target),
        "vote": losses.cross_entropy(fused.log(), half),
        "label_consistency": losses.label_consistency(votes.router_logits_BMHW, votes.log_votes_BMKHW, half),
        "load_balance": losses.load_balance(votes.router_logits_BMHW, votes.gates_BMHW, half),
        "router_z": losses.router_z(votes.router_logits_BMHW),
        "router_anchor": losses.router_anchor(votes.router_logits_BMHW, anchor(votes.normed_BCHW)),
        "contrast": contrast + prototype_pull(z_BDN, class_BN, now_KD),
    }
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(terms[name], value, atol=1e-5), name
    assert terms["router_anchor"].abs().sum() > 0


@torch.no_grad()
def test_the_mask_head_doubles_the_grid_bilinearly(make_study) -> None:
    head = build_model(make_study(), seed=1).head
    y = torch.randn(1, head.down.weight.shape[1], 4, 4, generator=torch.Generator().manual_seed(2))
    h = F.gelu(head.norm(head.down(y)))
    grown = F.interpolate(h, size=(8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(head(y), head.classify(F.gelu(head.refine(grown))), atol=1e-6)
