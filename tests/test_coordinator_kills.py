"""The coordinator killed at random instants: every study finishes with the same bits, at most one round repeated per kill.

Only the wire is a fake. ``ICMOE_KILLS`` and ``ICMOE_KILL_SEED`` choose how many kills and which.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from test_rounds import ROSTER, SITES, Wire, honest

from fl_server.app import make_strategy, start_state
from fl_server.rounds import run_rounds
from fl_server.run_state import KEPT, RunState, latest_state
from icmoe.messages import CONFIG, ROUND_KEY
from icmoe.study import Study

KILLS = int(os.environ.get("ICMOE_KILLS", "10"))
SEED = int(os.environ.get("ICMOE_KILL_SEED", "7"))
ROUNDS = 6


def coordinate(study: Study, path: Path, log: Path) -> None:
    """Run what is left of the study, as the ServerApp does; note each round that is asked."""
    state = latest_state(path, study) or start_state(study)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def answer(message: Message, site: str) -> Message | None:
        if site == "Alder" and message.metadata.message_type == "train":
            os.write(descriptor, f"{message.content[CONFIG][ROUND_KEY]}\n".encode())
        return honest(message, site)

    commit = partial(RunState.commit, path=path, keep=KEPT)
    run_rounds(Wire(answer), make_strategy(study, ROSTER), study, state, sites=SITES, commit=commit, poll_s=0.001)


def what_counts(state: RunState) -> tuple[object, ...]:
    """Return everything of a state but the seconds."""
    tensors = {name: tensor.tobytes() for name, tensor in {**state.arrays, **state.extra}.items()}
    return state.round, state.closed, tensors, [{**row, "seconds": None} for row in state.history]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_coordinator_killed_at_any_instant_ends_with_the_same_bits(make_study, tmp_path: Path) -> None:
    study = make_study(rounds=ROUNDS, quorum=2, aggregation={"optimizer": "adam"})
    began = time.monotonic()
    coordinate(study, tmp_path / "calm.safetensors", tmp_path / "calm")
    whole_s, calm = time.monotonic() - began, RunState.load(tmp_path / "calm.safetensors", study)
    rng, kills, repeated, studies = random.Random(SEED), 0, 0, 0
    while kills < KILLS:
        path, log, killed = tmp_path / f"{studies}" / "study.state.safetensors", tmp_path / f"{studies}.log", 0
        while True:
            process = multiprocessing.get_context("fork").Process(target=coordinate, args=(study, path, log))
            process.start()
            process.join(rng.uniform(0.0, 0.8 * whole_s) if kills + killed < KILLS else None)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -9
            killed += 1
        ended = RunState.load(path, study)
        assert what_counts(ended) == what_counts(calm)
        assert all(np.array_equal(ended.arrays[name], tensor) for name, tensor in calm.arrays.items())
        asked = Counter(log.read_text().split())
        assert set(asked) == {str(number) for number in range(1, ROUNDS + 1)}
        assert sum(asked.values()) - ROUNDS <= killed  # a kill repeats one round at most
        kills, repeated, studies = kills + killed, repeated + sum(asked.values()) - ROUNDS, studies + 1
    print(f"{kills} kills, {studies} studies of {ROUNDS} rounds, {repeated} rounds repeated")
