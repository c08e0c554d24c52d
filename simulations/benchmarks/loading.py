"""Random batches of cached features beside the same bytes read by the plainest means, from the page cache.

The limit maps each entry and copies its bytes into a batch of bytes, as `mmap` and NumPy do it. Beside it stand the batch in
half precision as it goes to the device, and the batch in float32 as a step on a CPU gets it; there the limit widens the
bytes as well, because a copy alone moves a half of what arrives. Entries of LiteMedSAM at 128 px (1 MiB) and of SAM ViT-B
at 1024 px (5 MiB) with random numbers, four in a batch, entries verified before as in all steps but an entry's first. One
thread, least process CPU seconds of a batch, in turns.

Before entries were read straight into the batch, safetensors' arrays were copied into float32: 2.2 ms of CPU for four of
LiteMedSAM where the plain copy took 0.9; now 1.0 to the batch, 1.7 in float32, beside 0.77 and 1.63. Widening is 40 % of the
latter and cannot go where features are kept in half precision. SAM's plain copy pays for 40 MB in one piece, which the
allocator asks of the system anew each time.

Pinned memory and the copy that does not wait are taken on CUDA only, by the same lines; there was none here.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icmoe.backbone import grid_of, widths
from icmoe.features import FeatureCache
from icmoe.study import BackboneChoice
from simulations.benchmarks.row import Row
from simulations.benchmarks.training_step import BATCH, study_of
from simulations.measuring import least_cpu_s

ENTRIES, TURNS = 64, 80
CHOICES = {
    "lite-medsam, 128 px": BackboneChoice(digest="0" * 64),
    "sam-vit-b, 1024 px": BackboneChoice(name="sam-vit-b", digest="0" * 64, image_size=1024),
}


def filled(folder: Path, choice: BackboneChoice, entries: int) -> tuple[FeatureCache, list[str]]:
    """Return a cache of random features and its keys, every entry verified."""
    cache, grid, generator = FeatureCache.of(folder, study_of(choice)), grid_of(choice), torch.Generator().manual_seed(1)
    channels, block_channels, _ = widths(choice, block_features=True)
    keys = [cache.key(str(index), "identity") for index in range(entries)]
    for key in keys:
        embedding, *blocks = (torch.randn(count, grid, grid, generator=generator) for count in (channels, *block_channels))
        cache.put(key, embedding, blocks)
        cache.load([key])
    return cache, keys


def header_bytes_of(cache: FeatureCache, key: str) -> int:
    """Return how many bytes of an entry stand before its features."""
    return cache.path(key).stat().st_size - sum(half.nbytes for half in cache.halves([key]))


def mapped(paths: Sequence[Path], header_bytes: int) -> Tensor:
    """Return the bytes of files of one size, without what stands before the features, copied from memory maps."""
    batch = torch.empty(len(paths), paths[0].stat().st_size - header_bytes, dtype=torch.uint8)
    for row, path in zip(batch.numpy(), paths, strict=True):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            row[:] = np.frombuffer(view, np.uint8, offset=header_bytes)
    return batch


def rows(*, quick: bool) -> list[Row]:
    """Return both forms of a batch for each backbone.

    Parameters
    ----------
    quick
        LiteMedSAM alone, few turns.
    """
    torch.set_num_threads(1)
    chosen = list(CHOICES.items())[: 1 if quick else None]
    return [row for what, choice in chosen for row in compared(what, choice, quick=quick)]


def compared(what: str, choice: BackboneChoice, *, quick: bool) -> list[Row]:
    """Return the rows of one backbone."""
    with TemporaryDirectory() as folder:
        cache, keys = filled(Path(folder), choice, BATCH if quick else ENTRIES)
        header_bytes = header_bytes_of(cache, keys[0])

        def plain(drawn: list[str]) -> Tensor:
            return mapped([cache.path(key) for key in drawn], header_bytes)

        def widened(drawn: list[str]) -> Tensor:
            return plain(drawn).view(torch.float16).float()

        works: list[Callable[[list[str]], object]] = [plain, cache.halves, widened, cache.load]
        rng, turns = np.random.default_rng(0), 3 if quick else TURNS
        draws = iter([rng.choice(keys, BATCH, replace=False).tolist() for _ in range(turns * len(works))])
        cpu_s = least_cpu_s({str(at): lambda work=work: work(next(draws)) for at, work in enumerate(works)}, turns)  # type: ignore[misc]
        plain_s, halves_s, widened_s, load_s = cpu_s.values()
    shared: dict[str, Any] = {"unit": "CPU s", "bar": 0.7, "at_most": False}
    return [
        Row(what=f"batch as it goes to the device, {what}", against="mmap and copy", ours=halves_s, limit=plain_s, **shared),
        Row(what=f"batch in float32, {what}", against="mmap, copy, widen", ours=load_s, limit=widened_s, **shared),
    ]
