"""The study page: what it says of a run that waits, went on, stopped, is over or has damaged files, and what it never says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from consortium import snapshot as files_of
from flwr.app import ConfigRecord, Message
from shown import NAMES, lifelike, living, make_home, play, with_infinities

from fl_server import audit
from fl_server.beside import audit_path
from fl_server.dashboard import page
from fl_server.dashboard.charts import line_chart, rounded_up
from fl_server.dashboard.feed import Feed
from fl_server.dashboard.references import read_references
from fl_server.dashboard.snapshot import SiteRow, Snapshot
from fl_server.home import Home
from fl_server.run_state import RunState
from fl_server.waiting import begun, wait_path, write_wait
from icmoe.errors import IcmoeError
from icmoe.study import Study

PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "patients": 100, "sample_rate": 0.2, "steps": 3}
UNCOUPLED = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0}


class Page(HTMLParser):
    """What a page says, and what it would run, load or style by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.inline, self.tags, self.ids, self.links = [], [], [], [], []
        self._inside = ""
        self.feed(text)
        self.said = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.inline += [name for name in values if name == "style" or name.startswith("on")]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in values) else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home", *NAMES, "Elm")


def standings(snapshot: Snapshot) -> dict[str, str]:
    return {site.name: site.standing for site in snapshot.sites}


def said(snapshot: Snapshot, **options: object) -> str:
    return Page(page.render(snapshot, **options)).said


def numbers(snapshot: Snapshot) -> list[int]:
    return [fault.number for fault in snapshot.faults]


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
        state.history[-1] |= change
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
    assert "49" not in re.findall(r"(?<![.\d])49(?![\d])", shown.said)


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
    from icmoe.exchange import UPDATE

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


def results(**changes: object) -> dict:
    def run(**dice: float) -> dict:
        return {"rounds": [{"sites": {name: {"val_dice": value} for name, value in dice.items()}}]}

    methods = {"local": {"1": run(Alder=0.5, Birch=0.6), "2": run(Alder=0.7)}, "pooled": {"1": run(**{"(pooled)": 0.8})}}
    about = {"schema_version": 1, "kind": "icmoe-simulation", "created": "2026-01-02T03:04:05", "phantoms": True, "seeds": [1, 2]}
    return {**about, "labels": ["background", "lesion"], "methods": methods, **changes}


def test_lines_of_a_rehearsal_stand_beside_the_scores(home: Home, make_study, tmp_path: Path) -> None:
    study: Study = make_study(rounds=3, quorum=2)
    play(home, study, rounds=2)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(configuration={"study": {"backbone": {"digest": study.backbone.digest}}})))
    found = Feed(home, references=read_references(path)).current()
    assert found.references is not None
    assert (found.references.local, found.references.pooled) == ({"Alder": pytest.approx(0.6), "Birch": 0.6}, 0.8)
    text = said(found)
    assert "Rehearsed: local 0.600, pooled 0.800." in text
    assert "It has no local model of Cedar, Dogwood, Elm." in text
    assert "Its images are phantoms" in text
    assert "no yardstick" not in text
    html = page.render(found)
    assert (html.count('class="level local"'), html.count('class="level pooled"')) == (2 + 1, 4 + 1)  # and the legend
    path.write_text(json.dumps(results(configuration={"study": {"backbone": {"digest": "f" * 64}}}, labels=["a", "b"])))
    other = Feed(home, references=read_references(path)).current()
    assert "It had other labels and backbone than this study: the lines are no yardstick for it." in said(other)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, json.dumps({"kind": "x"}), json.dumps(results(configuration=3)), None],
    ids=["empty", "a list", "no keys", "nested", "another kind", "odd", "absent"],
)
def test_results_that_are_none_are_refused_by_number(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(IcmoeError, match="ICM523"):
        read_references(path)


def test_a_rehearsal_without_local_and_pooled_has_no_lines_to_show(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    whole = results(configuration={"study": {"backbone": {"digest": "d" * 64}}})
    path.write_text(json.dumps({**whole, "methods": {"fedavg": whole["methods"]["local"]}}))
    with pytest.raises(IcmoeError, match="neither local nor pooled"):
        read_references(path)


def test_privacy_at_the_server_is_shown_as_its_rounds_recorded_it(home: Home, make_study) -> None:
    server = {"epsilon": 50.0, "delta": 1e-2, "sites": 4, "divisor": 3.0}
    study = make_study(rounds=4, quorum=2, privacy={"server": server}, aggregation=UNCOUPLED)
    folder = play(home, study, rounds=2)
    recorded = RunState.load(folder.state, study).history[-1]["privacy"]
    (one,) = Feed(home).current().privacy
    assert (one.epsilon, one.limit, one.unit) == (recorded["epsilon"], 50.0, "site")
    assert f"epsilon {recorded['epsilon']:.3f} at delta 0.01 per site" in said(Feed(home).current())


def test_privacy_at_the_sites_is_what_the_rounds_so_far_cost_and_scores_are_withheld(home: Home, make_study) -> None:
    pytest.importorskip("opacus")
    study = make_study(rounds=4, quorum=2, privacy={"site": {**PRIVATE, "accountant": "rdp"}})

    def answer(message: Message, site: str) -> Message | None:
        reply = lifelike(message, site)
        found = reply.content.metric_records["numbers"]
        for key in ("loss", "seconds", "val-dice", "val-patients"):
            found.pop(key, None)
        found["slices"] = 100
        return reply

    play(home, study, rounds=2, answer=answer)
    two = Feed(home).current()
    play(home, study, rounds=9, answer=answer)
    four = Feed(home).current()
    assert 0.0 < two.privacy[0].epsilon < four.privacy[0].epsilon <= 8.0
    assert four.privacy[0].epsilon == pytest.approx(8.0, rel=0.02)
    text = said(two)
    assert "of at most 8 at delta 0.001 per patient (add/remove; rdp), after 2 of 4 rounds" in text
    assert "Losses are withheld" in text
    assert "Validation scores are withheld" in text
    assert "withheld scores stay at the sites in this study" in text


def test_time_left_follows_the_pace_of_the_last_rounds(home: Home, make_study) -> None:
    study = make_study(rounds=10, quorum=2, deadline_s=600.0)
    folder = play(home, study, rounds=4)
    state = RunState.load(folder.state, study)
    for record in state.history:
        record["seconds"] = {"train": 60.0, "aggregate": 5.0}
    state.commit(folder.state)
    write_wait(folder.study, begun("answers", "round 5 of 10", 5, 600.0, NAMES, asked=NAMES))
    with living(folder):
        found = Feed(home).current()
    expected = datetime.fromtimestamp(folder.state.stat().st_mtime, UTC) + timedelta(seconds=6 * 65.0)
    assert abs((found.ends - expected).total_seconds()) <= 1.0
    assert "6 min 30 s until about" in said(found, now=found.ends - timedelta(seconds=390))


def test_a_line_breaks_where_a_round_has_no_value_and_fits_its_box() -> None:
    chart = line_chart([0.0, 0.5, None, 2.0, 0.25, None], rounds=12, top=1.0, levels={"local": 0.5, "pooled": None})
    assert len(chart.segments) == 2
    assert len(chart.dots) == 4
    assert [name for name, _ in chart.references] == ["local"]
    assert all(0 <= x <= 320 and 0 <= y <= 168 for x, y in chart.dots)
    assert chart.references[0][1] == chart.dots[1][1]
    long = line_chart([0.5] * 1000, rounds=1000, top=1.0, levels={})
    assert (len(long.dots), long.ticks_x[-1][1]) == (1, "1000")
    assert line_chart([0.5], rounds=1, top=1.0, levels={}).dots == ((38.0, 77.0),)
    assert [rounded_up(value) for value in (0.03, 1.0, 1.1, 7.0, 0.0)] == pytest.approx([0.05, 1.0, 2.0, 10.0, 1.0])


def test_numbers_read_as_people_write_them() -> None:
    assert [page.size(value) for value in (0, 999, 1_234_567, 5 * 10**12)] == ["0 bytes", "999 bytes", "1.2 MB", "5.0 TB"]
    assert [page.duration(value) for value in (0.4, 59, 61, 3700, 200_000)] == [
        "0.4 s",
        "59 s",
        "1 min 1 s",
        "1 h 1 min",
        "2 d 7 h",
    ]
    row = SiteRow(name="Alder", standing="answered", dice_R=(None, 0.4, 0.5))
    assert page.dice_sentence(Snapshot(consortium="x"), row) == "0.500 in round 3, from 0.400 in round 2."
    assert page.loss_sentence(row) == "No loss yet."
