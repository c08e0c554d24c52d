"""What Flower's SuperLink spends on a thousand sites in its state: an update into its store and out again, and an idle question.

`python -m simulations.benchmarks.superlink_state` uses the classes of Flower 1.41 that the SuperLink uses, once with a
database file and once in memory, without network, proxy or TLS. An update is one array of the default model's bytes, as the
product sends it. An idle question is what every site asks every few seconds: is there a message for me. Medians.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from flwr.app import Array, ArrayRecord
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from rich.console import Console
from rich.table import Table

from icmoe.usage import run_command

UPDATE_BYTES = 1_683_000


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long a call took."""
    began = time.perf_counter()
    work()
    return 1000.0 * (time.perf_counter() - began)


def measured(database: str, nodes: int, repeats: int) -> dict[str, float]:
    """Return milliseconds of each thing, and bytes that the database has at the end.

    Parameters
    ----------
    database
        Path, or Flower's name for none.
    nodes
        Registered sites.
    repeats
        Updates, and idle questions.
    """
    objects = ObjectStoreFactory(database)
    state, store = LinkStateFactory(database, NoOpFederationManager(), objects).state(), objects.store()
    ids = [state.create_node("benchmark", "benchmark", secrets.token_bytes(32), 30.0) for _ in range(nodes)]
    found: dict[str, list[float]] = {"store an update": [], "read it": [], "delete it": [], "idle question": []}
    for turn in range(repeats):
        rng = np.random.default_rng(turn)
        record = ArrayRecord({"packed": Array(rng.integers(0, 256, UPDATE_BYTES, dtype=np.uint8))})
        tree, parts = get_object_tree(record), {key: part.deflate() for key, part in get_all_nested_objects(record).items()}

        def put(tree: Any = tree, parts: dict[str, bytes] = parts) -> None:  # noqa: ANN401  # a protobuf class without types
            store.preregister(1, tree)
            for key, content in parts.items():
                store.put(key, content)

        found["store an update"].append(milliseconds(put))
        found["read it"].append(milliseconds(lambda parts=parts: [store.get(key) for key in parts]))  # type: ignore[misc]
        found["delete it"].append(milliseconds(lambda tree=tree: store.delete(tree.object_id)))  # type: ignore[misc]
        node = ids[turn % nodes]
        found["idle question"].append(milliseconds(lambda node=node: state.get_message_ins(node, 1)))  # type: ignore[misc]
    return {what: median(values) for what, values in found.items()}


def main(
    nodes: Annotated[int, typer.Option(min=1, help="Registered sites.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Updates and questions.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
) -> None:
    """Print what an update and an idle question cost in the SuperLink's state."""
    with TemporaryDirectory() as folder:
        places = {"database file": str(Path(folder) / "state.db"), "in memory": FLWR_IN_MEMORY_DB_NAME}
        found = {name: measured(database, nodes, repeats) for name, database in places.items()}
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    table = Table(f"median ms, {nodes} nodes", *found)
    for what in next(iter(found.values())):
        table.add_row(what, *(f"{values[what]:.3g}" for values in found.values()))
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
