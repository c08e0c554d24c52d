"""A round of local training on seeded patients: what a broken step ends in."""

from __future__ import annotations

import pytest
import torch

from icmoe.errors import IcmoeError
from icmoe.model import build_model
from icmoe.privacy_audit.seeded import seeded_rows
from icmoe.training import _Gradient, train_round

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_last_step_that_breaks_the_model_is_refused_though_every_loss_was_finite(
    value: float, make_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, steps, whole = make_study(), [0], _Gradient.of

    def broken(self: _Gradient, batch, at_once: int):
        measured = whole(self, batch, at_once)
        steps[0] += 1
        if steps[0] == 3:
            self.trained[3].grad[...] = value
        return measured

    monkeypatch.setattr(_Gradient, "of", broken)
    model = build_model(study, seed=1)
    with pytest.raises(IcmoeError, match="the trained model is not finite") as caught:
        train_round(model, seeded_rows(study, [1] * 4, seed=1), study, round_number=1, seed=5, device=CPU, steps=3)
    assert caught.value.faults[0].number == 304
