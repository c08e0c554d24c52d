"""Aggregates as replies: in one, so that a wrapped strategy applies it as a site's update; in Flower's form, for its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from icmoe.messages import ARRAYS, LOSS_KEY, NUMBERS, SECONDS_KEY, SLICES_KEY, STEPS_KEY, UPDATE, USAGE_KEY
from icmoe.study import Aggregation, Study

IDENTITY = Aggregation(usage_exponent=0.0, floor=0.0, cap=1.0, min_contributors=1, shrinkage=False, balance_step=0.0)
"""Weights with which router-aware FedAvg takes a single reply as it is."""


def in_one_reply(
    mean: Mapping[str, npt.NDArray[np.floating]],
    current: Mapping[str, npt.NDArray[np.generic]],
    sites: Mapping[int, str],
    study: Study,
) -> Message:
    """Return the mean update as if one site had sent it.

    Parameters
    ----------
    mean
        By name.
    current
        The round's global tensors: their types are kept, integers rounded.
    sites
        Names by node; which one lends its name changes nothing.
    study
        Decides how many experts the usage names, evenly.
    """
    arrays = {name: Array(_typed(value, current[name].dtype)) for name, value in sorted(mean.items())}
    experts = study.model.experts
    private = study.privacy.site
    numbers = {SLICES_KEY: private.patients if private else 1, STEPS_KEY: 1, USAGE_KEY: [1.0 / experts] * experts}
    numbers |= {} if private else {LOSS_KEY: 0.0, SECONDS_KEY: 0.0}
    content = RecordDict({UPDATE: ArrayRecord(arrays), NUMBERS: MetricRecord(numbers)})  # type: ignore[arg-type]
    return _reply(content, min(sites))


def flower_reply(arrays: ArrayRecord, key: str, weight: float) -> Message:
    """Return arrays as a site's reply to one of Flower's own strategies, which weighs it by `key`."""
    return _reply(RecordDict({ARRAYS: arrays, "metrics": MetricRecord({key: weight})}), 1)


def _reply(content: RecordDict, node: int) -> Message:
    return Message(content, reply_to=Message(RecordDict(), dst_node_id=node, message_type="train"))


def _typed(value: npt.NDArray[np.floating], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    return (np.rint(value) if np.issubdtype(dtype, np.integer) else value).astype(dtype)
