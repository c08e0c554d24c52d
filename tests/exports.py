"""Exports as hospitals make them, and their ingest; what the tests of ingest share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from icmoe.data.ingest import index
from icmoe.data.ingest.index import FrameRow, LeftOut, frame_rows, left_out
from icmoe.data.ingest.opening import Refusal
from icmoe.data.ingest.pixels import read_pictures
from icmoe.data.ingest.run import Export, ingest
from icmoe.data.ingest.settings import IngestSettings
from icmoe.data.slices import SiteData
from icmoe.study import Label

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.real
absent = pytest.mark.skipif(not DATA.exists(), reason="the real hospital images are not here")
BACKGROUND = Label(name="background", values=(0,))
LESION = (BACKGROUND, Label(name="lesion", values=(1, 255)))


def export_of(root: Path, place: Path, labels: tuple[Label, ...] = LESION, **settings: object) -> Export:
    chosen = IngestSettings.model_validate({"folder": "x", "processes": 2, **settings})
    return Export(site="Elm", root=root, store=place / "store", secret_folder=place, labels=labels, settings=chosen)


def taken(export: Export) -> SiteData:
    ingest(export)
    return index.read_index(export.store)


def published(store: Path) -> tuple[list[FrameRow], list[LeftOut]]:
    """Return what readers of an index see: frames that may be used, and what is left out."""
    with index.opened(store) as connection:
        return frame_rows(connection), left_out(connection)


def read_frames(path: Path, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray | Refusal]]:
    """Yield the grey values of frames, or why they have none."""
    for number, picture in read_pictures(path, numbers):
        yield number, picture if isinstance(picture, Refusal) else picture.grey_HW


def write_series(folder: Path, patient: str, slices: int = 3, seed: int = 0, **elements: object) -> list[np.ndarray]:
    """Write an axial MR series with PNG masks of the same names, and return its grey values by position."""
    rng, series, study = np.random.default_rng(seed), generate_uid(), generate_uid()
    folder.mkdir(parents=True)
    pixels = [rng.integers(0, 4000, (24, 32)).astype(np.uint16) for _ in range(slices)]
    for number, grey in enumerate(pixels):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, generate_uid()
        data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = MRImageStorage, data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.PatientID, data.Modality = study, series, patient, "MR"
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 24, 32, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 5.0 * number], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.PixelData = [1.0, 1.5], grey.tobytes()
        for name, value in elements.items():
            setattr(data, name, value)
        data.save_as(folder / f"x{slices - number}.dcm", enforce_file_format=True)
        mask = np.zeros((24, 32), np.uint8)
        mask[4 : 8 + number, 5:9] = 255
        Image.fromarray(mask).save(folder / f"x{slices - number}.png")
    return pixels
