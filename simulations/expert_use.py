"""What the experts do on test slices: who decides where, whether their agreement tells of errors, what each one is worth.

Measured on the backbone's grid. B images, M experts, K classes, H x W cells, N = B H W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from icmoe.backbone import grid_of
from icmoe.data.slices import Slice, load_truth
from icmoe.evaluation import EVALUATION_BATCH, score_slices
from icmoe.features import FeatureCache
from icmoe.losses import halve
from icmoe.model import ICMoE
from icmoe.preprocess import target
from icmoe.study import Study
from icmoe.voting import agreement

Record = dict[str, Any]
Grid = npt.NDArray[np.float64]

BANDS = (
    (-np.inf, -2.0, "inside, 2 cells or deeper"),
    (-2.0, 0.0, "inside, near the border"),
    (0.0, 2.0, "outside, near the border"),
    (2.0, 6.0, "outside, 2 to 6 cells"),
    (6.0, np.inf, "outside, beyond 6 cells"),
)
"""Cells from the border of the foreground, negative inside."""
RELIABILITY_BINS = 10
CLOSED = -1e4
"""Bias that keeps an expert's gate shut."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the model said of some slices of one site, beside the truth."""

    site: str
    gates_BMHW: Tensor
    agreement_BHW: Tensor
    wrong_BHW: Tensor
    truth_BKHW: Tensor


def expert_use(model: ICMoE, slices: Sequence[Slice], study: Study, cache: FeatureCache, device: torch.device) -> Record | None:
    """Return use by class, site and distance from the border, reliability of the agreement, and the loss without each expert.

    Parameters
    ----------
    model
        In evaluation mode on `device`.
    slices
        Test slices; their identity view must be in the cache.
    study
        Labels and backbone.
    cache, device
        As in `score_slices`.

    Returns
    -------
    dict or None
        None where there are no experts or no slices. Shares are rows over the experts that sum to 1; a class or band that
        never occurs is left out.
    """
    if not model.shape.experts or not slices:
        return None
    use = _Shares(model.shape.experts)
    bins = _Bins()
    for seen in _look(model, slices, study, cache, device):
        use.add(seen, [label.name for label in study.labels])
        bins.add(seen.agreement_BHW, seen.wrong_BHW)
    return {
        "experts": list(model.expert_names),
        **use.record(),
        "reliability": bins.record(),
        "removed": _removed(model, slices, study, cache, device),
    }


class _Shares:
    """Gate mass by class, site and band."""

    def __init__(self, experts: int) -> None:
        self._mass: dict[tuple[str, str], Grid] = {}
        self._experts = experts

    def add(self, seen: Seen, labels: Sequence[str]) -> None:
        gates_MN = seen.gates_BMHW.double().permute(1, 0, 2, 3).flatten(1).numpy()
        truth_KN = seen.truth_BKHW.double().permute(1, 0, 2, 3).flatten(1).numpy()
        for name, weight_N in zip(labels, truth_KN, strict=True):
            self._put("by_class", name, gates_MN @ weight_N)
        self._put("by_site", seen.site, gates_MN.sum(axis=1))
        distance_N = np.concatenate([border_distance(truth_KHW).ravel() for truth_KHW in seen.truth_BKHW.numpy()])
        for low, high, name in BANDS:
            self._put("by_distance", name, gates_MN @ ((distance_N > low) & (distance_N <= high)))

    def _put(self, table: str, row: str, mass_M: Grid) -> None:
        self._mass[table, row] = self._mass.get((table, row), np.zeros(self._experts)) + mass_M

    def record(self) -> Record:
        tables: Record = {"by_class": {}, "by_site": {}, "by_distance": {}}
        for (table, row), mass_M in self._mass.items():
            if mass_M.sum() > 0.0:
                tables[table][row] = (mass_M / mass_M.sum()).tolist()
        return tables


class _Bins:
    """Cells by how far the experts agree on them."""

    def __init__(self) -> None:
        self._sums = np.zeros((RELIABILITY_BINS, 3))

    def add(self, agreement_BHW: Tensor, wrong_BHW: Tensor) -> None:
        value_N, wrong_N = agreement_BHW.double().flatten().numpy(), wrong_BHW.flatten().numpy()
        at_N = np.clip((value_N * RELIABILITY_BINS).astype(int), 0, RELIABILITY_BINS - 1)
        np.add.at(self._sums, at_N, np.stack([np.ones_like(value_N), value_N, wrong_N], axis=1))

    def record(self) -> list[Record]:
        total = self._sums[:, 0].sum()
        return [
            {"share": count / total, "agreement": value / count, "error": wrong / count}
            for count, value, wrong in self._sums.tolist()
            if count
        ]


def border_distance(truth_KHW: npt.NDArray[np.float32]) -> Grid:
    """Return the distance of each cell from the border of the foreground in cells, negative inside; infinite without one."""
    inside_HW = truth_KHW[1:].sum(axis=0) > 0.5
    if not inside_HW.any():
        return np.full(inside_HW.shape, np.inf)
    # Half a cell: the border lies between two cells, not on one of them.
    found: Grid = np.where(inside_HW, 0.5 - distance_transform_edt(inside_HW), distance_transform_edt(~inside_HW) - 0.5)
    return found


@torch.no_grad()
def _look(model: ICMoE, slices: Sequence[Slice], study: Study, cache: FeatureCache, device: torch.device) -> Iterator[Seen]:
    by_site: dict[str, list[Slice]] = {}
    for item in slices:
        by_site.setdefault(item.site, []).append(item)
    for site, rows in sorted(by_site.items()):
        for at in range(0, len(rows), EVALUATION_BATCH):
            yield _seen(model, site, rows[at : at + EVALUATION_BATCH], study, cache, device)


def _seen(model: ICMoE, site: str, rows: Sequence[Slice], study: Study, cache: FeatureCache, device: torch.device) -> Seen:
    features = cache.load([cache.key(item.image_digest, "identity") for item in rows], device)
    output = model(features)
    votes = output.experts
    assert votes is not None
    side = grid_of(study.backbone)
    truth_BKHW = torch.stack([target(load_truth(item, study.labels), study.classes, side) for item in rows])
    guess_BHW = halve(output.logits_BKhw.float().softmax(dim=1)).argmax(dim=1).cpu()
    agreed_BMHW = agreement(votes.router_logits_BMHW, votes.log_votes_BMKHW.exp())
    return Seen(
        site,
        votes.gates_BMHW.cpu(),
        (votes.gates_BMHW * agreed_BMHW).sum(dim=1).cpu(),
        (guess_BHW != truth_BKHW.argmax(dim=1)).float(),
        truth_BKHW,
    )


def _removed(model: ICMoE, slices: Sequence[Slice], study: Study, cache: FeatureCache, device: torch.device) -> dict[str, float]:
    """Return by how much Dice changes, mean over patients, where one expert's gate is shut."""

    def dice() -> float:
        scores = score_slices(model, slices, study.labels, cache, device, surfaces=False)
        return sum(score.dice for score in scores) / len(scores)

    whole, bias_M = dice(), model.balance_bias_M.clone()
    change = {}
    for index, name in enumerate(model.expert_names):
        model.balance_bias_M[index] = CLOSED
        change[name] = dice() - whole
        model.balance_bias_M.copy_(bias_M)
    return change


def use_tables(use: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Return title, columns and rows of each table of the report."""
    experts = tuple(use["experts"])
    titles = {"by_class": "by class", "by_site": "by site", "by_distance": "by distance from the border of the foreground"}
    tables = [
        (f"Share of the decision {title}", ("", *experts), [_percent(name, shares) for name, shares in use[key].items()])
        for key, title in titles.items()
    ]
    removed = [("all test patients", *(f"{use['removed'][name]:+.3f}" for name in experts))]
    reliability: list[tuple[str, ...]] = [
        (f"{row['agreement']:.2f}", f"{100 * row['share']:.1f}%", f"{100 * row['error']:.1f}%") for row in use["reliability"]
    ]
    return [
        *tables,
        ("Change of Dice without the expert", ("", *experts), removed),
        ("Agreement of the experts and error", ("mean agreement", "share of cells", "wrong"), reliability),
    ]


def _percent(name: str, shares: Sequence[float]) -> tuple[str, ...]:
    return (name, *(f"{100 * share:.0f}%" for share in shares))
