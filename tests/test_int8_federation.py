"""A whole federation whose updates travel in int8: real ClientApps and the real coordinator; only the wire is a fake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from test_client import ask, hospital, site
from test_rounds import ROSTER, SITES, Wire

from fl_client.budget import Budget
from fl_client.ledger import read_ledger
from fl_client.participant import Participant
from fl_server.app import make_strategy, start_state
from fl_server.private import norm_of
from fl_server.round_strategy import unheard
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState
from icmoe.errors import IcmoeError
from icmoe.messages import CONFIG, ROUND_KEY
from icmoe.study import Study
from simulations.methods import study_for

__all__ = ["hospital", "site"]
INT8 = {"form": "int8"}


def federation(sites: dict[str, Participant]) -> Callable[[Message, str], Message]:
    """Return hospitals that answer with their real ClientApp."""

    def answer(message: Message, name: str) -> Message:
        return ask(sites[name], message.content, message.metadata.message_type)

    return answer


SITE = {"noise_multiplier": 2.0, "delta": 0.1, "patients": 2, "sample_rate": 0.5, "steps": 2, "accountant": "rdp"}
SERVER = {"noise_multiplier": 0.1, "delta": 1e-3, "sites": 3, "divisor": 2.0, "clip_norm": 0.5}
APART = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0, "largest_size": 30}
WITH: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "personal parts": {"aggregation": {"personal": True}},
    "sums": {"aggregation": {"form": "sums", "cap": 1.0, "starved": "keep", "largest_size": 100}},
    "the median": {"quorum": 3, "aggregation": {"robust": "median"}},
    "server optimiser": {"aggregation": {"optimizer": "adam"}},
    "privacy at the server": {"aggregation": APART, "privacy": {"server": SERVER}},
    "privacy at the sites": {"privacy": {"site": SITE}},
    "privacy at both": {"aggregation": APART, "privacy": {"server": SERVER, "site": SITE}},
}
DRAWN = {name for name in WITH if name.startswith("privacy")}
"""Noise is never seeded: two runs differ."""


def played(study: Study, site: Participant, folder: Path, **changes: Any) -> RunState:
    sites = {name: replace(site, name=name, studies=(study,), state_folder=folder / name, **changes) for name in ROSTER.sizes}
    strategy = make_strategy(study, ROSTER)
    return run_rounds(Wire(federation(sites)), strategy, study, start_state(study), sites=SITES, commit=unheard, poll_s=0.005)


@pytest.mark.parametrize("what", WITH)
def test_a_federation_in_int8_moves_as_one_in_float32(what: str, site: Participant, make_study, tmp_path: Path) -> None:
    study = make_study(update=INT8, **WITH[what])
    found = played(study, site, tmp_path / "int8")
    whole = played(make_study(**WITH[what]), site, tmp_path / "float32")
    for record, floats in zip(found.history, whole.history, strict=True):
        assert (record["faults"], len(record["sites"])) == ([], 3)
        assert record["bytes_up"] < floats["bytes_up"]
        assert record["bytes_down"] == floats["bytes_down"]
    if what in DRAWN:
        assert all(np.isfinite(tensor).all() for tensor in found.arrays.values())
        return
    start = start_state(study).arrays
    moved = norm_of({name: tensor - start[name] for name, tensor in whole.arrays.items()})
    assert 0.0 < norm_of({name: tensor - whole.arrays[name] for name, tensor in found.arrays.items()}) < 0.2 * moved


def test_hospitals_and_simulated_sites_hold_the_same_bits(site: Participant, make_study, tmp_path: Path) -> None:
    """With records, receipts and finished updates, or without: the same model."""
    study = make_study(rounds=3, update=INT8)
    simulated = played(study, site, tmp_path / "simulated")
    hospitals = played(study, site, tmp_path / "hospitals", audited=True)
    assert all(np.array_equal(hospitals.arrays[name], tensor) for name, tensor in simulated.arrays.items())


@pytest.mark.parametrize(("cut_off", "audited"), [((2, "Cedar"), False), ((2, "Birch"), True), ((3, "Cedar"), True)])
def test_a_study_that_was_cut_off_within_a_round_ends_with_the_same_bits(
    cut_off: tuple[int, str], audited: bool, site: Participant, make_study, tmp_path: Path
) -> None:
    """Some sites have trained the round, and kept what they owe after it, when it is asked again."""
    study, path = make_study(rounds=3, update=INT8), tmp_path / "state.safetensors"
    undisturbed = played(study, site, tmp_path / "undisturbed", audited=audited)
    names = {
        name: replace(site, name=name, studies=(study,), state_folder=tmp_path / name, audited=audited) for name in ROSTER.sizes
    }
    answer, cuts = federation(names), [cut_off]

    def answer_until_cut(message: Message, name: str) -> Message:
        reply = answer(message, name)
        if (message.content[CONFIG].get(ROUND_KEY), name) in cuts:
            cuts.clear()
            raise KeyboardInterrupt
        return reply

    def go_on() -> RunState:
        state = RunState.load(path, study) if path.exists() else start_state(study)
        wire, commit = Wire(answer_until_cut), partial(RunState.commit, path=path)
        return run_rounds(wire, make_strategy(study, ROSTER), study, state, sites=SITES, commit=commit, poll_s=0.005)

    with pytest.raises(KeyboardInterrupt):
        go_on()
    resumed = go_on()
    assert all(np.array_equal(resumed.arrays[name], tensor) for name, tensor in undisturbed.arrays.items())


def test_the_ledger_of_a_private_study_does_not_know_the_form(site: Participant, make_study, tmp_path: Path) -> None:
    """What is owed is made of noised tensors alone: sending it later tells nothing more, and costs nothing more."""
    spent = []
    for form in ("float32", "int8"):
        study = make_study(update={"form": form}, privacy={"site": SITE})
        budget = Budget(epsilon=1000.0, delta=0.1, accountant="rdp")
        played(study, site, tmp_path / form, audited=True, budget=budget)
        spent.append([entry.releases for entry in read_ledger(tmp_path / form / "Alder", "Alder").entries])
    assert spent[0] == spent[1]
    assert spent[0]


def test_references_that_never_leave_a_site_are_in_float32(make_study) -> None:
    study = make_study(update=INT8)
    assert study_for("local", study, seed=1).update.form == "float32"
    assert study_for("fedavg", study, seed=1).update.form == "int8"


def test_the_form_is_part_of_the_study_and_its_default_is_not_written(make_study) -> None:
    assert make_study(update={"form": "float32"}).digest == make_study().digest != make_study(update=INT8).digest
    with pytest.raises(IcmoeError, match="ICM202"):
        make_study(update={"form": "int4"})
