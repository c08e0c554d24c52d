"""A backbone that is cut before its last stage: experts inside it, all of its weights still frozen and none in the model."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from predictions import write_random_model
from test_backbone import SMALL, small_encoder
from test_training import hospital

from fl_client.participant import _require_features
from fl_client.preparing import _is_kept
from icmoe.backbone import backbone_digest, chosen_backbone
from icmoe.backbones import BACKBONES
from icmoe.batch_independence import mixing_faults
from icmoe.config import parse
from icmoe.data.folder import read_folder
from icmoe.dataset import TrainingSet
from icmoe.errors import IcmoeError
from icmoe.evaluation import score_slices
from icmoe.exchange import global_state
from icmoe.export import TOLERANCE, example, export_model
from icmoe.features import FeatureCache, Features
from icmoe.model import build_model, total_loss
from icmoe.modelfile import read_model
from icmoe.patient_gradients import Objective, all_at_once, one_by_one
from icmoe.predict.maps import maps_of
from icmoe.prepare import encode_slices
from icmoe.privacy_audit.seeded import seeded_rows
from icmoe.rest import keep_rest, kept_rest, rest_path, size_bytes
from icmoe.sam import SHAPES
from icmoe.study import BackboneChoice, Study, canonical
from icmoe.training import train_round
from tests.private_data import FeatureRows, settled

__all__ = ["hospital"]
CPU = torch.device("cpu")


@pytest.fixture
def study(make_study) -> Study:
    training = {"learning_rate": 5e-3, "batch_size": 3}
    return make_study(backbone={"cut": "last-stage"}, training=training, model={"router_noise": 0.0})


@pytest.fixture
def prepared(hospital: Path, study: Study, tmp_path: Path):
    site = read_folder(hospital, study.labels)["S"]
    cache = FeatureCache.of(tmp_path / "cache", study)
    encode_slices(site.slices, study, chosen_backbone(study.backbone, checkpoint=None, device=CPU), cache)
    yield site, cache
    kept_rest.cache_clear()


def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[BackboneChoice, Path | None]:
    """A chosen backbone and its weights; `sam-vit-b` in a small shape with windows, relative positions and three last blocks."""
    path = None
    if name == "sam-vit-b":
        monkeypatch.setitem(SHAPES, name, replace(SMALL, taps=(0,)))
        torch.save(small_encoder().vit.state_dict(), path := tmp_path / "sam.pth")
    return BackboneChoice(name=name, digest=backbone_digest(name, path), image_size=64), path


@pytest.mark.parametrize("name", ["lite-medsam", "sam-vit-b", "sam-vit-test"])
def test_front_and_rest_together_are_the_whole_encoder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, path = choices(tmp_path, monkeypatch, name)
    cut = chosen.model_copy(update={"cut": "last-stage"})
    whole, front = (chosen_backbone(choice, checkpoint=path, device=CPU) for choice in (chosen, cut))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    complete, features = whole.encode(images), front.encode(images)
    assert complete.rest is None
    assert features.embedding_BCHW.shape != complete.embedding_BCHW.shape or name == "sam-vit-test"
    assert torch.equal(features.rest(features.embedding_BCHW), complete.embedding_BCHW)
    assert all(torch.equal(one, other) for one, other in zip(features.blocks, complete.blocks, strict=True))
    assert not any(tensor.requires_grad for tensor in front.rest.parameters())
    if name == "lite-medsam":  # its batch norm keeps the statistics it came with
        assert front.rest.train().training is False


def test_the_model_begins_as_the_frozen_encoder_and_gradients_reach_its_experts_through_the_rest(study: Study) -> None:
    backbone = chosen_backbone(study.backbone, checkpoint=None, device=CPU)
    features, model = backbone.encode(torch.rand(2, 3, 32, 32)), build_model(study, seed=1)
    before = backbone.weights_digest()
    output = model(features)
    assert torch.equal(output.fused_BCHW, features.embedding_BCHW)
    assert torch.equal(output.logits_BKhw, model.head(features.rest(features.embedding_BCHW)))
    settled(model)
    model(features).logits_BKhw.square().mean().backward()
    silent = {name for name, tensor in model.named_parameters() if tensor.grad is None or not tensor.grad.abs().sum() > 0}
    assert silent == {"prototypes_KD", "project.weight", "project.bias"}  # those of the contrast
    assert backbone.weights_digest() == before


def test_what_is_exchanged_holds_no_tensor_of_the_backbone(study: Study, make_study) -> None:
    own, plain = (set(global_state(build_model(one, seed=1))) for one in (study, make_study()))
    assert own - plain == {"lateral_behind.gate_L", "lateral_behind.convs.0.weight", "lateral_behind.convs.0.bias"}
    assert plain <= own


def test_a_study_without_a_cut_keeps_its_digest_and_one_with_it_has_another(make_study, study: Study) -> None:
    assert "cut" not in canonical(make_study())
    assert '"cut":"last-stage"' in canonical(study)
    assert parse(Study, json.loads(canonical(study)), where="here").digest == study.digest


def test_a_backbone_that_has_no_such_cut_is_refused(make_study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "sam-vit-test", replace(BACKBONES["sam-vit-test"], staged=False))
    with pytest.raises(IcmoeError) as caught:
        make_study(backbone={"cut": "last-stage"})
    assert "not cut before its last stage" in str(caught.value)


def test_training_on_kept_tokens_finds_the_disc(prepared, study: Study) -> None:
    site, cache = prepared
    data, model = TrainingSet(site.of("train"), study, cache), build_model(study, seed=1)
    for round_number in (1, 2):
        train_round(model, data, study, round_number=round_number, seed=round_number, device=CPU, steps=40)
    assert score_slices(model.eval(), site.of("val"), study.labels, cache, CPU)[0].dice > 0.7


def test_tokens_and_embeddings_of_one_image_stand_side_by_side(prepared, make_study) -> None:
    _, cache = prepared
    whole = FeatureCache.of(cache.folder, make_study())
    assert whole.key("a", "identity") != cache.key("a", "identity")
    assert whole.key("a", "identity")[:24] == cache.key("a", "identity")[:24]  # so that both go when the image goes
    assert whole.rest(CPU) is None


@pytest.mark.parametrize("damage", ["gone", "cut off", "another value", "of another backbone", "of other tensors"])
def test_a_rest_that_is_absent_or_damaged_is_refused_and_made_anew(damage: str, prepared, study: Study) -> None:
    site, cache = prepared
    path, key = rest_path(cache.folder, study.backbone), cache.key(site.slices[0].image_digest, "identity")
    sound = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "cut off":
            path.write_bytes(sound[:-8])
        case "another value":
            path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        case "of another backbone":
            path.write_bytes(sound.replace(study.backbone.digest.encode(), b"0" * 64))
        case "of other tensors":  # whole by its own word
            keep_rest(cache.folder, study.backbone, torch.nn.Linear(2, 2))
            assert path.read_bytes() != sound
    kept_rest.cache_clear()
    with pytest.raises(IcmoeError) as caught:
        cache.load([key])
    assert [fault.number for fault in caught.value.faults] == [111]
    assert str(path) in str(caught.value)
    encode_slices(site.slices, study, chosen_backbone(study.backbone, checkpoint=None, device=CPU), cache)
    assert path.read_bytes() == sound
    assert cache.load([key]).rest is not None
    assert 0 < len(sound) - size_bytes(study.backbone) < 4096  # the table in front


def test_a_site_notices_that_the_rest_is_lost(prepared, study: Study) -> None:
    site, cache = prepared
    _require_features("S", cache, site.slices)
    assert _is_kept(cache.folder, study)
    path = rest_path(cache.folder, study.backbone)
    sound = path.read_bytes()
    path.unlink()
    with pytest.raises(IcmoeError) as caught:
        _require_features("S", cache, site.slices)
    assert [fault.number for fault in caught.value.faults] == [207]
    assert "last stage" in str(caught.value)
    assert not _is_kept(cache.folder, study)
    path.write_bytes(sound)
    for entry in cache.folder.glob("??/*.safetensors"):
        entry.unlink()
    assert not _is_kept(cache.folder, study)  # the rest alone is no feature


def test_patients_gradients_are_the_same_one_by_one_and_all_at_once(study: Study, make_features) -> None:
    data = FeatureRows(study, make_features, [2, 1, 3])
    batch = data.read(range(6), (), CPU)
    gradients = []
    for back_end in (one_by_one, all_at_once):
        model = settled(build_model(study, seed=1)).train()
        model.start_round()
        weights = study.loss.model_copy(update={"contrast": 0.0})
        blocks = back_end(Objective(model, weights, torch.Generator().manual_seed(0)), batch, [2, 1, 3], 4)
        gradients.append(torch.cat([gradient_PD for gradient_PD, _ in blocks]))
    one, all_ = gradients
    assert one.shape[0] == 3
    torch.testing.assert_close(one, all_, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("name", ["lite-medsam", "sam-vit-b"])
def test_every_rest_lets_gradients_of_slices_be_mapped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, path = choices(tmp_path, monkeypatch, name)  # windows that do not fill the map, relative positions, batch norm
    rest = chosen_backbone(chosen.model_copy(update={"cut": "last-stage"}), checkpoint=path, device=CPU).rest
    drawn = torch.Generator().manual_seed(1)
    tokens_BCHW = torch.randn(3, 24 if path else 320, 8, 8, generator=drawn)
    weight_CHW = torch.randn(16 if path else 256, 8, 8, generator=drawn)

    def loss(tokens_CHW: torch.Tensor) -> torch.Tensor:
        return (rest(tokens_CHW[None])[0] * weight_CHW).mean()

    mapped = torch.func.vmap(torch.func.grad(loss))(tokens_BCHW)
    single = torch.stack([torch.func.grad(loss)(tokens_CHW) for tokens_CHW in tokens_BCHW])
    torch.testing.assert_close(mapped, single, rtol=1e-3, atol=1e-4 * float(single.abs().max()))


@pytest.mark.parametrize("name", ["lite-medsam", "sam-vit-test"])
def test_no_patient_reaches_another_through_the_rest(name: str, make_study) -> None:
    study = make_study(backbone={"name": name, "cut": "last-stage", "digest": "0" * 64})
    assert mixing_faults(settled(build_model(study, seed=1)), study) == []


def test_losses_of_a_batch_are_those_of_its_parts(study: Study, make_features) -> None:
    features, target = make_features(study, batch=4)
    model = build_model(study, seed=1).eval()
    weights = study.loss.model_copy(update={"contrast": 0.0, "load_balance": 0.0})

    def loss(of: Features, target_BKhw: torch.Tensor) -> torch.Tensor:
        return total_loss(model.losses(of, target_BKhw, weights, torch.Generator().manual_seed(0))[0], weights)

    halves = [loss(features.each(lambda t, at=at: t[at : at + 2]), target[at : at + 2]) for at in (0, 2)]
    torch.testing.assert_close(loss(features, target), torch.stack(halves).mean())


def test_an_export_holds_the_last_stage_and_starts_from_its_tokens(study: Study, tmp_path: Path) -> None:
    path, out = write_random_model(tmp_path / "m.safetensors", study), tmp_path / "head.pt"
    record = export_model(path, out, "torchscript", force=False)
    assert list(record["inputs"]) == ["tokens", "block0"]
    model, header = read_model(path)
    features = example(header.study, 5, seed=9)
    rest = chosen_backbone(header.study.backbone, checkpoint=None, device=CPU).rest
    with torch.no_grad():
        wanted = model(Features(features[0], features[1:], rest)).logits_BKhw.softmax(dim=1)
        found = torch.jit.load(io.BytesIO(out.read_bytes()))(*features)
    assert torch.allclose(found, wanted, atol=TOLERANCE)


def test_what_cannot_be_exported_is_refused_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_study) -> None:
    chosen, weights = choices(tmp_path, monkeypatch, "sam-vit-b")  # its attention goes window by window
    study = make_study(backbone={**chosen.model_dump(), "cut": "last-stage"})
    path, out = write_random_model(tmp_path / "m.safetensors", study), tmp_path / "head.pt"
    with pytest.raises(IcmoeError) as caught:
        export_model(path, out, "torchscript", force=False, checkpoint=weights)
    assert [fault.number for fault in caught.value.faults] == [144]
    assert not out.exists()


def test_weights_that_an_export_would_not_use_are_refused(make_study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen, weights = choices(tmp_path, monkeypatch, "sam-vit-b")
    path = write_random_model(tmp_path / "m.safetensors", make_study(backbone=chosen.model_dump()))
    with pytest.raises(IcmoeError) as caught:
        export_model(path, tmp_path / "head.pt", "torchscript", force=False, checkpoint=weights)
    assert [fault.number for fault in caught.value.faults] == [210]


def test_features_of_a_backbone_that_is_cut_elsewhere_are_not_taken(study: Study, make_study, make_features) -> None:
    for own, other in ((study, make_study()), (make_study(), study)):
        with pytest.raises(ValueError, match="cut elsewhere"):
            build_model(own, seed=1)(make_features(other)[0])


def test_made_up_patients_go_through_a_last_stage_too(study: Study) -> None:
    data = seeded_rows(study, [2, 1], seed=1)
    terms, _ = build_model(study, seed=1).losses(
        data.batch.features, data.batch.target_BKhw, study.loss, torch.Generator().manual_seed(0)
    )
    assert all(value.isfinite().all() for value in terms.values())
    assert data.of([1]).batch.features.rest is data.batch.features.rest


def test_approval_check_and_card_say_where_the_experts_stand(study: Study, make_study) -> None:
    assert study.backbone.told.endswith("32 px, experts before its last stage, which each step runs")
    assert make_study().backbone.told.endswith("32 px")


def test_a_picture_is_segmented_through_the_rest(study: Study, tmp_path: Path) -> None:
    model, header = read_model(write_random_model(tmp_path / "m.safetensors", study))
    backbone = chosen_backbone(header.study.backbone, checkpoint=None, device=CPU)
    image = torch.rand(40, 32, generator=torch.Generator().manual_seed(3)).numpy()
    maps = maps_of(model, backbone, image)
    assert maps.classes_HW.shape == (40, 32)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for tensor in other.rest.parameters():
            tensor.neg_()
    assert (maps_of(model, other, image).classes_HW != maps.classes_HW).any()
