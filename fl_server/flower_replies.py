"""Private names of Flower by which the coordinator takes replies one by one, in one place, for one version."""

# ruff: noqa: E402  (the version is looked at before any private name)
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, MutableMapping
from typing import cast

from icmoe.platform import require_flower

require_flower()

from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.common.serde import recorddict_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, inflate_object_from_contents
from flwr.superlink.grid.http_grid import HttpGrid

__all__ = ["Gone", "HttpGrid", "ReplyStore", "Unreadable", "joined_bytes", "read_reply"]


class Gone(Exception):
    """The SuperLink does not hold an object any more that a reply was announced with."""


class Unreadable(Exception):
    """The bytes of a reply are no message of Flower; says what they raised, never what they hold."""


class ReplyStore:
    """What the SuperLink holds of replies.

    Parameters
    ----------
    grid
        Flower's own, which is connected to it.
    """

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid

    def handed_out(self, questions: Iterable[str]) -> list[tuple[Metadata, list[str]]]:
        """Return the replies that are new, as the SuperLink checked who sent them, and their objects by number.

        The SuperLink hands out each reply once: what is lost here is lost.
        """
        found = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=questions))
        return [
            (metadata_from_proto(message.metadata), list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree))))
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True)
        ]

    def fetched(self, number: str) -> bytes | None:
        """Return an object, None where the site has not sent it yet.

        Raises
        ------
        Gone
            Where it will not come any more.
        """
        client, run = self._grid._runtime_client, self._grid.run
        try:
            return make_pull_object_fn_protobuf(client.PullObject, self._grid.node, run.run_id)(number)
        except ObjectUnavailableError:
            return None
        except ObjectPullError:
            raise Gone from None

    def confirm(self, number: str) -> None:
        """Let the SuperLink drop a reply."""
        request = ConfirmMessageReceivedRequest(node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=number)
        self._grid._runtime_client.ConfirmMessageReceived(request)


def joined_bytes(contents: Mapping[str, bytes]) -> int:
    """Return the bytes that a reply's arrays come to: one may name the same piece a million times.

    Raises
    ------
    Unreadable
        Where that cannot be told.
    """
    try:
        return sum(map(_joined_bytes, contents.values(), [contents] * len(contents)))
    except Exception as error:  # noqa: BLE001  (as in `read_reply`)
        raise Unreadable(type(error).__name__) from None


def _joined_bytes(content: bytes, contents: Mapping[str, bytes]) -> int:
    kind, parts, _ = get_object_head_values_from_object_content(content)
    if kind != Array.__qualname__:
        return 0
    sizes = [len(contents[part]) for part in parts]
    return sum(sizes[place] for place in json.loads(get_object_body(content, Array))["arraychunk_ids"])


def read_reply(metadata: Metadata, contents: MutableMapping[str, bytes]) -> Message:
    """Return the message of these objects, which are used up; who sent it is what the SuperLink says, not what stands in it.

    Raises
    ------
    Unreadable
        Where they are none, or hold names and types that no honest site can send.
    """
    try:
        found = inflate_object_from_contents(metadata.message_id, cast(dict[str, bytes], contents))
        if not isinstance(found, Message):
            raise TypeError(type(found).__name__)
        if found.has_error():
            return make_message(metadata, error=found.error)
        recorddict_to_proto(_without_values(found.content)).SerializeToString()
        return make_message(metadata, found.content)
    except Exception as error:  # noqa: BLE001  (the bytes are a site's: whatever they raise concerns this one reply)
        raise Unreadable(type(error).__name__) from None


def _without_values(content: RecordDict) -> RecordDict:
    """Return names and claims of a content alone: arrays are described in JSON, which carries more than a message can."""
    bare = RecordDict()
    for name, record in content.items():
        arrays = record.items() if isinstance(record, ArrayRecord) else ()
        claims = {key: Array(array.dtype, array.shape, array.stype, b"") for key, array in arrays}
        bare[name] = ArrayRecord(claims) if isinstance(record, ArrayRecord) else MetricRecord()
    return bare
