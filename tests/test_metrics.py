"""Scores against hand-computed values and a slow, obvious reference."""

import itertools
import json
import math
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icmoe.metrics import (
    ClassScore,
    PatientScore,
    evaluation_record,
    patient_scores,
    site_scores,
    summary,
)

FLOAT32 = 1e-6  # MONAI divides in float32


class ImageCounts(NamedTuple):
    images_found: int
    images_used: int


masks = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


def _voxels(mask_DHW):
    return {tuple(int(i) for i in voxel) for voxel in np.argwhere(mask_DHW)}


def _surface_mm(voxels, spacing_mm):
    """Return the centres, in mm, of the voxels with a face neighbour outside; one slice is a plane."""
    axes = (1, 2) if len({v[0] for v in voxels}) == 1 and spacing_mm[0] == 0 else (0, 1, 2)
    steps = [tuple(sign * (axis == i) for i in range(3)) for axis in axes for sign in (-1, 1)]
    border = [v for v in voxels if any(tuple(map(sum, zip(v, s, strict=True))) not in voxels for s in steps)]
    return [tuple(i * s for i, s in zip(v, spacing_mm, strict=True)) for v in border]


def _directed(from_mm, to_mm):
    return [min(math.dist(a, b) for b in to_mm) for a in from_mm]


def _reference(prediction_DHW, truth_DHW, spacing_mm):
    """Return Dice, IoU, HD95 and surface Dice of two non-empty masks, by sets and brute force."""
    p, t = _voxels(prediction_DHW), _voxels(truth_DHW)
    if truth_DHW.shape[0] == 1:
        spacing_mm = (0, *spacing_mm[1:])
    sp, st_ = _surface_mm(p, spacing_mm), _surface_mm(t, spacing_mm)
    there, back = _directed(sp, st_), _directed(st_, sp)
    near = sum(d <= 2.0 for d in there + back)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return 2 * len(p & t) / (len(p) + len(t)), len(p & t) / len(p | t), hd95, near / len(there + back)


def _row(*columns, width=10):
    volume = np.zeros((1, 1, width), np.uint8)
    volume[0, 0, list(columns)] = 1
    return volume


def test_values_that_fit_on_a_napkin():
    (score,) = patient_scores(_row(2, 3, 4), _row(3, 4, 5), 2, (1.0, 1.0, 4.0))
    # intersection 2, sizes 3 and 3, union 4; on one row every pixel is edge, the ends are 4 mm away: 95th percentile of
    # (0, 0, 4) interpolated at position 1.9 is 3.6; two of three pixels each way lie within 2 mm.
    assert score.dice == pytest.approx(2 / 3, abs=FLOAT32)
    assert score.iou == pytest.approx(0.5, abs=FLOAT32)
    assert score.hd95_mm == pytest.approx(3.6, abs=1e-5)
    assert score.surface_dice == pytest.approx(2 / 3, abs=FLOAT32)


def test_classes_are_scored_apart():
    truth = np.array([[[0, 1, 1, 2]]], np.uint8)
    prediction = np.array([[[0, 1, 2, 2]]], np.uint8)
    one, two = patient_scores(prediction, truth, 3, None)
    assert (one.dice, two.dice) == pytest.approx((2 / 3, 2 / 3), abs=FLOAT32)
    assert (one.hd95_mm, one.surface_dice) == (None, None)
    assert PatientScore("a", "p", (one, two)).hd95_mm is None


def test_one_slice_is_measured_in_its_plane():
    truth = np.zeros((1, 12, 12), np.uint8)
    truth[0, 1:11, 1:11] = 1
    prediction = truth.copy()
    prediction[0, 1:11, 8:11] = 0
    (score,) = patient_scores(prediction, truth, 2, (5.0, 1.0, 1.0))
    # In 3-D the inner pixels would count as surface and hide the shift.
    assert score.hd95_mm == pytest.approx(3.0, abs=1e-5)


def test_two_slices_of_which_one_is_empty_are_a_volume():
    truth = np.zeros((2, 12, 12), np.uint8)
    truth[0, 1:11, 1:11] = 1
    prediction = truth.copy()
    prediction[0, 1:11, 8:11] = 0
    (score,) = patient_scores(prediction, truth, 2, (5.0, 1.0, 1.0))
    # Every pixel is surface: of truth's hundred, ten lie 3 mm from the prediction, none of the other seventy does.
    assert score.hd95_mm == pytest.approx(3.0, abs=1e-5)
    assert score.surface_dice == pytest.approx(160 / 170, abs=FLOAT32)


@pytest.mark.parametrize("shape", [(1, 6, 7), (2, 5, 5), (4, 5, 6)])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_reference(shape, seed):
    rng = np.random.default_rng(seed)
    prediction, truth = (rng.random((2, *shape)) < rng.uniform(0.1, 0.9)).astype(np.uint8)
    prediction[0, 0, 0] = truth[-1, -1, -1] = 1
    spacing_mm = tuple(float(s) for s in rng.uniform(0.5, 3.0, 3))
    (score,) = patient_scores(prediction, truth, 2, spacing_mm)
    expected = _reference(prediction, truth, spacing_mm)
    assert (score.dice, score.iou, score.hd95_mm, score.surface_dice) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("shape", "diagonal_mm"), [((2, 3, 4), math.hypot(10, 6, 4)), ((1, 3, 4), math.hypot(6, 4))])
def test_absent_classes_follow_the_documented_conventions(shape, diagonal_mm):
    empty, full, spacing = np.zeros(shape, np.uint8), np.ones(shape, np.uint8), (5.0, 2.0, 1.0)
    assert patient_scores(empty, empty, 2, spacing) == (ClassScore(1.0, 1.0, 0.0, 1.0),)
    for prediction, truth in ((empty, full), (full, empty)):
        (score,) = patient_scores(prediction, truth, 2, spacing)
        assert (score.dice, score.iou, score.surface_dice) == (0.0, 0.0, 0.0)
        assert score.hd95_mm == pytest.approx(diagonal_mm)
    assert patient_scores(empty, full, 2, None) == (ClassScore(0.0, 0.0, None, None),)


def test_the_penalty_exceeds_every_real_distance():
    corner, opposite = np.zeros((2, 3, 3, 3), np.uint8)
    corner[0, 0, 0] = opposite[-1, -1, -1] = 1
    real, missed = (patient_scores(p, opposite, 2, (1, 1, 1))[0].hd95_mm for p in (corner, np.zeros_like(corner)))
    assert real < missed


@settings(max_examples=60, deadline=None)
@given(masks)
def test_scores_are_symmetric_and_bounded(rng):
    shape = tuple(rng.integers(1, 5, 3))
    a, b = (rng.random((2, *shape)) < rng.uniform(0, 1)).astype(np.uint8)
    (forth,), (back,) = patient_scores(a, b, 2, (2.0, 1.0, 1.5)), patient_scores(b, a, 2, (2.0, 1.0, 1.5))
    assert forth == back
    assert 0 <= forth.iou <= forth.dice <= 1
    assert 0 <= forth.surface_dice <= 1
    assert 0 <= forth.hd95_mm < math.inf
    assert patient_scores(a, a, 2, (2.0, 1.0, 1.5)) == (ClassScore(1.0, 1.0, 0.0, 1.0),)


unit = st.floats(0, 1)
scores = st.builds(ClassScore, unit, unit, st.none() | st.floats(0, 500), st.none() | unit)
people = st.builds(PatientScore, st.sampled_from(["CS", "DU", "HT"]), st.text(max_size=3), st.tuples(scores, scores))


@given(st.lists(people, min_size=1, max_size=8), st.randoms())
def test_order_of_the_patients_changes_nothing(patients, random):
    shuffled = random.sample(patients, len(patients))
    assert site_scores(shuffled) == site_scores(patients)
    assert summary(shuffled) == summary(patients)


def _patient(site, dice, hd95_mm=None):
    return PatientScore(site, "p", (ClassScore(dice, dice / 2, hd95_mm, None),))


def test_sites_count_once_in_the_mean_and_patients_once_in_the_pool():
    whole = summary([_patient("b", 0.9), _patient("b", 0.7), _patient("b", 0.8), _patient("a", 0.4)])
    assert whole.mean.dice == pytest.approx((0.8 + 0.4) / 2)
    assert whole.pooled.dice == pytest.approx((0.9 + 0.7 + 0.8 + 0.4) / 4)
    assert (whole.worst_site, whole.worst.dice, whole.pooled.patients) == ("a", 0.4, 4)


def test_equally_bad_sites_are_named_in_order_of_name():
    for order in itertools.permutations("cab"):
        assert summary([_patient(site, 0.5) for site in order]).worst_site == "a"


def test_unknown_distances_are_left_out_of_means():
    scores = site_scores([_patient("a", 0.5, 4.0), _patient("a", 0.5), _patient("b", 0.5)])
    assert (scores["a"].hd95_mm, scores["b"].hd95_mm) == (4.0, None)


def test_record_has_the_published_shape():
    images = {"DU": ImageCounts(3, 3), "CS": ImageCounts(12, 11)}
    record = evaluation_record([_patient("CS", 0.5, 4.0)], images, ("background", "lesion"))
    lesion = {"dice": 0.5, "iou": 0.25, "hd95_mm": 4.0, "surface_dice": None}
    nothing = dict.fromkeys(lesion)
    assert record == {
        "sites": {
            "CS": {**lesion, "patients": 1, "images_found": 12, "images_used": 11, "classes": {"lesion": lesion}},
            "DU": {**nothing, "patients": 0, "images_found": 3, "images_used": 3, "classes": {"lesion": nothing}},
        },
        "mean": {"dice": 0.5, "iou": 0.25},
        "worst_site": {"site": "CS", "dice": 0.5},
        "pooled": {"dice": 0.5, "iou": 0.25, "patients": 1},
    }
    assert json.loads(json.dumps(record)) == record
    assert list(record["sites"]) == ["CS", "DU"]


def test_record_without_any_patient_is_null_not_zero():
    record = evaluation_record([], {"CS": ImageCounts(2, 0)}, ("background", "lesion"))
    assert record["mean"] == {"dice": None, "iou": None}
    assert record["worst_site"] == {"site": None, "dice": None}
    assert record["pooled"] == {"dice": None, "iou": None, "patients": 0}
    assert summary([]) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((np.zeros((1, 2, 2), int), np.zeros((1, 2, 3), int), 2, None), r"\(1, 2, 3\)"),
        ((np.zeros((2, 2), int), np.zeros((2, 2), int), 2, None), r"\(2, 2\)"),
        ((np.full((1, 2, 2), 2), np.zeros((1, 2, 2), int), 2, None), "prediction .* 0 to 1"),
        ((np.zeros((1, 2, 2), int), np.full((1, 2, 2), -1), 2, None), "truth .* -1"),
        ((np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int), 2, (1.0, 0.0, 1.0)), "0.0"),
        ((np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int), 2, (1.0, math.nan, 1.0)), "nan"),
        ((np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int), 1, None), "1 classes"),
    ],
)
def test_what_does_not_fit_is_refused_by_value(arguments, named):
    with pytest.raises(ValueError, match=named):
        patient_scores(*arguments)


def test_record_refuses_sites_and_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="CS"):
        evaluation_record([_patient("CS", 0.5)], {}, ("background", "lesion"))
    with pytest.raises(ValueError, match="edema"):
        evaluation_record([_patient("CS", 0.5)], {"CS": ImageCounts(1, 1)}, ("background", "lesion", "edema"))
    with pytest.raises(ValueError, match="foreground class"):
        PatientScore("CS", "p", ())


def test_overlap_is_what_monai_says():
    from monai.metrics import compute_dice, compute_iou

    rng = np.random.default_rng(5)
    for share in (0.02, 0.3, 0.9):
        prediction, truth = (rng.random((3, 16, 16)) < share for _ in range(2))
        (score,) = patient_scores(prediction.astype(np.int64), truth.astype(np.int64), 2, None)
        masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
        assert score.dice == pytest.approx(float(compute_dice(*masks, include_background=True, num_classes=1)), abs=FLOAT32)
        assert score.iou == pytest.approx(float(compute_iou(*masks, include_background=True)), abs=FLOAT32)


def test_overlap_does_not_import_monai_which_takes_seconds_in_each_round_of_a_site():
    code = (
        "import sys, numpy, icmoe.metrics as m; v = numpy.eye(4, dtype=int)[None]; print(m.patient_scores(v, v, 2, None)[0].dice)"
    )
    code += "; sys.exit('monai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1.0")
