"""Private names of Flower for the register of sites, in one place, for one version; `flower_replies` has those of replies."""

# ruff: noqa: E402  (the version is looked at before any private name)
from __future__ import annotations

from icmoe.platform import require_flower

require_flower()

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient


class Refused(Exception):
    """The SuperLink answered with an error.

    Parameters
    ----------
    code
        Flower's number, 0 where it gave none.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Registry:
    """The SuperLink's register of site keys, asked through its Control API on loopback.

    Parameters
    ----------
    port
        Of the SuperLink on 127.0.0.1.
    ca
        PEM of the CA.
    """

    def __init__(self, port: int, ca: bytes) -> None:
        self._client = ControlHttpClient.from_server_address(f"127.0.0.1:{port}", False, ca, ())  # noqa: FBT003 (Flower's order)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def find(self, key: ec.EllipticCurvePublicKey) -> tuple[int, str] | None:
        """Return node id and status of a key, None where it was never registered.

        Raises
        ------
        httpx.HTTPError
            Where the SuperLink cannot be reached or refuses.
        """
        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return next(((node.node_id, node.status) for node in nodes if node.public_key == _pem(key)), None)

    def live(self, name: str) -> dict[int, ec.EllipticCurvePublicKey]:
        """Return the keys that are registered under a name now, by node id; raises as `find`."""
        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        keys = {
            node.node_id: load_pem_public_key(node.public_key)
            for node in nodes
            if node.name == name and node.status != "unregistered"
        }
        return {number: key for number, key in keys.items() if isinstance(key, ec.EllipticCurvePublicKey)}

    def register(self, key: ec.EllipticCurvePublicKey, name: str) -> int:
        """Register a key under a name and return its node id.

        Raises
        ------
        Refused
            Where Flower refuses the key.
        httpx.HTTPError
            Where the SuperLink cannot be reached.
        """
        try:
            return int(self._client.RegisterNode(RegisterNodeRequest(public_key=_pem(key), name=name)).node_id)
        except httpx.HTTPStatusError as error:
            raise Refused(_code(error.response)) from None

    def unregister(self, node_id: int) -> None:
        """Take a node's registration away; its SuperNode stops within half a minute."""
        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _code(response: httpx.Response) -> int:
    try:
        return int(response.json()["code"])
    except (ValueError, KeyError, TypeError):
        return 0
