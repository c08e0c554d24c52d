"""A site that is not there when a run starts takes part from the next round on; one that cannot be used is asked once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from flwr.app import Error, Message
from test_rounds import ROSTER, SITES, Wire, honest, registered

from fl_server.app import make_strategy, run_study, start_state
from fl_server.new_study import study_toml
from fl_server.roster import meet, welcome
from fl_server.round_log import RoundRecord
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState, latest_state
from icmoe.errors import IcmoeError
from icmoe.study import Study, read_study


def played(study: Study, wire: Wire, folder: Path, *, at_first: int = 2) -> tuple[RunState, list[str]]:
    """Return a run of two hospitals at first, whose third connects while round 1 is asked, and what the run said."""
    everybody, wire.nodes = wire.nodes, wire.nodes[:at_first]
    said: list[str] = []
    roster = meet(wire, study.quorum, study, poll_s=0.01)
    assert sorted(roster.sizes) == ["Alder", "Birch"]

    def connects(record: RoundRecord) -> None:
        wire.nodes = everybody

    joining = partial(welcome, wire, roster, study, poll_s=0.01)
    commit = partial(RunState.commit, path=folder / "s")
    strategy = make_strategy(study, roster)
    options = {"poll_s": 0.01, "on_round": connects, "tell": said.append, "welcome": joining}
    return run_rounds(wire, strategy, study, start_state(study), sites=roster.sites, commit=commit, **options), said


def test_a_late_site_takes_part_from_the_next_round_on(make_study, tmp_path: Path) -> None:
    state, said = played(make_study(rounds=3, quorum=2), Wire(honest), tmp_path)
    assert [sorted(record["sites"]) for record in state.history] == [
        ["Alder", "Birch"],
        sorted(SITES.values()),
        sorted(SITES.values()),
    ]
    assert [line for line in said if "joined" in line] == ["round 2 of 3: joined by Cedar"]
    assert all(record["faults"] == [] for record in state.history)


def test_no_site_trains_before_a_quorum_is_connected(make_study) -> None:
    study, wire = make_study(rounds=1, quorum=2, deadline_s=0.2), Wire(honest, [registered(11, "Alder")])
    with pytest.raises(IcmoeError) as caught:
        run_rounds(wire, make_strategy(study, ROSTER), study, start_state(study), sites=SITES, commit=print, poll_s=0.01)
    assert [(fault.number, fault.value, fault.limit) for fault in caught.value.faults] == [(501, "1", "at least 2")]
    assert wire.asked == []


def test_a_late_site_that_cannot_take_part_is_named_and_asked_once(make_study, tmp_path: Path, capsys) -> None:
    def answer(message: Message, site: str) -> Message | None:
        reply = honest(message, site)
        if site == "Cedar" and message.metadata.message_type == "query.site":
            reply.content["config"]["site"] = "Birch"  # another name than the one registered with its key
        return reply

    wire = Wire(answer)
    state, _ = played(make_study(rounds=3, quorum=2), wire, tmp_path)
    assert all(sorted(record["sites"]) == ["Alder", "Birch"] for record in state.history)
    asked = [message for message in wire.asked if message.metadata.dst_node_id == 13]
    assert [message.metadata.message_type for message in asked] == ["query.site"]
    assert "ICM331 Cedar" in capsys.readouterr().err


def test_a_site_that_refused_for_the_hour_is_asked_again_before_each_round(make_study, tmp_path: Path) -> None:
    closed = iter([True, True, False])  # at the start of the run, before round 1, before round 2

    def answer(message: Message, site: str) -> Message | None:
        if site == "Cedar" and message.metadata.message_type == "query.site" and next(closed):
            return Message(Error(1320, "ICM320 site does not take part at this hour"), reply_to=message)
        return honest(message, site)

    state, said = played(make_study(rounds=3, quorum=2), Wire(answer), tmp_path, at_first=3)
    three = sorted(SITES.values())
    assert [sorted(record["sites"]) for record in state.history] == [["Alder", "Birch"], three, three]
    assert [line for line in said if "joined" in line] == ["round 2 of 3: joined by Cedar"]


def test_a_site_that_declines_at_the_start_is_made_up_for_by_one_that_comes(make_study, capsys) -> None:
    def answer(message: Message, site: str) -> Message | None:
        if site == "Alder":
            wire.nodes = everybody
            return Message(Error(1302, "ICM302 study is not approved at this site"), reply_to=message)
        return honest(message, site)

    wire, study = Wire(answer), make_study(quorum=2, deadline_s=5.0)
    everybody, wire.nodes = wire.nodes, wire.nodes[:2]
    assert sorted(meet(wire, 2, study, poll_s=0.01).sizes) == ["Birch", "Cedar"]
    assert [message.metadata.dst_node_id for message in wire.asked] == [11, 12, 13]
    assert capsys.readouterr().err.count("ICM302 Alder") == 1


def test_an_offline_or_known_node_costs_no_message(make_study) -> None:
    wire, study = Wire(honest), make_study(quorum=2)
    wire.nodes[2] = registered(13, "Cedar", "offline")
    roster = meet(wire, 2, study, poll_s=0.01)
    count = len(wire.asked)
    assert welcome(wire, roster, study, poll_s=0.01) == []
    assert len(wire.asked) == count


def test_the_coordinator_s_app_lets_late_sites_in_and_says_each_wait(make_study, tmp_path: Path, capsys) -> None:
    path = tmp_path / "runs/study/study.toml"
    path.parent.mkdir(parents=True)
    path.write_text(study_toml(make_study(rounds=2, quorum=2)))

    def answer(message: Message, site: str) -> Message | None:
        if message.metadata.message_type == "query.summary":
            return Message(Error(code=1, reason="ICM301 nothing is shared"), reply_to=message)
        if message.metadata.message_type == "train":
            wire.nodes = everybody
        return honest(message, site)

    wire = Wire(answer)
    everybody, wire.nodes = wire.nodes, wire.nodes[:2]
    run_study(wire, path, run="1")  # type: ignore[arg-type]  # a Grid at the wire
    history = latest_state(path.with_suffix(".state.safetensors"), read_study(path)).history
    assert [sorted(record["sites"]) for record in history] == [["Alder", "Birch"], sorted(SITES.values())]
    waits = [line.split(": waiting for ")[0] for line in capsys.readouterr().err.splitlines() if ": waiting for " in line]
    assert waits[:3] == ["tiny", "data check", "round 1 of 2"]
