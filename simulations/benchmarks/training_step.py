"""What the feature cache saves: a training step on cached features beside one that runs the frozen encoder.

`python simulations/benchmarks/training_step.py` prints ratios and their bars. One torch thread, process CPU seconds,
the least of the repeats. SAM ViT-B has random weights here: its cost does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from flwr.app import Array, ArrayRecord
from torch import Tensor

from icmoe.backbone import Backbone, grid_of, load_backbone
from icmoe.backbones import DEFAULT, DEFAULT_WEIGHTS
from icmoe.errors import exit_on_fault
from icmoe.exchange import global_state, update_of
from icmoe.features import FeatureCache, Features
from icmoe.model import ICMoE, build_model, total_loss
from icmoe.sam import SHAPES, SamEncoder
from icmoe.study import BackboneChoice, Label, Study
from icmoe.usage import run_command
from simulations.benchmarks.row import Row, show
from simulations.measuring import least_cpu_s

BATCH = 4
SAM_B_PARAMETERS = 93_735_472
LABELS = (Label(name="background", values=(0,)), Label(name="lesion", values=(255,)))


def study_of(choice: BackboneChoice) -> Study:
    """Return the default study over a backbone."""
    return Study(name="benchmark", seed=1, labels=LABELS, backbone=choice)


def train_step(model: ICMoE, study: Study, features: Features, target_BKhw: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one training step."""
    terms, _ = model.losses(features, target_BKhw, study.loss, torch.Generator().manual_seed(0))
    optimizer.zero_grad(set_to_none=True)
    total_loss(terms, study.loss).backward()
    optimizer.step()


def compare(
    study: Study, encode: Callable[[Tensor], Features], folder: Path, repeats: int, encoded_at_once: int
) -> tuple[float, float]:
    """Return CPU seconds of a step on cached features and of the same step with the encoder.

    Parameters
    ----------
    study
        The default study over the backbone.
    encode
        The frozen encoder.
    folder
        For a cache of its own.
    repeats
        Steps of which the least counts.
    encoded_at_once
        Images given to the encoder; its time is scaled to the batch.
    """
    image_size, grid = study.backbone.image_size, grid_of(study.backbone)
    images = torch.rand(encoded_at_once, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    encode_s = least_cpu_s({"encode": lambda: encode(images)}, max(1, repeats // 3))["encode"] * BATCH / encoded_at_once
    one = encode(images[:1])
    cache = FeatureCache.of(folder, study)
    keys = [cache.key(str(index), "identity") for index in range(BATCH)]
    for key in keys:
        cache.put(key, one.embedding_BCHW[0], [block[0] for block in one.blocks])
    target_BKhw = torch.full((BATCH, 2, 2 * grid, 2 * grid), 0.5)
    model = build_model(study, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    steps = {"step": lambda: train_step(model, study, cache.load(keys), target_BKhw, optimizer)}
    cached_s = least_cpu_s(steps, repeats)["step"]
    return cached_s, cached_s + encode_s


def lite_medsam() -> tuple[Study, Callable[[Tensor], Features]]:
    """Return study and encoder of the default backbone at 128 px."""
    study = study_of(BackboneChoice(digest=DEFAULT_WEIGHTS.digest))
    return study, load_backbone(DEFAULT, image_size=128, device=torch.device("cpu")).encode


def sam_vit_b() -> tuple[Study, Callable[[Tensor], Features]]:
    """Return study and encoder of SAM ViT-B at 1024 px, with random weights."""
    shape = SHAPES["sam-vit-b"]
    study = study_of(BackboneChoice(name="sam-vit-b", digest="0" * 64, image_size=1024))
    backbone = Backbone(
        "sam-vit-b",
        SamEncoder(shape, 1024).freeze(),
        digest="0" * 64,
        image_size=1024,
        stride=shape.patch,
        channels=shape.out_channels,
        block_widths=(shape.width,) * len(shape.taps),
    )
    return study, backbone.encode


def update_bytes(study: Study) -> tuple[int, int]:
    """Return bytes of a site's update and of the global tensors, as Flower sends them."""
    model = build_model(study, seed=1)
    state = global_state(model)
    update = update_of(model, state, personal=False, shape=study.model)

    def size(tensors: dict[str, Tensor]) -> int:
        return sum(len(array.data) for array in ArrayRecord({name: Array(t.numpy()) for name, t in tensors.items()}).values())

    return size(update), size(state)


def rows(*, quick: bool) -> list[Row]:
    """Return all comparisons.

    Parameters
    ----------
    quick
        One step each, without SAM ViT-B.
    """
    torch.set_num_threads(1)
    return measure(1 if quick else 10, with_sam_b=not quick)


def measure(repeats: int, *, with_sam_b: bool) -> list[Row]:
    """Return all comparisons, with so many steps of which the fastest counts."""
    found = []
    parts = [("lite-medsam, 128 px", lite_medsam, BATCH, repeats, 10.0, "")]
    if with_sam_b:
        note = "random weights; one image encoded, its time scaled to the batch"
        parts.append(("sam-vit-b, 1024 px", sam_vit_b, 1, min(repeats, 3), 50.0, note))
    for what, make, at_once, count, bar, note in parts:
        study, encode = make()
        with TemporaryDirectory() as folder:
            cached_s, uncached_s = compare(study, encode, Path(folder), count, at_once)
        names = {"what": f"training step on cached features, {what}", "against": "with the frozen encoder in it"}
        found.append(Row(**names, ours=cached_s, limit=uncached_s, unit="CPU s", bar=bar, at_most=False, note=note))
    up_bytes, down_bytes = update_bytes(lite_medsam()[0])
    for what, sent in (("update of a site and round, up", up_bytes), ("global model to a site and round, down", down_bytes)):
        whole: dict[str, Any] = {"against": "all of SAM ViT-B", "limit": 4 * SAM_B_PARAMETERS, "bar": 1 / 150}
        found.append(Row(what=what, ours=sent, unit="bytes", at_most=True, **whole))
    return found


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Steps of which the fastest counts.")] = 10,
    skip_sam_b: Annotated[bool, typer.Option("--skip-sam-b", help="Leave out SAM ViT-B at 1024 px.")] = False,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
) -> None:
    """Compare training steps with and without the feature cache, and bytes with sending all of SAM-B."""
    torch.set_num_threads(1)
    with exit_on_fault():
        found = measure(repeats, with_sam_b=not skip_sam_b)
    show(found, as_json=as_json)


if __name__ == "__main__":
    run_command(main)
