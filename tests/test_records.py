"""The two records of a site: every line signed, every line missed where it is missing, whoever edited what."""

from __future__ import annotations

import json
import shutil
import sqlite3
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from books import PRIVACY, budget_of, pay, signed_records, unsigned
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fl_client import cli
from fl_client.accounts import account_of
from fl_client.audit import LOG
from fl_client.credentials import make_node_key, read_node_key
from fl_client.ledger import FILE
from fl_client.records import Records
from fl_client.signing import Signer, fingerprint_of, signature_holds
from fl_client.site import SiteFile
from icmoe.chain import START, digest_of
from icmoe.errors import IcmoeError

BUDGET = budget_of(100.0)


@pytest.fixture
def records(tmp_path: Path, make_study) -> Records:
    """Six signed lines, two of them on what was spent."""
    made = signed_records(tmp_path / "state", tmp_path / "node.key")
    study = make_study(rounds=5, privacy={"site": PRIVACY})
    for number in (1, 2):
        made.write("received", {"round": number})
        pay(made, study, number, budget=BUDGET)
        made.write("sent", {"round": number})
    return made


def site_file(records: Records) -> Path:
    """Return a site file whose state and key are these."""
    path = records.state.parent / "site.toml"
    coordinator = '[coordinator]\naddress = "localhost:443"\nca = "ca.crt"\nkey = "node.key"\n'
    path.write_text(
        f'name = "Alder"\ndata = "nowhere"\n{coordinator}[budget]\nepsilon = 100.0\ndelta = 1e-3\naccountant = "rdp"\n'
    )
    return path


def run(records: Records, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(site_file(records)), *words])
    assert "Traceback" not in done.output
    return done.exit_code, done.output + done.stderr


def lines_of(records: Records) -> list[bytes]:
    return (records.state / LOG).read_bytes().splitlines(keepends=True)


def put(records: Records, lines: list[bytes]) -> None:
    (records.state / LOG).write_bytes(b"".join(lines))


def chained_anew(lines: list[bytes], signer: Signer | None = None) -> list[bytes]:
    """Return the lines with numbers, hashes and, with another key, signatures made to fit, as a careful forger would."""
    entries, last = [json.loads(line) for line in lines], {"line": 0, "hash": START}
    for number, entry in enumerate(entries, start=1):
        entry["line"], entry["previous"] = number, last["hash"]
        if signer is not None:
            entry["by"] = fingerprint_of(signer.public())
            if number == 1:
                entry["key"] = signer.public()
        entry["hash"] = digest_of(entry, apart=("signature",))
        if signer is not None:
            entry["signature"] = signer.sign(entry["hash"])
        last = entry
    return [json.dumps(entry).encode() + b"\n" for entry in entries]


def edited(lines: list[bytes], index: int, **changes: object) -> list[bytes]:
    entry = {**json.loads(lines[index]), **changes}
    return [*lines[:index], json.dumps(entry).encode() + b"\n", *lines[index + 1 :]]


def test_a_log_as_it_was_written_is_verified(records: Records) -> None:
    code, output = run(records, "audit", "verify")
    assert code == 0, output
    assert f"6 lines, unbroken, signed from line 1 on by {fingerprint_of(records.signer.public())}" in output
    assert f"2 entries in the ledger, unbroken, in agreement with the log; head: {records.book().head.digest}" in output
    found = json.loads(run(records, "audit", "verify", "--json")[1])
    assert (found["lines"], found["unsigned"], found["ledger_entries"], found["fault"]) == (6, 0, 2, None)
    assert all(json.loads(line)["signature"] for line in lines_of(records))


FORGERIES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "an edited value": lambda lines: edited(lines, 2, round=7),
    "an edited value, chained anew": lambda lines: chained_anew(edited(lines, 2, round=7)),
    "the last value edited, chained anew": lambda lines: chained_anew(edited(lines, 5, round=7)),
    "a line removed": lambda lines: lines[:2] + lines[3:],
    "a line removed, chained anew": lambda lines: chained_anew(lines[:2] + lines[3:]),
    "two lines swapped": lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
    "two lines swapped, chained anew": lambda lines: chained_anew([*lines[:2], lines[3], lines[2], *lines[4:]]),
    "the first line cut off": lambda lines: lines[1:],
    "the last line cut off": lambda lines: lines[:-1],
    "a line nested beyond reading": lambda lines: [*lines[:2], b"[" * 100_000 + b"\n", *lines[2:]],
    "half a line at the end": lambda lines: [*lines[:-1], lines[-1][:40]],
    "three lines cut off": lambda lines: lines[:-3],
    "all lines cut off": lambda lines: [],
    "a line twice": lambda lines: [*lines, lines[-1]],
    "a line added": lambda lines: chained_anew([*lines, lines[-1]]),
    "a signature taken off": lambda lines: edited(lines, 3, signature=None),
    "a signature of another line": lambda lines: edited(lines, 3, signature=json.loads(lines[2])["signature"]),
    "a space more": lambda lines: [*lines[:2], lines[2].replace(b'": ', b'":  ', 1), *lines[3:]],
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_log_is_found_out(name: str, records: Records) -> None:
    put(records, FORGERIES[name](lines_of(records)))
    code, output = run(records, "audit", "verify")
    assert code == 1
    assert "ICM321" in output


def test_a_log_signed_anew_by_another_key_is_found_out(records: Records) -> None:
    other = records.state.parent / "other.key"
    make_node_key(other)
    put(records, chained_anew(lines_of(records), Signer(other)))
    assert "ICM321" in run(records, "audit", "verify")[1]  # the ledger knows another last line
    (records.state / FILE).unlink()
    assert run(records, "audit", "verify")[0] == 1  # the log speaks of entries
    put(records, chained_anew([line for line in lines_of(records) if b'"spent"' not in line], Signer(other)))
    code, output = run(records, "audit", "verify")  # both forged: the key is not the site's
    assert code == 1
    assert "signed by another key than the site's" in output


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), new=st.integers(0, 255))
def test_no_byte_of_a_signed_log_can_be_changed(records: Records, at: int, new: int) -> None:
    whole = (records.state / LOG).read_bytes()
    changed = bytearray(whole)
    changed[at % len(whole)] = new
    try:
        (records.state / LOG).write_bytes(changed)
        if bytes(changed) == whole:
            records.verify()
        else:
            with pytest.raises(IcmoeError, match="ICM321"):
                records.verify()
    finally:
        (records.state / LOG).write_bytes(whole)


def test_a_last_line_that_was_never_signed_is_known_to_the_ledger(tmp_path: Path) -> None:
    plain = Records(state=tmp_path / "plain", site="Alder")
    for number in (1, 2):
        plain.write("sent", {"round": number})
    put(plain, chained_anew(edited(lines_of(plain), 1, round=7)))
    with pytest.raises(IcmoeError, match="ICM321"):
        plain.agreement()
    with pytest.raises(IcmoeError, match="ICM321"):
        plain.write("sent", {"round": 3})


def test_a_shortened_log_stops_the_next_round(records: Records, make_study) -> None:
    put(records, lines_of(records)[:-1])
    with pytest.raises(IcmoeError, match=r"ICM321 .*5 lines.*at least 6"):
        pay(records, make_study(rounds=5, privacy={"site": PRIVACY}), 3, budget=BUDGET)
    with pytest.raises(IcmoeError, match="ICM321"):
        records.write("sent", {"round": 3})
    assert len(lines_of(records)) == 5


def test_lines_from_before_signatures_stay_and_the_first_signed_one_is_named(tmp_path: Path) -> None:
    made = signed_records(tmp_path / "state", tmp_path / "node.key")
    for number in range(3):
        unsigned(made).write("sent", {"round": number})
    made.write("sent", {"round": 3})
    code, output = run(made, "audit", "verify")
    assert code == 0
    assert "4 lines, unbroken, signed from line 4 on" in output
    put(made, chained_anew(edited(lines_of(made), 1, round=9)))
    assert run(made, "audit", "verify")[0] == 1


def test_lines_of_version_one_are_read(tmp_path: Path) -> None:
    """As the first version wrote them: neither version nor signature, and no ledger beside them."""
    made = signed_records(tmp_path / "state", tmp_path / "node.key")
    made.state.mkdir()
    entry = {"line": 1, "time": "2026-03-01T12:00:00+00:00", "event": "approved", "study": "0" * 64, "previous": START}
    put(made, [json.dumps({**entry, "hash": digest_of(entry)}).encode() + b"\n"])
    assert "none of 1 lines is signed" in run(made, "audit", "verify")[1]
    made.write("sent", {"round": 1})
    assert "signed from line 2 on" in run(made, "audit", "verify")[1]


def test_a_new_key_signs_from_its_line_on(records: Records) -> None:
    first = fingerprint_of(records.signer.public())
    make_node_key(records.signer.path)
    code, output = run(records, "audit", "verify")
    assert (code, "until the next line is written" in output) == (1, True)
    records.write("sent", {"round": 3})
    code, output = run(records, "audit", "verify")
    assert code == 0, output
    second = fingerprint_of(records.signer.public())
    assert f"signed from line 1 on by {first}, from line 7 on by {second}" in output.replace("\n", " ")


def test_a_signed_log_takes_no_unsigned_line(records: Records) -> None:
    with pytest.raises(IcmoeError, match=r"ICM321 .*signed, this line would not be"):
        unsigned(records).write("sent", {"round": 3})
    records.verify()


def test_a_key_that_cannot_be_used_stops_the_site(records: Records) -> None:
    records.signer.path.chmod(0o644)
    with pytest.raises(IcmoeError, match="ICM306"):
        records.write("sent", {"round": 3})
    assert len(lines_of(records)) == 6


@pytest.mark.parametrize("crash", ["fl_client.audit.record", "fl_client.ledger.keep_audit_head"])
def test_a_crash_between_the_two_files_loses_nothing(crash: str, records: Records, make_study, monkeypatch) -> None:
    study = make_study(rounds=5, privacy={"site": PRIVACY})
    with monkeypatch.context() as patched:
        patched.setattr(crash, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pay(records, study, 3, budget=BUDGET)
    assert records.verify()[0].head.count == 3  # spent, though nothing was trained
    pay(records, study, 3, budget=BUDGET)
    assert [entry.round for entry in records.verify()[0].entries] == [1, 2, 3, 3]


def test_signatures_are_for_the_audit_log_alone(records: Records) -> None:
    digest = "ab" * 32
    signature = records.signer.sign(digest)
    assert signature_holds(records.signer.public(), digest, signature)
    for public, text, other in (("", digest, signature), (records.signer.public(), "cd" * 32, signature), ("x y", digest, None)):
        assert not signature_holds(public, text, other)
    bare = read_node_key(records.signer.path).sign(bytes.fromhex(digest), ec.ECDSA(hashes.SHA256()))
    assert not signature_holds(records.signer.public(), digest, b64encode(bare).decode())


def test_the_ledger_is_shown_as_table_json_and_page(records: Records, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, output = run(records, "ledger", "--page", str(page))
    assert code == 0, output
    account = json.loads(run(records, "ledger", "--json")[1])
    assert (account["entries"], account["head"]) == (2, records.book().head.digest)
    (study,) = account["studies"]
    assert study["releases"] == [{"noise_multiplier": 2.0, "sample_rate": 0.2, "steps": 10}]
    assert account["epsilon_left"] == pytest.approx(100.0 - account["epsilon_spent"])
    assert f"epsilon {account['epsilon_spent']:.3f} of 100 is spent" in output
    text = page.read_text()
    for words in ("What is promised", "patient", account["head"], study["digest"][:16], "0.001"):
        assert words in text
    assert page.stat().st_mode & 0o077 == 0


def test_a_lowered_budget_leaves_nothing_rather_than_less_and_scores_are_no_rounds(records: Records, make_study) -> None:
    study = make_study(name="scored", rounds=5, privacy={"site": {**PRIVACY, "scores": "noised"}})
    pay(records, study, 1, budget=BUDGET)
    pay(records, study, 2, kind="evaluate", budget=BUDGET)  # of a round that the site missed
    account = account_of(SiteFile(name="Alder", data="nowhere", budget=budget_of(0.01)), records.book())
    assert account["epsilon_spent"] > 0.01
    assert account["epsilon_left"] == 0.0
    (row,) = [row for row in account["studies"] if row["study"] == "scored"]
    assert (row["rounds"], row["entries"]) == (1, 2)


def test_a_site_without_budget_or_rounds_says_that_nothing_is_promised(records: Records, tmp_path: Path) -> None:
    bare = replace(records, state=tmp_path / "empty")
    path = site_file(bare)
    path.write_text('name = "Alder"\ndata = "nowhere"\nstate = "empty"\n')
    page = tmp_path / "page.html"
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(path), "ledger", "--page", str(page)])
    assert done.exit_code == 0, done.output
    assert "No [budget] in the site file" in " ".join(done.output.split())
    assert "<p>Nothing. The site file has no section" in page.read_text()
    assert "No round was trained yet" in page.read_text()


def test_attempts_without_privacy_are_counted_and_no_epsilon_covers_them(records: Records, make_study) -> None:
    pay(records, make_study())
    account = json.loads(run(records, "ledger", "--json")[1])
    assert account["rounds_without_privacy"] == 1
    assert [(row["private"], row["epsilon"] is None) for row in account["studies"]] == [(True, False), (False, True)]
    output = run(records, "ledger")[1]
    assert "1 attempts at a round were made without differential privacy" in output
    assert "infinite" in output


def test_a_ledger_that_does_not_agree_with_the_log_is_not_shown(records: Records) -> None:
    shutil.copy(records.state / FILE, records.state.parent / "new")
    (records.state / FILE).unlink()
    code, output = run(records, "ledger")
    assert (code, "ICM413" in output) == (1, True)


@pytest.mark.parametrize("page", ["state", "site.toml/page.html", "/proc/page.html"])
def test_a_page_that_cannot_be_written_is_named_as_it_was_asked_for(page: str, records: Records) -> None:
    target = records.state.parent / page
    code, output = run(records, "ledger", "--page", str(target))
    assert (code, f"ICM205 {target}: " in output) == (1, True)
    assert not list(records.state.parent.glob(".*"))


def test_the_largest_budget_fits_on_the_page(records: Records, tmp_path: Path) -> None:
    path, page = site_file(records), tmp_path / "page.html"
    path.write_text(path.read_text().replace("epsilon = 100.0", "epsilon = 1000.0"))
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(path), "ledger", "--page", str(page)])
    assert (done.exit_code, "and of inf once the budget" in page.read_text()) == (0, True)


@pytest.mark.parametrize("words", [("audit",), ("audit", "--json"), ("history",), ("history", "--json")])
def test_a_shortened_log_is_printed_and_then_told(words: tuple[str, ...], records: Records) -> None:
    (records.state / LOG).write_bytes(b"")
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(site_file(records)), *words])
    assert (done.exit_code, "ICM321" in done.stderr, "lines are missing at the end" in done.stderr) == (1, True, True)
    assert json.loads(done.stdout) == [] if "--json" in words else done.stdout


def test_a_page_may_have_brackets_in_its_name(records: Records) -> None:
    page = records.state.parent / "a[" / "b].html"
    code, output = run(records, "report", "--out", str(page))
    assert (code, f"Report: {page}" in output, page.is_file()) == (0, True, True)


@pytest.mark.parametrize("words", [("ledger",), ("audit", "verify")])
def test_a_log_that_is_no_file_is_one_numbered_sentence(words: tuple[str, ...], records: Records) -> None:
    (records.state / LOG).unlink()
    (records.state / LOG).mkdir()
    code, output = run(records, *words)
    assert (code, f"ICM205 {records.state / LOG}: " in output) == (1, True)


def test_a_ledger_that_cannot_be_written_to_is_not_called_damaged(records: Records, monkeypatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        "fl_client.ledger.sqlite3.connect", lambda path, **settings: connect(f"file:{path}?mode=ro", **settings | {"uri": True})
    )
    with pytest.raises(IcmoeError, match=r"ICM205 .*readonly database"):
        records.write("sent", {"round": 3})
