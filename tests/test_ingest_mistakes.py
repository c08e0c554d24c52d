"""What a person does wrong at the first ingest: each is one numbered sentence, and what was there before stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from test_quality import site_file, write_series
from typer.testing import CliRunner

from fl_client import cli
from fl_client.dry_run import passing_folder, remove_killed
from icmoe.data.ingest.pseudonyms import SECRET_FILE


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a site file whose export holds two patients."""
    write_series(tmp_path / "export/a", "one", seed=1)
    write_series(tmp_path / "export/b", "two", seed=2)
    return site_file(tmp_path, tmp_path / "export", "[128, 255]")


def command(site: Path, *words: str) -> str:
    """Return what the command prints, output and errors; a traceback fails the test."""
    done = CliRunner().invoke(cli.app, ["--site", "Elm", "--config", str(site), *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def ingest(site: Path, *words: str) -> str:
    """Return what ingest prints without running the backbone."""
    return command(site, "ingest", "--no-encode", *words)


def set_key(site: Path, line: str) -> None:
    """Add a line to the section [ingest], which is the file's last."""
    site.write_text(f"{site.read_text()}{line}\n")


def test_an_empty_export_does_not_empty_the_index(site: Path) -> None:
    assert "of 8 images used" in ingest(site)
    (site.parent / "export").rename(site.parent / "elsewhere")
    assert "ICM109" in ingest(site)
    (site.parent / "export").mkdir()
    assert "export holds no file" in ingest(site)
    assert '"images_found": 8' in command(site, "show", "--json")


def test_what_was_changed_in_the_site_file_and_not_ingested_is_told_before_the_site_takes_part(site: Path) -> None:
    changed = "[ingest] in the site file was changed since ingest was run. What was read before is used."
    splits = site.parent / "split.csv"
    ingest(site)
    assert changed not in command(site, "check")
    for line, text in (('exclude = ["b/*"]', ""), ('split_file = "split.csv"', "patient,split\none,train\n")):
        set_key(site, line)
        splits.write_text(text)
        assert f"ICM131 {site}: {changed}" in command(site, "check").replace("\n", " ")
        ingest(site)
        assert changed not in command(site, "check")
    splits.write_text("patient,split\none,test\n")
    assert changed in command(site, "check")
    set_key(site, "processes = 1")
    ingest(site)
    set_key(site, 'store = "./ingest"')
    assert changed not in command(site, "check"), "these decide nothing about what is used"


def test_a_store_under_another_name_without_its_content_is_refused_and_one_that_was_moved_is_taken(site: Path) -> None:
    before = ingest(site)
    assert "of 8 images used" in before
    text = site.read_text()
    set_key(site, 'store = "larger/ingest"')
    for words in (("ingest", "--no-encode"), ("forget", "one")):
        said = command(site, *words).replace("\n", " ")
        assert said.startswith(f"ICM129 {site.parent / 'larger/ingest'}: the site's secret is not here. Nothing was read. Move ")
        assert not (site.parent / "larger").exists()
    site.write_text(text)
    assert "of 8 images used" in ingest(site)
    set_key(site, 'store = "larger/ingest"')
    (site.parent / "larger").mkdir()
    (site.parent / "ingest").rename(site.parent / "larger/ingest")
    assert "of 8 images used" in ingest(site)
    moved = site.read_text()
    site.write_text(moved.replace("larger/ingest", "third"))
    assert f"Move {site.parent / 'larger/ingest'} there" in ingest(site).replace("\n", " "), "where it lay last"
    site.write_text(moved)
    (site.parent / "larger/ingest" / SECRET_FILE).write_bytes(bytes(32))
    assert "another secret of the site lies here" in ingest(site).replace("\n", " ")
    next(site.parent.rglob("ingest-secret.json")).unlink()
    assert "another secret" not in ingest(site).replace("\n", " ")


def test_a_second_study_with_other_labels_is_not_told_that_nobody_ever_ran_ingest(site: Path) -> None:
    assert "ingest has not been run. Nothing" in command(site, "show")
    ingest(site)
    file = site.parent / "second.toml"
    file.write_text((site.parent / "study.toml").read_text().replace('"lesion"', '"tumour"'))
    said = command(site, "approve", str(file), "--yes")
    assert "The site cannot take part in it before. Run fl_client --site Elm ingest." in said.split("is approved at Elm.")[1]
    shown = command(site, "show")
    assert "ingest has not been run since a study with these labels was approved" in shown
    assert "│ 8     │ 6    │" in shown, "found and used of the first study"
    for words in (("check",), ("show",), ("prepare",)):
        assert "Run fl_client --site Elm ingest." in " ".join(command(site, *words).split()), words
    ingest(site)
    assert "ICM131" not in command(site, "show")
    assert command(site, "approve", str(file), "--yes").endswith("is approved at Elm.\n")
    assert command(site, "forget", "one").startswith("3 images and "), "each once, though two indexes had it"


def test_a_folder_that_cannot_be_read_does_not_pass_for_a_deleted_one(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ingest(site)
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patch:  # the tests may run as root, whom permissions do not bind
        patch.setattr(os, "scandir", scandir)
        refused = ingest(site)
        assert "ICM109" in refused
        assert "1, Permission denied" in refused
        set_key(site, 'exclude = ["b/*"]')
        assert "of 4 images used" in ingest(site)
    site.write_text(site.read_text().replace('exclude = ["b/*"]\n', ""))
    assert ingest(site) == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file or directory. Nothing was read. Correct split_file"),
        ("case,part\none,train\n", "column patient or split is missing"),
        ("patient;split\none;train\n", "column patient or split is missing"),
        ("patient,split\none,trian\n", "row 1"),
    ],
)
def test_a_bad_split_file_is_told_by_what_is_wrong_with_it(site: Path, text: str | None, told: str) -> None:
    if text is not None:
        (site.parent / "split.csv").write_text(text)
    set_key(site, 'split_file = "split.csv"')
    printed = ingest(site)
    assert "ICM110" in printed
    assert told in printed
    assert "slice, image, mask" not in printed  # the columns of another kind of split file


def test_the_ingest_is_not_kept_inside_the_export(site: Path) -> None:
    set_key(site, 'store = "export/ingest"')
    assert "ICM210" in ingest(site)
    assert not (site.parent / "export/ingest").exists()


def test_what_cannot_be_kept_is_a_numbered_sentence_and_the_next_run_goes_on(site: Path) -> None:
    ingest(site)
    (store,) = (path for path in (site.parent / "ingest").iterdir() if path.is_dir())
    (store / "frames").rename(store / "aside")
    (store / "frames").write_text("a file where the folder should be")
    write_series(site.parent / "export/c", "three", seed=3)
    assert "ICM129" in ingest(site)
    (store / "frames").unlink()
    (store / "aside").rename(store / "frames")
    assert "of 12 images used" in ingest(site)


def test_a_dry_run_before_the_first_ingest_says_that_its_hashes_pass(site: Path) -> None:
    assert "will differ" in ingest(site, "--dry-run")
    assert not (site.parent / "ingest" / SECRET_FILE).exists()
    assert "will differ" not in ingest(site)
    assert "will differ" not in ingest(site, "--dry-run")


def test_an_allowed_series_that_is_not_there_is_told(site: Path) -> None:
    set_key(site, 'allow = ["S-0123456789abcdef"]')
    assert "ICM210 allow names series that are not there: S-0123456789abcdef" in ingest(site)


def test_without_a_training_image_ingest_says_so(site: Path) -> None:
    site.write_text(site.read_text().replace("[1.0, 0.0, 0.0]", "[0.0, 0.0, 1.0]"))
    assert "ICM108" in ingest(site)


def test_forgetting_somebody_unknown_does_not_claim_a_removal(site: Path) -> None:
    ingest(site)
    assert "No image of this patient was in use" in command(site, "forget", "thre")
    assert "3 images and 0 cached views removed" in command(site, "forget", "one")


@pytest.mark.parametrize("patient", ["", "  "])
def test_forgetting_nobody_is_a_mistake(site: Path, patient: str) -> None:
    ingest(site)
    done = CliRunner().invoke(cli.app, ["--site", "Elm", "--config", str(site), "forget", patient])
    assert done.exit_code == 1
    assert "ICM210 forget: no patient is named" in done.output


@pytest.mark.parametrize("name", ["x" * 300, "round/in/circles"])
def test_an_export_that_cannot_be_looked_at_is_told(site: Path, name: str) -> None:
    (site.parent / "round").symlink_to("round")
    site.write_text(site.read_text().replace(str(site.parent / "export"), str(site.parent / name)))
    assert "ICM109" in ingest(site)


def test_a_letter_in_two_parts_is_the_same_letter(site: Path) -> None:
    write_series(site.parent / "export/c", unicodedata.normalize("NFC", "M\u00fcller"), seed=3, SpecificCharacterSet="ISO_IR 192")
    write_series(site.parent / "export/d", unicodedata.normalize("NFD", "M\u00fcller"), seed=4, SpecificCharacterSet="ISO_IR 192")
    assert "3 patients" in ingest(site)
    assert "6 images and 0 cached views removed" in command(site, "forget", " M\u00fcLLER")


def test_a_patient_may_be_forgotten_before_any_study_is_approved(site: Path) -> None:
    (approval,) = (site.parent / "state").glob("*/*.json")
    kept = approval.read_bytes()
    approval.unlink()
    assert "not read from now on" in command(site, "forget", "one")
    approval.write_bytes(kept)
    assert "1 patient\n" in ingest(site)


def test_forgetting_needs_an_ingest(site: Path) -> None:
    site.write_text('name = "Elm"\ndata = "export"\n')
    assert "ICM203" in command(site, "forget", "one")


def test_forgetting_names_who_else_has_the_pictures(site: Path) -> None:
    write_series(site.parent / "export/c", "one again", seed=1)
    ingest(site)
    (other,) = re.findall(r"P-[0-9a-f]{16}", command(site, "forget", "one"))
    assert other in ingest(site), "the pictures are used under the other number now"
    assert "3 images" in command(site, "forget", other)
    assert "1 patient\n" in ingest(site)


def stores(site: Path) -> list[Path]:
    return [path for path in (site.parent / "ingest").iterdir() if (path / "frames").is_dir()]


@pytest.mark.parametrize("harm", ["no index", "empty index", "no secret"])
def test_forgetting_does_not_pass_for_done_where_nobody_can_look(site: Path, harm: str) -> None:
    ingest(site)
    (store,) = stores(site)
    if harm == "no secret":
        (site.parent / "ingest" / SECRET_FILE).unlink()
    else:
        (store / "index.sqlite").unlink()
        if harm == "empty index":
            (store / "index.sqlite").touch()
    done = CliRunner().invoke(cli.app, ["--site", "Elm", "--config", str(site), "forget", "one"])
    assert done.exit_code == 1
    assert "ICM129" in done.output
    assert (site.parent / "ingest" / SECRET_FILE).exists() == (harm != "no secret"), "no new secret is made"


@pytest.mark.parametrize("gone", ["secret", "secret and index", "everything"])
@pytest.mark.parametrize("noted", [True, False])
def test_a_lost_secret_is_not_made_anew_beside_an_ingest(site: Path, gone: str, noted: bool) -> None:
    ingest(site)
    command(site, "forget", "one")
    if gone != "secret":
        shutil.rmtree(stores(site)[0])
    (site.parent / "ingest" / SECRET_FILE).unlink()
    if gone == "everything":
        shutil.rmtree(site.parent / "ingest")
    if not noted:  # as by an earlier version
        (site.parent / "state/ingest-secret.json").unlink()
    lost = noted or gone != "everything"
    assert ("secret of the site is lost" in ingest(site)) == lost
    assert (site.parent / "ingest" / SECRET_FILE).exists() != lost


@pytest.mark.parametrize("harm", ["file", "loop", "approvals"])
@pytest.mark.parametrize("words", [["audit", "verify"], ["status"], ["withdraw", "tiny"], ["ledger"]])
def test_a_state_folder_that_is_none_does_not_pass_for_an_empty_one(site: Path, harm: str, words: list[str]) -> None:
    state = site.parent / "state"
    if harm == "approvals":
        (state / "approvals").rename(state / "aside")
        (state / "approvals").write_text("x")
    else:
        state.rename(site.parent / "aside")
        state.symlink_to("state") if harm == "loop" else state.write_text("x")
    assert "ICM205" in command(site, *words)


def test_the_store_may_not_be_a_link_to_itself(site: Path) -> None:
    (site.parent / "ingest").symlink_to("ingest")
    assert "ICM129" in ingest(site)


def end_dry_run(site: Path, number: int, passing: Path) -> int:
    """End a dry run by a signal when it has written a picture, and return its exit code."""
    code = f"""
import os, sys
import fl_client.ingesting as ingesting
def ingest(export, **_):
    export.store.mkdir(parents=True)
    (export.store / "x").touch()
    os.kill(os.getpid(), {int(number)})
ingesting.ingest = ingest
from fl_client.cli import main
sys.argv = ["fl_client", "--site", "Elm", "--config", {str(site)!r}, "ingest", "--dry-run"]
main()
"""
    environment = {**os.environ, "TMPDIR": str(passing)}
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False).returncode


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT])
def test_a_dry_run_that_is_ended_keeps_no_picture(site: Path, number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    passing = tmp_path_factory.mktemp("passing")
    assert end_dry_run(site, number, passing) == 128 + number
    assert not list(passing.glob("icmoe-dry-run-*"))


@pytest.mark.parametrize("words", [["ingest", "--no-encode"], ["ingest", "--dry-run"], ["forget", "one"]])
def test_what_a_killed_dry_run_left_goes_with_the_next_command_and_nothing_that_lives_does(
    site: Path, words: list[str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing, aside = tmp_path_factory.mktemp("passing"), tmp_path_factory.mktemp("aside")
    assert end_dry_run(site, signal.SIGKILL, passing) == -signal.SIGKILL
    (left,) = passing.glob("icmoe-dry-run-*")
    assert list(left.rglob("x"))
    monkeypatch.setattr("tempfile.tempdir", str(passing))
    (passing / "icmoe-dry-run-locked-link").symlink_to(aside)
    with passing_folder() as living:
        command(site, *words)
        assert (left.exists(), living.exists(), aside.exists()) == (False, True, True)
    assert not living.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give a folder to another user")
def test_what_another_user_left_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "icmoe-dry-run-locked-other").mkdir()
    os.chown(tmp_path / "icmoe-dry-run-locked-other", 12345, -1)
    remove_killed()
    assert list(tmp_path.iterdir())


def test_a_dry_run_of_a_version_without_locks_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    running, killed = (tmp_path / f"icmoe-dry-run-{name}" for name in ("running1", "killed_1"))
    for folder in (running, killed):
        folder.mkdir()
    os.utime(killed, (0, 0))
    remove_killed()
    assert (running.exists(), killed.exists()) == (True, False)


def test_which_commands_no_terminal(site: Path) -> None:
    write_series(site.parent / "export/c\x1b[31m\nx", "three", seed=3)
    (pseudonym,) = set(re.findall(r"P-[0-9a-f]{16}", ingest(site))) - set(re.findall(r"P-[0-9a-f]{16}", exclude(site)))
    lines = command(site, "which", pseudonym).splitlines()
    assert all(line.startswith(r"c\x1b[31m\nx/") for line in lines)
    assert lines


def exclude(site: Path) -> str:
    """Return what ingest prints without the third patient, and take it in again."""
    set_key(site, 'exclude = ["c*"]')
    printed = ingest(site)
    site.write_text(site.read_text().replace('exclude = ["c*"]\n', ""))
    ingest(site)
    return printed


def test_a_withdrawal_that_cannot_be_printed_is_on_record(site: Path) -> None:
    words = [sys.executable, "-m", "fl_client.cli", "--site", "Elm", "--config", str(site), "withdraw", "tiny"]
    code = "import sys; from fl_client.cli import main; sys.argv = sys.argv[1:]; main()"
    with Path("/dev/full").open("w") as full:
        subprocess.run([sys.executable, "-c", code, *words[2:]], stdout=full, stderr=subprocess.DEVNULL, timeout=120, check=False)
    assert "withdrawn" in command(site, "audit")


def test_a_site_file_may_begin_with_a_byte_order_mark(site: Path) -> None:
    site.write_bytes(b"\xef\xbb\xbf" + site.read_bytes())
    assert "of 8 images used" in ingest(site)


def test_a_patient_of_the_split_file_who_is_not_there_is_told(site: Path) -> None:
    (site.parent / "split.csv").write_text("patient,split\none,val\ntow,train\n ONE,val\n")
    set_key(site, 'split_file = "split.csv"')
    assert "ICM110 split_file names patients without an image in the export: 1." in ingest(site)
    assert "ICM110" in ingest(site), "told again where nothing changed"
    text = "patient,split\none,val\ntwo,train\n"
    (site.parent / "split.csv").write_text(text)
    assert "ICM110" not in ingest(site)
    (site.parent / "split.csv").write_text(text, encoding="utf-16")
    assert "ICM110 split.csv: file is text in UTF-16" in ingest(site)
