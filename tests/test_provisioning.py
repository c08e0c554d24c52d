"""A consortium from one file: certificates that strict verifiers accept, and a second run that keeps what is there."""

from __future__ import annotations

import datetime as dt
import json
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from consortium import TEXT, make, numbers, serve, snapshot, write_consortium
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from loopback import NOW, Authority

from fl_server.certificates import missing_names, parse_key
from fl_server.consortium import read_consortium
from icmoe.atomic import write_atomically
from icmoe.errors import IcmoeError
from icmoe.joining import (
    parse_certificate,
)


def test_a_consortium_has_exactly_the_agreed_files_and_its_secrets_are_private(tmp_path: Path) -> None:
    done = make(tmp_path)
    files = set(snapshot(tmp_path / "out"))
    kits = {f"sites/{site}/kit/{name}" for site in ("Alder", "Birch") for name in ("kit.toml", "ca.crt", "SHA256SUMS")}
    secret = {"ca/ca.key", "coordinator/server.key", "coordinator/superexec.secret"}
    open_files = {"ca/ca.crt", "coordinator/ca.crt", "coordinator/server.crt", "consortium.toml"}
    assert files == kits | secret | open_files
    assert {stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in secret} == {0o600}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert set(done.kits) == {"Alder", "Birch"}
    assert done.kits["Alder"] != done.kits["Birch"]
    assert not [name for name in kits if b"PRIVATE" in (tmp_path / "out" / name).read_bytes()]


def test_openssl_accepts_the_chain_strictly_and_for_every_name(tmp_path: Path) -> None:
    make(tmp_path)
    folder = tmp_path / "out"
    for kind, name in (("hostname", "coordinator.example"), ("hostname", "localhost"), ("ip", "127.0.0.1"), ("ip", "10.1.2.3")):
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", folder / "ca" / "ca.crt"]
        subprocess.run([*command, f"-verify_{kind}", name, folder / "coordinator" / "server.crt"], check=True, timeout=20)
    leaf = x509.load_pem_x509_certificates((folder / "coordinator" / "server.crt").read_bytes())
    assert [certificate.subject == certificate.issuer for certificate in leaf] == [False, True]  # leaf, then CA
    assert leaf[0].not_valid_before_utc < NOW < leaf[0].not_valid_after_utc


def test_checksums_are_what_sha256sum_checks(tmp_path: Path) -> None:
    make(tmp_path)
    kit = tmp_path / "out" / "sites" / "Alder" / "kit"
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=kit, check=True, timeout=20)


def test_a_second_run_touches_nothing_and_a_new_site_touches_no_other(tmp_path: Path) -> None:
    make(tmp_path)
    before = snapshot(tmp_path / "out")
    assert make(tmp_path).changes == ()
    assert snapshot(tmp_path / "out") == before
    make(tmp_path, "Alder", "Birch", "Cedar")
    after = snapshot(tmp_path / "out")
    assert {name for name in after if before.get(name) != after[name]} == {
        "consortium.toml",
        *(f"sites/Cedar/kit/{name}" for name in ("kit.toml", "ca.crt", "SHA256SUMS")),
    }
    assert any("Birch is not in" in note and "revoke" in note for note in make(tmp_path, "Alder", "Cedar").notes)
    assert (tmp_path / "out" / "sites" / "Birch" / "kit").is_dir()  # taken away by nobody


@pytest.mark.parametrize(
    "name", ["coordinator/server.crt", "coordinator/server.key", "coordinator/superexec.secret", "ca/ca.crt"]
)
def test_what_is_missing_is_made_again_and_fits(name: str, tmp_path: Path) -> None:
    make(tmp_path)
    folder = tmp_path / "out"
    (folder / name).unlink()
    make(tmp_path)
    leaf, ca = x509.load_pem_x509_certificates((folder / "coordinator" / "server.crt").read_bytes())
    leaf.verify_directly_issued_by(ca)
    key = parse_key((folder / "coordinator" / "server.key").read_bytes(), where="")
    assert key.public_key() == leaf.public_key()
    assert ca.public_bytes(Encoding.PEM) == (folder / "sites" / "Birch" / "kit" / "ca.crt").read_bytes()


def test_a_secret_that_was_emptied_starts_nothing_and_is_made_again(tmp_path: Path) -> None:
    make(tmp_path)
    secret = tmp_path / "out/coordinator/superexec.secret"
    secret.write_bytes(b"")
    code, output = serve("superlink", "--home", tmp_path / "out")
    assert (code, "ICM326" in output, "superexec.secret" in output) == (1, True, True), output
    make(tmp_path)
    assert len(secret.read_bytes()) == 64
    assert serve("superlink", "--home", tmp_path / "out")[0] == 0


def test_a_further_name_needs_a_new_certificate_but_no_new_kit(tmp_path: Path) -> None:
    make(tmp_path)
    before = snapshot(tmp_path / "out")
    make(tmp_path, text=TEXT.replace('["10.1.2.3"]', '["10.1.2.3", "other.example"]'))
    after = snapshot(tmp_path / "out")
    assert {name for name in after if before.get(name) != after[name]} == {"consortium.toml", "coordinator/server.crt"}
    leaf = parse_certificate((tmp_path / "out" / "coordinator" / "server.crt").read_bytes(), where="")
    assert missing_names(leaf, ["other.example", "10.1.2.3", "localhost", "absent.example"]) == {"absent.example"}


def test_renewal_happens_on_request_and_only_when_it_is_due(tmp_path: Path) -> None:
    make(tmp_path)
    before = snapshot(tmp_path / "out")
    later = NOW + dt.timedelta(days=340)
    assert "expires soon" in make(tmp_path, now=later).notes[-1]
    assert make(tmp_path, renew=True).changes == ()
    assert snapshot(tmp_path / "out") == before
    done = make(tmp_path, renew=True, now=later)
    assert done.notes == ()
    after = snapshot(tmp_path / "out")
    assert {name for name in after if before[name] != after[name]} == {"coordinator/server.crt"}


@pytest.mark.parametrize("all_of_it", [False, True])
def test_what_a_clock_that_was_ahead_made_is_made_again_once_it_is_right(all_of_it: bool, tmp_path: Path) -> None:
    ahead = NOW + dt.timedelta(days=1000)
    make(tmp_path, now=ahead if all_of_it else NOW)
    made = make(tmp_path, renew=True, now=ahead)
    assert made.notes == ()
    told = make(tmp_path).notes
    assert [note.split(" certificate: ")[0] for note in told] == (["ICM309 CA"] if all_of_it else []) + ["ICM309 server"]
    assert all(note.endswith("Set this machine's clock. If it is right: fl_server provision --renew.") for note in told)
    anew = ("the CA was renewed; hand out all kits again now: the old one is not valid yet",)
    assert make(tmp_path, renew=True).notes == (anew if all_of_it else ())
    assert make(tmp_path).notes == ()


def handshake(folder: Path, ca: Path) -> None:
    """Shake hands with the coordinator's files over real TLS, trusting `ca`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "coordinator" / "server.crt", folder / "coordinator" / "server.key")
    trusting = ssl.create_default_context(cafile=str(ca))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = context.wrap_bio(ours, theirs, server_side=True)
    other = trusting.wrap_bio(theirs, ours, server_hostname="coordinator.example")
    for side in (other, one, other, one):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert other.version() == "TLSv1.3"


def test_sites_that_hold_the_old_ca_trust_what_a_renewed_ca_signs(tmp_path: Path) -> None:
    short = "ca_valid_days = 50\nvalid_days = 30\n" + TEXT
    make(tmp_path, text=short)
    folder, old = tmp_path / "out", tmp_path / "old.crt"
    old.write_bytes((folder / "ca" / "ca.crt").read_bytes())
    done = make(tmp_path, text=short, renew=True)
    assert f"before {NOW + dt.timedelta(days=50):%Y-%m-%d}" in done.notes[0]
    assert (folder / "ca" / "ca.crt").read_bytes() != old.read_bytes()
    handshake(folder, folder / "ca" / "ca.crt")
    handshake(folder, old)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, Authority(tmp_path / "foreign").path)


def test_the_ca_key_may_lie_elsewhere_until_something_is_to_be_signed(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "out" / "ca" / "ca.key").unlink()
    assert make(tmp_path, "Alder", "Birch", "Cedar").kits["Cedar"]
    with pytest.raises(IcmoeError, match="key of the CA is not there") as caught:
        make(tmp_path, renew=True, now=NOW + dt.timedelta(days=340))
    assert numbers(caught) == [205]


def test_keys_that_others_can_read_or_that_do_not_belong_are_not_used(tmp_path: Path) -> None:
    make(tmp_path)
    key = tmp_path / "out" / "coordinator" / "server.key"
    key.chmod(0o640)
    with pytest.raises(IcmoeError, match=r"0640 \(allowed: 0600\)") as caught:
        make(tmp_path)
    assert numbers(caught) == [306]
    key.chmod(0o600)
    key.write_text("rubbish")
    with pytest.raises(IcmoeError) as caught:
        make(tmp_path)
    assert numbers(caught) == [307]
    other = tmp_path / "other"
    other.mkdir()
    make(other)
    key.unlink()
    (tmp_path / "out" / "ca" / "ca.key").write_bytes((other / "out" / "ca" / "ca.key").read_bytes())
    with pytest.raises(IcmoeError, match="do not belong together") as caught:
        make(tmp_path)
    assert numbers(caught) == [308]
    with pytest.raises(IcmoeError, match="CA has ended") as caught:
        make(tmp_path, now=NOW + dt.timedelta(days=4000))
    assert numbers(caught) == [309]


@pytest.mark.parametrize("name", ["ca/ca.crt", "coordinator/server.crt"])
def test_a_certificate_that_was_cut_off_is_made_again_once_it_is_removed(name: str, tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(IcmoeError, match=rf"ICM308 .*{name}: .*remove it: fl_server provision makes it again\.$"):
        make(tmp_path)
    path.unlink()
    assert make(tmp_path).notes == ()
    handshake(tmp_path / "out", tmp_path / "out/sites/Alder/kit/ca.crt")


BAD_FILES = {
    "an unknown key": (TEXT + 'adress = "x"\n', 201),
    "a URL": (TEXT.replace("coordinator.example:443", "https://coordinator.example"), 202),
    "no port": (TEXT.replace(":443", ""), 202),
    "a port that cannot be": (TEXT.replace(":443", ":70000"), 202),
    "no coordinator": ('name = "x"\n', 203),
    "not TOML": ("name = \n", 204),
    "a certificate without end": ("valid_days = 100000\n" + TEXT, 202),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_consortium_file_is_one_numbered_sentence(name: str, tmp_path: Path) -> None:
    text, number = BAD_FILES[name]
    code, output = serve("provision", write_consortium(tmp_path, text=text), "--out", tmp_path / "out")
    assert code == 1
    assert output.startswith(f"ICM{number} ")
    assert not (tmp_path / "out").exists()


def test_two_sites_may_not_differ_by_capitals_only_and_need_plain_names(tmp_path: Path) -> None:
    for sites in (("Alder", "alder"), ("../Alder",), ("a b",)):
        with pytest.raises(IcmoeError) as caught:
            read_consortium(write_consortium(tmp_path, *sites))
        assert numbers(caught) == [202]


def test_expiry_is_watched_by_exit_code_and_json(tmp_path: Path) -> None:
    code, output = serve("provision", write_consortium(tmp_path), "--out", tmp_path / "out")
    assert code == 0
    assert "kit of Alder: digest" in output
    assert serve("expiry", "--home", tmp_path / "out")[0] == 0
    code, output = serve("expiry", "--home", tmp_path / "out", "--days", 400, "--json")
    record = json.loads(output)
    assert (code, record["ok"], [fault["number"] for fault in record["faults"]]) == (1, False, [309])
    assert record["certificates"]["server"]["days"] == 364
    assert serve("expiry", "--home", tmp_path / "nowhere")[0] == 1


def test_a_run_that_was_stopped_at_any_file_is_completed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stopped_at in range(13):
        folder = tmp_path / str(stopped_at)
        folder.mkdir()
        written: list[Path] = []

        def write(path: Path, data: bytes, *, private: bool = False, at: int = stopped_at, written: list[Path] = written) -> None:
            if len(written) == at:
                raise KeyboardInterrupt
            written.append(path)
            write_atomically(path, data, private=private)

        with monkeypatch.context() as patched:
            patched.setattr("fl_server.provisioning.write_atomically", write)
            with pytest.raises(KeyboardInterrupt):
                make(folder)
        make(folder)
        assert make(folder).changes == ()
        handshake(folder / "out", folder / "out" / "sites" / "Birch" / "kit" / "ca.crt")


def test_a_folder_that_cannot_be_written_to_is_one_numbered_sentence(tmp_path: Path) -> None:
    source = write_consortium(tmp_path)
    (tmp_path / "file").write_text("x")
    nowhere = tmp_path / "file" / "x"
    for command in (
        ["provision", source, "--out"],
        ["expiry", "--home"],
        ["admit", source, "--home"],
        ["revoke", "Alder", "--home"],
    ):
        code, output = serve(*command, nowhere)
        assert (code, output[:7]) == (1, "ICM205 ")
    make(tmp_path)
    (tmp_path / "out" / "sites" / "Cedar").write_text("in the way")
    code, output = serve("provision", write_consortium(tmp_path, "Alder", "Cedar"), "--out", tmp_path / "out")
    assert (code, output[:7]) == (1, "ICM205 ")
    assert "Cedar" in output
