"""A round of local training on seeded patients: what a broken step or a lack of memory ends in, and how long it took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from icmoe import training
from icmoe.errors import IcmoeError
from icmoe.exchange import global_state, state_digest
from icmoe.model import build_model
from icmoe.parts import Parts
from icmoe.privacy_audit.seeded import seeded_rows
from icmoe.training import _Gradient, _Sums, train_round

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_last_step_that_breaks_the_model_is_refused_though_every_loss_was_finite(
    value: float, make_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, steps, whole = make_study(), [0], _Gradient.of

    def broken(self: _Gradient, *given):
        measured = whole(self, *given)
        steps[0] += 1
        if steps[0] == 3:
            self.trained[3].grad[...] = value
        return measured

    monkeypatch.setattr(_Gradient, "of", broken)
    model = build_model(study, seed=1)
    with pytest.raises(IcmoeError, match="the trained model is not finite") as caught:
        train_round(model, seeded_rows(study, [1] * 4, seed=1), study, round_number=1, seed=5, device=CPU, steps=3)
    assert caught.value.faults[0].number == 304


def test_a_lack_of_memory_leaves_no_trace_in_what_the_seed_draws(make_study, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(model={"router_noise": 0.5}, training={"batch_size": 4})
    whole = _Gradient.of

    def after(at_once: int, *, short: bool) -> str:
        tried = [0]

        def scarce(self: _Gradient, *given):
            measured = whole(self, *given)  # memory runs short when all has been drawn
            tried[0] += 1
            if short and tried[0] == 1:
                raise MemoryError
            return measured

        monkeypatch.setattr(_Gradient, "of", scarce)
        monkeypatch.setattr(training, "Parts", lambda _: Parts(at_once))
        model = build_model(study, seed=1)
        train_round(model, seeded_rows(study, [1] * 8, seed=1), study, round_number=1, seed=5, device=CPU, steps=3)
        return state_digest(global_state(model))

    assert after(4, short=True) == after(2, short=False) != after(4, short=False)


def test_the_seconds_of_a_round_end_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1.0]

    class Busy:
        def item(self) -> float:
            clock[0] += 5.0
            return 2.0

    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    sums = _Sums()
    sums.loss = Busy()
    assert sums.result(2, 1.0).train_s == 5.0
