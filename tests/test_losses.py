"""Each loss term against a slow, obvious reading of its formula."""

from __future__ import annotations

import math

import pytest
import torch

from icmoe import losses


def soft_target(batch: int = 3, classes: int = 3, side: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, classes, side, side, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(dim=1)


def router(batch: int = 3, experts: int = 4, side: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, experts, side, side, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_is_the_pixel_mean_of_each_image() -> None:
    p, y = soft_target(seed=5), soft_target()
    found = losses.cross_entropy(p.log(), y)
    for b in range(3):
        pixels = [-sum(y[b, c, h, w] * math.log(p[b, c, h, w]) for c in range(3)) for h in range(4) for w in range(4)]
        assert found[b].item() == pytest.approx(float(sum(pixels)) / 16, rel=1e-5)


@pytest.mark.parametrize("shown", [True, False])
def test_dice_agrees_with_monai_per_image(shown: bool) -> None:
    from monai.losses import DiceLoss

    p, y = soft_target(seed=5), soft_target()
    if not shown:
        y = torch.cat([torch.ones_like(y[:, :1]), torch.zeros_like(y[:, 1:])], dim=1)
    smooth = losses.SMOOTH_CELLS if shown else losses.SMOOTH_SHARE * y[0, 0].numel()
    reference = DiceLoss(include_background=False, reduction="none", smooth_nr=smooth, smooth_dr=smooth)
    assert torch.allclose(losses.dice_loss(p, y), reference(p, y).flatten(1).mean(dim=1), atol=1e-6)


def test_dice_of_a_picture_with_one_marked_cell_by_hand() -> None:
    p = torch.tensor([0.5, 0.0, 0.25, 0.25]).view(1, 1, 2, 2)
    y = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    shown, empty = (losses.dice_loss(torch.cat([1 - p, p], dim=1), torch.cat([1 - t, t], dim=1)) for t in (y, 0 * y))
    assert shown.item() == pytest.approx(1 - (2 * 0.5 + 1) / (1 + 1 + 1))
    assert empty.item() == pytest.approx(1 - 0.1 / (1 + 0.1))  # 2.5 % of four cells


def test_an_empty_image_with_an_empty_prediction_costs_nothing() -> None:
    empty = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    assert losses.dice_loss(empty, empty).item() == pytest.approx(0.0)
    assert losses.dice_loss(1 - empty, empty).item() > 0.9


def test_a_class_that_one_picture_lacks_is_not_unlearned_much_faster_than_another_teaches_it() -> None:
    """While the class is hardly marked anywhere: an empty picture's push down, and the push up of one with 75 cells of it."""
    p = torch.tensor([0.9999, 0.0001]).view(1, 2, 1, 1).repeat(2, 1, 64, 64).requires_grad_()
    target = torch.zeros(2, 64, 64)
    target[1].view(-1)[:75] = 1.0
    losses.dice_loss(p, torch.stack([1 - target, target], dim=1)).sum().backward()
    down, up = p.grad[0, 1, 63, 63], -p.grad[1, 1, 0, 0]
    assert 0 < down < 1.5 * up


def test_an_unknown_class_is_background_and_is_neither_taught_nor_unlearned() -> None:
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    p = logits.softmax(dim=1)
    found = losses.counted_as_background(p.log(), [1, 3], dim=1).exp()
    assert torch.allclose(found, torch.stack([p[:, 0] + p[:, 1] + p[:, 3], 0 * p[:, 1], p[:, 2], 0 * p[:, 3]], dim=1))
    y = soft_target(batch=2, classes=2, side=3)
    target = torch.stack([y[:, 0], 0 * y[:, 0], y[:, 1], 0 * y[:, 0]], dim=1)
    (losses.cross_entropy(found.clamp(min=1e-30).log(), target) + losses.dice_loss(found, target)).sum().backward()
    # Background and unknown classes move together, each by its own share: none wins against another.
    assert torch.allclose(logits.grad[:, [1, 3]] / p[:, [1, 3]], (logits.grad[:, :1] / p[:, :1]).expand(-1, 2, -1, -1), rtol=1e-4)
    assert logits.grad[:, 0].abs().min() > 0


def test_without_an_unknown_class_nothing_is_changed() -> None:
    log_p = soft_target().log()
    assert losses.counted_as_background(log_p, [], dim=1) is log_p


def test_label_consistency_is_zero_where_the_router_knows_who_is_right() -> None:
    y = soft_target(batch=1, classes=2, side=2)
    votes = soft_target(batch=4, classes=2, side=2, seed=7)[None]
    fit = (votes.log() * y[:, None]).sum(dim=2) / losses.LABEL_FIT_TEMPERATURE
    assert losses.label_consistency(fit, votes.log(), y).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.label_consistency(-fit, votes.log(), y).item() > 0.01


def test_label_consistency_follows_the_formula_and_trains_the_router_alone() -> None:
    y, s = soft_target(batch=1, classes=2, side=1), router(batch=1, experts=3, side=1).requires_grad_()
    log_v = soft_target(batch=3, classes=2, side=1, seed=4).log()[None].requires_grad_()
    found = losses.label_consistency(s, log_v, y)
    weights = [math.exp(sum(float(y[0, c]) * float(log_v[0, e, c]) for c in range(2)) / 0.5) for e in range(3)]
    q = [weight / sum(weights) for weight in weights]
    r = s.softmax(dim=1).flatten().tolist()
    assert found.item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(q, r, strict=True)), abs=1e-5)
    found.sum().backward()
    assert s.grad is not None
    assert log_v.grad is None


def test_even_use_costs_exactly_one_and_collapse_costs_more() -> None:
    y = soft_target(batch=1)
    even = losses.load_balance(torch.zeros(1, 4, 4, 4), torch.full((1, 4, 4, 4), 0.25), y)
    assert even.item() == pytest.approx(1.0, abs=1e-5)
    logits = torch.zeros(1, 4, 4, 4)
    logits[:, 0] = 20.0
    gates = torch.zeros(1, 4, 4, 4)
    gates[:, 0] = 1.0
    assert losses.load_balance(logits, gates, y).item() == pytest.approx(4.0 + 3.0, abs=1e-3)  # M f P = 4, CV^2 = 3


def test_balance_weighs_each_class_alike_however_rare() -> None:
    y = torch.zeros(1, 2, 4, 4)
    y[:, 0] = 1.0
    y[0, :, 0, 0] = torch.tensor([0.0, 1.0])
    weight = losses.class_balance(y)
    assert weight.sum().item() == pytest.approx(1.0)
    assert weight[0, 0, 0].item() == pytest.approx(0.5)
    y[0, :, 0, 0] = torch.tensor([1.0, 0.0])
    assert losses.class_balance(y)[0, 0, 0].item() == pytest.approx(1 / 16)  # an absent class takes no share


def test_router_z_and_anchor() -> None:
    s = router(batch=1, experts=2, side=1)
    assert losses.router_z(s).item() == pytest.approx(math.log(sum(math.exp(v) for v in s.flatten().tolist())) ** 2, rel=1e-5)
    assert losses.router_anchor(s, s).item() == pytest.approx(0.0, abs=1e-6)
    other = router(batch=1, experts=2, side=1, seed=9)
    g, r = other.softmax(1).flatten().tolist(), s.softmax(1).flatten().tolist()
    expected = sum(a * math.log(a / b) for a, b in zip(g, r, strict=True))
    assert losses.router_anchor(s, other).item() == pytest.approx(expected, abs=1e-6)
    losses.router_anchor(s.requires_grad_(), other.requires_grad_()).sum().backward()
    assert s.grad.abs().sum() > 0
    assert other.grad is None  # the global router is a constant of the round


def test_proximal_is_half_the_squared_distance() -> None:
    now, then = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([0.0, 0.0]), torch.tensor([1.0])]
    assert losses.proximal(now, then).item() == pytest.approx(0.5 * (1 + 4 + 4))


def test_halving_keeps_area_fractions() -> None:
    y = soft_target(side=4)
    half = losses.halve(y)
    assert half[0, 0, 0, 0].item() == pytest.approx(y[0, 0, :2, :2].mean().item())
    assert torch.allclose(half.sum(dim=1), torch.ones_like(half[:, 0]))


@pytest.mark.parametrize("term", ["cross_entropy", "dice", "label_consistency", "load_balance", "router_z", "router_anchor"])
def test_the_value_of_an_image_does_not_depend_on_the_others(term: str) -> None:
    y, s, gates = soft_target(), router(), router(seed=3).softmax(dim=1)
    votes = torch.stack([soft_target(seed=seed) for seed in range(4)], dim=1)
    work = {
        "cross_entropy": lambda i: losses.cross_entropy(soft_target(seed=5)[i].log(), y[i]),
        "dice": lambda i: losses.dice_loss(soft_target(seed=5)[i], y[i]),
        "label_consistency": lambda i: losses.label_consistency(s[i], votes[i].log(), y[i]),
        "load_balance": lambda i: losses.load_balance(s[i], gates[i], y[i]),
        "router_z": lambda i: losses.router_z(s[i]),
        "router_anchor": lambda i: losses.router_anchor(s[i], router(seed=8)[i]),
    }[term]
    assert torch.allclose(work(slice(0, 3))[:1], work(slice(0, 1)), atol=1e-6)
