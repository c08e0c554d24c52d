"""Every private name of Flower that a hospital's side touches, in one place, for one minor version of Flower.

The SuperNode is Flower's own. It is made to run nothing but the site's installed package, whatever the coordinator ships,
and to send nothing but numbers and their titles when something goes wrong. The preflight asks Flower's API what it would
answer, without changing anything there.
"""

# ruff: noqa: E402  (the version is looked at before any private name)
from __future__ import annotations

import datetime as dt
import hashlib
import logging
import lzma
import math
import sys
import time
import zipfile
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from io import BytesIO
from pathlib import Path
from typing import Any

from icmoe.platform import require_flower

require_flower()

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Error, Message
from flwr.app.message.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TaskType
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal

from fl_client.callbacks import Connect, Connection, Received, watched
from icmoe.atomic import write_atomically
from icmoe.bundle import differences
from icmoe.errors import CATALOGUE, Fault
from icmoe.messages import ERROR_CODE, error_reason
from icmoe.processes import sweep_often

log = logging.getLogger("fl_client")

LARGEST_BYTES = 50_000_000
"""Bytes that a shipped bundle may unpack to; Flower packs at most 10 MB."""

SOON_S, BETWEEN_S = 20.0, 0.5
"""After an answer the next question is near: for so long a site asks so often, and then every 3 s as Flower does."""

NO_SECONDS = 0.0
"""What stands in each answer for how long it took, a field that Flower adds up for the coordinator."""

_EQUAL = "equal"
# What Python's reader of zip files raises beside the usual: by format, method, password, and damage to what is packed.
_NO_BUNDLE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, lzma.LZMAError)
# What Flower's own code says in an error reply, and the number that says the same.
_FLOWERS_OWN = {"The FAB could not be verified.": 317, "ClientApp stopped responding.": 323}


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return the bundle of these files, made by Flower's own builder."""
    return build_fab_from_files(files)[0]


def unpack(content: bytes) -> dict[str, bytes]:
    """Return the files of a bundle by their names; empty where it is none, or too large."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            if sum(item.file_size for item in archive.infolist()) > LARGEST_BYTES:
                return {}
            return {item.filename: archive.read(item) for item in archive.infolist()}
    except (*_NO_BUNDLE, ValueError, EOFError, OSError) as error:
        log.error("what the coordinator shipped is no app bundle: %s", type(error).__name__)
        return {}


def guarded(connect: Connect, mine: Fab, fab_id: str, fab_version: str) -> Connect:
    """Return Flower's connection to the coordinator, changed in what comes in as a run or a bundle and in what leaves.

    Parameters
    ----------
    connect
        Flower's context manager of callbacks.
    mine
        The bundle of the installed package; it is what runs, and only where the shipped one holds the same files.
    fab_id, fab_version
        Names of the bundle, which the coordinator cannot choose.
    """
    answered_s = -math.inf
    verdicts: dict[tuple[int, str], str] = {}  # Flower asks before each message; a run's bundle is fetched and compared once

    @contextmanager
    def connection(*arguments: Any, **settings: Any) -> Iterator[Connection]:  # noqa: ANN401  (Flower's own signature)
        with connect(*arguments, **settings) as (node_id, receive, send, get_run, get_fab, pull, push, confirm):
            shipped: dict[int, str] = {}

            def receive_soon() -> Received | None:
                found: Received | None = receive()
                while found is None and time.monotonic() < answered_s + SOON_S:
                    time.sleep(BETWEEN_S)
                    found = receive()
                return found

            def get_own_run(run_id: int) -> Run:
                run: Run = get_run(run_id)
                shipped[run_id] = run.fab_hash
                run.fab_id, run.fab_version, run.fab_hash = fab_id, fab_version, mine.hash_str
                run.override_config, run.primary_task_type = {}, TaskType.SERVER_APP
                return run

            def get_own_fab(_: str, run_id: int) -> Fab:
                asked = run_id, shipped[run_id]
                if asked not in verdicts:
                    offered = get_fab(shipped[run_id], run_id)
                    verdicts[asked] = _EQUAL if _is_mine(offered.content, mine.content) else "different"
                return Fab(mine.hash_str, mine.content, {"valid_license": verdicts[asked]})

            def send_numbers(message: Message, tree: object, runtime_s: float) -> tuple[set[str], str]:
                nonlocal answered_s
                del runtime_s  # Flower's seconds of this answer: they tell how many patients were drawn, and nobody needs them
                answered_s = time.monotonic()
                return _send_error(message, send, push) if message.has_error() else send(message, tree, NO_SECONDS)

            yield (node_id, receive_soon, send_numbers, get_own_run, get_own_fab, pull, push, confirm)

    return connection


def run_supernode(files: Mapping[str, bytes], fab_id: str, fab_version: str, home: Path, arguments: Sequence[str]) -> None:
    """Run `flower-supernode` in this process until it ends, held to the bundle of `files`.

    Parameters
    ----------
    files
        From `icmoe.bundle.bundle_files`.
    fab_id, fab_version
        Names of the bundle.
    home
        Folder of Flower's own files.
    arguments
        Flags of `flower-supernode`.
    """
    from flwr.supernode.cli import flower_supernode

    content = pack(files)
    mine = Fab(hashlib.sha256(content).hexdigest(), content, {})
    connect = start_client_internal.http_request_response  # type: ignore[attr-defined]
    start_client_internal.http_request_response = guarded(watched(connect), mine, fab_id, fab_version)  # type: ignore[attr-defined]
    start_client_internal._verify_fab = _verdict
    sys.argv = ["flower-supernode", *arguments, "--trusted-entities", str(_write_entities(home))]
    sweep_often()
    flower_supernode()


def _verdict(fab: Fab, trusted_entities: Mapping[str, str]) -> bool:
    del trusted_entities
    return fab.verifications.get("valid_license") == _EQUAL


def _is_mine(offered: bytes, mine: bytes) -> bool:
    names = differences(unpack(mine), unpack(offered))
    if names:
        value = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        log.error("%s", Fault(number=317, value=value, did="Nothing was run."))
    return not names


def _send_error(message: Message, send: Callable[..., tuple[set[str], str]], push: Callable[..., None]) -> tuple[set[str], str]:
    """Send an error reply as a number and its title, whatever text Flower gave it."""
    number = _number_of(message.error.reason or "")
    clean = make_message(copy(message.metadata), error=Error(ERROR_CODE + number, error_reason(number)))
    clean.metadata.__dict__["_message_id"] = clean.object_id
    wanted, session = send(clean, get_object_tree(clean), NO_SECONDS)
    if clean.object_id in wanted:
        push(clean.metadata.run_id, session, clean.object_id, clean.deflate())
    return set(), session


def _number_of(reason: str) -> int:
    known = {error_reason(number): number for number in CATALOGUE}
    return {**known, **_FLOWERS_OWN}.get(reason, 304)


def _write_entities(home: Path) -> Path:
    """Write what makes Flower ask for a verdict on each bundle: one key that nobody holds the other half of."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    path = home / "trusted-entities.yaml"
    write_atomically(path, f"fpk_icmoe: '{key}'\n".encode(), durable=False)
    return path


MEDIA_TYPE = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}
UNSIGNED = "/v1/fleet/pull-messages"  # asked without a signature; a server that authenticates sites answers as below
UNSIGNED_ANSWER = "Invalid SuperNode authentication"
SIGNED = "/v1/fleet/activate-node"  # asked with a heartbeat of zero, which changes nothing
OTHER_APIS = (
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/runtime/acquire-task"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
)
ADMITTED = int(ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL)  # the key was found, then the heartbeat was refused
NOT_ADMITTED = int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
AHEAD_S, BEHIND_S = SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


def signed_request(key: ec.EllipticCurvePrivateKey) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a request to `SIGNED` that only asks whether the key is registered."""
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed_at = dt.datetime.now(tz=dt.UTC).isoformat()
    headers = {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode(),
        TIMESTAMP_HEADER: signed_at,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, signed_at.encode())).decode(),
    }
    return ActivateNodeRequest(public_key=public, heartbeat_interval=0.0).SerializeToString(), {**MEDIA_TYPE, **headers}
