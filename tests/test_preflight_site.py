"""The preflight of a site: keys, CA, site file, study, data and room; each fault has its number and remedy."""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import stat
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from loopback import HOSTS, Authority, closed_port, http_server
from typer.testing import CliRunner

from fl_client import check, cli, preflight
from fl_client.flower_private import OTHER_APIS
from fl_client.leaves import LEAVES
from fl_client.preflight import run_preflight

if TYPE_CHECKING:
    from hospitals import Hospital

pytest_plugins = ["hospitals"]

# Keys and CA


def pem(key: Any, layout: PrivateFormat = PrivateFormat.OpenSSH) -> bytes:
    return key.private_bytes(Encoding.PEM, layout, NoEncryption())


EC = ec.generate_private_key(ec.SECP384R1())
BAD_KEYS = {
    "RSA": lambda: pem(rsa.generate_private_key(65537, 2048)),
    "Ed25519": lambda: pem(ed25519.Ed25519PrivateKey.generate()),
    "DSA": lambda: pem(dsa.generate_private_key(1024), PrivateFormat.TraditionalOpenSSL),
    "PEM": lambda: pem(EC, PrivateFormat.PKCS8),
    "a public key": lambda: EC.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    "garbage": lambda: b"\xff\x00garbage",
    "cut short": lambda: pem(EC)[:200],
    "empty": lambda: b"",
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_key_of_the_wrong_kind(name: str, hospital: Hospital, authority: Authority) -> None:
    hospital.key.write_bytes(BAD_KEYS[name]())
    with http_server(tls=authority.server(*HOSTS)) as (port, _):
        fault = hospital.at(port).only_fault()
    assert (fault["number"], fault["name"]) == (307, "key")
    assert "fl_client --site NAME init" in fault["sentence"]


def test_a_key_with_a_passphrase(hospital: Hospital) -> None:
    hospital.key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", hospital.key], check=True, timeout=20)
    found = {fault["number"]: fault for fault in hospital.at(closed_port()).faults()}
    assert set(found) == {307, 311}
    assert "passphrase" in found[307]["value"]


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_nist_curve_serves(curve: ec.EllipticCurve, hospital: Hospital, authority: Authority) -> None:
    hospital.key.write_bytes(pem(ec.generate_private_key(curve)))
    with http_server(tls=authority.server(*HOSTS)) as (port, _):
        assert hospital.at(port).faults() == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610])
def test_a_key_that_others_may_touch(mode: int, hospital: Hospital, authority: Authority) -> None:
    hospital.key.chmod(mode)
    with http_server(tls=authority.server(*HOSTS)) as (port, asked):
        fault = hospital.at(port).only_fault()
    assert (fault["number"], fault["value"]) == (306, f"{mode:04o}")
    assert not [line for line in asked if "activate-node" in line]  # it was not used


def test_a_key_or_ca_that_is_not_a_file(hospital: Hospital, authority: Authority) -> None:
    with http_server(tls=authority.server(*HOSTS)) as (port, _):
        hospital.at(port)
        for path, name in ((hospital.key, "key"), (hospital.ca, "CA")):
            data, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
            for make in (Path.mkdir, os.mkfifo, lambda path: path.write_bytes(b"x" * 100_000), lambda path: None):
                path.unlink()
                make(path)
                fault = hospital.only_fault()
                assert (fault["number"], fault["name"]) == (205, name)
                if path.exists():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                path.write_bytes(data)
                path.chmod(mode)
        hospital.ca.write_text("rubbish")
        assert hospital.only_fault()["number"] == 308


# Site file


def test_an_unknown_site_is_told_which_are_known(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(hospital.folder))
    sites = hospital.folder / "icmoe" / "sites"
    sites.mkdir(parents=True)
    (sites / "Birch.toml").write_text("")
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "check"])
    assert done.exit_code == 1
    assert "ICM205" in done.output
    assert "sites known here: Birch" in done.output
    assert "init --kit" in done.output


HARM = {
    "missing": (lambda path: path.unlink(), 205),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), 205),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), 204),
    "no TOML": (lambda path: path.write_text("name = "), 204),
    "an unknown key": (lambda path: path.write_text('colour = "x"\n' + path.read_text()), 201),
    "an unknown key of the coordinator": (lambda path: path.write_text(path.read_text() + 'adress = "x"\n'), 201),
    "a wrong type": (lambda path: path.write_text("threads = true\n" + path.read_text()), 202),
    "an address with a path": (lambda path: path.write_text(path.read_text().replace('ress = "', 'ress = "https://')), 202),
    "no address": (lambda path: path.write_text(path.read_text().replace("address = ", "health = ")), 203),
    "another site": (lambda path: path.write_text(path.read_text().replace('"Alder"', '"Birch"', 1)), 210),
}


@pytest.mark.parametrize("name", HARM)
@pytest.mark.parametrize("command", ["check", "it-sheet"])
def test_a_bad_site_file_is_one_numbered_sentence(name: str, command: str, hospital: Hospital) -> None:
    harm, number = HARM[name]
    hospital.at(closed_port())
    harm(hospital.path)
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(hospital.path), command])
    assert done.exit_code == 1
    assert f"ICM{number} " in done.output
    assert "Traceback" not in done.output


def test_a_site_file_that_may_not_be_read(hospital: Hospital) -> None:
    hospital.run()  # whatever is imported late is imported now
    hospital.path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)  # root may read everything
    try:
        found = run_preflight(hospital.path)
    finally:
        os.seteuid(user)
    assert [(line.name, line.fault.number) for line in found if line.fault] == [("site file", 205)]
    assert "Permission denied" in str(found[0].fault)


# Machine, study, data


def test_every_fault_is_reported_at_once_with_its_remedy(hospital: Hospital) -> None:
    hospital.approves(digest_in(hospital.folder / "study.toml"), "0" * 64)
    hospital.text = hospital.text.replace('cache = "cache"', 'cache = "other"\ndevice = "cuda:9"')
    hospital.key.chmod(0o644)
    numbers = [fault["number"] for fault in hospital.at(closed_port()).faults()]
    assert numbers == [306, 311, 206, 207, 211]
    code, output = hospital.run()
    assert code == 1
    assert all(f"\nICM{number} " in output for number in numbers)


def digest_in(study: Path) -> str:
    return study.read_text().split('digest = "')[1][:64]


def test_another_backbone_missing_features_and_no_approved_study(hospital: Hospital) -> None:
    digest = digest_in(hospital.folder / "study.toml")
    hospital.approves(digest, "0" * 64)
    assert {fault["number"] for fault in hospital.faults()} == {206, 207}  # features are of one backbone
    hospital.approves("0" * 64, digest)
    shutil.rmtree(hospital.folder / "cache")
    fault = hospital.only_fault()
    assert (fault["number"], fault["name"]) == (207, "features")
    assert fault["value"].startswith("0 of ")
    shutil.rmtree(hospital.folder / "state/approvals")
    assert hospital.only_fault()["number"] == 316


@pytest.mark.parametrize("left", [0, 100, -1])
def test_features_that_were_cut_off_are_not_there(left: int, hospital: Hospital) -> None:
    entry = next((hospital.folder / "cache").rglob("*.safetensors"))
    whole = entry.read_bytes()
    entry.write_bytes(whole[:left])
    fault = hospital.only_fault()
    assert (fault["number"], fault["name"], fault["value"]) == (207, "features", "17 of 18 views")
    assert "prepare." in fault["sentence"]
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(hospital.path), "prepare"])
    assert (done.exit_code, entry.read_bytes()) == (0, whole), done.output


def test_a_study_for_tests_only_and_a_folder_without_images(hospital: Hospital) -> None:
    hospital.path.write_text(hospital.text.replace("allow_test_only = true", "allow_test_only = false"))
    assert hospital.only_fault()["number"] == 212
    data = next(line for line in hospital.text.splitlines() if line.startswith("data"))
    hospital.path.write_text(hospital.text.replace(data, 'data = "nowhere"'))
    assert hospital.only_fault()["number"] == 109


def test_a_full_disk_is_a_fault_and_little_memory_a_warning(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "RESERVE_BYTES", 10**18)
    assert [fault["number"] for fault in hospital.faults()] == [315, 315]
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "MEMORY_BYTES", 10**18)
    assert hospital.run()[0] == 0
    assert [(fault["number"], fault["ok"]) for fault in hospital.faults()] == [(315, True)]


def test_a_study_that_was_not_prepared_yet_does_not_keep_the_site_from_the_others(hospital: Hospital) -> None:
    study = hospital.folder / "second.toml"
    text = (hospital.folder / "study.toml").read_text()
    study.write_text(text.replace('views = ["identity"', 'views = ["flip"').replace("image_size = 32", "image_size = 64"))
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(hospital.path), "approve", str(study), "--yes"])
    assert done.exit_code == 0, done.output
    code, _ = hospital.run()
    (fault,) = hospital.faults()
    assert (code, fault["number"], fault["ok"]) == (0, 207, True)
    assert "others go on" in fault["sentence"]
    shutil.rmtree(hospital.folder / "cache")
    assert hospital.run()[0] == 1, "no study is ready"


def test_what_one_study_lacks_keeps_no_other_from_being_prepared(hospital: Hospital) -> None:
    second = hospital.folder / "second.toml"  # the latest is prepared first
    second.write_text((hospital.folder / "study.toml").read_text().replace('"sam-vit-test"', '"sam-vit-b"'))
    shutil.rmtree(hospital.folder / "cache")
    words = ["--site", "Alder", "--config", str(hospital.path)]
    assert CliRunner().invoke(cli.app, [*words, "approve", str(second), "--yes"]).exit_code == 0
    done = CliRunner().invoke(cli.app, [*words, "prepare"])
    assert (done.exit_code, "ICM207" in done.stderr) == (1, True), done.output
    assert "views encoded" in done.stdout


def test_the_it_sheet_names_host_port_files_and_what_never_leaves(hospital: Hospital) -> None:
    hospital.at("coordinator.example:8443")
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(hospital.path), "it-sheet"])
    assert done.exit_code == 0
    for words in ("coordinator.example | TCP 8443, outbound only", str(hospital.key), "No inbound port", "What never leaves"):
        assert words in done.output
    assert LEAVES[1:] in " ".join(done.output.split())
    assert all(path in done.output for _, path in OTHER_APIS), "whoever watches the network is told of every request"
    hospital.path.write_text(hospital.text)
    done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(hospital.path), "it-sheet"])
    assert (done.exit_code, done.output[:7]) == (1, "ICM203 ")


def test_readme_says_what_leaves_in_the_same_words() -> None:
    assert LEAVES in " ".join((Path(__file__).parents[1] / "README.md").read_text().split())


def test_a_wait_has_a_deadline_and_passes_errors_on() -> None:
    assert check.within(5, lambda: 3) == 3
    with pytest.raises(TimeoutError):
        check.within(0.05, lambda: time.sleep(5))
    with pytest.raises(ssl.SSLError):
        check.within(5, lambda: (_ for _ in ()).throw(ssl.SSLError()))


def test_a_weights_file_is_compared_with_the_study_before_it_is_needed(hospital: Hospital) -> None:
    digest = digest_in(hospital.folder / "study.toml")
    study = hospital.folder / "study.toml"
    study.write_text(study.read_text().replace('"sam-vit-test"', '"sam-vit-b"'))
    hospital.approves("test_only = true", "test_only = false")
    numbers = {fault["name"]: fault for fault in hospital.faults()}
    assert (numbers["backbone"]["number"], "--checkpoint" in numbers["backbone"]["sentence"]) == (207, True)
    hospital.path.write_text(hospital.text + '\ncheckpoint = "weights.pth"\n')
    assert next(fault for fault in hospital.faults() if fault["name"] == "backbone")["number"] == 207
    (hospital.folder / "weights.pth").write_bytes(b"x")
    fault = next(fault for fault in hospital.faults() if fault["name"] == "backbone")
    assert (fault["number"], fault["limit"]) == (206, digest)
    hospital.approves(digest, hashlib.sha256(b"x").hexdigest())
    assert "backbone" not in {fault["name"] for fault in hospital.faults()}
