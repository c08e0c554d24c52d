"""Private names of Flower that a site's side needs, in one place, for one version."""

# ruff: noqa: E402  (the version is looked at before any private name)
from __future__ import annotations

import datetime as dt
from base64 import b64encode

from icmoe.platform import require_version

require_version("flwr", "1.41.")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

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
