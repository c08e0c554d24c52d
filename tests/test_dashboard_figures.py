"""The study page's figures: lines of a rehearsal, privacy spent, time left, the geometry of its plots, numbers for people."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.app import Message
from shown import NAMES, lifelike, living, make_home, play, said

from fl_server.dashboard import page
from fl_server.dashboard.charts import line_chart, rounded_up
from fl_server.dashboard.feed import Feed
from fl_server.dashboard.references import read_references
from fl_server.dashboard.snapshot import SiteRow, Snapshot
from fl_server.home import Home
from fl_server.round_log import RoundLog
from fl_server.run_state import RunState
from fl_server.waiting import begun, write_wait
from icmoe.errors import IcmoeError
from icmoe.study import Study

PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "patients": 100, "sample_rate": 0.2, "steps": 3}
UNCOUPLED = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home", *NAMES, "Elm")


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


def computed(feed: Feed) -> Snapshot:
    ends = time.monotonic() + 300
    while (found := feed.current()).privacy[0].epsilon is None:
        assert time.monotonic() < ends
        time.sleep(0.1)
    return found


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
    feed = Feed(home)
    first = feed.current()
    assert first.privacy[0].epsilon is None  # nobody waits for the search for the study's noise
    assert "an epsilon that is being computed of at most 8" in said(first)
    two = computed(feed)
    assert two.etag != first.etag
    play(home, study, rounds=9, answer=answer)
    four = computed(feed)
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
    state.history = RoundLog([{**record, "seconds": {"train": 60.0, "aggregate": 5.0}} for record in state.history])
    state.commit(folder.state)
    write_wait(folder.study, begun("answers", "round 5 of 10", 5, 600.0, NAMES, asked=NAMES))
    with living(folder):
        found = Feed(home).current()
    expected = datetime.fromtimestamp(folder.state.stat().st_mtime, UTC) + timedelta(seconds=6 * 65.0)
    assert abs((found.ends - expected).total_seconds()) <= 1.0
    assert "6 min 30 s until about" in said(found, now=found.ends - timedelta(seconds=390))
    assert "longer than reckoned until about" in said(found, now=found.ends + timedelta(seconds=1))


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


@pytest.mark.parametrize(("phase", "done"), [("complete", 1), ("running", 1), ("waits for sites", 0), ("not running", 0)])
def test_only_a_complete_study_is_known_to_have_no_score(phase: str, done: int):
    snapshot = Snapshot.model_validate({"consortium": "x", "study": "s", "phase": phase, "rounds": 1, "rounds_done": done})
    assert ("no site with validation patients sent one" in page.render(snapshot)) is (phase == "complete")
