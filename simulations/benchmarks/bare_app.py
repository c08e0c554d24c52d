"""The same training as a plain Flower app: Flower's FedAvg, no approval, no pin, no audit, no checks, no key, no TLS.

It is what `federated_round.py` compares with. Model, data, features, optimiser and validation are the product's own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from icmoe.data.folder import read_folder
from icmoe.dataset import TrainingSet
from icmoe.evaluation import score_slices
from icmoe.exchange import global_state
from icmoe.features import FeatureCache
from icmoe.model import build_model
from icmoe.study import derived_seed, read_study
from icmoe.training import train_round

# Flower looks for the names in the text of this file: one assignment each.
client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Score the incoming model, train it for a round, answer with all of it."""
    torch.set_num_threads(1)
    settings = context.run_config
    study, round_number = read_study(Path(str(settings["study"]))), int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    site, device = str(context.node_config["site"]), torch.device("cpu")
    data = read_folder(Path(str(settings["data"])), study.labels)[site]
    cache = FeatureCache.of(Path(str(settings["caches"])) / site / "cache", study)
    model = build_model(study, seed=0)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    scores = score_slices(model.eval(), data.of("val"), study.labels, cache, device, surfaces=False)
    seed = derived_seed(study, "train", site, round_number)
    done = train_round(
        model, TrainingSet(data.of("train"), study, cache), study, round_number=round_number, seed=seed, device=device, steps=None
    )
    numbers = MetricRecord(
        {"num-examples": len(data.of("train")), "seconds": done.train_s, "dice": math.fsum(score.dice for score in scores)}
    )
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in global_state(model).items()})
    return Message(RecordDict({"arrays": arrays, "metrics": numbers}), reply_to=message)


class Timed(FedAvg):
    """Flower's FedAvg that writes down when each round ended.

    Parameters
    ----------
    log
        File that gets one line of JSON per round.
    settings
        Passed on.
    """

    def __init__(self, log: Path, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.log = log

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate and note the time."""
        began, found = time.perf_counter(), list(replies)
        result = super().aggregate_train(server_round, found)
        train_s = max(float(reply.content.metric_records["metrics"]["seconds"]) for reply in found)  # type: ignore[arg-type]
        row = {"round": server_round, "ended": time.time(), "train": train_s, "aggregate": time.perf_counter() - began}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study's rounds."""
    study = read_study(Path(str(context.run_config["study"])))
    model = build_model(study, seed=derived_seed(study, "model"))
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in global_state(model).items()})
    both = {"min_train_nodes": 2, "min_available_nodes": 2, "fraction_evaluate": 0.0}
    Timed(Path(str(context.run_config["log"])), **both).start(grid, arrays, num_rounds=study.rounds)
