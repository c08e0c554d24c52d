"""Scores of a segmentation, one volume per patient; distances between surfaces are MONAI's.

A patient is one volume D H W of class indices: the 2-D predictions stacked again along the acquisition axis. Scores are
per foreground class; a patient's score is the mean over the foreground classes, a site's the mean over its patients.

Conventions, which decide more than the third decimal of any table:

* truth and prediction both lack the class: Dice = IoU = surface Dice = 1, HD95 = 0 mm;
* only one of the two has it: Dice = IoU = surface Dice = 0, HD95 = the volume's diagonal in mm, a finite penalty that no
  real distance in the volume can reach, so that a missed lesion is never dropped from a mean;
* HD95 is the larger of the two directed 95th percentiles of the distances between surface voxels, voxel centre to voxel
  centre; surface Dice counts surface voxels within 2 mm (`SURFACE_TOLERANCE_MM`) of the other surface. Foreground at the
  volume's border is surface;
* both exist only where the spacing is known (`icmoe.evaluation.common_spacing`), else they are None; means leave None out and
  are None where nothing is left;
* a volume of one slice is measured in its plane, since in 3-D each of its pixels would be surface.

Overlaps are counted in integers; MONAI divides in float32, so that distances carry about seven digits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

SURFACE_TOLERANCE_MM = 2.0
"""Distance within which two surfaces count as equal, about the disagreement of two careful readers."""

Volume = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """Scores of one foreground class.

    Parameters
    ----------
    dice, iou
        Overlap in [0, 1].
    hd95_mm
        95th percentile of the Hausdorff distance, millimetres >= 0; None where the spacing is unknown.
    surface_dice
        Share of the surfaces within `SURFACE_TOLERANCE_MM`, in [0, 1]; None where the spacing is unknown.
    """

    dice: float
    iou: float
    hd95_mm: float | None
    surface_dice: float | None


@dataclass(frozen=True, slots=True)
class PatientScore:
    """Scores of one patient; the properties are means over the foreground classes.

    Parameters
    ----------
    site
        Name of the patient's site.
    patient
        The patient's pseudonym; stays at the site.
    classes
        One score per foreground class, in the study's order; at least one.
    """

    site: str
    patient: str
    classes: tuple[ClassScore, ...]

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("a patient's score needs at least one foreground class")

    @property
    def dice(self) -> float:
        """Mean Dice in [0, 1]."""
        return _mean(score.dice for score in self.classes)

    @property
    def iou(self) -> float:
        """Mean IoU in [0, 1]."""
        return _mean(score.iou for score in self.classes)

    @property
    def hd95_mm(self) -> float | None:
        """Mean HD95 in millimetres, None where the spacing is unknown."""
        return _mean_known(score.hd95_mm for score in self.classes)

    @property
    def surface_dice(self) -> float | None:
        """Mean surface Dice in [0, 1], None where the spacing is unknown."""
        return _mean_known(score.surface_dice for score in self.classes)


@dataclass(frozen=True, slots=True)
class SiteScore:
    """Means over the patients of one site, or over sites or all patients in a `Summary`.

    Parameters
    ----------
    dice, iou, hd95_mm, surface_dice
        As in `ClassScore`, averaged over foreground classes, then over patients.
    patients
        Number of patients, at least 1.
    classes
        The same per foreground class.
    """

    dice: float
    iou: float
    hd95_mm: float | None
    surface_dice: float | None
    patients: int
    classes: tuple[ClassScore, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Three views of the same patients.

    Parameters
    ----------
    mean
        Mean over the sites that have patients, each site counting once.
    worst_site
        Name of the site with the lowest Dice; the first by name where several share it.
    worst
        That site's scores.
    pooled
        Mean over all patients, each patient counting once.
    """

    mean: SiteScore
    worst_site: str
    worst: SiteScore
    pooled: SiteScore


class CountsImages(Protocol):
    """What the record needs to know about a site's images; `icmoe.data.slices.SiteData` fits."""

    @property
    def images_found(self) -> int:
        """Images that the split names."""

    @property
    def images_used(self) -> int:
        """Images that could be read."""


def patient_scores(
    prediction_DHW: Volume, truth_DHW: Volume, classes: int, spacing_mm: Sequence[float] | None
) -> tuple[ClassScore, ...]:
    """Return the score of each foreground class of one patient.

    Parameters
    ----------
    prediction_DHW, truth_DHW
        Class indices in [0, classes), slices first; D may be 1.
    classes
        Number of classes K >= 2, the background counted.
    spacing_mm
        Distance of voxel centres along D, H and W in millimetres, > 0; None where unknown.

    Returns
    -------
    tuple of ClassScore
        K - 1 scores, for classes 1 to K - 1.

    Raises
    ------
    ValueError
        Where shapes, class indices or the spacing do not fit; the offending value is named.
    """
    _check(prediction_DHW, truth_DHW, classes, spacing_mm)
    return tuple(_class_score(prediction_DHW == index, truth_DHW == index, spacing_mm) for index in range(1, classes))


def site_scores(patients: Iterable[PatientScore]) -> dict[str, SiteScore]:
    """Return the scores of each site that has patients, sorted by name.

    The order of the patients has no influence, not even on the last bit.
    """
    grouped: dict[str, list[PatientScore]] = {}
    for patient in patients:
        grouped.setdefault(patient.site, []).append(patient)
    return {site: _over_patients(grouped[site]) for site in sorted(grouped)}


def summary(patients: Sequence[PatientScore]) -> Summary | None:
    """Return mean over sites, worst site and mean over patients; None where there is no patient."""
    if not patients:
        return None
    sites = site_scores(patients)
    worst = min(sites, key=lambda name: (sites[name].dice, name))
    return Summary(mean=_average(list(sites.values())), worst_site=worst, worst=sites[worst], pooled=_over_patients(patients))


def evaluation_record(
    patients: Sequence[PatientScore], images: Mapping[str, CountsImages], labels: Sequence[str]
) -> dict[str, Any]:
    """Return what `icmoe evaluate --json` prints, without its `model` key.

    Parameters
    ----------
    patients
        Scores of any number of sites.
    images
        Images found and used per site; a site without patients gets null scores.
    labels
        Names of all K classes, the background first.

    Raises
    ------
    ValueError
        Where a patient's site is not in `images`, or the number of labels and class scores differ.
    """
    scores = site_scores(patients)
    if unknown := sorted(set(scores) - set(images)):
        raise ValueError(f"no image counts for sites {unknown}; counts are given for {sorted(images)}")
    sites = {site: _site_record(scores.get(site), images[site], labels) for site in sorted(images)}
    return {"sites": sites, **summary_record(summary(patients))}


def summary_record(whole: Summary | None) -> dict[str, Any]:
    """Return `mean`, `worst_site` and `pooled` as plain values; null scores where there is no patient."""
    if whole is None:
        nothing = {"dice": None, "iou": None}
        return {"mean": nothing, "worst_site": {"site": None, "dice": None}, "pooled": {**nothing, "patients": 0}}
    return {
        "mean": {"dice": whole.mean.dice, "iou": whole.mean.iou},
        "worst_site": {"site": whole.worst_site, "dice": whole.worst.dice},
        "pooled": {"dice": whole.pooled.dice, "iou": whole.pooled.iou, "patients": whole.pooled.patients},
    }


def _site_record(score: SiteScore | None, images: CountsImages, labels: Sequence[str]) -> dict[str, Any]:
    names = labels[1:]
    if score is not None and len(score.classes) != len(names):
        raise ValueError(f"{len(score.classes)} class scores for {len(names)} foreground labels {list(names)}")
    nothing = {"dice": None, "iou": None, "hd95_mm": None, "surface_dice": None}
    values = nothing if score is None else {key: getattr(score, key) for key in nothing}
    rows = [nothing] * len(names) if score is None else [asdict(row) for row in score.classes]
    return {
        **values,
        "patients": 0 if score is None else score.patients,
        "images_found": images.images_found,
        "images_used": images.images_used,
        "classes": {name: dict(row) for name, row in zip(names, rows, strict=True)},
    }


def _check(prediction_DHW: Volume, truth_DHW: Volume, classes: int, spacing_mm: Sequence[float] | None) -> None:
    if prediction_DHW.shape != truth_DHW.shape or truth_DHW.ndim != 3 or truth_DHW.size == 0:
        raise ValueError(
            f"prediction {prediction_DHW.shape} and truth {truth_DHW.shape}: one non-empty shape (slices, rows, columns) expected"
        )
    if classes < 2:
        raise ValueError(f"{classes} classes: at least 2 expected, the background counted")
    for name, volume in (("prediction", prediction_DHW), ("truth", truth_DHW)):
        if volume.min() < 0 or volume.max() >= classes:
            raise ValueError(f"{name} holds class indices {volume.min()} to {volume.max()}: 0 to {classes - 1} expected")
    if spacing_mm is not None and (len(spacing_mm) != 3 or not all(0 < step < math.inf for step in spacing_mm)):
        raise ValueError(f"spacing {tuple(spacing_mm)} mm: three finite distances > 0 expected")


def _class_score(prediction_DHW: Mask, truth_DHW: Mask, spacing_mm: Sequence[float] | None) -> ClassScore:
    present = (bool(prediction_DHW.any()), bool(truth_DHW.any()))
    known = spacing_mm is not None
    if present == (False, False):
        return ClassScore(1.0, 1.0, 0.0 if known else None, 1.0 if known else None)
    if present != (True, True):
        diagonal_mm = None if spacing_mm is None else _diagonal_mm(truth_DHW.shape, spacing_mm)
        return ClassScore(0.0, 0.0, diagonal_mm, 0.0 if known else None)
    prediction, truth = _tensors(prediction_DHW, truth_DHW)
    dice, iou = _overlap(prediction, truth)
    hd95_mm, surface_dice = (None, None) if spacing_mm is None else _surface(prediction, truth, spacing_mm)
    return ClassScore(dice, iou, hd95_mm, surface_dice)


def _diagonal_mm(shape: tuple[int, ...], spacing_mm: Sequence[float]) -> float:
    extents_mm = [count * step for count, step in zip(shape, spacing_mm, strict=True)]
    return math.hypot(*(extents_mm[1:] if shape[0] == 1 else extents_mm))


def _tensors(prediction_DHW: Mask, truth_DHW: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both masks with batch and channel in front, cropped to what they cover; no score looks beyond it."""
    union_DHW = prediction_DHW | truth_DHW
    box = []
    for axis in range(3):
        (covered,) = np.nonzero(union_DHW.any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(int(covered[0]), int(covered[-1]) + 1))
    # One slice is measured in its plane; two slices of which one is empty stay a volume.
    index: tuple[Any, ...] = (0, *box[1:]) if union_DHW.shape[0] == 1 else tuple(box)
    prediction, truth = (torch.from_numpy(np.ascontiguousarray(mask[index])) for mask in (prediction_DHW, truth_DHW))
    return prediction[None, None], truth[None, None]


def _overlap(prediction: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Return Dice and intersection over union of two masks that are not empty.

    Counted here: MONAI, which says the same, takes four seconds of CPU to import, and each round of a site is a process.
    """
    both, either = int((prediction & truth).sum()), int((prediction | truth).sum())
    return 2 * both / (both + either), both / either


def _surface(prediction: torch.Tensor, truth: torch.Tensor, spacing_mm: Sequence[float]) -> tuple[float, float]:
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice  # here: it takes seconds to import

    spacing = [float(step) for step in spacing_mm][-(truth.ndim - 2) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls its own deprecated argument
        hd95 = compute_hausdorff_distance(prediction, truth, include_background=True, percentile=95, spacing=spacing)
        surface = compute_surface_dice(prediction, truth, [SURFACE_TOLERANCE_MM], include_background=True, spacing=spacing)
    return float(hd95.item()), float(surface.item())


def _mean(values: Iterable[float]) -> float:
    """Return the mean; `fsum` rounds once, so that order has no influence."""
    known = list(values)
    return math.fsum(known) / len(known)


def _mean_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _mean_classes(rows: Sequence[tuple[ClassScore, ...]]) -> tuple[ClassScore, ...]:
    return tuple(
        ClassScore(
            _mean(score.dice for score in column),
            _mean(score.iou for score in column),
            _mean_known(score.hd95_mm for score in column),
            _mean_known(score.surface_dice for score in column),
        )
        for column in zip(*rows, strict=True)
    )


def _over_patients(patients: Sequence[PatientScore]) -> SiteScore:
    return _average([SiteScore(p.dice, p.iou, p.hd95_mm, p.surface_dice, 1, p.classes) for p in patients])


def _average(scores: Sequence[SiteScore]) -> SiteScore:
    """Return the plain mean of `scores`; the patients are added."""
    return SiteScore(
        dice=_mean(score.dice for score in scores),
        iou=_mean(score.iou for score in scores),
        hd95_mm=_mean_known(score.hd95_mm for score in scores),
        surface_dice=_mean_known(score.surface_dice for score in scores),
        patients=sum(score.patients for score in scores),
        classes=_mean_classes([score.classes for score in scores]),
    )
