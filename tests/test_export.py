"""Exports give the model's own probabilities, for any batch, or are refused."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from predictions import loaded, write_random_model

from icmoe import export
from icmoe.errors import IcmoeError
from icmoe.export import ONNX_PACKAGES, TOLERANCE, example, export_model
from icmoe.features import Features
from icmoe.modelfile import read_model
from icmoe.tensor_file import METADATA_KEY

without_onnx = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(without_onnx), reason=f"not installed: {', '.join(without_onnx)}")


@pytest.fixture(scope="module", params=["all experts", "two of three", "no experts", "no blocks"])
def model(request: pytest.FixtureRequest, make_study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {
        "all experts": {},
        "two of three": {"model": {"top_k": 2}},
        "no experts": {"model": {"basic_experts": 0, "semantic_experts": 0, "adaptive_experts": 0}},
        "no blocks": {"backbone": {"block_features": False}},
    }[request.param]
    return write_random_model(tmp_path_factory.mktemp("model") / "m.safetensors", make_study(**changes))


@torch.no_grad()
def probabilities(model: Path, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return loaded(model)[0](Features(features[0], features[1:])).logits_BKhw.softmax(dim=1)


@pytest.mark.parametrize("batch", [1, 5])
def test_torchscript_gives_the_probabilities_of_the_model_and_says_which_study_it_is_of(model: Path, batch: int, tmp_path: Path):
    out = tmp_path / "head.pt"
    assert export_model(model, out, "torchscript", force=False)["largest_difference"] <= TOLERANCE
    about = {METADATA_KEY: ""}
    again = torch.jit.load(io.BytesIO(out.read_bytes()), _extra_files=about)
    study = read_model(model)[1].study
    features = example(study, batch, seed=9)
    assert torch.allclose(again(*features), probabilities(model, features), atol=TOLERANCE)
    assert json.loads(about[METADATA_KEY])["study_digest"] == study.digest


@needs_onnx
def test_onnx_gives_the_probabilities_of_the_model(model: Path, tmp_path: Path):
    import onnxruntime

    out = tmp_path / "head.onnx"
    record = export_model(model, out, "onnx", force=False)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    study = read_model(model)[1].study
    features = example(study, 5, seed=9)
    found = session.run(None, {name: one.numpy() for name, one in zip(record["inputs"], features, strict=True)})[0]
    assert torch.allclose(torch.from_numpy(found), probabilities(model, features), atol=TOLERANCE)
    assert json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])["study_digest"] == study.digest


def refusal(*arguments: object, force: bool = False) -> list[int]:
    with pytest.raises(IcmoeError) as caught:
        export_model(*arguments, force=force)  # type: ignore[arg-type]
    return [fault.number for fault in caught.value.faults]


def test_an_export_that_differs_is_not_written(make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = write_random_model(tmp_path / "m.safetensors", make_study())
    exact = export._torchscript

    def distorted(head: export.Head, header: export.ModelHeader) -> tuple[bytes, export.Run]:
        data, run = exact(head, header)
        return data, lambda features: run(features) + 2 * TOLERANCE

    monkeypatch.setattr(export, "_torchscript", distorted)
    assert refusal(model, tmp_path / "head.pt", "torchscript") == [144]
    assert not (tmp_path / "head.pt").exists()


def test_what_cannot_be_exported_is_said_by_number(make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = write_random_model(tmp_path / "m.safetensors", make_study())
    (tmp_path / "there.pt").write_text("mine")
    assert refusal(model, tmp_path / "there.pt", "torchscript") == [141]
    assert (tmp_path / "there.pt").read_text() == "mine"
    assert refusal(model, tmp_path, "torchscript", force=True) == [141], "a folder is never replaced"
    assert refusal(model, tmp_path / "x", "pickle") == [210]
    assert refusal(model, model, "torchscript", force=True) == [141], "nor is the model"
    assert refusal(tmp_path / "absent", tmp_path / "x", "torchscript") == [205]
    export_model(model, tmp_path / "there.pt", "torchscript", force=True)
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("a_package_that_nobody_has",))
    assert refusal(model, tmp_path / "x", "onnx") == [213]
