"""How the sites' models become one: FedAvg and the adaptive server steps, as pure functions on named tensors.

FedAvg: McMahan et al., arXiv 1602.05629. FedAdam and FedYogi: Reddi et al., arXiv 2003.00295, algorithm 2, as Flower's
classes compute it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fl_server.aggregate import flower_reply
from fl_server.round_strategy import Tensors
from fl_server.server_optimizer import FLOWER_STRATEGIES
from icmoe.exchange import State

TAU = 1e-3
Adaptive = Literal["adam", "yogi"]


def weighted_mean(states: Mapping[str, State], sizes: Mapping[str, int]) -> State:
    """Return sum_k n_k theta_k / N, summed in site-name order.

    Parameters
    ----------
    states
        Trained tensors per site.
    sizes
        n_k, training slices per site.
    """
    total = sum(sizes[site] for site in states)
    names = next(iter(states.values()))
    return {name: torch.stack([sizes[site] / total * states[site][name] for site in sorted(states)]).sum(dim=0) for name in names}


def adaptive_step(
    kind: Adaptive, before: State, mean: State, moments: Mapping[str, State], *, rate: float, round_number: int
) -> tuple[State, dict[str, State]]:
    """Return the tensors after the step that takes ``mean - before`` as pseudo-gradient, and the new moments.

    Parameters
    ----------
    kind
        Second moment of Adam or of Yogi.
    before, mean
        The round's global tensors and the sites' mean.
    moments
        "m" and "v"; empty in the first round.
    rate
        eta of the server.
    round_number
        From 1.
    """
    flower = FLOWER_STRATEGIES[kind](eta=rate, tau=TAU)
    flower.current_arrays = _arrays(before)
    flower.m_t, flower.v_t = (_arrays(moments[key]) if moments else None for key in ("m", "v"))
    reply = flower_reply(ArrayRecord({name: Array(array) for name, array in _arrays(mean).items()}), "num-examples", 1)
    stepped, _ = flower.aggregate_train(round_number, [reply])
    assert stepped is not None
    after = _state({name: array.numpy() for name, array in stepped.items()})
    return after, {"m": _state(flower.m_t or {}), "v": _state(flower.v_t or {})}


def _arrays(state: State) -> Tensors:
    return {name: tensor.numpy() for name, tensor in state.items()}


def _state(arrays: Tensors) -> State:
    """Return float32 tensors: Flower's learning rate is a float64 scalar and lifts them."""
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
