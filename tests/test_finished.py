"""A finished update is kept: asked for again, the same bytes leave, nothing is trained and nothing is spent."""

from __future__ import annotations

import os
import stat
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from exports import write_series
from flwr.app import Message, RecordDict
from test_client import ask, hospital, request, site
from test_quality import site_file

from fl_client import local_round
from fl_client.approval import approved_studies
from fl_client.audit import read_log
from fl_client.by_round import forget_unsent, forgot
from fl_client.finished import KEPT, finished_path
from fl_client.ingesting import forget_patient, ingest_site
from fl_client.ledger import read_ledger
from fl_client.owed import owed_path
from fl_client.participant import Participant
from fl_client.personal import personal_path
from icmoe.data.ingest.run import forget
from icmoe.messages import NUMBERS, UPDATE
from icmoe.study import UpdateForm

__all__ = ["hospital", "site"]


@pytest.fixture
def audited(site: Participant, tmp_path: Path) -> Participant:
    return replace(site, audited=True, state_folder=tmp_path / "state")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that were really trained."""
    rounds: list[int] = []
    train_round = local_round.train_round

    def spy(*arguments, round_number: int, **settings):
        rounds.append(round_number)
        return train_round(*arguments, round_number=round_number, **settings)

    monkeypatch.setattr("fl_client.local_round.train_round", spy)
    return rounds


def content(site: Participant, number: int = 1, seed: int = 1, study: int = 0) -> RecordDict:
    return request(site.studies[study], number, seed)


def sent(reply: Message) -> tuple[dict[str, bytes], dict[str, object]]:
    assert not reply.has_error(), reply.error
    numbers = {key: value for key, value in reply.content[NUMBERS].items() if key not in {"ledger", "audit"}}
    return {name: array.data for name, array in reply.content[UPDATE].items()}, numbers


def kept(site: Participant) -> list[Path]:
    return sorted(site.state_folder.rglob("finished/*.safetensors"))


def test_the_same_question_gets_the_same_bytes_for_nothing(audited: Participant, trained: list[int]) -> None:
    first, again = (sent(ask(audited, content(audited))) for _ in range(2))
    assert first == again  # seconds of training included: it is not a second training
    assert trained == [1]
    assert len(read_ledger(audited.state_folder, "Alder").entries) == 1
    events = [line["event"] for line in read_log(audited.state_folder)]
    assert events == ["received", "spent", "sent", "received", "sent"]  # that it left twice is written down
    (path,) = kept(audited)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("other", [{"number": 2}, {"seed": 2}, {"study": 1}])
def test_another_round_model_or_study_is_trained_anew(other: dict[str, int], audited: Participant, trained: list[int]) -> None:
    first, second = (sent(ask(audited, content(audited, **asked))) for asked in ({}, other))
    assert first[0] != second[0]
    assert len(trained) == len(read_ledger(audited.state_folder, "Alder").entries) == len(kept(audited)) == 2


def test_killed_between_keeping_and_sending_the_kept_one_leaves(audited: Participant, trained: list[int], monkeypatch) -> None:
    def killed(*_: object) -> Message:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fl_client.app.release", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(audited, content(audited))
    assert len(kept(audited)) == 1
    sent(ask(audited, content(audited)))
    assert trained == [1]
    assert len(read_ledger(audited.state_folder, "Alder").entries) == 1


def test_killed_before_it_is_kept_it_is_trained_and_paid_for_again(audited: Participant, trained: list[int], monkeypatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fl_client.finished.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(audited, content(audited))
    assert kept(audited) == []
    sent(ask(audited, content(audited)))
    assert trained == [1, 1]
    assert len(read_ledger(audited.state_folder, "Alder").entries) == 2


@pytest.mark.parametrize("harm", ["cut short", "a bit of a tensor", "a number", "gone", "another round's"])
def test_a_damaged_one_is_trained_and_paid_for_again(harm: str, audited: Participant, trained: list[int]) -> None:
    first = sent(ask(audited, content(audited)))
    (path,) = kept(audited)
    data = bytearray(path.read_bytes())
    if harm == "cut short":
        path.write_bytes(data[:200])
    elif harm == "a bit of a tensor":
        data[-1] ^= 1
        path.write_bytes(data)
    elif harm == "a number":
        place = data.index(b'\\"loss\\": ') + len(b'\\"loss\\": ')
        data[place] ^= 1
        path.write_bytes(data)
    elif harm == "gone":
        path.unlink()
    else:
        sent(ask(audited, content(audited, 2)))
        path.write_bytes(next(one for one in kept(audited) if one != path).read_bytes())
    paid = len(trained)
    assert sent(ask(audited, content(audited)))[0] == first[0]  # without privacy the seed makes the same bytes
    assert len(trained) == len(read_ledger(audited.state_folder, "Alder").entries) == paid + 1


def test_only_the_newest_are_kept(audited: Participant, trained: list[int]) -> None:
    for seed in range(KEPT + 2):
        sent(ask(audited, content(audited, seed=seed)))
    assert len(kept(audited)) == KEPT
    sent(ask(audited, content(audited, seed=KEPT + 1)))
    assert len(trained) == KEPT + 2


def test_the_last_is_kept_where_the_clock_was_put_back(audited: Participant, trained: list[int]) -> None:
    for seed in range(1, KEPT + 1):
        ask(audited, content(audited, seed=seed))
    for path in kept(audited):
        os.utime(path, (4e9, 4e9))
    first, again = (sent(ask(audited, content(audited, number=2))) for _ in range(2))
    assert first == again
    assert trained == [1] * KEPT + [2]
    assert len(kept(audited)) == KEPT


def test_a_simulation_keeps_none(site: Participant, trained: list[int], tmp_path: Path) -> None:
    quiet = replace(site, state_folder=tmp_path / "state")
    for _ in range(2):
        sent(ask(quiet, content(quiet)))
    assert trained == [1, 1]
    assert not quiet.state_folder.exists()


def test_updates_that_were_made_with_a_forgotten_patient_do_not_leave_any_more(tmp_path: Path) -> None:
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    path = site_file(tmp_path, tmp_path / "export", "[255]")
    ingest_site(path, "Elm", dry_run=False)
    (study,), state = approved_studies(tmp_path / "state"), tmp_path / "state"
    unsent = [finished_path(state, study, 3, "0" * 64), owed_path(state, study, "Elm", 3)]
    own = personal_path(state, study, "Elm", 3)
    for kept in (*unsent, own):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()
    forget_patient(path, "Elm", "nobody")
    assert all(kept.exists() for kept in unsent)
    before = forgot(state)
    forget_patient(path, "Elm", "one")
    assert before == "" != forgot(state), "a training that goes on meanwhile would not know"
    assert not any(kept.exists() for kept in unsent)
    assert own.exists(), "what was learned stays learned, and stays here"


@pytest.mark.parametrize("end", ["an ingest took them out", "killed"])
def test_nothing_unsent_stays_where_the_images_went_by_another_way(end: str, tmp_path: Path, monkeypatch) -> None:
    write_series(tmp_path / "export/a", "one", 2, seed=1)
    path = site_file(tmp_path, tmp_path / "export", "[255]")
    ingest_site(path, "Elm", dry_run=False)
    kept = finished_path(tmp_path / "state", approved_studies(tmp_path / "state")[0], 3, "0" * 64)
    kept.parent.mkdir(parents=True)
    kept.touch()

    def beside(folder: Path, patient: str) -> int:
        assert forget(folder, patient) == 2
        if end == "killed":
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr("fl_client.ingesting.forget", beside)
    with pytest.raises(KeyboardInterrupt) if end == "killed" else nullcontext():
        assert forget_patient(path, "Elm", "one")[0] == 2
    assert not kept.exists()


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_what_was_trained_while_a_patient_was_forgotten_neither_leaves_nor_stays(
    form: str, audited: Participant, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = audited.studies[0].model_copy(update={"update": UpdateForm(form=form)})
    own = replace(audited, studies=(study,))
    train_round = local_round.train_round

    def forgotten_meanwhile(*arguments, **settings):
        forget_unsent(own.state_folder)
        return train_round(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr("fl_client.local_round.train_round", forgotten_meanwhile)
        reply = ask(own, request(study, 1))
    assert (reply.error.code, reply.error.reason) == (1336, "ICM336 site's data changed while it trained")
    assert kept(own) == [] == [*own.state_folder.rglob("owed-*")]
    sent(ask(replace(own, forgot=forgot(own.state_folder)), request(study, 1)))
    assert len(kept(own)) == 1
