"""The private round's rates, pull and prototypes, with released gradients that are known."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from icmoe import privacy
from icmoe.model import build_model
from icmoe.privacy import private_round
from icmoe.training import learning_rate
from tests.private_data import SITE, FeatureRows, settled

CPU = torch.device("cpu")


def by_ones(make_study, make_features, monkeypatch: pytest.MonkeyPatch, *, mu: float, number: int) -> tuple[float, list[float]]:
    """Return how far one weight moves in a round whose every released gradient is 1, and the rates of its three steps."""
    monkeypatch.setattr(privacy, "noised", lambda total, setting, sigma: torch.ones_like(total))
    site = {**SITE, "optimizer": "sgd", "average_last": 0.0, "sample_rate": 0.5}
    training = {"schedule": "cosine", "learning_rate": 0.1, "weight_decay": 0.0, "proximal_mu": mu}
    study = make_study(privacy={"site": site}, training=training, loss={"contrast": 0.0})
    model = settled(build_model(study, seed=1))
    start = model.head.classify.bias[0].item()
    private_round(model, FeatureRows(study, make_features, [1] * 4), study, round_number=number, device=CPU)
    rates = [learning_rate(study, round_number=number, step=step, steps=3) for step in range(3)]
    return model.head.classify.bias[0].item() - start, rates


@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_the_rate_falls_over_the_rounds_and_the_proximal_term_pulls_back(
    mu: float, make_study, make_features, monkeypatch
) -> None:
    moved = []
    for number in (1, 2):
        found, rates = by_ones(make_study, make_features, monkeypatch, mu=mu, number=number)
        away, speed = 0.0, 0.0
        for rate in rates:
            speed = 0.9 * speed + 1.0 + mu * away
            away -= rate * speed
        assert found == pytest.approx(away, rel=1e-4)
        moved.append(-found)
    assert moved[1] < 0.6 * moved[0]


def test_the_contrast_meets_the_prototypes_that_the_round_began_with(make_study, make_features) -> None:
    study = make_study(privacy={"site": SITE})
    model = settled(build_model(study, seed=1))
    incoming = F.normalize(model.prototypes_KD.detach().clone(), dim=1)
    private_round(model, FeatureRows(study, make_features, [1, 3, 6, 2]), study, round_number=1, device=CPU)
    assert torch.equal(model.round_prototypes_KD, incoming)
