"""Black-box attack: was this patient in the training? The likelihood ratio of Carlini et al. (LiRA, arXiv 2112.03570).

Several models are trained by the study's own procedure, each on a random half of the patients. Each is attacked in turn
with the others as references: for those that held a patient and those that did not, the patient's losses are taken as
normal with one variance for all (the paper's advice where references are few), and the score is the log of the ratio.

Shapes: T models, P patients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import mannwhitneyu

from icmoe.model import ICMoE
from icmoe.os_random import torch_generator
from icmoe.patient_gradients import Objective
from icmoe.privacy import private_round
from icmoe.privacy_audit.seeded import SeededRows
from icmoe.study import Study
from icmoe.training import anchor_of, train_round

_FALSE_POSITIVES = 0.01
_CPU = torch.device("cpu")

Scores = npt.NDArray[np.float64]
Members = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipAttack:
    """How well members are told from others.

    Parameters
    ----------
    auc
        Area under the curve of true over false positives; 0.5 is chance.
    tpr_at_1_fpr
        Share of members found where at most 1 % of the others are accused; 0.01 is chance.
    models, patients, rounds
        Trained models, patients of each attack, rounds of each training.
    """

    auc: float
    tpr_at_1_fpr: float
    models: int
    patients: int
    rounds: int


def membership_attack(model: ICMoE, study: Study, data: SeededRows, *, models: int, rounds: int, seed: int) -> MembershipAttack:
    """Train models on halves of the patients, starting from `model`, and attack each.

    Parameters
    ----------
    model
        What everybody knows before the training.
    study
        How is trained: with privacy at the site where the study has it, plainly otherwise.
    data
        Patients, an even number of them.
    models
        Even, at least 6: each patient is in half of them.
    rounds
        Of each training, from the study's first on.
    seed
        Of halves and plain training.
    """
    member_TP = balanced_halves(models, len(data.rows_of_patients), seed)
    loss_TP = np.stack([_losses_after(model, study, data, member_P, rounds, seed) for member_P in member_TP])
    score_TP = likelihood_ratios(loss_TP, member_TP)
    auc, tpr = roc(score_TP[member_TP], score_TP[~member_TP])
    return MembershipAttack(auc=auc, tpr_at_1_fpr=tpr, models=models, patients=len(data.rows_of_patients), rounds=rounds)


def balanced_halves(models: int, patients: int, seed: int) -> Members:
    """Return who is in which training, T P: each patient in half of the models, otherwise at random."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(models) < models // 2 for _ in range(patients)], axis=1)


def likelihood_ratios(loss_TP: Scores, member_TP: Members) -> Scores:
    """Return the score of each patient against each model, the model itself left out of the references, T P.

    Parameters
    ----------
    loss_TP
        Loss of each patient under each model.
    member_TP
        Who was in which training; each patient in and out of at least two models.
    """
    centred_TP = np.where(member_TP, loss_TP - _mean(loss_TP, member_TP), loss_TP - _mean(loss_TP, ~member_TP))
    variance = float(centred_TP.var()) + 1e-12
    scores = np.empty_like(loss_TP)
    for target in range(len(loss_TP)):
        others = np.arange(len(loss_TP)) != target
        inside_P, outside_P = (_distance(loss_TP, who, target, others) for who in (member_TP, ~member_TP))
        scores[target] = (outside_P - inside_P) / (2.0 * variance)
    return scores


def roc(members: Scores, others: Scores) -> tuple[float, float]:
    """Return the area under the curve, and the true positives at 1 % false positives.

    Parameters
    ----------
    members, others
        Scores, at least one each; higher speaks for a member.
    """
    auc = float(mannwhitneyu(members, others).statistic) / (len(members) * len(others))
    threshold = np.sort(others)[::-1][int(_FALSE_POSITIVES * len(others))]
    return auc, float((members > threshold).mean())


def _distance(loss_TP: Scores, who_TP: Members, target: int, others: Members) -> Scores:
    """Return the squared distance of the target's losses from the mean of the references that `who` names, P.

    The mean of n references varies itself: over 1 + 1/n the distance has the same law for any n. A member has one
    reference less on its own side, and would be told by that alone.
    """
    distance_P: Scores = (loss_TP[target] - _mean(loss_TP[others], who_TP[others])) ** 2
    spread_P: Scores = 1.0 + 1.0 / who_TP[others].sum(axis=0)
    return distance_P / spread_P


def _mean(value_TP: Scores, of_TP: Members) -> Scores:
    mean_P: Scores = np.where(of_TP, value_TP, 0.0).sum(axis=0) / of_TP.sum(axis=0)
    return mean_P


def _losses_after(model: ICMoE, study: Study, data: SeededRows, member_P: Members, rounds: int, seed: int) -> Scores:
    """Return each patient's loss after a training on the members, P."""
    trained, members = copy.deepcopy(model), data.of(np.flatnonzero(member_P).tolist())
    for number in range(1, rounds + 1):
        if study.privacy.site is not None:
            private_round(trained, members, study, round_number=number, device=_CPU)
        else:
            train_round(trained, members, study, round_number=number, seed=seed + number, device=_CPU)
    return patient_losses(trained.eval(), study, data)


@torch.no_grad()
def patient_losses(model: ICMoE, study: Study, data: SeededRows) -> Scores:
    """Return the mean loss of each patient's slices, P, with the model as it stands."""
    objective = Objective(model, study.loss, torch_generator(_CPU), anchor_of(model, study))

    def loss(rows: Sequence[int]) -> float:
        return float(objective(data.read(rows, (), _CPU))[0].mean())

    return np.array([loss(rows) for rows in data.rows_of_patients])
