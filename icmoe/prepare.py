"""From slices to cached features: what a site does once, before any training.

The encoder takes nearly all of the time. Pictures are read ahead by one thread and entries written behind by another, both a
few views and no more, so that it seldom waits for either. A picture is read once for all of its views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from icmoe.backbone import Backbone
from icmoe.data.slices import Slice, load_image
from icmoe.device import moved
from icmoe.features import FeatureCache, Wanted
from icmoe.in_order import InOrder
from icmoe.parts import Parts
from icmoe.preprocess import apply_view, prepare
from icmoe.study import Study, View

# One image at a time is fastest on a CPU: its intermediate maps stay in the cache.
CPU_BATCH, GPU_BATCH = 1, 16
AHEAD = 2
"""Batches that are read before the encoder asks for them, and that wait to be written."""


def wanted_views(
    slices: Sequence[Slice],
    training_views: tuple[View, ...],
    cache: FeatureCache,
    image_size: int,
    *,
    everywhere: bool = False,
) -> Iterator[Wanted]:
    """Yield what has to be in the cache: every view of a training slice, or `everywhere`; the identity view of any slice."""
    pixels = lru_cache(maxsize=1)(partial(_pixels, image_size=image_size))  # views of a picture follow one another
    for item in slices:
        views: set[View] = {"identity", *training_views} if everywhere or item.split == "train" else {"identity"}
        for view in sorted(views):
            yield Wanted(cache.key(item.image_digest, view), partial(_view, pixels, item, view))


def _pixels(item: Slice, *, image_size: int) -> Tensor:
    return prepare(load_image(item), image_size)


def _view(pixels: Callable[[Slice], Tensor], item: Slice, view: View) -> Tensor:
    return apply_view(pixels(item), view)


def encode_slices(
    slices: Sequence[Slice],
    study: Study,
    backbone: Backbone,
    cache: FeatureCache,
    *,
    views: tuple[View, ...] | None = None,
    everywhere: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Encode what the cache does not hold yet; return how many views were encoded.

    Parameters
    ----------
    slices
        Of any number of sites; equal images are encoded once.
    study
        Names the views of training slices.
    backbone
        The frozen encoder.
    cache
        Where the features go.
    views
        Views of training slices where they are not the study's.
    everywhere
        Whether slices of the other splits get these views too.
    on_progress
        Called with (done, to do).
    """
    wanted = wanted_views(slices, views or study.training.views, cache, backbone.image_size, everywhere=everywhere)
    unique = {item.key: item for item in wanted}
    return encode_missing(list(unique.values()), backbone, cache, on_progress=on_progress)


def encode_missing(
    wanted: Sequence[Wanted], backbone: Backbone, cache: FeatureCache, *, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Encode the views that the cache does not hold and return their number; may be killed and started again.

    Parameters
    ----------
    wanted
        Views by key.
    backbone
        On its device.
    cache
        Written as batches are done.
    on_progress
        Called with (done, to do).
    """
    cache.keep_rest(backbone.rest)
    missing = [item for item in wanted if not cache.contains(item.key)]
    device = next(backbone.buffers()).device
    parts = Parts(GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    with (
        InOrder("read", (item.read for item in missing), AHEAD * parts.at_once) as images,
        InOrder[None]("write", (), AHEAD * parts.at_once) as entries,
    ):
        done = 0
        while done < len(missing):
            features = parts.run(lambda at_once: backbone.encode(moved(torch.stack(images.first(at_once)), device)))
            for row, _ in enumerate(features.embedding_BCHW):
                images.drop()
                own = features.embedding_BCHW[row], [block[row] for block in features.blocks]
                entries.add(partial(cache.put, missing[done + row].key, *own))
            done += len(features.embedding_BCHW)
            if on_progress is not None:
                on_progress(done, len(missing))
        entries.drain()
    return len(missing)
