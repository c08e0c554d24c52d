"""The update as one flat vector whose sum over the sites is all that an aggregate needs.

    v_k  = [w_ke delta_ke for semantic and adaptive e | w_k0 delta_k0 | w_k1 .. w_kM | w_k0 | 1(u_k1 > g) .. 1(u_kM > g)]
    w_ke = (n_k / n_max) ((1 - eta) u_ke^t + eta M^-t)          w_k0 = n_k / n_max        0: everything else

A site forms v_k from its own numbers and the study's constants, so a secure sum can add vectors that nobody sees one by
one, and noise can be added to a sum whose terms do not depend on each other. From S = sum_k v_k:

    delta_e = S[w_e delta_e] / S[w_e]      delta_0 = S[w_0 delta_0] / S[w_0]      K_e = S[1(u_e > g)]

This equals router-aware FedAvg's plain form (`fl_server.weights`) where
* n_max is at least the largest n_k;
* t = 0, or the floor eta is 0: the plain form's floor is max(p, eta n_k / N), this one mixes, p ~ (1 - eta) u^t + eta M^-t;
* the cap is off or does not bind: a cap needs one site's share, which a sum does not show;
* a starved expert is kept, or no expert is starved: its plain weights would need a second copy of the expert in the vector;
* shrinkage and the balance bias are off, or t = 1 and eta < 1: then sum_k n_k u_ke / N = (S[w_e] / S[w_0] - eta / M) / (1 - eta)
  gives back the mean usage that both need; for another t it is not in the sums, and neither is applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icmoe.kinds import is_usage_weighted, weighing_expert
from icmoe.study import Aggregation, ModelShape

Vector = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SumLayout:
    """Where each tensor lies in the vector.

    Parameters
    ----------
    shapes
        Of an update's tensors, by name.
    model
        The study's model: which expert's weight a tensor takes.
    """

    shapes: Mapping[str, tuple[int, ...]]
    model: ModelShape

    @property
    def tensor_values(self) -> int:
        """Values of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def length(self) -> int:
        """Values of the vector."""
        return self.tensor_values + 2 * self.model.experts + 1

    def places(self) -> Iterator[tuple[str, int, slice]]:
        """Yield name, index of the weight and place of each tensor, usage-weighted ones first, each part by name."""
        start = 0
        for name in sorted(self.shapes, key=lambda name: (not is_usage_weighted(name, self.model), name)):
            end = start + math.prod(self.shapes[name])
            yield name, self._weight_of(name), slice(start, end)
            start = end

    def _weight_of(self, name: str) -> int:
        expert = weighing_expert(name, self.model)
        return self.model.experts if expert is None else expert


def own_weights(size: int, usage_M: Numbers, settings: Aggregation) -> Numbers:
    """Return w_k1 .. w_kM, w_k0 of one site, each in [0, 1], from its own numbers alone.

    Parameters
    ----------
    size
        n_k >= 1; above the study's n_max it counts as n_max.
    usage_M
        u_k on the simplex; may be empty.
    settings
        t, eta, n_max.
    """
    experts, exponent = len(usage_M), settings.usage_exponent
    plain = min(1.0, size / settings.largest_size)
    mixed_M = (1.0 - settings.floor) * usage_M**exponent + settings.floor * float(max(experts, 1)) ** -exponent
    return plain * np.append(mixed_M, 1.0)


def own_vector(
    layout: SumLayout, tensors: Mapping[str, npt.NDArray[np.float32]], size: int, usage_M: Numbers, settings: Aggregation
) -> Vector:
    """Return v_k in float32.

    Parameters
    ----------
    layout
        Of the update's tensors.
    tensors
        delta_k by name, float32.
    size, usage_M, settings
        As for `own_weights`.
    """
    weights = own_weights(size, usage_M, settings)
    vector = np.empty(layout.length, dtype=np.float32)
    for name, index, place in layout.places():
        np.multiply(tensors[name].reshape(-1), np.float32(weights[index]), out=vector[place])
    vector[layout.tensor_values :] = np.concatenate([weights, usage_M > settings.min_usage])
    return vector


@dataclass(frozen=True, slots=True)
class Sums:
    """What a summed vector says.

    Parameters
    ----------
    tensors
        sum_k w_k delta_k by name.
    weights
        sum_k w_k of each expert and, last, of everything else.
    contributors_M
        K_e.
    layout
        Which weight belongs to which tensor.
    """

    tensors: Mapping[str, Vector]
    weights: Numbers
    contributors_M: npt.NDArray[np.int64]
    layout: SumLayout

    def mean_usage(self, settings: Aggregation) -> Numbers | None:
        """Return sum_k n_k u_ke / N, None where the sums do not tell."""
        if settings.usage_exponent != 1.0 or settings.floor >= 1.0 or not self.layout.model.experts:
            return None
        mixed_M = self.weights[:-1] / self.weights[-1]
        mean_M: Numbers = np.maximum(0.0, (mixed_M - settings.floor / self.layout.model.experts) / (1.0 - settings.floor))
        return mean_M

    def means(self, step_M: Numbers) -> Iterator[tuple[str, Vector]]:
        """Yield the mean update of each tensor times its expert's step s; zero where no site gave it any weight."""
        steps = np.append(step_M, 1.0)
        scale = np.divide(steps, self.weights, out=np.zeros_like(steps), where=self.weights > 0.0)
        for name, index, _ in self.layout.places():
            yield name, np.float32(scale[index]) * self.tensors[name]


def unpacked(layout: SumLayout, vector: npt.NDArray[np.floating]) -> Sums:
    """Return the parts of a summed vector; the tensors are views of it."""
    tensors = {name: vector[place].reshape(layout.shapes[name]) for name, _, place in layout.places()}
    numbers = vector[layout.tensor_values :].astype(np.float64)
    weights, contributors_M = numbers[: layout.model.experts + 1], numbers[layout.model.experts + 1 :]
    return Sums(tensors, weights, np.rint(contributors_M).astype(np.int64), layout)
