"""The study page: what it says of a run that waits, went on, stopped, is over or has damaged files, and what it never says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from consortium import snapshot as files_of
from flwr.app import ConfigRecord, Message
from shown import NAMES, Page, lifelike, living, make_home, numbers, play, said, standings, with_infinities

from fl_server import audit
from fl_server.beside import audit_path
from fl_server.dashboard import page
from fl_server.dashboard.feed import Feed
from fl_server.home import Home
from fl_server.run_state import RunState
from fl_server.waiting import begun, wait_path, write_wait
from icmoe.errors import IcmoeError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home", *NAMES, "Elm")


def test_before_any_study_the_page_says_so(home: Home) -> None:
    found = Feed(home).current()
    assert (found.phase, found.consortium) == ("nothing yet", "Lesion group")
    assert "No study was submitted yet" in said(found)
    with pytest.raises(IcmoeError, match="ICM524 tiny"):
        Feed(home).current("tiny")


def test_a_live_run_shows_who_is_in_who_is_late_and_until_when(home: Home, make_study) -> None:
    study = make_study(rounds=6, quorum=2, deadline_s=600.0)
    folder = play(home, study, rounds=2, answer=with_infinities("Cedar", 2))
    play(home, study, rounds=3, offline=("Dogwood",))
    wait = begun("answers", "round 4 of 6", 4, 600.0, NAMES, asked=NAMES[:3], offline=NAMES[3:]).with_answer("Alder")
    write_wait(folder.study, wait)
    with living(folder):
        found = Feed(home).current()
    assert found.phase == "running"
    assert standings(found) == {
        "Alder": "answered",
        "Birch": "awaited",
        "Cedar": "awaited",
        "Dogwood": "not connected",
        "Elm": "not in this run",
    }
    rows = {site.name: site for site in found.sites}
    assert (rows["Birch"].until, rows["Alder"].until) == (wait.until, None)
    assert (rows["Cedar"].rounds_used, rows["Cedar"].refused, rows["Dogwood"].why) == (2, 1, 332)
    text = said(found, now=wait.until - timedelta(seconds=590))
    assert "Round 4 of 6: waits for Birch, Cedar; 3 of 6 rounds are done." in text
    assert f"until {page.clock(wait.until)} (in 9 min 50 s)" in text
    assert "ICM504 Cedar 2" in text
    assert "No lines for own-site local and pooled training: the coordinator does not know them." in text


def test_scores_losses_bytes_and_usage_are_those_of_the_state(home: Home, make_study) -> None:
    study = make_study(rounds=4, quorum=2)
    folder = play(home, study, rounds=3)
    state = RunState.load(folder.state, study)
    found = Feed(home).current()
    for site in found.sites[:4]:
        rows = [record["sites"][site.name] for record in state.history]
        assert list(site.dice_R) == [row["val_dice"] for row in rows]
        assert list(site.loss_R) == [row["loss"] for row in rows]
        assert list(site.usage_M) == rows[-1]["usage"]
        assert (site.bytes_up, site.bytes_down) == tuple(sum(row[key] for row in rows) for key in ("bytes_up", "bytes_down"))
    assert [row.dice for row in found.history] == [record["val_dice"] for record in state.history]
    text = said(found)
    assert f"{state.history[1]['val_dice']:.3f}" in text
    assert f"{state.history[-1]['sites']['Alder']['usage'][0]:.3f}" in text
    assert page.size(sum(record["bytes_up"] for record in state.history)) in text


def test_every_plot_has_its_text_and_no_file_is_written(home: Home, make_study) -> None:
    play(home, make_study(rounds=4, quorum=2), rounds=3)
    before = files_of(home.root)
    text = page.render(Feed(home).current())
    assert files_of(home.root) == before
    shown = Page(text)
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == 2 * len(NAMES)
    assert all(re.search(r"<figcaption>0\.\d{3} in round \d", figure) for figure in figures)
    assert all(values.get("aria-hidden") == "true" for tag, values in shown.tags if tag == "svg")
    assert {tag for tag, _ in shown.tags} >= {"header", "nav", "main", "footer", "h1", "h2"}
    assert len(set(shown.ids)) == len(shown.ids)
    assert all(link[1:] in shown.ids for link in shown.links if link.startswith("#"))
    assert not shown.inline
    assert not [link for link in shown.links if not link.startswith(("/", "#"))]


def test_a_wait_whose_time_is_over_is_late_and_a_run_that_died_is_not_running(home: Home, make_study) -> None:
    folder = play(home, make_study(rounds=4, quorum=2), rounds=1)
    write_wait(folder.study, begun("answers", "round 2 of 4", 2, -5.0, NAMES, asked=NAMES).with_answer("Alder"))
    with living(folder):
        found = Feed(home).current()
    assert standings(found)["Birch"] == "overdue"
    assert "late: did not answer in time" in said(found)
    dead = Feed(home).current()
    assert (dead.phase, dead.wait, standings(dead)["Birch"]) == ("not running", None, "took part")
    assert "No run of it lives on this machine; 1 of 4 rounds are done" in said(dead)


def test_the_page_follows_each_change_of_the_files_and_keeps_what_did_not_change(home: Home, make_study) -> None:
    study, feed = make_study(rounds=4, quorum=2), Feed(home)
    folder = play(home, study, rounds=1)
    first = feed.current()
    assert feed.current() is first
    play(home, study, rounds=2)
    second = feed.current()
    assert (first.rounds_done, second.rounds_done) == (1, 2)
    assert first.etag != second.etag
    with living(folder):
        assert feed.current().phase == "running"
    audit.note(audit_path(folder.study), "refused", {"round": 2, "site": "Alder", "number": 513, "said": "ICM513"})
    assert feed.current().refused[0].number == 513


def test_a_complete_study_and_one_that_was_stopped(home: Home, make_study) -> None:
    folder = play(home, make_study(rounds=2, quorum=2), rounds=5)
    folder.model.write_bytes(b"model")
    assert "Complete: 2 of 2 rounds are done" in said(Feed(home).current())
    short = play(home, make_study(name="short", rounds=3, quorum=2), rounds=1)
    fault = {"number": 515, "where": "round 2", "what": "", "value": "1 usable", "limit": "at least 2", "did": "", "todo": ""}
    (short.path / "study.faults.json").write_text(json.dumps([fault]))
    found = Feed(home).current(short.path.name)
    assert (found.phase, numbers(found)) == ("stopped", [515])
    assert "ICM515 round 2: round stayed below its quorum: 1 usable (allowed: at least 2)" in said(found)
    assert found.others == (short.path.name, folder.path.name)
    only = Feed(home, "tiny")
    assert (only.current().study, only.current().others) == ("tiny", (folder.path.name,))


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # the newest commit has a second name
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "expected", "rounds"),
    [
        (lambda folder: damaged(folder.state), 517, 3),
        (lambda folder: [damaged(path) for path in folder.path.glob("study.state*")], 502, 0),
        (lambda folder: folder.state.write_bytes(b""), 517, 2),
        (lambda folder: audit_path(folder.study).write_text('{"line": 1}\n'), 516, 3),
        (lambda folder: wait_path(folder.study).write_text('{"kind": "answers"'), 523, 3),
        (lambda folder: (folder.path / "study.faults.json").write_text('[{"number": 515, "page": 1}]'), None, 3),
        (lambda folder: folder.study.write_text("name = "), 204, 0),
        (lambda folder: (folder.path / "run.json").write_text("[]"), None, 3),
    ],
    ids=["newest state", "all states", "empty state", "audit log", "wait", "faults", "study", "run"],
)
def test_a_damaged_file_is_a_numbered_sentence_and_the_rest_is_shown(
    harm: Callable[..., object], expected: int | None, rounds: int, home: Home, make_study
) -> None:
    folder = play(home, make_study(rounds=5, quorum=2), rounds=3)
    write_wait(folder.study, begun("answers", "round 4 of 5", 4, 60.0, NAMES, asked=NAMES))
    harm(folder)
    with living(folder):
        found = Feed(home).current()
    assert numbers(found) == ([] if expected is None else [expected])
    assert found.rounds_done == rounds
    assert expected is None or f"ICM{expected}" in said(found)


def test_odd_words_of_what_stopped_a_run_are_a_fault_of_the_page(home: Home, make_study) -> None:
    folder = play(home, make_study(rounds=5, quorum=2), rounds=1)
    for text in ('[{"number": 515, "page": 1}]', "{}x", '[{"number": 9}]', "[1]", "3", '[{"number": 504, "where": 7}]'):
        (folder.path / "study.faults.json").write_text(text)
        assert set(numbers(Feed(home).current())) <= {523}
    assert numbers(Feed(home).current()) == [523]


def test_a_history_of_another_version_is_a_fault_and_no_traceback(home: Home, make_study) -> None:
    study = make_study(rounds=5, quorum=2)
    folder = play(home, study, rounds=2)
    for change in ({"sites": 3}, {"faults": None}, {"val_dice": "high"}, {"seconds": None}, {"bytes_up": -0.5}):
        state = RunState.load(folder.state, study)
        state.history[-1].update(change)
        state.commit(folder.state)
        found = Feed(home).current()
        assert (numbers(found), found.study) == ([523], "tiny"), change
        assert "ICM523" in said(found)
        folder.state.unlink()
        play(home, study, rounds=2)


def test_hostile_names_of_sites_and_consortium_stay_text(tmp_path: Path, make_study) -> None:
    evil = ('<script>alert(1)</script>"', "' onload='x", "{{ 7 * 7 }}", "</td><h1>Birch")
    home = make_home(tmp_path)
    folder = play(home, make_study(rounds=3, quorum=2), rounds=2, names=evil, answer=with_infinities(evil[0], 2))
    write_wait(folder.study, begun("answers", "<img src=x>", 3, 60.0, evil, asked=evil))
    with living(folder):
        found = Feed(home).current().model_copy(update={"consortium": "<b>us</b>", "others": ("<i>", '"><s>')})
    shown = Page(page.render(found))
    assert not shown.inline
    assert not {"b", "i", "s", "img"} & {tag for tag, _ in shown.tags}
    assert sum(tag == "script" for tag, _ in shown.tags) == sum(tag == "h1" for tag, _ in shown.tags) == 1
    assert all(name in shown.said for name in evil)


def test_what_a_site_wrote_into_its_message_is_not_shown(home: Home, make_study) -> None:
    """A site's software names a record after a patient: the refusal quotes it in the coordinator's log, and only there."""
    patient = "DOE^JANE 1980-01-02"

    def answer(message: Message, site: str) -> Message | None:
        reply = lifelike(message, site)
        if site == "Birch" and message.metadata.message_type == "train":
            reply.content[patient] = ConfigRecord({"id": patient})
        return reply

    folder = play(home, make_study(rounds=3, quorum=2), rounds=2, answer=answer)
    assert "DOE^JANE" in audit_path(folder.study).read_text()
    found = Feed(home).current()
    assert [(row.number, row.site) for row in found.refused] == [(504, "Birch")] * 2
    assert "update was refused, it holds other records" in said(found)
    assert not re.search("DOE|1980", page.render(found) + found.model_dump_json())


def test_a_site_that_sits_out_is_named_and_a_large_update_shows_norm_and_bound(home: Home, make_study) -> None:
    from icmoe.messages import UPDATE

    def answer(message: Message, site: str) -> Message | None:
        reply = lifelike(message, site)
        if site == "Dogwood" and message.metadata.message_type == "train":
            arrays = reply.content[UPDATE]
            for name in list(arrays):
                arrays[name] = type(arrays[name])(arrays[name].numpy() * 1e6)
        return reply

    play(home, make_study(rounds=6, quorum=2), rounds=4, answer=answer)
    found = Feed(home).current()
    assert standings(found)["Dogwood"] == "sits out"
    assert [row.number for row in found.refused] == [511, 511, 511]
    assert re.search(r"update is too large: norm [\d.e+]+ \(allowed: at most [\d.]+\)", said(found))
