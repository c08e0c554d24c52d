"""What a hospital approves is what runs: its own copy, its own package, within its policy, at its hours."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from test_client import CONTEXT, command, hospital, number_of, request, write_site_file, write_study_file

from fl_client.app import make_client_app
from fl_client.approval import changes, read_approvals, withdraw
from fl_client.audit import read_log
from fl_client.credentials import make_node_key
from fl_client.leaves import IN_INT8, LEAVES
from fl_client.participant import site_from_environment
from fl_client.policy import Policy, limit_gpu, policy_faults, require_hour
from fl_client.site import ENVIRONMENT
from icmoe.bundle import INSTALLED, KINDS, PACKAGES, bundle_digest, bundle_files, differences, installed_digest
from icmoe.config import parse
from icmoe.errors import IcmoeError

__all__ = ["hospital"]
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[1]
BUNDLE = "b" * 64


@pytest.fixture
def ready(hospital: Path, make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A site that approved the tiny study and has its features."""
    study = make_study()
    path = write_site_file(tmp_path, hospital)
    for words in (["approve", str(write_study_file(tmp_path / "study.toml", study)), "--yes"], ["prepare"]):
        done = command(path, *words)
        assert done.exit_code == 0, done.output + done.stderr
    monkeypatch.setenv(ENVIRONMENT, str(path))
    return path, study


def ask(content: RecordDict, context: Context = CONTEXT) -> Message:
    return make_client_app(site_from_environment)(Message(content, dst_node_id=5, message_type="train"), context)


@pytest.mark.parametrize("section", ["", "[model]", "[aggregation]", "[training]"])
def test_a_study_that_asks_for_tensors_outside_the_manifest_cannot_be_approved(
    section: str, hospital: Path, make_study, tmp_path: Path
) -> None:
    path, file = write_site_file(tmp_path, hospital), write_study_file(tmp_path / "study.toml", make_study())
    text, asked = file.read_text(), 'tensors = ["backbone.*"]\n'
    assert section in text
    file.write_text(text.replace(f"{section}\n", f"{section}\n{asked}") if section else asked + text)
    done = command(path, "approve", str(file), "--yes")
    assert done.exit_code == 1
    assert "ICM201" in done.stderr
    assert "tensors" in done.stderr
    assert not read_approvals(tmp_path / "state")


def test_the_command_shows_what_is_asked_and_what_leaves(hospital: Path, make_study, tmp_path: Path) -> None:
    path = write_site_file(tmp_path, hospital)
    study = make_study(rounds=7, quorum=3, deadline_s=90.0)
    file = write_study_file(tmp_path / "study.toml", study)
    shown = command(path, "approve", str(file), "--yes")
    text = " ".join(shown.output.replace("│", " ").split())
    said = [
        "lesion [1, 255]",
        "12 of 12 images used",
        "no differential privacy",
        "7 of",
        "3 (the coordinator's word)",
        "90 s per round",
    ]
    said += ["out per round", LEAVES, "No study of this name was approved before."]
    assert [word for word in said if word not in text] == []
    assert study.digest in text.replace(" ", "")
    assert installed_digest() in text.replace(" ", "")

    file.write_text(file.read_text().replace("rounds = 7", "rounds = 9"))
    again = " ".join(command(path, "approve", str(file), "--yes").output.split())
    assert "Changed since tiny" in again
    assert "│ rounds │ 7 │ 9 │" in again.replace("┃", "│")
    assert [approval.study.rounds for approval in read_approvals(tmp_path / "state")] == [7, 9]


def test_a_hospital_is_told_of_updates_in_int8(hospital: Path, make_study, tmp_path: Path) -> None:
    path = write_site_file(tmp_path, hospital)
    texts = []
    for form in ("float32", "int8"):
        file = write_study_file(tmp_path / f"{form}.toml", make_study(name=form, update={"form": form}))
        texts.append(" ".join(command(path, "approve", str(file), "--yes").output.replace("│", " ").split()))
    assert [IN_INT8 in text for text in texts] == [False, True]
    floats, bytes_ = (int(re.search(r"in and ([0-9,]+) out", text)[1].replace(",", "")) for text in texts)
    assert 0.25 * floats < bytes_ < 0.3 * floats


def test_without_a_yes_nothing_is_approved(hospital: Path, make_study, tmp_path: Path) -> None:
    path = write_site_file(tmp_path, hospital)
    done = command(path, "approve", str(write_study_file(tmp_path / "study.toml", make_study())))
    assert done.exit_code == 1
    assert "ICM210" in done.stderr
    assert read_approvals(tmp_path / "state") == ()


def test_without_its_line_in_the_log_nothing_is_approved_but_a_withdrawal_stands(
    hospital: Path, make_study, tmp_path: Path
) -> None:
    path, file = write_site_file(tmp_path, hospital), str(write_study_file(tmp_path / "study.toml", make_study()))
    plain = path.read_text()
    path.write_text(plain + '\n[coordinator]\naddress = "localhost:443"\nca = "ca.crt"\nkey = "absent.key"\n')
    done = command(path, "approve", file, "--yes")
    assert (done.exit_code, "ICM205" in done.stderr) == (1, True)
    assert read_approvals(tmp_path / "state") == ()
    signing, _ = path.read_text(), path.write_text(plain)
    assert command(path, "approve", file, "--yes").exit_code == 0
    path.write_text(signing)
    done = command(path, "withdraw", "tiny")
    assert (done.exit_code, "ICM205" in done.stderr, "is withdrawn" in done.stdout) == (1, True, True)
    assert read_approvals(tmp_path / "state")[0].withdrawn_at


def signed(path: Path, key: Path) -> None:
    path.write_text(path.read_text() + f'\n[coordinator]\naddress = "localhost:443"\nca = "ca.crt"\nkey = "{key.name}"\n')
    make_node_key(key)


def events(state: Path) -> list[str]:
    return [entry["event"] for entry in read_log(state)]


def test_a_withdrawal_without_a_usable_key_holds_and_its_missing_line_is_told_and_written_later(
    hospital: Path, make_study, tmp_path: Path
) -> None:
    path, file, state = (
        write_site_file(tmp_path, hospital),
        write_study_file(tmp_path / "study.toml", make_study()),
        tmp_path / "state",
    )
    key = tmp_path / "own.key"
    signed(path, key)
    assert command(path, "approve", str(file), "--yes").exit_code == 0
    whole = key.read_bytes()
    key.write_bytes(whole[:40])
    done = command(path, "withdraw", "tiny")
    assert (done.exit_code, "is withdrawn" in done.stdout, events(state)) == (1, True, ["approved"])
    assert done.stderr.startswith(f"ICM307 {key}: ")
    assert "but the audit log has no line on it" in done.stderr
    assert "withdraw it again" in done.stderr
    assert "ICM316" in command(path, "withdraw", "another").stderr
    key.write_bytes(whole)
    assert (command(path, "withdraw", "tiny").exit_code, events(state)) == (0, ["approved", "withdrawn"])
    assert read_log(state)[-1]["withdrawn_at"] == read_approvals(state)[0].withdrawn_at
    assert "ICM316" in command(path, "withdraw", "tiny").stderr
    assert command(path, "audit", "verify").exit_code == 0


def test_a_site_can_leave_though_the_disk_is_full(
    hospital: Path, make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = write_site_file(tmp_path, hospital), tmp_path / "state"
    file = str(write_study_file(tmp_path / "study.toml", make_study()))
    assert command(path, "approve", file, "--yes").exit_code == 0

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("icmoe.atomic._write", full)
        disk.setattr("icmoe.chain_file._put", full)
        done = command(path, "withdraw", "tiny")
    assert (done.exit_code, "is withdrawn" in done.stdout, "ICM205" in done.stderr) == (1, True, True)
    assert "withdraw it again" not in done.stderr, "there is nothing left to withdraw"
    assert read_approvals(state) == ()
    assert command(path, "approve", file, "--yes").exit_code == 0


def test_a_new_approval_first_writes_the_line_that_a_withdrawal_lacks(hospital: Path, make_study, tmp_path: Path) -> None:
    path, file, state = (
        write_site_file(tmp_path, hospital),
        write_study_file(tmp_path / "study.toml", make_study()),
        tmp_path / "state",
    )
    assert command(path, "approve", str(file), "--yes").exit_code == 0
    withdraw(state, "tiny", NOW)  # and killed there
    assert command(path, "approve", str(file), "--yes").exit_code == 0
    assert events(state) == ["approved", "withdrawn", "approved"]


def test_a_state_that_is_no_folder_is_one_numbered_sentence(hospital: Path, make_study, tmp_path: Path) -> None:
    path, file = write_site_file(tmp_path, hospital), str(write_study_file(tmp_path / "study.toml", make_study()))
    (tmp_path / "state").write_text("a file")
    done = command(path, "approve", file, "--yes")
    assert (done.exit_code, done.stderr.startswith(f"ICM205 {tmp_path / 'state'}: ")) == (1, True)


def test_the_copy_counts_whatever_becomes_of_the_file(ready, tmp_path: Path) -> None:
    path, study = ready
    (tmp_path / "study.toml").unlink()
    assert not ask(request(study)).has_error()
    file = tmp_path / "state/approvals" / f"{study.digest}.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text(file.read_text().replace('"rounds":2', '"rounds":3').replace('"rounds": 2', '"rounds": 3'))
    assert number_of(ask(request(study))) == 321
    assert "ICM321" in command(path, "approvals").stderr


def test_an_approval_is_listed_withdrawn_and_then_refused(ready) -> None:
    path, study = ready
    listed = json.loads(command(path, "approvals", "--json").output)
    assert [(row["study"], row["digest"], row["withdrawn"], row["package"]) for row in listed] == [
        ("tiny", study.digest, None, "as approved")
    ]
    assert command(path, "withdraw", study.digest[:12]).exit_code == 0
    assert number_of(ask(request(study))) == 302
    assert json.loads(command(path, "approvals", "--json").output)[0]["withdrawn"]
    assert "ICM316" in command(path, "withdraw", "tiny").stderr
    events = [entry["event"] for entry in read_log(path.parent / "state")]
    assert events == ["approved", "withdrawn"]


def test_a_changed_package_needs_a_new_approval(ready, monkeypatch: pytest.MonkeyPatch) -> None:
    path, study = ready
    monkeypatch.setattr("fl_client.participant.installed_digest", lambda: BUNDLE)
    assert number_of(ask(request(study))) == 318
    monkeypatch.undo()
    monkeypatch.setenv(ENVIRONMENT, str(path))
    assert not ask(request(study)).has_error()


def test_what_the_run_configuration_says_changes_nothing_at_the_site(ready) -> None:
    _, study = ready
    hostile = {"study": "/etc/passwd", "site": "Birch", "deadline_s": 1e9, "training.learning_rate": 1.0, "rounds": 99}
    context = Context(
        run_id=1, node_id=5, node_config={"site": "Birch", "partition-id": 3}, state=RecordDict(), run_config=hostile
    )
    plain, overridden = ask(request(study)), ask(request(study), context)
    assert {name: array.data for name, array in plain.content["update"].items()} == {
        name: array.data for name, array in overridden.content["update"].items()
    }


def hours_around(now: datetime, *, inside: bool) -> str:
    hour = timedelta(hours=1)
    first, last = (now - hour, now + hour) if inside else (now + hour, now - hour)
    return f"{first:%H:%M}-{last:%H:%M}"


def with_policy(path: Path, policy: str) -> None:
    path.write_text(path.read_text() + f"\npolicy = {policy}")


POLICIES = {
    "quorum": ("{min_quorum = 2}", 319, "quorum is below the site's: 1 (allowed: at least 2)"),
    "privacy": ("{require_dp = true}", 319, "study has no differential privacy"),
    "epsilon": ("{max_epsilon = 8.0}", 319, "epsilon is above the site's: inf (allowed: at most 8)"),
    "labels": ('{labels = ["kidney"]}', 319, "label is not allowed: lesion (allowed: kidney)"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_holds_when_a_study_is_approved_and_again_at_each_message(name: str, ready) -> None:
    path, study = ready
    policy, number, said = POLICIES[name]
    with_policy(path, policy)
    assert number_of(ask(request(study))) == number
    refused = command(path, "approve", str(path.parent / "study.toml"), "--yes")
    assert refused.exit_code == 1
    assert f"ICM{number}" in refused.stderr
    assert said in refused.stderr


@pytest.mark.parametrize(("inside", "number"), [(True, None), (False, 320)])
def test_outside_its_hours_a_site_refuses(inside: bool, number: int | None, ready) -> None:
    path, study = ready
    with_policy(path, f'{{hours = "{hours_around(datetime.now().astimezone(), inside=inside)}", labels = ["lesion"]}}')
    reply = ask(request(study))
    assert (number_of(reply) if reply.has_error() else None) == number
    approved = command(path, "approve", str(path.parent / "study.toml"), "--yes")
    assert approved.exit_code == 0  # a study may be approved at any hour


@given(start=st.integers(0, 1439), length=st.integers(1, 1439), at=st.integers(0, 1439))
def test_hours_hold_from_the_first_minute_to_before_the_last_across_midnight(start: int, length: int, at: int) -> None:
    end = (start + length) % 1440
    policy = parse(Policy, {"hours": f"{start // 60:02d}:{start % 60:02d}-{end // 60:02d}:{end % 60:02d}"}, where="x")
    now = NOW.replace(hour=at // 60, minute=at % 60)
    if (at - start) % 1440 < length:
        require_hour(policy, now)
    else:
        with pytest.raises(IcmoeError, match="ICM320"):
            require_hour(policy, now)


@pytest.mark.parametrize("hours", ["9:00-17:00", "09:00-24:00", "09:00", "09:00-09:00", "09:00-17:60"])
def test_hours_that_are_none_are_refused(hours: str) -> None:
    with pytest.raises(IcmoeError, match="ICM202"):
        parse(Policy, {"hours": hours}, where="x")


def test_the_default_policy_allows_what_the_site_approves(make_study) -> None:
    require_hour(Policy(), NOW)
    assert policy_faults(Policy(), make_study()) == []


def test_the_gpu_share_limits_a_gpu_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append((share, device.type)))
    limit_gpu(Policy(gpu_share=0.5), torch.device("cpu"))
    limit_gpu(Policy(), torch.device("cuda"))
    limit_gpu(Policy(gpu_share=0.5), torch.device("cuda"))
    assert limits == [(0.5, "cuda")]


def test_changes_name_each_setting_that_differs(make_study) -> None:
    old = make_study()
    new = make_study(rounds=3, training={"batch_size": 8})
    assert changes(old, old) == []
    assert changes(old, new) == [("rounds", "2", "3"), ("training.batch_size", "4", "8")]


def test_equal_trees_make_equal_bundles_and_any_change_shows(tmp_path: Path) -> None:
    files = bundle_files()
    assert {name.split("/")[0] for name in files} == {*PACKAGES, "pyproject.toml"}
    for name, content in reversed(files.items()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (0, 0))
    assert bundle_files(tmp_path) == files
    assert bundle_digest(bundle_files(tmp_path)) == bundle_digest(files)
    (tmp_path / "fl_client/extra.py").write_text("")
    (tmp_path / "fl_client/app.py").write_bytes(files["fl_client/app.py"] + b" ")
    assert differences(files, bundle_files(tmp_path)) == ["fl_client/app.py", "fl_client/extra.py"]
    assert bundle_digest(bundle_files(tmp_path)) != bundle_digest(files)


def test_what_is_approved_holds_all_three_packages_and_their_templates(tmp_path: Path) -> None:
    for package in INSTALLED:
        for path in (one for one in (ROOT / package).rglob("*") if one.suffix in {*KINDS, ".pyc"}):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert installed_digest(tmp_path) == installed_digest()
    seen = {installed_digest()}
    for name in ("icmoe/privacy.py", "icmoe/model_card.md.j2", "fl_client/app.py", "fl_server/app.py"):
        with (tmp_path / name).open("ab") as file:
            file.write(b" ")
        seen.add(installed_digest(tmp_path))
    assert len(seen) == 5


def test_the_name_of_a_site_is_not_taken_from_elsewhere(ready) -> None:
    path, study = ready
    site = site_from_environment(CONTEXT, study.digest)
    assert site == replace(site, name="Alder", studies=(study,), audited=True, exact_counts=False)
    assert site.state_folder == path.parent / "state"
