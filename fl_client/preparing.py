"""What `fl_client prepare` does, and `fl_client ingest` at its end: the frozen backbone runs once over the site's images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fl_client.site import SiteFile, cache_folder_of, site_data, site_export, site_slices
from icmoe.backbones import BACKBONES
from icmoe.cache_entries import FORMAT, PREPROCESSING_VERSION
from icmoe.data.ingest import index
from icmoe.data.slices import Slice
from icmoe.study import Study

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, how much is done and how much there is."""


def prepare_study(path: Path, settings: SiteFile, study: Study, *, on_progress: Progress) -> tuple[int, int]:
    """Encode what the cache does not hold yet and return how many views that were, and of how many images.

    Parameters
    ----------
    path, settings, study
        From `read_site_file`.
    on_progress
        Told of each batch.

    Raises
    ------
    IcmoeError
        As `site_slices`; 206, 207 for the backbone's weights, 211 for the device.
    """
    slices = site_slices(path, settings, study)
    return _encode(path, settings, study, slices, on_progress), len(slices)


def encode_ingested(path: Path, settings: SiteFile, study: Study, *, on_progress: Progress) -> int:
    """Encode what an ingest brought and return how many views the cache did not hold; unchanged data need no look.

    Raises
    ------
    IcmoeError
        131 where ingest has not been run; 206, 207 for the backbone's weights, 211 for the device.
    """
    store = site_export(path, settings, study).store
    with index.claimed(store) as connection:
        wanted = _mark(path, settings, study, index.meta(connection, index.STATE))
        if _is_kept(cache_folder_of(path, settings), study) and index.meta(connection, "encoded") == wanted:
            return 0
    data = site_data(path, settings, study)
    encoded = _encode(path, settings, study, data.slices if data else (), on_progress)
    with index.claimed(store) as connection:
        index.put_meta(connection, {"encoded": wanted})
    return encoded


def _is_kept(folder: Path, study: Study) -> bool:
    """Return whether the cache has anything: that it was emptied is seen, one entry less is not."""
    if not any(folder.glob("??/*.safetensors")):
        return False
    if study.backbone.cut == "end":
        return True
    from icmoe.features import FeatureCache

    return not FeatureCache.of(folder, study).lacks_rest()


def _mark(path: Path, settings: SiteFile, study: Study, state: str) -> str:
    """Return what features depend on: the index, how they are computed and kept, the views, and where the cache is."""
    backbone, folder = study.backbone, str(cache_folder_of(path, settings))
    how = (FORMAT, PREPROCESSING_VERSION, backbone.model_dump(mode="json"), BACKBONES[backbone.name].arithmetic)
    own = (state, *how, study.training.views, folder)
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()


def _encode(path: Path, settings: SiteFile, study: Study, slices: Sequence[Slice], on_progress: Progress) -> int:
    from icmoe.backbone import chosen_backbone
    from icmoe.device import available_device
    from icmoe.features import FeatureCache
    from icmoe.prepare import encode_slices

    if not slices:
        return 0
    checkpoint = path.parent / settings.checkpoint if settings.checkpoint else None
    backbone = chosen_backbone(study.backbone, checkpoint=checkpoint, device=available_device(settings.device))
    cache = FeatureCache.of(cache_folder_of(path, settings), study)
    return encode_slices(slices, study, backbone, cache, on_progress=lambda done, total: on_progress("encode", done, total))
