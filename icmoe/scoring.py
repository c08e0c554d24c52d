"""Score a saved model on a folder of hospitals: the machinery behind `icmoe evaluate`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from icmoe.backbone import chosen_backbone, require_taken
from icmoe.cache_entries import default_cache_folder
from icmoe.data.sources import read_sites_split
from icmoe.device import available_device
from icmoe.errors import Fault, IcmoeError
from icmoe.evaluation import ALONE, MIRRORED, score_slices
from icmoe.features import FeatureCache
from icmoe.metrics import evaluation_record
from icmoe.modelfile import read_model
from icmoe.prepare import encode_slices


def score_folder(
    model_path: Path,
    root: Path,
    split: str,
    *,
    checkpoint: Path | None,
    device_name: str,
    cache_folder: Path | None,
    mirrored: bool = False,
    console: Console,
) -> tuple[dict[str, Any], list[Fault]]:
    """Return the record that `--json` prints and the exclusions.

    Parameters
    ----------
    model_path
        Model file; its header names study, labels and backbone.
    root, split
        Folder and name of the split.
    checkpoint
        Weights of a backbone that brings none.
    device_name
        cpu, cuda or cuda:N.
    cache_folder
        Feature cache; the user's where None.
    mirrored
        Whether the prediction is averaged with that of the mirrored image.
    console
        For the progress bars.

    Raises
    ------
    IcmoeError
        205-211 for model, backbone and checkpoint, 107-110 for the folder, 108 where no image of the split is usable.
    """
    device = available_device(device_name)
    model, header = read_model(model_path)
    study = header.study
    require_taken(study.backbone.name, checkpoint)
    torch.set_num_threads(os.cpu_count() or 1)
    views = MIRRORED if mirrored else ALONE
    progress = Progress(console=console, transient=True)
    with progress if console.is_terminal else nullcontext():
        bars = {name: progress.add_task(name, total=None) for name in ("read", "encode")}
        sites = read_sites_split(
            root, split, study.labels, progress=lambda done, total: progress.update(bars["read"], completed=done, total=total)
        )
        faults = [fault for site in sites.values() for fault in site.exclusions]
        slices = [item for site in sites.values() for item in site.slices]
        if not slices:
            raise IcmoeError(
                *faults[:20], Fault(number=108, where=split, what="no image of the split is usable", did="Nothing was scored.")
            )
        backbone = chosen_backbone(study.backbone, checkpoint=checkpoint, device=device)
        cache = FeatureCache.of(cache_folder or default_cache_folder(), study)
        encode_slices(
            slices,
            study,
            backbone,
            cache,
            on_progress=lambda done, total: progress.update(bars["encode"], completed=done, total=total),
            views=views,
            everywhere=True,
        )
        scores = score_slices(model.to(device), slices, study.labels, cache, device, views=views)
    record = evaluation_record(scores, sites, [label.name for label in study.labels])
    return {**record, "split": split, "model": header.record()}, faults
