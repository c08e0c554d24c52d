"""How a rival is trained: alone, pooled, or across the sites; every regime sees the same batches for the same seed.

The rounds are those of the rehearsal: `icmoe.training.train_round` at every site, order and views drawn from
("train", site, round), as many steps per round as there. No Ray and no messages: one process, one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from icmoe.dataset import TrainingSet
from icmoe.exchange import State
from icmoe.model import ICMoE
from icmoe.study import Study, derived_seed
from icmoe.training import train_round
from simulations.evidence.rivals.averaging import Adaptive, adaptive_step, weighted_mean
from simulations.evidence.rivals.segmenter import put_trained, trained_state

SHARED = "(shared)"
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """How the sites work together.

    Parameters
    ----------
    title
        As tables show it.
    shared
        Whether the sites' models are averaged each round.
    pooled
        Whether all data are one site's.
    proximal_mu
        FedProx's pull of each site's model to the round's shared one.
    personal_mu
        Ditto's pull of each site's own model to the round's shared one (lambda of Li et al., arXiv 2012.04221).
    server
        Adaptive step of the server.
    """

    title: str
    shared: bool = True
    pooled: bool = False
    proximal_mu: float = 0.0
    personal_mu: float | None = None
    server: Adaptive | None = None

    @property
    def own_models(self) -> bool:
        """Whether each site ends with a model of its own."""
        return not self.pooled and (not self.shared or self.personal_mu is not None)


REGIMES: dict[str, Regime] = {
    "fedavg": Regime(title="FedAvg"),
    "pooled": Regime(title="pooled", shared=False, pooled=True),
    "local": Regime(title="each site alone", shared=False),
    "ditto": Regime(title="Ditto", personal_mu=0.1),
    "fedprox": Regime(title="FedProx", proximal_mu=0.01),
    "fedadam": Regime(title="FedAdam", server="adam"),
    "fedyogi": Regime(title="FedYogi", server="yogi"),
}


@dataclass(slots=True)
class Progress:
    """All that a run has reached.

    Parameters
    ----------
    models
        Trained tensors by owner: `SHARED`, the pooled data or a site.
    moments
        Of the adaptive server, "m" and "v".
    """

    models: dict[str, State]
    moments: dict[str, State] = field(default_factory=dict)


def start(regime: Regime, model: nn.Module, sites: Mapping[str, TrainingSet]) -> Progress:
    """Return round 0: every owner holds the model's initial tensors."""
    owners = ([SHARED] if regime.shared else []) + (list(sites) if regime.own_models or regime.pooled else [])
    return Progress({owner: trained_state(model) for owner in owners})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Trains one model object in turn for every owner.

    Parameters
    ----------
    regime
        How.
    model
        Its trained tensors are overwritten before every use.
    study
        Rates, losses, seed.
    sites
        Training slices by site; the pooled data alone where the regime pools.
    steps
        Steps per round and site.
    """

    regime: Regime
    model: nn.Module
    study: Study
    sites: Mapping[str, TrainingSet]
    steps: Mapping[str, int]

    def round(self, progress: Progress, round_number: int) -> dict[str, float]:
        """Take `progress` one round further and return the mean training loss per site.

        Raises
        ------
        IcmoeError
            304 where a loss is not finite; `progress` is as before then.
        """
        losses, moved, owned = {}, {}, {}
        for site in sorted(self.sites):
            begun = progress.models[SHARED if self.regime.shared else site]
            moved[site], losses[site] = self._train(site, round_number, begun, begun, self.regime.proximal_mu)
            if self.regime.personal_mu is not None:
                owned[site], _ = self._train(site, round_number, progress.models[site], begun, self.regime.personal_mu)
        if not self.regime.shared:
            progress.models = moved
            return losses
        mean = weighted_mean(moved, {site: len(data) for site, data in self.sites.items()})
        if self.regime.server is not None:
            before, rate = progress.models[SHARED], self.study.aggregation.server_learning_rate
            mean, progress.moments = adaptive_step(
                self.regime.server, before, mean, progress.moments, rate=rate, round_number=round_number
            )
        progress.models = {SHARED: mean, **owned}
        return losses

    def _train(self, site: str, round_number: int, begun: State, pull_to: State, mu: float) -> tuple[State, float]:
        put_trained(self.model, begun)
        named = dict(self.model.named_parameters())
        anchors = [pull_to[name] for name, tensor in named.items() if tensor.requires_grad]
        training = self.study.training.model_copy(update={"proximal_mu": mu})
        result = train_round(
            cast("ICMoE", self.model),  # `losses`, `start_round` and `shape` are all that is asked of it
            self.sites[site],
            self.study.model_copy(update={"training": training}),
            round_number=round_number,
            seed=derived_seed(self.study, "train", site, round_number),
            device=CPU,
            steps=self.steps[site],
            pull_to=anchors,
        )
        loss = math.nan if result.loss is None else result.loss  # withheld only under privacy
        return trained_state(self.model), loss
