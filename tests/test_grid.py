"""A Grid in front of another hands on what it does not do itself."""

from __future__ import annotations

from typing import Any

from flwr.app import RecordDict

from fl_server.grid import InFront


class Asked:
    """A Grid that answers with what it was asked."""

    run = "run"

    def __getattr__(self, name: str) -> Any:
        return lambda *given: (name, *given)


def test_every_call_is_handed_on_with_what_was_given() -> None:
    grid = InFront(Asked())  # type: ignore[arg-type]
    content = RecordDict()
    assert grid.run == "run"
    assert grid.get_nodes() == ("get_nodes",)
    assert grid.get_node_ids() == ("get_node_ids",)
    assert grid.push_messages([]) == ("push_messages", [])
    assert grid.pull_messages(["1"]) == ("pull_messages", ["1"])
    assert grid.create_message(content, "train", 7, "group", 5.0) == ("create_message", content, "train", 7, "group", 5.0)
