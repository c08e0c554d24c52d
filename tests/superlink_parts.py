"""A SuperLink as Flower's Grid sees it: replies announced with their parts, each of which passes the SuperLink's own check."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.app.message.message import make_message
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree, PullObjectResponse
from flwr.proto.message_pb2 import Message as Sent
from flwr.proto.message_pb2 import Metadata as About
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesResponse, PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

RUN = 7
Parts = tuple[str, list[str], dict[str, bytes]]
"""Number of the message, of all its parts, and what of them was sent."""


def part(kind: str, children: list[str], body: bytes) -> tuple[str, bytes]:
    """Return number and bytes of an object that the SuperLink takes."""
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body
    validate_object_content(content)
    return hashlib.sha256(content).hexdigest(), content


def parts(*objects: tuple[str, bytes]) -> Parts:
    """Return a reply of these objects, the message last."""
    return objects[-1][0], [number for number, _ in objects], dict(objects)


def parts_of(reply: Message) -> Parts:
    """Return a reply as Flower's own client sends it."""
    found = get_all_nested_objects(reply)
    return reply.object_id, list(found), {number: one.deflate() for number, one in found.items()}


class Superlink:
    """Keeps what it was asked and hands each answer out once.

    Parameters
    ----------
    answer
        Makes a reply's parts of a question and its site; None is a silent site.
    sites
        Names by node.
    """

    def __init__(self, answer: Callable[[Message, str], Parts | None], sites: dict[int, str]) -> None:
        self.answer, self.sites = answer, sites
        self.questions: dict[str, tuple[Any, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.lost: set[str] = set()
        self.given: list[str] = []
        self.confirmed: list[str] = []

    def PushMessages(self, request: Any) -> PushAppMessagesResponse:
        ids = [one.metadata.message_id for one in request.messages_list]
        self.questions |= dict(zip(ids, zip(request.messages_list, request.message_object_trees, strict=True), strict=True))
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=[n for t in request.message_object_trees for n in _of(t)])

    def PushObject(self, request: Any) -> SimpleNamespace:
        self.objects[request.object_id] = request.object_content
        return SimpleNamespace(stored=True)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        given = [one for number in list(request.message_ids) if (one := self._reply(number)) is not None]
        return PullAppMessagesResponse(messages_list=[m for m, _ in given], message_object_trees=[t for _, t in given])

    def _reply(self, number: str) -> tuple[Sent, ObjectTree] | None:
        if number in self.given:
            raise AssertionError("the SuperLink forgot the question when it handed the answer out")
        proto, tree = self.questions[number]
        question = inflate_object_from_contents(number, {one: self.objects[one] for one in _of(tree)}, keep_object_contents=True)
        question = make_message(metadata_from_proto(proto.metadata), question.content)
        found = self.answer(question, self.sites[proto.metadata.dst_node_id])
        if found is None:
            return None
        self.given.append(number)
        message, numbers, contents = found
        self.objects |= contents
        about = About(
            run_id=RUN, message_id=message, src_node_id=proto.metadata.dst_node_id, dst_node_id=1, reply_to_message_id=number,
            message_type=proto.metadata.message_type, ttl=1000.0, created_at=time.time(),
        )  # fmt: skip
        children = [ObjectTree(object_id=one) for one in numbers if one != message]
        return Sent(metadata=about), ObjectTree(object_id=message, children=children)

    def PullObject(self, request: Any) -> PullObjectResponse:
        content = self.objects.get(request.object_id, b"")
        found = request.object_id not in self.lost
        return PullObjectResponse(object_found=found, object_available=content != b"", object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> ConfirmMessageReceivedResponse:
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()

    def GetNodes(self, request: Any) -> GetNodesResponse:
        nodes = [NodeInfo(node_id=node, name=name, status="online") for node, name in self.sites.items()]
        return GetNodesResponse(nodes=nodes)

    def grid(self) -> HttpGrid:
        """Return Flower's own Grid, connected to it."""
        grid = HttpGrid(token="x")
        grid._client, grid._run = self, Run.create_empty(RUN)
        return grid


def _of(tree: ObjectTree) -> list[str]:
    return [*(number for child in tree.children for number in _of(child)), tree.object_id]
