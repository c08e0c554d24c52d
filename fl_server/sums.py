"""Router-aware FedAvg from sums alone: each site's vector is added, then only the sum is looked at (`icmoe.sums`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fl_server.replies import Update
from fl_server.round_strategy import Tensors
from fl_server.router_aware import RouterAware
from fl_server.weights import FULL_STEP_SHARE, move_bias
from icmoe.kinds import BALANCE_BIAS
from icmoe.study import Aggregation
from icmoe.sums import SumLayout, Sums, own_vector, unpacked


class FromSums(RouterAware):
    """The sums form of router-aware FedAvg, for studies with ``aggregation.form = "sums"``.

    Here the coordinator still receives updates and forms the vectors itself; a secure sum would hand in their total.
    """

    def _moved(self, updates: Sequence[Update]) -> Tensors:
        layout = SumLayout({name: tensor.shape for name, tensor in updates[0].tensors.items()}, self.study.model)
        total = np.zeros(layout.length, dtype=np.float32)
        for update in updates:
            usage_M = np.array(update.usage_M, dtype=np.float64)
            total += own_vector(layout, update.loaded().tensors, update.size, usage_M, self.settings)
        return moved_by_sums(self._current, unpacked(layout, total), self.settings)


def moved_by_sums(current: Tensors, sums: Sums, settings: Aggregation) -> Tensors:
    """Return the global tensors after a round, from the sums alone.

    Parameters
    ----------
    current
        The round's global tensors.
    sums
        Over the sites.
    settings
        t, eta, minimum contributors, shrinkage, step of the balance bias.
    """
    mean_M = sums.mean_usage(settings)
    moved = dict(current)
    for name, delta in sums.means(_steps(sums, mean_M, settings)):
        moved[name] = current[name] + delta
    if BALANCE_BIAS in moved and mean_M is not None and settings.balance_step > 0.0:
        bias_M = moved[BALANCE_BIAS].astype(np.float64)
        moved[BALANCE_BIAS] = move_bias(bias_M, mean_M, settings.balance_step).astype(np.float32)
    return moved


def _steps(sums: Sums, mean_M: npt.NDArray[np.float64] | None, settings: Aggregation) -> npt.NDArray[np.float64]:
    """Return s: 0 for a starved expert, less than 1 for a rarely used one."""
    experts = sums.layout.model.experts
    step_M = np.ones(experts)
    if settings.shrinkage and mean_M is not None:
        step_M = np.minimum(1.0, mean_M * experts / FULL_STEP_SHARE)
    if settings.usage_exponent > 0.0:
        step_M[sums.contributors_M < settings.min_contributors] = 0.0
    return step_M
