"""The model: the folded form equals the literal one, ablations are configurations, gradients go where they belong."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from icmoe.contrast import ANCHORS_PER_CLASS, prototype_pull, semantic_contrast
from icmoe.exchange import global_state
from icmoe.losses import cross_entropy, halve, label_consistency
from icmoe.model import build_model, total_loss
from icmoe.study import Study
from icmoe.voting import top_k_gates

ABLATIONS = {
    "full": {},
    "no basic experts": {"model": {"basic_experts": 0, "top_k": 1}},
    "no semantic experts": {"model": {"semantic_experts": 0}},
    "no adaptive experts": {"model": {"adaptive_experts": 0}},
    "mask head alone": {"model": {"basic_experts": 0, "semantic_experts": 0, "adaptive_experts": 0}},
    "no voting": {"model": {"voting": False}},
    "no block features": {"backbone": {"block_features": False}},
    "router anchor": {"loss": {"router_anchor": 0.1}},
    "three classes": {"labels": [{"name": name, "values": [index]} for index, name in enumerate(("none", "rim", "core"))]},
    **{
        f"no {term}": {"loss": {term: 0.0}}
        for term in ("cross_entropy", "dice", "vote", "label_consistency", "load_balance", "router_z", "contrast")
    },
}


def randomised(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Move every tensor away from its start, where many are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def losses_of(model, study: Study, features, target, seed: int = 1):
    return model.losses(features, target, study.loss, torch.Generator().manual_seed(seed), getattr(model, "router", None))


def test_folded_fusion_and_votes_equal_the_formulas(make_study, make_features) -> None:
    study = make_study()
    features, _ = make_features(study)
    model = randomised(build_model(study, seed=1))
    model.balance_bias_M.copy_(torch.tensor([0.1, -0.2, 0.1]))
    output = model(features)
    x = features.embedding_BCHW + sum(
        gate * conv(block)
        for gate, conv, block in zip(model.lateral.gate_L.sigmoid(), model.lateral.convs, features.blocks, strict=True)
    )
    xn = model.norm(x)
    contributions = [expert.up(expert.body(xn)) for expert in model.experts]
    votes = torch.stack([model.vote_head(x + d).softmax(dim=1) for d in contributions], dim=1)
    assert torch.allclose(output.experts.log_votes_BMKHW.exp(), votes, atol=1e-5)
    y = x + sum(output.experts.gates_BMHW[:, e : e + 1] * d for e, d in enumerate(contributions))
    assert torch.allclose(output.fused_BCHW, y, atol=1e-4)
    assert torch.allclose(output.logits_BKhw, model.head(y), atol=1e-4)
    fused = sum(output.experts.gates_BMHW[:, e, None] * votes[:, e] for e in range(3))
    assert torch.allclose(output.experts.fused(), fused, atol=1e-5)


def test_at_the_start_the_model_is_the_plain_backbone_with_its_head(make_study, make_features) -> None:
    study = make_study()
    features, _ = make_features(study)
    model = build_model(study, seed=1)
    assert torch.equal(model(features).fused_BCHW, features.embedding_BCHW)
    assert torch.equal(model(features).logits_BKhw, model.head(features.embedding_BCHW))


def test_without_experts_only_head_and_laterals_are_left(make_study, make_features) -> None:
    study = make_study(**ABLATIONS["mask head alone"], backbone={"block_features": False})
    features, _ = make_features(study)
    model = randomised(build_model(study, seed=1))
    names = {name.split(".")[0] for name in global_state(model)}
    assert names == {"head", "project", "prototypes_KD"}
    assert torch.equal(model(features).logits_BKhw, model.head(features.embedding_BCHW))


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_is_a_configuration_that_learns(name: str, make_study, make_features) -> None:
    study = make_study(**ABLATIONS[name])
    features, target = make_features(study)
    model = build_model(study, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    history = []
    for _ in range(12):
        terms, output = losses_of(model, study, features, target)
        assert all(value.shape == (2,) for value in terms.values())
        loss = total_loss(terms, study.loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0]
    assert output.logits_BKhw.shape == target.shape
    off = {term for term in terms if getattr(study.loss, term) == 0.0}
    assert not off


def test_a_class_that_the_site_does_not_show_is_background_in_each_term_of_the_votes(make_study, make_features) -> None:
    study = make_study(**ABLATIONS["three classes"], model={"router_noise": 0.0})
    features, target = make_features(study)
    target = torch.stack([target[:, 0] + target[:, 2], target[:, 1], 0 * target[:, 2]], dim=1)
    model = randomised(build_model(study, seed=1))
    terms, output = model.losses(features, target, study.loss, torch.Generator().manual_seed(1), unknown=[2])
    half, votes = halve(target)[:, :2], output.experts.log_votes_BMKHW.exp()
    seen = torch.stack([votes[:, :, 0] + votes[:, :, 2], votes[:, :, 1]], dim=2)
    fused = (output.experts.gates_BMHW.unsqueeze(2) * seen).sum(dim=1)
    assert torch.allclose(terms["vote"], cross_entropy(fused.log(), half), atol=1e-5)
    wanted = label_consistency(output.experts.router_logits_BMHW, seen.log(), half)
    assert torch.allclose(terms["label_consistency"], wanted, atol=1e-5)


def test_without_voting_the_gates_are_the_routers_alone(make_study, make_features) -> None:
    study = make_study(model={"voting": False, "consensus": 2.0})
    model = randomised(build_model(study, seed=1))
    votes = model(make_features(study)[0]).experts
    assert torch.allclose(votes.gates_BMHW, top_k_gates(votes.router_logits_BMHW, study.model.top_k), atol=1e-6)


def test_without_experts_the_contrast_prefers_what_the_mask_head_gets_wrong(make_study, make_features) -> None:
    # A grid of 16 x 16 has more pixels than anchors, so that the preference shows.
    study = make_study(**{**ABLATIONS["mask head alone"], "backbone": {"image_size": 256}})
    features, target = make_features(study)
    model = randomised(build_model(study, seed=1))
    model.start_round()
    terms, output = model.losses(features, target, study.loss, torch.Generator().manual_seed(4))
    z_BDN = F.normalize(model.project(output.fused_BCHW), dim=1).flatten(2)
    class_BN = halve(target).argmax(dim=1).flatten(1)
    wrong_BN = halve(output.logits_BKhw).argmax(dim=1).flatten(1) != class_BN
    assert wrong_BN.any()
    assert not wrong_BN.all()
    now_KD, frozen_BCN = model.round_prototypes_KD, features.embedding_BCHW.flatten(2)
    wanted = semantic_contrast(z_BDN, frozen_BCN, class_BN, wrong_BN, now_KD, torch.Generator().manual_seed(4))
    assert torch.allclose(terms["contrast"], wanted + prototype_pull(z_BDN, class_BN, now_KD), atol=1e-5)


def test_gradients_reach_every_trained_tensor_and_no_frozen_one(make_study, make_features) -> None:
    study = make_study(loss={"router_anchor": 0.1})
    features, target = make_features(study)
    features.embedding_BCHW.requires_grad_(requires_grad=False)
    model = randomised(build_model(study, seed=1))  # zero-initialised layers would hide what lies before them
    terms, _ = losses_of(model, study, features, target)
    total_loss(terms, study.loss).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum()]
    # A router shift common to all experts changes neither gates nor votes; only the z-loss sees it, so none is exempt.
    assert without == []
    assert features.embedding_BCHW.grad is None
    assert not model.balance_bias_M.requires_grad


def test_an_expert_that_no_pixel_chose_hears_of_the_loss_only_through_the_consensus(make_study, make_features) -> None:
    study = make_study(model={"top_k": 1, "voting": False}, loss={"contrast": 0.0})
    features, target = make_features(study)
    model = randomised(build_model(study, seed=1))
    model.balance_bias_M.copy_(torch.tensor([50.0, 0.0, 0.0]))
    terms, output = losses_of(model, study, features, target)
    assert (output.experts.gates_BMHW[:, 0] == 1).all()
    total_loss(terms, study.loss).backward()
    assert model.experts[0].up.weight.grad.abs().sum() > 0
    assert model.experts[2].up.weight.grad.abs().sum() == 0


def test_every_term_of_an_image_is_its_own(make_study, make_features) -> None:
    study = make_study(loss={"contrast": 0.0})  # the draw of anchors is tested by itself
    features, target = make_features(study, batch=3)
    model = randomised(build_model(study, seed=1)).eval()
    study_terms, _ = model.losses(features, target, study.loss, torch.Generator().manual_seed(1))
    model.router.noise = 0.0
    whole, _ = model.losses(features, target, study.loss, torch.Generator().manual_seed(1))
    single = type(features)(features.embedding_BCHW[:1], tuple(block[:1] for block in features.blocks))
    alone, _ = model.losses(single, target[:1], study.loss, torch.Generator().manual_seed(1))
    for name, value in alone.items():
        assert torch.allclose(value, whole[name][:1], atol=1e-5), name
    assert study_terms.keys() == whole.keys()


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator(make_study) -> None:
    study = make_study()
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, second = global_state(build_model(study, seed=1)), global_state(build_model(study, seed=1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = global_state(build_model(study, seed=2))
    assert not torch.equal(first["router.down.weight"], other["router.down.weight"])


def test_the_default_model_has_half_a_million_parameters(make_study) -> None:
    study = make_study(
        model={"basic_experts": 2, "semantic_experts": 2, "adaptive_experts": 2, "bottleneck": 64},
        backbone={"name": "lite-medsam", "digest": "0" * 64, "image_size": 128},
    )
    count = sum(parameter.numel() for parameter in build_model(study, seed=1).parameters())
    assert 300_000 < count < 600_000
    assert 93_735_472 / count > 150  # against sending the whole of SAM-B
    assert ANCHORS_PER_CLASS == 64
