"""What the tests of predictions share: a small seeded model, the array it predicts, and SEG objects read back by highdicom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import torch
from dicom_builders import volume
from pydicom.dataset import Dataset
from rich.console import Console

from icmoe.backbone import Backbone, load_backbone
from icmoe.errors import Fault
from icmoe.exchange import global_state
from icmoe.features import Features
from icmoe.model import ICMoE, build_model
from icmoe.modelfile import ModelHeader, read_model, write_model
from icmoe.predict.run import predict_study
from icmoe.preprocess import prepare, restore
from icmoe.study import Study

RNG = np.random.default_rng(4)
BLOBS = np.kron(RNG.integers(0, 3000, (5, 4, 5)), np.ones((1, 6, 5))).astype(np.uint16)  # 5 x 24 x 25
MARKED = (BLOBS > 1500).astype(np.uint8)
TILT = np.deg2rad(20.0)
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)
SERIES = {
    "axial": {},
    "upside down": {"axes": (-1, 0, 0, 0, -1, 0)},
    "from the head down": {"step": (0, 0, -5.0)},
    "coronal": {"axes": (1, 0, 0, 0, 0, -1)},
    "sagittal": {"axes": (0, 1, 0, 0, 0, -1)},
    "turned": {"axes": (0, 1, 0, 1, 0, 0)},
    "oblique": {"axes": OBLIQUE},
    "tilted gantry": {"axes": (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT)), "step": (0, 0, 5.0)},
    "uneven": {"step": None},
}


def write_random_model(path: Path, study: Study) -> Path:
    """Write a model of random weights, so that experts differ and every class occurs."""
    model = build_model(study, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    write_model(path, global_state(model), ModelHeader(study=study, method="router-aware", round=0, phantoms=False))
    return path


def loaded(path: Path) -> tuple[ICMoE, Backbone]:
    model, header = read_model(path)
    chosen = header.study.backbone
    return model, load_backbone(chosen.name, image_size=chosen.image_size, device=torch.device("cpu"))


@torch.no_grad()
def array_prediction(model: ICMoE, backbone: Backbone, image_HW: np.ndarray) -> np.ndarray:
    """Return the class map of an image in [0, 1], from the parts of the model and without the code under test."""
    raw = backbone.encode(prepare(image_HW, backbone.image_size)[None])
    features = Features(raw.embedding_BCHW.half().float(), tuple(block.half().float() for block in raw.blocks))
    return restore(model(features).logits_BKhw[0], image_HW.shape).argmax(dim=0).numpy()


def predicted(
    model: Path,
    source: Path,
    out: Path,
    form: str = "dicom-seg",
    *,
    force: bool = False,
    maps: bool = False,
    mirrored: bool = False,
) -> tuple[dict[str, Any], list[Fault]]:
    told = {"checkpoint": None, "device_name": "cpu", "console": Console(quiet=True)}
    return predict_study(model, source, out, form, maps=maps, mirrored=mirrored, force=force, **told)


def read_back(path: Path, sources: Sequence[Dataset], numbers: Sequence[int] = ()) -> np.ndarray:
    """Return the classes that a SEG object gives these images, or these frames (from 1) of one image, D x H x W."""
    seg = highdicom.seg.segread(path)
    options = {"combine_segments": True, "assert_missing_frames_are_empty": True}
    if numbers:
        return seg.get_pixels_by_source_frame(sources[0].SOPInstanceUID, list(numbers), **options)
    return seg.get_pixels_by_source_instance([source.SOPInstanceUID for source in sources], **options)


def planes_of(path: Path) -> dict[tuple[str, int], tuple[float, ...]]:
    """Return position, axes and pixel distances of every stored frame by the instance and frame that it refers to."""
    seg = highdicom.seg.segread(path)
    shared = seg.SharedFunctionalGroupsSequence[0]
    axes = [*shared.PlaneOrientationSequence[0].ImageOrientationPatient, *shared.PixelMeasuresSequence[0].PixelSpacing]
    found = {}
    for group in seg.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        position = group.PlanePositionSequence[0].ImagePositionPatient
        key = (str(source.ReferencedSOPInstanceUID), int(source.get("ReferencedFrameNumber", 1)))
        found[key] = tuple(float(value) for value in (*position, *axes))
    return found


def slices(name: str) -> list[Dataset]:
    made = volume(BLOBS, **SERIES[name])
    if name == "uneven":
        for data, height in zip(made, (0.0, 5.0, 12.0, 14.0, 30.0), strict=True):
            data.ImagePositionPatient = [-20.0, -30.0, height]
    return made


def plane(source: Dataset) -> tuple[float, ...]:
    return tuple(float(v) for v in (*source.ImagePositionPatient, *source.ImageOrientationPatient, *source.PixelSpacing))
