"""The first encoding of a study beside its encoder alone, and SAM's encoder as we run it beside segment-anything's own.

First encoding: phantoms as PNG files of 256 px, LiteMedSAM at 128 px. Ours is what `fl_client prepare` does once its weights
are loaded: read and check the folder, read and resize each picture, make its views, encode, write the entries. The limit is
the encoder in a loop over the same views, ready as tensors, in batches of the size that is fastest. Both on all threads,
clock and process CPU seconds, the least of the turns. Four pictures, one thread, on a machine with much else to do: 0.90 by
the clock and 0.97 in CPU seconds while reading, encoding and writing took turns, 0.96 and 0.96 with a thread for each.

SAM ViT-B: random weights with filled positions, one picture, one thread, the least process CPU seconds of turns. The output
may differ by what float32 rounds off (`TOLERANCE` of its greatest value), or the part stops. What was tried at 256 px, 512 px
and 1024 px, CPU seconds, on two cores shared with others, AVX-512:

    segment-anything's own                                            0.76    3.1    17.6
    relative positions folded into query and key, one fused kernel    0.76    2.5    14.4   ours before
    blocks of scores that stay in the cache, no tokens of padding     0.44    1.9    10.1   kept
    fused attention with the positions as a mask, by 512 queries      attention alone at 64 x 64 tokens: 1.6 for 0.7: out
    and inference_mode                                                0.40 for 0.43 without, within the noise: out
    and channels-last weights                                         0.41 for 0.43: the convolutions are 1 %: out
    and torch.compile                                                 0.48 for 0.47, after 41 s of compiling: out
    and autocast to bfloat16 (the processor has AMX)                  0.24 for 0.43, other output: 0.7 % off in L2: out

Autocast would make a study nearly twice as fast to encode once, on processors that have it, and its features others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from icmoe.backbone import Backbone, load_backbone
from icmoe.backbones import DEFAULT
from icmoe.data.folder import read_folder
from icmoe.data.slices import Slice, load_image
from icmoe.features import FeatureCache
from icmoe.prepare import encode_slices
from icmoe.preprocess import apply_view, prepare
from icmoe.sam import SHAPES, SamEncoder, VitShape
from icmoe.study import Study
from simulations.benchmarks.row import Row
from simulations.benchmarks.training_step import lite_medsam
from simulations.measuring import least_cpu_s
from simulations.phantoms import PhantomSite, write_phantoms

SITE, PICTURE_PX = "Alder", 256
BATCHES = (1, 2, 4, 8)
TOLERANCE = 1e-5
SAM_SIZES = (256, 512, 1024)
SAM_B = SHAPES["sam-vit-b"]


def rows(*, quick: bool) -> list[Row]:
    """Return both comparisons.

    Parameters
    ----------
    quick
        Two pictures and one turn; a small encoder of SAM's form.
    """
    threads = torch.get_num_threads()
    found = first_encoding(pictures=2 if quick else 12, turns=1 if quick else 5)
    torch.set_num_threads(1)
    if quick:
        found.append(sam_encoder(replace(SAM_B, width=48, depth=3, heads=3, global_blocks=(1,), taps=(0,)), 64, turns=1))
    else:
        found += [sam_encoder(SAM_B, size, turns=max(2, 1536 // size)) for size in SAM_SIZES]
    torch.set_num_threads(threads)
    return found


def first_encoding(*, pictures: int, turns: int) -> list[Row]:
    """Return the row of the clock and that of CPU seconds."""
    study, _ = lite_medsam()
    backbone = load_backbone(DEFAULT, image_size=study.backbone.image_size, device=torch.device("cpu"))
    with TemporaryDirectory() as name:
        folder = Path(name)
        site = PhantomSite(name=SITE, train_patients=1, val_patients=0, test_patients=0, slices_per_patient=pictures)
        write_phantoms(folder / "export", seed=1, size_px=PICTURE_PX, sites=[site])
        views = ready_views(read_folder(folder / "export", study.labels)[SITE].slices, study)
        batch = fastest_batch(backbone, views)
        ours: list[tuple[float, float]] = []
        alone: list[tuple[float, float]] = []
        for turn in range(turns):
            ours.append(taken(partial(whole, folder / "export", folder / f"{turn}", study, backbone)))
            alone.append(taken(partial(encoder_alone, backbone, views, batch)))
    names: dict[str, Any] = {"what": "first encoding of a study, lite-medsam 128 px", "bar": 0.9, "at_most": False}
    against = f"the encoder alone, {batch} at once"
    return [
        Row(**names, against=against, ours=min(one[at] for one in ours), limit=min(one[at] for one in alone), unit=unit)
        for at, unit in enumerate(("s", "CPU s"))
    ]


def taken(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds by the clock and process CPU seconds of a call."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def whole(export: Path, cache_folder: Path, study: Study, backbone: Backbone) -> int:
    """Fill a cache from a folder of pictures and return how many views were encoded."""
    slices = read_folder(export, study.labels)[SITE].slices
    return encode_slices(slices, study, backbone, FeatureCache.of(cache_folder, study))


def ready_views(slices: Sequence[Slice], study: Study) -> Tensor:
    """Return every view of every slice as the encoder takes it, N 3 S S."""
    pictures = [prepare(load_image(item), study.backbone.image_size) for item in slices]
    return torch.stack([apply_view(picture, view) for picture in pictures for view in study.training.views])


def encoder_alone(backbone: Backbone, views_N3SS: Tensor, batch: int) -> None:
    """Encode everything and keep nothing."""
    for images_B3SS in views_N3SS.split(batch):
        backbone.encode(images_B3SS)


def fastest_batch(backbone: Backbone, views_N3SS: Tensor) -> int:
    """Return the size of a batch with which the encoder takes the fewest CPU seconds, the better of two turns."""
    some, sizes = views_N3SS[: max(BATCHES)], [size for size in BATCHES if size <= len(views_N3SS)]
    turns = [[taken(partial(encoder_alone, backbone, some, size))[1] for size in sizes] for _ in range(2)]
    least = [min(each) for each in zip(*turns, strict=True)]
    return sizes[least.index(min(least))]


def both_encoders(shape: VitShape, image_size: int) -> tuple[nn.Module, nn.Module]:
    """Return segment-anything's encoder and ours, the same random weights in both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = SamEncoder(shape, image_size)
        for name, parameter in stock.named_parameters():
            if "pos" in name:  # zero when built, which would hide a mistake
                nn.init.normal_(parameter, std=0.02)
    ours = SamEncoder(shape, image_size)
    ours.load_state_dict(stock.state_dict())
    return stock.requires_grad_(requires_grad=False).eval(), ours.freeze()


@torch.no_grad()
def sam_encoder(shape: VitShape, image_size: int, *, turns: int) -> Row:
    """Return the row of one size of the input.

    Raises
    ------
    AssertionError
        Where the outputs differ.
    """
    stock, ours = both_encoders(shape, image_size)
    images = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    said: dict[str, Tensor] = {}

    def say(name: str, encoder: nn.Module) -> None:
        said[name] = encoder(images)[0]

    cpu_s = least_cpu_s({"ours": partial(say, "ours", ours), "stock": partial(say, "stock", stock)}, turns)
    off = float((said["ours"] - said["stock"]).abs().max() / said["stock"].abs().max())
    assert off <= TOLERANCE, off
    names = {"what": f"SAM ViT-B's encoder, {image_size} px", "against": "segment-anything's own forward"}
    note = f"random weights; outputs differ by {off:.1g} of the greatest"
    return Row(**names, ours=cpu_s["ours"], limit=cpu_s["stock"], unit="CPU s", bar=1.2, at_most=False, note=note)
