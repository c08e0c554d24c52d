"""Differential privacy at the server: every site's whole update is clipped, the sum gets noise.

    y_k   = [w_ke clip(delta_k, C)_e for each part e]       clip scales the whole update to a norm of at most C
    Delta = (sum_k y_k + N(0, (z_delta S)^2)) / W           S = C w_max, twice that where a site may be replaced

Part e is a usage-weighted expert or everything else. w_ke = min(w_max, n_k / n_max ((1 - eta) (M u_ke)^t + eta)) follows
from site k alone: the weights of the sums form times the public M^t, so that even use weighs 1. W is a constant of the study.

Sensitivity. The parts of clip(delta_k) are disjoint, so |y_k|^2 = sum_e w_ke^2 |clip(delta_k)_e|^2 <= w_max^2 C^2. One
site more or less changes the sum by its own y_k, hence by at most C w_max, and Delta by C w_max / W; another site in its
place by |y - y'| <= 2 C w_max. No term depends on another site: nothing is normalised, capped, gated or shrunk by what the
sites sent, the balance bias rests, and `fl_server.guard` compares no update with the others'.

Adaptive C (Andrew et al., arXiv 1905.03871, algorithm 1): b_k = 1(|delta_k| <= C); the count sum_k (b_k - 1/2), of
sensitivity 1/2, gets noise of standard deviation sigma_b, and C <- C exp(-rate (count / m + 1/2 - quantile)). Sum and count
are one Gaussian release of multiplier z if z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2) (theorem 1 there); z is what is charged.

The promise covers the global models and C. It takes as public which sites are in the study, which of them a round refused
or missed, and so whether a quorum was there. The coordinator itself sees every update and number and is trusted with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fl_server.aggregate import in_one_reply
from fl_server.replies import PIECE, Update, parse_replies
from fl_server.round_strategy import RoundReport, RoundStrategy, State
from fl_server.wrapping import Wrapping
from icmoe.errors import Fault, IcmoeError
from icmoe.gaussian import ACCOUNTANT, epsilon_of
from icmoe.kinds import weighing_expert
from icmoe.os_random import gaussian
from icmoe.server_noise import Noise, noise_of, sensitivity_of
from icmoe.server_privacy import ServerPrivacy
from icmoe.study import Study
from icmoe.sums import own_weights

Values = dict[str, npt.NDArray[np.float64]]


def require_affordable(study: Study, noise: Noise, releases: int, *, done: int = 0) -> None:
    """Refuse rounds that would cross the study's epsilon.

    Parameters
    ----------
    study
        With a section [privacy.server].
    noise
        Of every round.
    releases
        Rounds in all.
    done
        Those that were released already, for the message.

    Raises
    ------
    IcmoeError
        420 with the number of rounds that fit.
    """
    settings = study.privacy.server
    assert settings is not None
    spent = partial(epsilon_of, noise_multiplier=noise.whole, delta=settings.delta)
    if settings.epsilon is not None and spent(releases) > settings.epsilon:
        fitting = next(count for count in range(releases, -1, -1) if spent(count) <= settings.epsilon)
        value, todo = f"{spent(releases):.3f} after {releases} rounds", f"{fitting} rounds fit; or allow more noise."
        did = f"{done} rounds were done, none is begun."
        raise IcmoeError(Fault(number=420, where=study.name, value=value, limit=f"{settings.epsilon:g}", did=did, todo=todo))


def site_weights(update: Update, study: Study) -> npt.NDArray[np.float64]:
    """Return w_k1 .. w_kM and, last, the weight of everything else, each in [0, w_max], from the site alone."""
    settings = study.privacy.server
    assert settings is not None
    weights = own_weights(update.size, np.array(update.usage_M, dtype=np.float64), study.aggregation)
    weights[:-1] *= float(max(1, study.model.experts)) ** study.aggregation.usage_exponent
    return np.minimum(weights, settings.max_weight)


def norm_of(tensors: Mapping[str, npt.NDArray[np.generic]]) -> float:
    """Return the L2 norm over all tensors together, in float64; integers count as their values."""
    pieces = (tensor.reshape(-1)[start : start + PIECE] for tensor in tensors.values() for start in range(0, tensor.size, PIECE))
    return math.sqrt(math.fsum(float(np.sum(np.square(piece, dtype=np.float64))) for piece in pieces))


def contribution(update: Update, study: Study, clip_norm: float) -> Values:
    """Return y_k in float64: its norm is at most C w_max whatever the site sent.

    Parameters
    ----------
    update
        Checked: every value is finite.
    study
        Its weights and model.
    clip_norm
        C.
    """
    norm, weights = norm_of(update.tensors), site_weights(update, study)
    scale = min(1.0, clip_norm / norm) if norm > 0.0 else 1.0
    found: Values = {}
    for name, tensor in update.tensors.items():
        expert = weighing_expert(name, study.model)
        found[name] = (scale * weights[-1 if expert is None else expert]) * tensor.astype(np.float64)
    return found


def summed(updates: Sequence[Update], study: Study, clip_norm: float) -> Values:
    """Return sum_k y_k without noise, one pass per update."""
    total: Values = {}
    for update in updates:
        for name, part in contribution(update, study, clip_norm).items():
            total[name] = total[name] + part if name in total else part
    return total


def next_clip_norm(clip_norm: float, whole: float, settings: ServerPrivacy) -> float:
    """Return C of the next round from the noised count sum_k (b_k - 1/2) of this one; a fixed C where no quantile is set."""
    if settings.clip_quantile is None:
        return clip_norm
    share = whole / settings.sites + 0.5
    return clip_norm * math.exp(-settings.clip_rate * (share - settings.clip_quantile))


class Private(Wrapping):
    """Hand the wrapped strategy one reply: the clipped, weighted and noised mean of all.

    Parameters
    ----------
    inner
        Takes a single reply as the mean that it is: router-aware FedAvg with `aggregate.IDENTITY`, bare or optimised.
    study
        With a section [privacy.server].
    sites
        Names by node.

    Raises
    ------
    IcmoeError
        420 where the study's rounds would cross its epsilon, 421 as `noise_of`.
    """

    def __init__(self, inner: RoundStrategy, study: Study, sites: Mapping[int, str]) -> None:
        super().__init__(inner)
        assert study.privacy.server is not None
        self.study, self.sites, self.settings = study, sites, study.privacy.server
        self.noise = noise_of(self.settings, study.rounds)
        self.releases, self.clip_norm = 0, self.settings.clip_norm
        require_affordable(study, self.noise, study.rounds)

    def epsilon(self, releases: int) -> float:
        """Return the epsilon of this many rounds."""
        return epsilon_of(releases, self.noise.whole, self.settings.delta)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Delegate, where the budget holds another round."""
        require_affordable(self.study, self.noise, self.releases + 1, done=self.releases)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the global arrays after the noised step, None without any update: nothing is released then."""
        updates, faults = parse_replies(replies, self.sites, self.study, self._current)
        self.report = RoundReport([update.without_tensors() for update in updates], faults)
        if not updates:
            return None, None
        settings, used = self.settings, self.clip_norm
        mean = self._noised(summed(updates, self.study, used))
        whole = sum((norm_of(update.tensors) <= used) - 0.5 for update in updates)
        self.clip_norm = next_clip_norm(used, whole + self.noise.count * float(gaussian(1)[0]), settings)
        self.releases += 1
        self.report.privacy = self._record(used)
        return self.inner.aggregate_train(server_round, [in_one_reply(mean, self._current, self.sites, self.study)])

    def _noised(self, total: Values) -> Values:
        """Return (sum + noise) / W."""
        deviation = self.noise.update * sensitivity_of(self.settings, self.clip_norm)
        return {
            name: (part + deviation * gaussian(part.size).reshape(part.shape)) / self.settings.divisor
            for name, part in total.items()
        }

    def _record(self, used: float) -> dict[str, str | float]:
        """Return what this and all earlier rounds spent; an epsilon never stands without what it means."""
        return {
            "epsilon": self.epsilon(self.releases),
            "delta": self.settings.delta,
            "unit": self.settings.unit,
            "adjacency": self.settings.adjacency,
            "accountant": ACCOUNTANT,
            "noise_multiplier": self.noise.whole,
            "clip_norm": used,
        }

    def state(self) -> State:
        """Return releases and C beside the wrapped strategy's state, for the checkpoint."""
        own = {"private.releases": np.array([self.releases]), "private.clip_norm": np.array([self.clip_norm])}
        return {**super().state(), **own}

    def load_state(self, state: State) -> None:
        """Take them back from a checkpoint."""
        super().load_state(state)
        if "private.releases" in state:
            self.releases, self.clip_norm = int(state["private.releases"][0]), float(state["private.clip_norm"][0])
