"""Start kits: nothing altered is taken, the key is made at the site and stays there."""

from __future__ import annotations

import base64
import datetime as dt
import fcntl
import os
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from consortium import init, make, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import NOW, Authority

from fl_client.credentials import make_node_key, parse_ca, read_node_key
from fl_client.kit import join, read_kit
from fl_server.certificates import key_pem, make_key, parse_key
from icmoe.errors import IcmoeError
from icmoe.joining import (
    CHECKSUMS,
    checksum_text,
    key_digest,
)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    make(tmp_path)
    return tmp_path / "out" / "sites" / "Alder" / "kit"


def resum(kit: Path) -> None:
    files = {name: (kit / name).read_bytes() for name in ("ca.crt", "kit.toml")}
    (kit / CHECKSUMS).write_bytes(checksum_text(files))


def test_init_makes_the_key_here_and_keeps_it_when_run_again(kit: Path, tmp_path: Path) -> None:
    code, output = init(kit, tmp_path)
    assert code == 0
    own = tmp_path / "site" / "Alder"
    key = own / "node.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    shown = subprocess.run(["ssh-keygen", "-l", "-f", key], check=True, capture_output=True, text=True, timeout=20).stdout
    assert shown.startswith("384 SHA256:")
    assert shown.split()[1] in output  # the fingerprint that the hospital reads out
    assert b"PRIVATE" in key.read_bytes()
    assert "PRIVATE" not in (own / "request.json").read_text() + output
    first = key.read_bytes()
    assert 'address = "coordinator.example:443"' in (tmp_path / "site" / "Alder.toml").read_text()
    (tmp_path / "site" / "Alder.toml").write_text("# mine\n")
    code, output = init(kit, tmp_path)
    assert (code, key.read_bytes()) == (0, first)
    assert (tmp_path / "site" / "Alder.toml").read_text() == "# mine\n"
    assert 'key = "Alder/node.key"' in output  # told, not written
    assert init(kit, tmp_path, "--new-key")[0] == 0
    assert key.read_bytes() != first


def test_of_two_inits_at_once_the_second_makes_nothing(kit: Path, tmp_path: Path) -> None:
    own = tmp_path / "site" / "Alder"
    own.mkdir(parents=True)
    held = os.open(own, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)  # only who wants it alone is refused
    try:
        code, output = init(kit, tmp_path)
    finally:
        os.close(held)
    assert (code, "ICM325" in output, list(own.iterdir())) == (1, True, [])
    assert init(kit, tmp_path)[0] == 0


def test_both_ends_print_the_same_digest_and_init_compares_it(kit: Path, tmp_path: Path) -> None:
    digest = make(tmp_path).kits["Alder"]
    code, output = init(kit, tmp_path, "--digest", digest)
    assert code == 0
    assert digest in output
    other = ("1" if digest[0] == "0" else "0") + digest[1:]
    code, output = init(kit, tmp_path, "--digest", other)
    assert (code, output[:7]) == (1, "ICM310 ")


@pytest.mark.parametrize("name", ["kit.toml", "ca.crt", "SHA256SUMS"])
@pytest.mark.parametrize("harm", ["a byte changed", "cut short", "missing", "empty", "a folder"])
def test_a_kit_with_any_file_tampered_is_refused(name: str, harm: str, kit: Path, tmp_path: Path) -> None:
    data = (kit / name).read_bytes()
    (kit / name).unlink()
    if harm == "a folder":
        (kit / name).mkdir()
    elif harm != "missing":
        changed = {"a byte changed": data[:20] + bytes([data[20] ^ 1]) + data[21:], "cut short": data[:-5], "empty": b""}
        (kit / name).write_bytes(changed[harm])
    code, output = init(kit, tmp_path)
    assert code == 1
    assert output.startswith("ICM205 " if harm == "a folder" else "ICM310 ")
    assert not (tmp_path / "site").exists()


def test_a_kit_for_another_site_with_another_file_or_consistent_lies_is_refused(kit: Path, tmp_path: Path) -> None:
    assert "ICM310" in init(kit, tmp_path, site="Birch")[1]
    (kit / "run.sh").write_text("x")
    assert "run.sh" in init(kit, tmp_path)[1]
    (kit / "run.sh").unlink()
    text = (kit / "kit.toml").read_text()
    for changed, number in (
        (text + "colour = 1\n", 201),
        ("a = " + "[" * 20_000, 310),
        (f"a = {'9' * 5000}", 310),
        (text.replace("Lesion group", "a\\nb"), 202),
        ("= ", 310),
    ):
        (kit / "kit.toml").write_text(changed)
        resum(kit)
        assert f"ICM{number}" in init(kit, tmp_path)[1]
    (kit / "kit.toml").write_text(text)
    (kit / "ca.crt").write_bytes((tmp_path / "out" / "coordinator" / "server.crt").read_bytes())
    resum(kit)
    assert "ICM308" in init(kit, tmp_path)[1]  # a server's certificate is not a CA
    (kit / "ca.crt").write_text("rubbish")
    resum(kit)
    assert "ICM308" in init(kit, tmp_path)[1]
    assert "ICM205" in init(tmp_path / "nowhere", tmp_path)[1]
    assert not (tmp_path / "site").exists()


def test_an_expired_ca_is_refused_before_a_key_is_made(kit: Path, tmp_path: Path) -> None:
    with pytest.raises(IcmoeError) as caught:
        join(kit, "Alder", tmp_path / "Alder.toml", digest=None, new_key=False, now=NOW + dt.timedelta(days=4000))
    assert numbers(caught) == [309]
    assert not (tmp_path / "Alder").exists()
    assert read_kit(kit, "Alder")[0].address == "coordinator.example:443"


def altered(data: bytes, place: int, change: int) -> bytes:
    """Return a PEM file whose decoded bytes are changed at one place."""
    first, *middle, last = data.decode().strip().split("\n")
    body = bytearray(base64.b64decode("".join(middle)))
    body[place % len(body)] ^= change
    return f"{first}\n{base64.b64encode(bytes(body)).decode()}\n{last}\n".encode()


@settings(max_examples=400, deadline=None)
@given(place=st.integers(0, 10_000), change=st.integers(1, 255))
def test_a_key_or_certificate_with_any_byte_changed_is_read_or_refused_by_number(
    files: dict[str, Path], place: int, change: int
) -> None:
    readers = {
        "ca": lambda path: key_digest(parse_ca(path.read_bytes(), where="")),
        "node": read_node_key,
        "server": lambda path: parse_key(path.read_bytes(), where=""),
    }
    for name, read in readers.items():
        files["altered"].write_bytes(altered(files[name].read_bytes(), place, change))
        files["altered"].chmod(0o600)
        with suppress(IcmoeError):  # anything else would be a traceback
            read(files["altered"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    make_node_key(folder / "node.key")
    (folder / "server.key").write_bytes(key_pem(make_key()))
    ca = Authority(folder).path
    return {"ca": ca, "node": folder / "node.key", "server": folder / "server.key", "altered": folder / "altered"}
