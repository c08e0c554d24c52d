"""Requests to join: proven, compared, admitted at a real SuperLink under the site's name, and revoked for good."""

from __future__ import annotations

import base64
import errno
import importlib
import json
import socket
from pathlib import Path

import pytest
from consortium import TEXT, init, listens, make, numbers, request_of, serve, serving, wait_until, write_consortium
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from loopback import Authority, closed_port

from fl_client.preflight import run_preflight
from fl_server import admission as admitting
from fl_server.flower_private import Refused
from fl_server.home import find_home
from icmoe.errors import IcmoeError
from icmoe.joining import (
    JoinRequest,
    fingerprint,
    key_digest,
    make_request,
    proven_key,
    split_address,
)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[JoinRequest, x509.Certificate]:
    ca = Authority(tmp_path_factory.mktemp("ca")).certificate
    return make_request("Alder", ec.generate_private_key(ec.SECP384R1()), ca), ca


def test_a_request_proves_its_key(signed: tuple[JoinRequest, x509.Certificate]) -> None:
    request, ca = signed
    assert fingerprint(proven_key(request, where="")).startswith("SHA256:")
    assert request.ca == key_digest(ca)


def decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


@given(
    field=st.sampled_from(["site", "ca", "proof", "public_key"]), place=st.integers(0, 10_000), other=st.characters(codec="ascii")
)
def test_a_request_with_any_character_changed_proves_nothing(
    signed: tuple[JoinRequest, x509.Certificate], field: str, place: int, other: str
) -> None:
    request, _ = signed
    text = getattr(request, field)
    place %= len(text)
    if text[place] == other:
        return
    changed = text[:place] + other + text[place + 1 :]
    if field == "proof" and decoded(changed) == decoded(text):
        return  # two last bits of base64 that stand for nothing
    with pytest.raises(IcmoeError) as caught:
        proven_key(request.model_copy(update={field: changed}), where="request.json")
    assert numbers(caught)[0] in (307, 310)


@pytest.mark.parametrize("make_other", [lambda: rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate])
def test_a_public_key_of_the_wrong_kind_is_refused(make_other, signed: tuple[JoinRequest, x509.Certificate]) -> None:
    text = make_other().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    with pytest.raises(IcmoeError) as caught:
        proven_key(signed[0].model_copy(update={"public_key": text}), where="request.json")
    assert numbers(caught) == [307]


@given(st.from_regex(r"\A[a-z0-9]{1,20}(\.[a-z0-9]{1,20}){0,3}\Z"), st.integers(1, 65_535))
def test_an_address_is_split_into_what_it_was_made_of(host: str, port: int) -> None:
    assert split_address(f"{host}:{port}") == (host, port)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:0", "host:65536", "https://host:443", "host:443/x", "a b:1", "::1:443"]
)
def test_what_is_not_an_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_address(text)
    assert split_address("[::1]:443") == ("::1", 443)


def test_requests_that_do_not_belong_are_refused_before_flower_is_asked(tmp_path: Path) -> None:
    make(tmp_path, port=closed_port())
    out, good = tmp_path / "out", request_of(tmp_path, "Alder")
    values = json.loads(good.read_text())
    path = tmp_path / "request.json"
    cases: list[tuple[object, int]] = [
        ("rubbish", 310),
        ("[]", 310),
        ("[" * 50_000, 310),
        (" " * 70_000, 205),
        (json.dumps({**values, "extra": 1}), 201),
        (json.dumps({**values, "public_key": "\ud800 x"}), 202),
        (json.dumps({**values, "site": "Birch"}), 310),  # signed for Alder
        (json.dumps({**values, "proof": base64.b64encode(b"0" * 100).decode()}), 310),
    ]
    for text, number in cases:
        path.write_text(str(text))
        code, output = serve("admit", path, "--home", out)
        assert (code, output[:7]) == (1, f"ICM{number} ")
    code, output = serve("admit", good, "--home", out, "--fingerprint", "SHA256:other")
    assert (code, output[:7]) == (1, "ICM314 ")
    foreign = request_of(tmp_path, "Birch", ca=Authority(tmp_path / "foreign").path)
    assert "another consortium" in serve("admit", foreign, "--home", out)[1]
    write_consortium(tmp_path, "Birch")
    (out / "consortium.toml").write_bytes((tmp_path / "consortium.toml").read_bytes())
    assert "site is not in the consortium" in serve("admit", good, "--home", out)[1]
    assert "ICM205" in serve("admit", tmp_path / "none.json", "--home", out)[1]
    assert "ICM205" in serve("admit", good, "--home", tmp_path / "nowhere")[1]


def test_a_key_that_a_site_has_or_had_is_admitted_for_no_other_site(tmp_path: Path) -> None:
    make(tmp_path, port=closed_port())
    out, request = tmp_path / "out", request_of(tmp_path, "Alder")
    birch, key = out / "sites" / "Birch", json.loads(request.read_text())["public_key"]
    (birch / "node.pub").write_text(key)
    code, output = serve("admit", request, "--home", out)
    assert (code, output[:7], "key is admitted for another site" in output) == (1, "ICM314 ", True)
    (birch / "revoked").mkdir()
    (birch / "node.pub").replace(birch / "revoked" / "old.pub")
    code, output = serve("admit", request, "--home", out)
    assert (code, output[:7], "key has been revoked" in output) == (1, "ICM314 ", True)


def test_without_a_superlink_nothing_is_admitted_or_revoked(tmp_path: Path) -> None:
    make(tmp_path, port=closed_port())
    out, request = tmp_path / "out", request_of(tmp_path, "Alder")
    code, output = serve("admit", request, "--home", out)
    assert (code, output[:7]) == (1, "ICM311 ")
    assert not (out / "sites" / "Alder" / "node.pub").exists()
    code, output = serve("revoke", "Alder", "--home", out)
    assert (code, output[:7]) == (1, "ICM314 ")
    (out / "sites" / "Alder" / "node.pub").write_text(json.loads(request.read_text())["public_key"])
    assert serve("revoke", "Alder", "--home", out)[1].startswith("ICM311 ")
    assert (out / "sites" / "Alder" / "node.pub").exists()


def admission(folder: Path, site: str) -> tuple[bool, str]:
    """Return what the preflight of a site says of its admission."""
    path = folder / "site" / f"{site}.toml"
    check = next(check for check in run_preflight(path) if check.name == "admission")
    return check.ok, str(check.fault or "")


def test_sites_are_admitted_replaced_and_revoked_one_by_one_at_a_real_superlink(tmp_path: Path) -> None:
    port = closed_port()
    text = TEXT.replace("coordinator.example:443", f"localhost:{port}")
    make(tmp_path, port=port, text=text)
    out, requests = tmp_path / "out", {site: request_of(tmp_path, site) for site in ("Alder", "Birch")}
    with serving(find_home(out), tmp_path / "superlink.log"):
        wait_until(lambda: listens(port), "SuperLink on its port")
        assert not admission(tmp_path, "Alder")[0]
        for site, request in requests.items():
            assert serve("admit", request, "--home", out)[0] == 0
            assert admission(tmp_path, site) == (True, "")
        before = (out / "sites" / "Birch" / "node.pub").read_bytes()
        assert serve("admit", requests["Alder"], "--home", out) == serve("admit", requests["Alder"], "--home", out)
        old = requests["Alder"].read_bytes()
        init(out / "sites" / "Alder" / "kit", tmp_path, "--new-key")
        assert "another key is admitted" in serve("admit", requests["Alder"], "--home", out)[1]
        assert serve("revoke", "Alder", "--home", out)[0] == 0
        assert serve("admit", requests["Alder"], "--home", out)[0] == 0
        assert admission(tmp_path, "Alder") == (True, "")
        requests["Alder"].write_bytes(old)
        serve("revoke", "Alder", "--home", out)
        ok, sentence = admission(tmp_path, "Alder")
        assert not ok
        assert sentence.startswith("ICM314")
        assert "key has been revoked" in serve("admit", requests["Alder"], "--home", out)[1]
        assert admission(tmp_path, "Birch") == (True, "")
        assert (out / "sites" / "Birch" / "node.pub").read_bytes() == before
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_key_is_written_down_before_it_is_live_and_revoke_takes_out_every_key_of_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = closed_port()
    make(tmp_path, port=port, text=TEXT.replace("coordinator.example:443", f"localhost:{port}"))
    out, request = tmp_path / "out", request_of(tmp_path, "Alder")
    written = out / "sites" / "Alder" / "node.pub"
    with serving(find_home(out), tmp_path / "superlink.log"):
        wait_until(lambda: listens(port), "SuperLink on its port")
        with monkeypatch.context() as full:
            full.setattr(admitting, "write_atomically", no_room)
            with pytest.raises(OSError, match="No space"):
                admitting.admit(request, out)
        assert not admission(tmp_path, "Alder")[0], "a key that is not written down is not live"
        with monkeypatch.context() as refusing:
            refusing.setattr(admitting.Registry, "register", refused)
            with pytest.raises(IcmoeError, match="Flower refused the key: code 7"):
                admitting.admit(request, out)
        assert not written.exists()
        with monkeypatch.context() as killed:
            killed.setattr(admitting.Registry, "register", interrupted)
            with pytest.raises(KeyboardInterrupt):
                admitting.admit(request, out)
        assert written.exists()
        assert serve("admit", request, "--home", out)[0] == 0
        assert admission(tmp_path, "Alder") == (True, "")
        written.unlink()  # lost, or never written by an earlier version
        other = ec.generate_private_key(ec.SECP384R1())
        ca = x509.load_pem_x509_certificate((out / "ca" / "ca.crt").read_bytes())
        (tmp_path / "other.json").write_text(make_request("Alder", other, ca).model_dump_json())
        code, output = serve("admit", tmp_path / "other.json", "--home", out)
        assert (code, "another key is registered for this site" in output, written.exists()) == (1, True, False)
        assert serve("revoke", "Alder", "--home", out)[0] == 0
        assert not admission(tmp_path, "Alder")[0]
        assert "key has been revoked" in serve("admit", request, "--home", out)[1]
        assert serve("admit", tmp_path / "other.json", "--home", out)[0] == 0


def no_room(path: Path, *_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def refused(*_: object) -> int:
    raise Refused(7)


def interrupted(*_: object) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize("module", ["fl_client.flower_private", "fl_server.flower_private", "fl_server.flower_replies"])
def test_another_version_of_flower_is_refused_before_its_private_names_are_used(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = importlib.import_module(module)
    monkeypatch.setattr("icmoe.platform.version", lambda _: "1.42.0")
    with pytest.raises(IcmoeError, match=r"flwr: this version is not supported: 1\.42\.0 \(allowed: 1\.41\.x\)") as caught:
        importlib.reload(loaded)
    assert numbers(caught) == [303]
