"""Robust aggregation per expert, by Flower's own strategies.

Trimmed mean and median (Yin et al., arXiv 1803.01498), MultiKrum (Blanchard et al., arXiv 1703.02757) and Bulyan (El
Mhamdi et al., arXiv 1802.07927) look at one part of the model at a time: each usage-weighted expert, and everything
else. An expert is combined from the sites that used it where they are enough for the rule, else from all of them: an
update that is zero because the site never routed there says nothing, and would pull a median to zero. MultiKrum weighs
what it selects by n_k u_ke^t; the others know no weights. Shrinkage is off and the balance bias rests: both would follow
what a malicious site says of its usage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, MultiKrum

from fl_server.aggregate import flower_reply, in_one_reply
from fl_server.replies import Update, parse_replies
from fl_server.round_strategy import RoundReport, RoundStrategy
from fl_server.wrapping import Wrapping
from icmoe.kinds import weighing_expert
from icmoe.study import Aggregation, Study

WEIGHT = "weight"
LEAST_WEIGHT = 1e-6
"""MultiKrum may select sites that never used an expert; their weights must not sum to zero."""

Values = dict[str, npt.NDArray[np.floating]]


def rule_of(settings: Aggregation, sites: int) -> FedAvg:
    """Return Flower's strategy for a number of updates, at least `Aggregation.least_sites`."""
    bad = settings.malicious_sites
    if settings.robust == "trimmed-mean":
        return FedTrimmedAvg(beta=(bad + 0.25) / sites, weighted_by_key=WEIGHT)  # cuts int(beta * sites) at either end
    if settings.robust == "median":
        return FedMedian(weighted_by_key=WEIGHT)
    if settings.robust == "multi-krum":
        return MultiKrum(num_malicious_nodes=bad, num_nodes_to_select=sites - bad, weighted_by_key=WEIGHT)
    return Bulyan(num_malicious_nodes=bad, weighted_by_key=WEIGHT)


def robust_mean(updates: Sequence[Update], study: Study) -> Values:
    """Return the combined update, each part by the study's rule.

    Parameters
    ----------
    updates
        Checked, at least as many as the rule needs.
    study
        Its model names the parts, its aggregation the rule.
    """
    updates = [update.loaded() for update in updates]
    parts: dict[int | None, list[str]] = {}
    for name in sorted(updates[0].tensors):
        parts.setdefault(weighing_expert(name, study.model), []).append(name)
    found: Values = {}
    for expert, names in parts.items():
        found |= _combined(names, _contributors(updates, expert, study.aggregation), expert, study.aggregation)
    return found


def _contributors(updates: Sequence[Update], expert: int | None, settings: Aggregation) -> Sequence[Update]:
    if expert is None:
        return updates
    used = [update for update in updates if update.usage_M[expert] > settings.min_usage]
    return used if len(used) >= max(settings.least_sites, settings.min_contributors) else updates


def _combined(names: Sequence[str], updates: Sequence[Update], expert: int | None, settings: Aggregation) -> Values:
    exponent = 0.0 if expert is None else settings.usage_exponent
    replies = []
    for update in updates:
        weight = update.size * (1.0 if expert is None else update.usage_M[expert]) ** exponent + LEAST_WEIGHT
        arrays = ArrayRecord({name: Array(update.tensors[name]) for name in names})
        replies.append(flower_reply(arrays, WEIGHT, weight))
    combined, _ = rule_of(settings, len(updates)).aggregate_train(1, replies)
    assert combined is not None
    return {name: array.numpy() for name, array in combined.items()}


class Robust(Wrapping):
    """Hand the wrapped strategy one reply: the robust mean of all.

    Parameters
    ----------
    inner
        Takes a single reply as the mean that it is, as for `fl_server.private.Private`.
    study
        With ``aggregation.robust`` set.
    sites
        Names by node.
    """

    def __init__(self, inner: RoundStrategy, study: Study, sites: Mapping[int, str]) -> None:
        super().__init__(inner)
        self.study, self.sites = study, sites

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the global arrays after the robust step, None with fewer updates than the rule needs."""
        updates, faults = parse_replies(replies, self.sites, self.study, self._current)
        self.report = RoundReport([update.without_tensors() for update in updates], faults)
        if len(updates) < self.study.aggregation.least_sites:
            return None, None
        mean = robust_mean(updates, self.study)
        return self.inner.aggregate_train(server_round, [in_one_reply(mean, self._current, self.sites, self.study)])
