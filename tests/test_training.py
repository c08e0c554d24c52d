"""Local training: seeded to the byte, schedules, order of slices, usage, refusal of a broken loss."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from icmoe import adamw
from icmoe.backbone import load_backbone
from icmoe.data.folder import read_folder
from icmoe.data.slices import Slice, load_image
from icmoe.dataset import TrainingSet, steps_of, unknown_classes
from icmoe.errors import IcmoeError
from icmoe.evaluation import common_spacing, predict_slices, score_slices
from icmoe.exchange import global_state, state_digest
from icmoe.features import FeatureCache
from icmoe.model import build_model
from icmoe.prepare import encode_slices
from icmoe.preprocess import apply_view, prepare, restore
from icmoe.study import Study
from icmoe.training import WARM_UP_STEPS, learning_rate, train_round

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients of six discs each, one more for validation."""
    root = tmp_path_factory.mktemp("hospital")
    rng = np.random.default_rng(0)
    rows = {"train": [], "val": [], "test": []}
    for split, patients in (("train", ("a", "b")), ("val", ("c",))):
        for patient in patients:
            for index in range(5):
                y, x = np.mgrid[:40, :32]
                centre = rng.uniform(12, 20, 2)
                mask = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 49
                image = (90 * mask + 60 + rng.normal(0, 6, mask.shape)).astype(np.uint8)
                for kind, pixels in (("images", image), ("masks", (mask * 255).astype(np.uint8))):
                    path = root / "S" / kind / f"{patient}_{index}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
                rows[split].append(f"{split},S,{patient},{index},S/images/{patient}_{index}.png,S/masks/{patient}_{index}.png")
    (root / "splits").mkdir()
    for split, lines in rows.items():
        (root / "splits" / f"{split}.csv").write_text("split,site,patient,slice,image,mask\n" + "\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def prepared(hospital: Path, make_study, tmp_path_factory: pytest.TempPathFactory):
    study = make_study(training={"learning_rate": 5e-3, "batch_size": 3, "local_epochs": 2})
    site = read_folder(hospital, study.labels)["S"]
    cache = FeatureCache.of(tmp_path_factory.mktemp("cache"), study)
    backbone = load_backbone("sam-vit-test", image_size=32, device=CPU)
    encode_slices(site.slices, study, backbone, cache)
    return study, site, cache, backbone


def trained(study: Study, data: TrainingSet, seed: int = 9) -> tuple[str, object]:
    model = build_model(study, seed=1)
    result = train_round(model, data, study, round_number=1, seed=seed, device=CPU)
    return state_digest(global_state(model)), result


def test_same_seed_same_bytes_and_another_seed_other_bytes(prepared) -> None:
    study, site, cache, _ = prepared
    data = TrainingSet(site.of("train"), study, cache)
    first, result = trained(study, data)
    torch.manual_seed(123)  # the global generator has no say
    assert trained(study, data)[0] == first
    assert trained(study, data, seed=10)[0] != first
    assert sum(result.usage_M) == pytest.approx(1.0)
    assert all(share > 0 for share in result.usage_M)
    assert result.steps == data.steps(2) == 8


def test_training_finds_the_disc_and_the_backbone_stays_as_it_was(prepared) -> None:
    study, site, cache, backbone = prepared
    before = backbone.weights_digest()
    data = TrainingSet(site.of("train"), study, cache)
    model = build_model(study, seed=1)
    start = score_slices(model, site.of("val"), study.labels, cache, CPU)[0].dice
    for round_number in (1, 2):
        train_round(model, data, study, round_number=round_number, seed=round_number, device=CPU, steps=40)
    after = score_slices(model, site.of("val"), study.labels, cache, CPU)[0].dice
    assert after > max(0.7, start)
    assert backbone.weights_digest() == before
    (prediction, *_) = predict_slices(model, site.of("val"), cache, CPU)
    assert prediction.shape == (40, 32)  # back on the source's own pixels


def _smaller(item: Slice) -> Slice:
    """Return a slice with a mask of 32 x 32 pixels."""
    path = item.mask.with_name("smaller.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    return replace(item, shape=(32, 32), mask=path, marks="")


UNEVEN = {
    "a slice was left out": lambda rows: rows[:2] + rows[3:],
    "every other slice was left out": lambda rows: rows[::2],
    "two series": lambda rows: [*rows[:2], replace(rows[2], index=1), *rows[3:]],
    "all in one place": lambda rows: [replace(item, index=1) for item in rows],
    "other pixels": lambda rows: [*rows[:4], replace(rows[4], spacing_mm=(5.0, 0.5, 0.5))],
    "unknown in part": lambda rows: [*rows[:4], replace(rows[4], spacing_mm=None)],
    "another size": lambda rows: [*rows[:4], _smaller(rows[4])],
}


@pytest.mark.parametrize("change", UNEVEN)
def test_distances_are_measured_only_where_the_slices_are_one_even_stack(change: str, prepared) -> None:
    study, site, cache, _ = prepared
    even = [replace(item, spacing_mm=(5.0, 1.0, 1.0)) for item in site.of("val")]
    model = build_model(study, seed=1)
    (whole,) = score_slices(model, even, study.labels, cache, CPU)
    assert whole.hd95_mm is not None
    thin = [replace(item, step=2) for item in even[::2]]  # listed so
    assert common_spacing(thin) == common_spacing(even) == common_spacing(even[:1]) == (5.0, 1.0, 1.0)
    assert common_spacing([*even[:4], replace(even[4], spacing_mm=(5.0, 1.0005, 1.0))]) == (5.0, 1.0, 1.0)  # rounded otherwise
    assert score_slices(model, [even[2], *even[3:], *even[:2]], study.labels, cache, CPU) == [whole]
    (part,) = score_slices(model, UNEVEN[change](even), study.labels, cache, CPU)
    assert (part.hd95_mm, part.surface_dice) == (None, None)


def test_cached_features_are_the_backbones_own(prepared) -> None:
    study, site, cache, backbone = prepared
    for item in site.of("train")[:3]:
        for view in study.training.views:
            pixels = apply_view(prepare(load_image(item), 32), view)
            fresh = backbone.encode(pixels[None])
            kept = cache.load([cache.key(item.image_digest, view)])
            assert torch.allclose(kept.embedding_BCHW, fresh.embedding_BCHW, rtol=2e-3, atol=2e-3)
            assert torch.allclose(kept.blocks[0], fresh.blocks[0], rtol=2e-3, atol=2e-3)


def test_every_slice_is_seen_once_per_epoch_and_never_twice_in_a_batch_of_one_pass(prepared) -> None:
    study, site, cache, _ = prepared
    data = TrainingSet(site.of("train"), study, cache)
    draws = data._draws(data.steps(1), 4)
    rows = [row for batch, _ in draws for row in batch]
    assert set(rows) == set(range(10))
    assert all(len(set(batch)) == len(batch) for batch, _ in draws[:3])
    spanning = [data._draws(data.steps(2), seed)[3][0] for seed in range(20)]  # the last slice of a pass, two of the next
    assert {len(set(batch)) for batch in spanning} == {2, 3}
    assert {view for _, views in draws for view in views} == set(range(len(study.training.views)))
    assert data._draws(5, 4) == data._draws(5, 4) != data._draws(5, 5)
    tiny = TrainingSet(site.of("train")[:2], study, cache)
    assert all(len(set(batch)) == 2 for batch, _ in tiny._draws(6, 1))  # a one-patient hospital
    assert len(list(tiny.batches(steps=6, seed=1, device=CPU))) == 6


def test_order_of_the_slices_and_how_many_are_predicted_at_once_change_nothing(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    study, site, cache, _ = prepared
    rows, model = site.of("train"), build_model(study, seed=1).eval()
    sets = [TrainingSet(order, study, cache) for order in (rows, rows[::-1])]
    first, second = (next(one.batches(steps=1, seed=1, device=CPU)) for one in sets)
    assert torch.equal(first.features.embedding_BCHW, second.features.embedding_BCHW)
    assert torch.equal(first.target_BKhw, second.target_BKhw)
    many = list(predict_slices(model, rows, cache, CPU))
    monkeypatch.setattr("icmoe.evaluation.EVALUATION_BATCH", 3)
    few = list(predict_slices(model, rows, cache, CPU))
    assert len(few) == len(rows)
    assert all(np.array_equal(*pair) for pair in zip(few, many, strict=True))


def test_steps_of_an_epoch() -> None:
    assert [steps_of(n, 4, 1) for n in (1, 3, 4, 5, 12)] == [1, 1, 1, 2, 3]
    assert steps_of(5, 4, 3) == 6


def test_a_flipped_view_has_a_flipped_target(prepared) -> None:
    study, site, cache, _ = prepared
    data = TrainingSet(site.of("train")[:1], study, cache)
    views = {view: data.read([0], [index], CPU).target_BKhw for index, view in enumerate(study.training.views)}
    assert torch.equal(views["flip"], views["identity"].flip(3))
    assert not torch.equal(views["flip"], views["identity"])


def test_the_rate_warms_up_in_each_round_and_falls_over_the_study(make_study) -> None:
    study = make_study(rounds=4, training={"learning_rate": 1.0})
    first = [learning_rate(study, round_number=1, step=step, steps=50) for step in range(50)]
    assert first[0] == pytest.approx(1 / WARM_UP_STEPS, rel=0.01)
    assert max(first) == first[WARM_UP_STEPS - 1]
    last = learning_rate(study, round_number=4, step=49, steps=50)
    assert 0.0 < last < 0.1
    half = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (1 + 10 / 50) / 4))
    assert learning_rate(study, round_number=2, step=10, steps=50) == pytest.approx(half)
    constant = make_study(rounds=4, training={"learning_rate": 1.0, "schedule": "constant"})
    assert learning_rate(constant, round_number=4, step=49, steps=50) == 1.0


THIRD = {"name": "vessel", "values": [7]}


@pytest.mark.parametrize("untaught", ["unknown", "background"])
def test_a_class_that_the_site_does_not_show_keeps_what_others_taught(untaught: str, prepared, make_study) -> None:
    study, site, cache, _ = prepared
    labels = [*study.model_dump(mode="json")["labels"], THIRD]
    wide = make_study(labels=labels, training={"learning_rate": 5e-3, "batch_size": 3, "untaught": untaught})
    model, data = build_model(wide, seed=1), TrainingSet(site.of("train"), wide, cache)
    with torch.no_grad():
        model.head.classify.bias[2] += 2.0  # what others taught: vessel nearly everywhere
    train_round(model, data, wide, round_number=1, seed=1, device=CPU, steps=20)
    p_BKhw = model(data.read(range(4), [0] * 4, CPU).features).logits_BKhw.softmax(dim=1)
    corner_K = p_BKhw[:, :, :3, :3].mean(dim=(0, 2, 3))  # far from the discs
    assert (corner_K[2] > 3 * corner_K[0]) == (untaught == "unknown"), corner_K


def test_a_site_that_shows_no_class_at_all_teaches_what_is_none(prepared, make_study) -> None:
    study, site, _, _ = prepared
    labels = [*study.model_dump(mode="json")["labels"], THIRD]
    wide = make_study(labels=labels)
    assert unknown_classes(site.of("train"), wide) == (2,)
    assert unknown_classes([replace(item, classes=(0,)) for item in site.of("train")], wide) == ()


def test_a_loss_that_is_not_finite_is_refused_by_number(prepared) -> None:
    study, site, cache, _ = prepared
    model = build_model(study, seed=1)
    with torch.no_grad():
        model.head.classify.bias.fill_(float("nan"))
    with pytest.raises(IcmoeError) as caught:
        train_round(model, TrainingSet(site.of("train"), study, cache), study, round_number=1, seed=1, device=CPU)
    assert caught.value.faults[0].number == 304


def test_the_proximal_term_keeps_the_update_small(prepared, make_study) -> None:
    study, site, cache, _ = prepared
    values = {**study.training.model_dump(), "views": list(study.training.views)}
    mild, near = (make_study(training={**values, "proximal_mu": mu}) for mu in (1.0, 50.0))

    def moved(chosen: Study) -> float:
        model = build_model(chosen, seed=1)
        start = global_state(model)
        train_round(model, TrainingSet(site.of("train"), chosen, cache), chosen, round_number=1, seed=1, device=CPU)
        return sum((tensor - start[name]).square().sum().item() for name, tensor in global_state(model).items())

    assert moved(near) < 0.5 * moved(study)
    assert moved(near) < 0.9 * moved(mild)


@pytest.fixture
def one_picture(prepared, make_study):
    """A site with one slice and one view, so that seeds neither order nor turn anything."""
    _, site, cache, _ = prepared

    def make(noise: float = 0.0, loss: dict[str, float] | None = None, **training: object) -> tuple[Study, TrainingSet]:
        chosen = {"views": ["identity"], "learning_rate": 5e-3, **training}
        study = make_study(model={"router_noise": noise}, loss={"contrast": 0.0, **(loss or {})}, training=chosen)
        return study, TrainingSet(site.of("train")[:1], study, cache)

    return make


def test_the_routers_noise_in_training_follows_the_seed(one_picture) -> None:
    first, again, other = (trained(*one_picture(noise=0.5), seed=seed)[0] for seed in (9, 9, 10))
    assert first == again != other
    quiet = [trained(*one_picture(), seed=seed)[0] for seed in (9, 10)]
    assert quiet[0] == quiet[1]


def test_the_anchor_is_the_router_that_the_round_began_with(one_picture) -> None:
    study, data = one_picture(loss={"router_anchor": 0.1})
    model = build_model(study, seed=1)
    terms = [train_round(model, data, study, round_number=1, seed=1, device=CPU, steps=steps).terms for steps in (1, 4)]
    assert terms[0]["router_anchor"] == pytest.approx(0.0, abs=1e-6)  # a round begins at its anchor
    assert terms[1]["router_anchor"] > 1e-6
    assert all(parameter.requires_grad for parameter in model.router.parameters())


def test_the_loss_that_is_told_is_the_mean_of_the_steps(one_picture) -> None:
    study, data = one_picture(learning_rate=1e-12)  # every step meets the same model
    told = [
        train_round(build_model(study, seed=1), data, study, round_number=1, seed=1, device=CPU, steps=steps) for steps in (1, 3)
    ]
    weights = study.loss.model_dump()
    assert (
        told[1].loss
        == pytest.approx(told[0].loss)
        == pytest.approx(sum(weights[key] * one for key, one in told[0].terms.items()))
    )
    assert told[1].terms == pytest.approx(told[0].terms)


def recorded(prepared, make_study, monkeypatch: pytest.MonkeyPatch, **training: object):
    """Train one round and return what the optimiser was given: its settings and the gradient norm of each step."""
    study, site, cache, _ = prepared
    chosen = make_study(training={**study.training.model_dump(), "views": list(study.training.views), **training})
    seen: dict[str, list] = {"norms": [], "rates": [], "decay": []}

    taken = adamw.adamw

    def spy(parameters, gradients, *moments, **settings):
        seen["norms"].append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        seen["rates"].append(settings["lr"])
        seen["decay"].append(settings["weight_decay"])
        return taken(parameters, gradients, *moments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(adamw, "adamw", spy)
        train_round(
            build_model(chosen, seed=1), TrainingSet(site.of("train"), chosen, cache), chosen, round_number=2, seed=1, device=CPU
        )
    return chosen, seen


def test_the_gradient_is_clipped_and_the_settings_arrive(prepared, make_study, monkeypatch: pytest.MonkeyPatch) -> None:
    study, free = recorded(prepared, make_study, monkeypatch, clip_norm=1e6, weight_decay=0.125)
    assert max(free["norms"]) > 0.2
    assert set(free["decay"]) == {0.125}
    steps = len(free["rates"])
    assert free["rates"] == [learning_rate(study, round_number=2, step=step, steps=steps) for step in range(steps)]
    _, clipped = recorded(prepared, make_study, monkeypatch, clip_norm=0.1)
    assert max(clipped["norms"]) < 0.1001


def test_the_contrast_meets_the_prototypes_of_the_incoming_model(prepared) -> None:
    study, site, cache, _ = prepared
    model = build_model(study, seed=1)
    with torch.no_grad():
        model.prototypes_KD.copy_(torch.randn(model.prototypes_KD.shape, generator=torch.Generator().manual_seed(8)))
    incoming = torch.nn.functional.normalize(model.prototypes_KD.detach().clone(), dim=1)
    train_round(model, TrainingSet(site.of("train"), study, cache), study, round_number=1, seed=1, device=CPU)
    assert torch.equal(model.round_prototypes_KD, incoming)
    assert not torch.allclose(model.prototypes_KD, incoming)


def test_mixed_precision_runs_the_same_code(prepared) -> None:
    study, site, cache, _ = prepared
    model = build_model(study, seed=1)
    batch = next(TrainingSet(site.of("train"), study, cache).batches(steps=1, seed=1, device=CPU))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms, _ = model.losses(batch.features, batch.target_BKhw, study.loss, torch.Generator().manual_seed(1))
        results.append({name: value.mean().item() for name, value in terms.items()})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=0.1, abs=0.02), name


def test_views_are_averaged_as_probabilities_and_a_mirrored_one_is_turned_back(prepared) -> None:
    study, site, cache, backbone = prepared
    slices = site.of("val")
    encode_slices(slices, study, backbone, cache, views=("identity", "flip"), everywhere=True)
    model = build_model(study, seed=1).eval()
    train_round(model, TrainingSet(site.of("train"), study, cache), study, round_number=1, seed=1, device=CPU)

    def probabilities(view: str) -> torch.Tensor:
        with torch.no_grad():
            return model(cache.load([cache.key(item.image_digest, view) for item in slices])).logits_BKhw.softmax(dim=1)

    mean = (probabilities("identity") + probabilities("flip").flip(-1)) / 2
    expected = [restore(row.log(), item.shape).argmax(dim=0).numpy() for row, item in zip(mean, slices, strict=True)]
    found = list(predict_slices(model, slices, cache, CPU, views=("identity", "flip")))
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    alone = list(predict_slices(model, slices, cache, CPU))
    assert any(not np.array_equal(*pair) for pair in zip(found, alone, strict=True))


def test_no_step_waits_for_a_number_of_the_device(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA every `.item()`, `float()` or `if` of a tensor would stop the loop until the device has caught up."""
    study, site, cache, _ = prepared
    data = TrainingSet(site.of("train"), study, cache)
    # AdamW reads its own counts of steps, which lie on the CPU wherever it does not run fused.
    monkeypatch.setattr(adamw, "adamw", lambda *_, **__: None)

    def read(steps: int) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train_round(build_model(study, seed=1), data, study, round_number=1, seed=1, device=CPU, steps=steps)
        return sum(event.name == "aten::_local_scalar_dense" for event in profile.events())

    assert read(6) == read(2) > 0  # what is read once at the end


def test_a_batch_that_was_used_is_gone_before_the_next_one_is_made(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    study, site, cache, _ = prepared
    widened = FeatureCache.widened
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def noted(own, halves, device):
        alive.append(sum(batch() is not None for batch in made))
        found = widened(own, halves, device)
        made.append(weakref.ref(found.embedding_BCHW))
        return found

    monkeypatch.setattr(FeatureCache, "widened", noted)
    data = TrainingSet(site.of("train"), study, cache)
    train_round(build_model(study, seed=1), data, study, round_number=1, seed=1, device=CPU, steps=5)
    assert alive == [0] * 5
