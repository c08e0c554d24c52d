"""The ledger: what is spent is on the disk first, in one chain, within the budget, and never forgotten."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from books import PRIVACY, budget_of, pay, signed_records
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client.budget import epsilon_of_history, history_of, prospect, rounds_left_spending, rounds_that_fit
from fl_client.ledger import FILE, keep_audit_head, new_entry, read_ledger, spend
from fl_client.records import Records
from icmoe.accounting import Spending, epsilon, study_epsilon
from icmoe.errors import IcmoeError
from icmoe.receipts import EMPTY, Head, head_of, numbers_of, receipt_of, receipt_text
from icmoe.study import Study, canonical

ROOT = Path(__file__).parents[1]
ROOMY = budget_of(100.0)


@pytest.fixture
def private(make_study) -> Study:
    return make_study(rounds=5, privacy={"site": PRIVACY})


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return signed_records(tmp_path / "state", tmp_path / "node.key")


def number_of(*arguments, **settings) -> tuple[int, str]:
    with pytest.raises(IcmoeError) as caught:
        pay(*arguments, **settings)
    return caught.value.faults[0].number, str(caught.value)


def sql(records: Records, line: str, *values: object) -> None:
    with sqlite3.connect(records.state / FILE) as connection:
        connection.execute(line, values)
    connection.close()


def test_what_is_spent_composes_over_rounds_runs_and_studies(records: Records, private: Study, make_study) -> None:
    other = make_study(name="other", seed=9, privacy={"site": {**PRIVACY, "noise_multiplier": 3.0, "steps": 7}})
    for study, number in ((private, 1), (private, 2), (private, 2), (other, 1)):  # the second round was tried twice
        pay(records, study, number, budget=ROOMY)
    book = read_ledger(records.state, "Alder")
    assert [entry.count for entry in book.entries] == [1, 2, 3, 4]
    assert history_of(book.entries) == [Spending(2.0, 0.2, 15), Spending(3.0, 0.2, 7)]
    whole = epsilon([Spending(2.0, 0.2, 15), Spending(3.0, 0.2, 7)], delta=1e-3, accountant="rdp")
    assert epsilon_of_history(ROOMY, history_of(book.entries)) == whole
    assert stat.S_IMODE((records.state / FILE).stat().st_mode) == 0o600


def test_noised_scores_are_paid_for(records: Records, make_study) -> None:
    study = make_study(privacy={"site": {**PRIVACY, "scores": "noised"}})
    entry = pay(records, study, budget=ROOMY)
    assert entry.releases == ((2.0, 0.2, 5), (10.0, 1.0, 1))
    assert pay(records, study, 2, kind="evaluate", budget=ROOMY).releases == ((10.0, 1.0, 1),)


def test_a_study_that_would_cross_the_budget_is_refused_before_its_first_round(records: Records, private: Study) -> None:
    one, whole = (epsilon([Spending(2.0, 0.2, 5 * rounds)], delta=1e-3, accountant="rdp") for rounds in (1, 5))
    number, sentence = number_of(records, private, budget=budget_of(0.5 * (one + whole)))
    fitting = rounds_that_fit(budget_of(0.5 * (one + whole)), [], private, 5)
    assert number == 411
    assert 1 <= fitting < 5
    assert f"{fitting} of 5 rounds still fit" in sentence
    assert "Nothing was trained" in sentence
    assert not read_ledger(records.state, "Alder").entries  # nothing is spent by a refusal
    assert "0 of 5 rounds still fit" in number_of(records, private, budget=budget_of(0.9 * one))[1]
    pay(records, private, budget=budget_of(whole))  # exactly what it takes


def test_a_study_must_have_room_for_its_closing_evaluation_too(records: Records, make_study) -> None:
    study = make_study(rounds=3, privacy={"site": {**PRIVACY, "scores": "noised", "score_noise": 2.0}})
    rounds, closing = [Spending(2.0, 0.2, 15), Spending(2.0, 1.0, 3)], Spending(2.0, 1.0, 1)
    without, whole = (epsilon([*rounds, *more], delta=1e-3, accountant="rdp") for more in ((), (closing,)))
    assert number_of(records, study, budget=budget_of(0.5 * (without + whole)))[0] == 411
    pay(records, study, budget=budget_of(1.001 * whole))


def test_a_site_that_comes_late_needs_room_for_the_rounds_that_are_left_alone(records: Records, private: Study) -> None:
    budget = budget_of(epsilon([Spending(2.0, 0.2, 10)], delta=1e-3, accountant="rdp"))
    assert "2 of 3 rounds still fit" in number_of(records, private, 3, budget=budget)[1]
    pay(records, private, 4, budget=budget)


def test_who_scores_without_having_trained_needs_room_for_the_score_alone(records: Records, make_study) -> None:
    study = make_study(rounds=5, privacy={"site": {**PRIVACY, "scores": "noised"}})
    budget = budget_of(epsilon([Spending(10.0, 1.0, 1)], delta=1e-3, accountant="rdp"))
    assert number_of(records, study, budget=budget)[0] == 411
    pay(records, study, 5, kind="evaluate", budget=budget)
    assert number_of(records, study, 5, kind="evaluate", budget=budget)[0] == 411


def test_an_entry_that_skips_a_place_is_noticed_though_its_own_digest_fits(records: Records, private: Study) -> None:
    for number in (1, 2):
        pay(records, private, number, budget=ROOMY)
    placed = replace(read_ledger(records.state, "Alder").entries[-1], count=3)
    sql(records, "UPDATE entries SET count = 3, hash = ? WHERE count = 2", placed.digest())
    with pytest.raises(IcmoeError, match="ICM412"):
        read_ledger(records.state, "Alder")


def test_a_study_that_began_may_use_what_is_left_round_by_round(records: Records, private: Study, make_study) -> None:
    other = make_study(name="other", rounds=1, privacy={"site": PRIVACY})
    budget = budget_of(epsilon([Spending(2.0, 0.2, 25)], delta=1e-3, accountant="rdp"))
    pay(records, private, 1, budget=budget)
    pay(records, other, 1, budget=budget)  # now the first one cannot end
    for number in (2, 3, 4):
        pay(records, private, number, budget=budget)
    assert number_of(records, private, 5, budget=budget)[0] == 411
    assert number_of(records, private, 4, budget=budget)[0] == 411  # nor can a round be repeated


def test_a_round_that_is_asked_for_again_and_again_spends_no_more_than_twice_the_study(records: Records, private: Study) -> None:
    budget = budget_of(100.0)
    for _ in range(2 * private.rounds):
        pay(records, private, 1, budget=budget)
    number, faults = number_of(records, private, 1, budget=budget)
    spent = epsilon([Spending(2.0, 0.2, 2 * 25)], delta=1e-3, accountant="rdp")
    assert number == 411
    assert f"epsilon {spent:.3g} is spent in 10 answers" in str(faults)


def test_the_sites_own_limit_for_a_study_binds_what_is_spent_and_not_only_what_is_planned(
    records: Records, private: Study
) -> None:
    budget, limit = budget_of(100.0), study_epsilon(private)
    for number in (1, 1, 2, 3, 4):  # the first round broke off once
        pay(records, private, number, budget=budget, max_epsilon=limit)
    with pytest.raises(IcmoeError, match="ICM411"):
        pay(records, private, 5, budget=budget, max_epsilon=limit)
    assert f"up to epsilon {limit:.3g} for this study" in prospect(budget, records.book(), private, limit)


@pytest.mark.parametrize("scores", ["withheld", "noised"])
def test_who_approves_again_is_not_told_that_rounds_are_spent_twice(records: Records, make_study, scores: str) -> None:
    study = make_study(rounds=5, privacy={"site": {**PRIVACY, "scores": scores}})
    budget = budget_of(100.0)
    whole = prospect(budget, records.book(), study).split(" spent, ")[1]
    for number in range(1, 6):
        pay(records, study, number, budget=budget)
        assert prospect(budget, records.book(), study).split(" spent, ")[1] == whole
    pay(records, study, 5, budget=budget)
    assert prospect(budget, records.book(), study).split(" spent, ")[1] != whole, "a round that was tried twice"


def test_a_study_that_was_changed_must_fit_whole_like_any_other(records: Records, private: Study, make_study) -> None:
    changed = make_study(seed=9, rounds=5, privacy={"site": PRIVACY})
    assert (changed.name, changed.digest != private.digest) == (private.name, True)
    budget = budget_of(epsilon([Spending(2.0, 0.2, 25)], delta=1e-3, accountant="rdp"))
    pay(records, private, 1, budget=budget)
    assert number_of(records, changed, 1, budget=budget)[0] == 411
    whole = epsilon([Spending(2.0, 0.2, 5 + 25)], delta=1e-3, accountant="rdp")
    assert f"{whole:.3g} after this study" in prospect(budget, records.book(), changed), "none of its rounds is done"


@settings(max_examples=30, deadline=None)
@given(limit=st.floats(0.1, 4.0), spent=st.lists(st.integers(1, 30), max_size=3), most=st.integers(1, 40))
def test_one_round_more_than_fit_would_cross(make_study, limit: float, spent: list[int], most: int) -> None:
    study, budget = make_study(rounds=40, privacy={"site": PRIVACY}), budget_of(limit)
    history = [Spending(2.0, 0.2, steps) for steps in spent]
    fitting = rounds_that_fit(budget, history, study, most)
    costs = [epsilon_of_history(budget, [*history, *rounds_left_spending(study, n)]) for n in (fitting, fitting + 1)]
    assert fitting == 0 or costs[0] <= limit
    assert fitting == most or costs[1] > limit


def test_without_a_budget_no_private_study_and_with_one_no_other(records: Records, private: Study, make_study) -> None:
    assert number_of(records, private)[0] == 410
    assert number_of(records, make_study(), budget=ROOMY)[0] == 417
    assert pay(records, make_study()).releases is None  # the ledger knows of rounds that nothing is promised about


def test_a_delta_above_one_in_the_patients_is_no_budget(records: Records, private: Study) -> None:
    number, sentence = number_of(records, private, budget=budget_of(8.0, delta=0.06))
    assert (number, "1 / 20" in sentence) == (202, True)
    pay(records, private, budget=budget_of(8.0, delta=1.0 / 20))


CELLS = {
    "time": "2020-01-01T00:00:00+00:00",
    "name": "another",
    "kind": "evaluate",
    "round": 9,
    "incoming": "f" * 64,
    "releases": "null",
    "previous": "f" * 64,
    "hash": "f" * 64,
}


@pytest.mark.parametrize("column", CELLS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_changed_entry_is_noticed(column: str, count: int, records: Records, private: Study) -> None:
    for number in (1, 2, 3):
        pay(records, private, number, budget=ROOMY)
    sql(records, f"UPDATE entries SET {column} = ? WHERE count = ?", CELLS[column], count)
    number, sentence = number_of(records, private, 4, budget=ROOMY)
    assert number == 412
    assert f"entry {count}" in sentence


def test_entries_taken_out_are_noticed(records: Records, private: Study) -> None:
    for number in (1, 2, 3):
        pay(records, private, number, budget=ROOMY)
    whole = (records.state / FILE).read_bytes()
    for count, expected in ((2, 412), (3, 413)):  # a hole in the chain; a chain that ends too early
        sql(records, "DELETE FROM entries WHERE count = ?", count)
        assert number_of(records, private, 4, budget=ROOMY)[0] == expected
        (records.state / FILE).write_bytes(whole)


def overwrite(path: Path, change) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content)))


HARM = {
    "no database": lambda content: b"not a database at all, but long enough to have a header" * 10,
    "cut short": lambda content: content[:5000],
    "a page of zeros": lambda content: content[:4096] + bytes(4096) + content[8192:],
    "all zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("name", HARM)
def test_a_damaged_ledger_stops_the_training(name: str, records: Records, private: Study) -> None:
    pay(records, private, budget=ROOMY)
    overwrite(records.state / FILE, HARM[name])
    assert number_of(records, private, 2, budget=ROOMY)[0] == 412


def test_the_ledger_of_another_site(records: Records, private: Study, tmp_path: Path) -> None:
    pay(records, private, budget=ROOMY)
    number, sentence = number_of(replace(records, site="Birch"), private, 2, budget=ROOMY)
    assert number == 414
    assert "Alder (allowed: Birch)" in sentence


def test_an_older_ledger_put_back_is_noticed_by_the_audit_log(records: Records, private: Study) -> None:
    pay(records, private, 1, budget=ROOMY)
    old = (records.state / FILE).read_bytes()
    pay(records, private, 2, budget=ROOMY)
    (records.state / FILE).write_bytes(old)
    number, sentence = number_of(records, private, 3, budget=ROOMY)
    assert (number, "1 entries (allowed: at least 2)" in sentence) == (413, True)


def test_an_older_ledger_is_noticed_though_two_processes_wrote_their_lines_the_other_way_round(
    records: Records, private: Study
) -> None:
    first = spend(records.state, "Alder", lambda _: new_entry(private, "train", 1, "0" * 64, None))
    old = (records.state / FILE).read_bytes()
    second = spend(records.state, "Alder", lambda _: new_entry(private, "train", 2, "0" * 64, None))
    for entry in (second, first):
        records.write("spent", {"entry": entry.count, "entry_hash": entry.hash})
    records.require(None)
    (records.state / FILE).write_bytes(old)
    assert number_of(records, private, 3, budget=ROOMY)[0] == 413


def test_an_older_folder_put_back_is_noticed_by_the_receipt(records: Records, private: Study, tmp_path: Path) -> None:
    pay(records, private, 1, budget=ROOMY)
    shutil.copytree(records.state, tmp_path / "backup")
    pay(records, private, 2, budget=ROOMY)
    receipt = records.book().head
    pay(records, private, 3, budget=ROOMY, receipt=receipt)  # going on from it is what it is for
    shutil.rmtree(records.state)
    shutil.copytree(tmp_path / "backup", records.state)
    assert number_of(records, private, 2, budget=ROOMY, receipt=receipt)[0] == 413
    pay(records, private, 2, budget=ROOMY)  # without a receipt the folder agrees with itself
    number, sentence = number_of(records, private, 3, budget=ROOMY, receipt=receipt)
    assert number == 413  # as long as before, but another history
    assert "does not go on from what the site has sent" in sentence


def test_the_ledger_never_takes_another_line_for_one_that_it_knows(records: Records) -> None:
    for head in (Head(2, "b" * 64), Head(2, "c" * 64), Head(1, "a" * 64)):
        keep_audit_head(records.state, "Alder", head)
        assert records.book().audit == Head(2, "b" * 64)


def test_a_quota_that_is_used_up_does_not_pass_for_a_damaged_ledger(records: Records, private: Study) -> None:
    pay(records, private, budget=ROOMY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))  # a write fails as beyond a quota, not as on a full disk
    try:
        number, said = number_of(records, private, 2, budget=ROOMY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (number, "disk I/O error" in said) == (205, True)
    assert len(read_ledger(records.state, "Alder").entries) == 1


def test_a_locked_ledger_is_waited_for_until_the_deadline(records: Records, private: Study) -> None:
    pay(records, private, budget=ROOMY)
    other = sqlite3.connect(records.state / FILE)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    number, sentence = number_of(replace(records, deadline_s=0.5), private, 2, budget=ROOMY)
    assert (number, "0.5 s" in sentence) == (415, True)
    assert 0.4 < time.monotonic() - began < 10.0
    other.close()
    pay(records, private, 2, budget=ROOMY)


def test_a_folder_that_may_not_be_written_to(records: Records, private: Study) -> None:
    records.state.write_text("a file, not a folder")
    assert number_of(records, private, budget=ROOMY)[0] == 205


RACER = """
import sys
from pathlib import Path
from books import budget_of, pay
from fl_client.records import Records
from fl_client.signing import Signer
from icmoe.errors import IcmoeError
from icmoe.study import Study
state, key, study = Path(sys.argv[1]), Path(sys.argv[2]), Study.model_validate_json(sys.argv[3])
records = Records(state=state, site="Alder", signer=Signer(key), deadline_s=60.0)
pay(records, study, 1, budget=budget_of(100.0))
print("ready", flush=True)
sys.stdin.readline()
paid = 0
try:
    while True:
        pay(records, study, 2, budget=budget_of(float(sys.argv[4])))
        paid += 1
except IcmoeError as error:
    print(paid, error.faults[0].number, flush=True)
"""


def test_two_processes_cannot_spend_the_same_budget(records: Records, private: Study) -> None:
    pay(records, private, budget=ROOMY)
    most = 9  # below twice the study's five rounds, which it may spend itself
    limit = epsilon([Spending(2.0, 0.2, 5 * most)], delta=1e-3, accountant="rdp")
    words = [str(records.state), str(records.signer.path), canonical(private), repr(limit)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    racers = [subprocess.Popen([sys.executable, "-c", RACER, *words], env=environment, **pipes) for _ in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n", "ready\n"]
    ends = [racer.communicate("go\n", timeout=120)[0].split() for racer in racers]
    assert [end[1] for end in ends] == ["411", "411"]
    assert sum(int(end[0]) for end in ends) == most - 3  # one before, and one of each to warm up
    assert len(records.verify()[0].entries) == most


@given(count=st.integers(0, 10**15 - 1), digest=st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}"))
def test_a_head_survives_its_journey(count: int, digest: str) -> None:
    head = Head(count, digest)
    assert head_of(numbers_of(head)) == head
    assert receipt_of(receipt_text(head)) == head


@pytest.mark.parametrize(
    "bad", [None, "", [1], [True, *[0] * 8], [-1, *[0] * 8], [1, 2**32, *[0] * 7], [1.0, *[0] * 8], [10**15, *[0] * 8]]
)
def test_what_is_no_head_is_none(bad: object) -> None:
    assert head_of(bad) is None
    assert receipt_of(bad) is None
    assert json.dumps(numbers_of(EMPTY)) == "[0, 0, 0, 0, 0, 0, 0, 0, 0]"
