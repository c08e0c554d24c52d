"""What the experts do: shares that sum, distances with a sign, gates that are shut and opened again, and their report."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays
from PIL import Image

from icmoe.backbone import grid_of, load_backbone
from icmoe.data.slices import load_mask
from icmoe.data.sources import read_sites
from icmoe.evaluation import score_slices
from icmoe.exchange import global_state, load_state, state_digest
from icmoe.features import FeatureCache
from icmoe.model import ICMoE, build_model
from icmoe.prepare import encode_slices
from icmoe.preprocess import target
from icmoe.voting import agreement
from simulations.expert_use import BANDS, Seen, _Bins, _look, _Shares, border_distance, expert_use, use_tables
from simulations.overlays import EXPERT_COLOURS, Overlay, panels
from simulations.phantoms import PhantomSite, write_phantoms

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=40)
@given(arrays.arrays(bool, (6, 7)))
def test_distance_is_negative_inside_half_a_cell_at_the_border_and_infinite_without_foreground(inside: np.ndarray) -> None:
    truth_KHW = np.stack([~inside, inside]).astype(np.float32)
    found = border_distance(truth_KHW)
    if not inside.any():
        assert np.isinf(found).all()
        return
    assert ((found < 0) == inside).all()
    neighbours = (inside[:, 1:] != inside[:, :-1]).nonzero()
    assert (np.abs(found[:, 1:][neighbours]) == 0.5).all()
    assert (np.abs(found[:, :-1][neighbours]) == 0.5).all()


def test_a_cell_is_inside_where_more_than_half_of_it_is_foreground() -> None:
    rim_K4 = np.array([[0.0, 0.4, 0.6, 1.0], [0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0]], np.float32)
    assert (border_distance(rim_K4[:, None]) < 0).tolist() == [[True, True, False, False]]


@pytest.fixture(scope="module")
def seen(make_study, tmp_path_factory: pytest.TempPathFactory):
    study = make_study()
    root = tmp_path_factory.mktemp("hospitals") / "data"
    sites = [PhantomSite(name=name, train_patients=1, val_patients=1, test_patients=1) for name in ("Alder", "Birch")]
    write_phantoms(root, seed=1, size_px=32, sites=sites)
    slices = [item for site in read_sites(root, study.labels).values() for item in site.of("test")]
    cache = FeatureCache.of(tmp_path_factory.mktemp("cache"), study)
    encode_slices(slices, study, load_backbone("sam-vit-test", image_size=32, device=CPU), cache)
    return study, slices, cache


def shaken(model: ICMoE) -> ICMoE:
    """Return the model with random weights: at start the experts say nothing."""
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()}
    load_state(model, state)
    return model.eval()


def test_shares_sum_to_one_and_the_model_is_left_as_it_was(seen) -> None:
    study, slices, cache = seen
    model = shaken(build_model(study, seed=1))
    before = state_digest(global_state(model))
    use = expert_use(model, slices, study, cache, CPU)
    assert use is not None
    assert state_digest(global_state(model)) == before
    assert set(use["by_site"]) == {"Alder", "Birch"}
    assert set(use["by_class"]) == {"background", "lesion"}
    rows = [row for key in ("by_class", "by_site", "by_distance") for row in use[key].values()]
    assert all(sum(row) == pytest.approx(1.0) and min(row) >= 0.0 for row in rows)
    assert sum(row["share"] for row in use["reliability"]) == pytest.approx(1.0)
    assert all(0.0 <= row["error"] <= 1.0 and 0.0 <= row["agreement"] <= 1.0 for row in use["reliability"])
    assert set(use["removed"]) == set(model.expert_names)
    assert any(use["removed"].values())


def test_who_decides_inside_is_not_counted_outside() -> None:
    truth_BKHW = torch.zeros(1, 2, 20, 20)
    truth_BKHW[:, 1, 4:10, 4:10] = 1.0
    truth_BKHW[:, 0] = 1.0 - truth_BKHW[:, 1]
    shares = _Shares(2)
    nothing_BHW = torch.zeros(1, 20, 20)
    shares.add(Seen("Alder", truth_BKHW, nothing_BHW, nothing_BHW, truth_BKHW), ["background", "lesion"])
    found = shares.record()
    assert found["by_class"] == {"background": [1.0, 0.0], "lesion": [0.0, 1.0]}
    assert found["by_distance"] == {name: [0.0, 1.0] if "inside" in name else [1.0, 0.0] for _, _, name in BANDS}
    assert found["by_site"]["Alder"] == pytest.approx([364 / 400, 36 / 400])


def test_use_is_the_same_however_many_slices_are_looked_at_at_once(seen, monkeypatch: pytest.MonkeyPatch) -> None:
    study, slices, cache = seen
    model = shaken(build_model(study, seed=1))
    shown = []
    for at_once in (16, 1):
        monkeypatch.setattr("simulations.expert_use.EVALUATION_BATCH", at_once)
        shown.append(torch.cat([seen.gates_BMHW for seen in _look(model, slices, study, cache, CPU)]))
    assert torch.allclose(shown[0], shown[1], atol=1e-5)
    assert len(shown[1]) == len(slices) > 2


def test_errors_are_the_cells_where_the_model_is_wrong_and_removal_is_dice_lost(seen) -> None:
    study, slices, cache = seen
    model = shaken(build_model(study, seed=1))
    use = expert_use(model, slices, study, cache, CPU)
    assert use is not None
    side = grid_of(study.backbone)
    wrong, agreed = [], []
    for item in slices:
        output = model(cache.load([cache.key(item.image_digest, "identity")]))
        votes = output.experts
        agreed_BMHW = agreement(votes.router_logits_BMHW, votes.log_votes_BMKHW.exp())
        agreed.append((votes.gates_BMHW * agreed_BMHW).sum(dim=1).mean().item())  # of those that decide, each by its gate
        guess_HW = torch.nn.functional.avg_pool2d(output.logits_BKhw.softmax(dim=1), 2)[0].argmax(dim=0)
        wrong.append(guess_HW != target(load_mask(item.mask, study.labels), study.classes, side).argmax(dim=0))
    error = sum(row["share"] * row["error"] for row in use["reliability"])
    assert error == pytest.approx(torch.stack(wrong).float().mean().item())
    assert sum(row["share"] * row["agreement"] for row in use["reliability"]) == pytest.approx(fmean(agreed))

    def dice() -> float:
        return fmean(score.dice for score in score_slices(model, slices, study.labels, cache, CPU))

    whole = dice()
    model.balance_bias_M[2] = -1e4
    assert use["removed"][model.expert_names[2]] == pytest.approx(dice() - whole)


def test_cells_of_like_agreement_are_told_together_with_their_mean_and_their_errors() -> None:
    bins = _Bins()
    bins.add(torch.tensor([[[0.04, 0.11, 0.19, 1.0]]]), torch.tensor([[[1.0, 0.0, 1.0, 0.0]]]))
    bins.add(torch.tensor([[[0.0, 0.15]]]), torch.tensor([[[1.0, 0.0]]]))
    found = [(row["share"], row["agreement"], row["error"]) for row in bins.record()]
    assert found == [pytest.approx(row) for row in [(1 / 3, 0.02, 1.0), (1 / 2, 0.15, 1 / 3), (1 / 6, 1.0, 0.0)]]


def test_experts_that_say_nothing_are_not_missed_and_a_model_without_experts_has_no_use(seen, make_study) -> None:
    study, slices, cache = seen
    use = expert_use(build_model(study, seed=1).eval(), slices, study, cache, CPU)
    assert use is not None
    assert set(use["removed"].values()) == {0.0}
    bare = make_study(model={"basic_experts": 0, "semantic_experts": 0, "adaptive_experts": 0})
    assert expert_use(build_model(bare, seed=1).eval(), slices, bare, cache, CPU) is None
    assert expert_use(build_model(study, seed=1).eval(), [], study, cache, CPU) is None


def test_every_table_has_a_cell_per_column(seen) -> None:
    study, slices, cache = seen
    use = expert_use(shaken(build_model(study, seed=1)), slices, study, cache, CPU)
    assert use is not None
    tables = use_tables(use)
    assert len(tables) == 5
    assert all(len(row) == len(columns) for _, columns, rows in tables for row in rows)


def test_the_map_of_who_decided_is_a_panel_with_its_shares_in_words(tmp_path: Path) -> None:
    experts = np.zeros((4, 4), np.uint8)
    experts[:, 3] = 1
    blank = np.zeros((4, 4), np.uint8)
    overlay = Overlay("a slice", np.zeros((4, 4)), blank, blank, experts, ("basic-1", "semantic-1"))
    assert [panel.caption for panel in panels(overlay)] == ["image", "truth", "prediction", "who decided"]
    assert panels(overlay)[-1].alternative.endswith("basic-1 75%, semantic-1 25%")
    painted = Image.open(io.BytesIO(base64.b64decode(panels(overlay)[-1].uri.partition(",")[2])))
    for x, colour in ((40, EXPERT_COLOURS[0]), (310, EXPERT_COLOURS[1])):
        assert painted.getpixel((x, 160)) == pytest.approx([0.55 * value for value in colour], abs=16)  # enlarging overshoots
    with pytest.raises(ValueError, match="experts"):
        Overlay("a slice", np.zeros((4, 4)), blank, blank, np.zeros((4, 5), np.uint8), ("basic-1",))
    assert len(panels(Overlay("a slice", np.zeros((4, 4)), blank, blank))) == 3
