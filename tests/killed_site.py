"""A hospital that is killed as it trains, each time in a process of its own; for test_ledger_kill.py and test_site_kills.py.

Started with the folder of the hospital. Each line "go" on the standard input starts a process, whose number is printed. It
trains round after round or, in the order "asked", answers the one question that lies in the folder that the line names.
Every step that is really taken adds one byte to the file `steps` there, without any buffer.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Written
from flwr.supercore.task_identity import TaskIdentity

import fl_client.app
import fl_client.local_round
from fl_client.app import make_client_app
from fl_client.budget import epsilon_of_history
from fl_client.participant import Participant, read_site
from icmoe.accounting import Spending
from icmoe.atomic import write_atomically
from icmoe.exchange import global_state
from icmoe.messages import ARRAYS, CONFIG, ROUND_KEY, STUDY_KEY, UPDATE
from icmoe.model import build_model
from icmoe.privacy import private_round
from icmoe.study import Study


def counted(path: Path):
    """Return the private training, every step of which is counted in the file `path` before the next one starts."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def train(*arguments, on_step, **settings):
        def step(done: int, steps: int) -> None:
            os.write(descriptor, b".")
            on_step(done, steps)

        return private_round(*arguments, **settings, on_step=step)

    return train


def paid_late(train, spend):
    """Return training and paying in the wrong order, to show that the test would notice."""
    asked = []

    def remember(request, incoming: str) -> None:
        asked.append((request, incoming))

    def train_then_pay(*arguments):
        numbers = train(*arguments)
        spend(*asked.pop())
        return numbers

    return train_then_pay, remember


def train_for_ever(site: Participant, sent: Path) -> None:
    """Answer one message after the other, some of them twice; each answer's update is noted in the file `sent`."""
    study, chosen = site.studies[0], random.Random()
    client_app = make_client_app(lambda *_: site)
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
    while True:
        seed, number = chosen.randrange(8), chosen.randrange(1, study.rounds + 1)
        for _ in range(chosen.choice((1, 2))):
            reply = client_app(Message(request(study, number, seed), dst_node_id=5, message_type="train"), context)
            if reply.has_error():
                print(reply.error.reason, file=sys.stderr, flush=True)
                os._exit(1)
            norm = sum(float((array.numpy() ** 2).sum()) for array in reply.content[UPDATE].values())
            with sent.open("a") as file:
                file.write(f"{number} {seed} {norm!r}\n")


def answer_one(folder: Path, digest: str) -> None:
    """Answer the question that lies in a hospital's folder, as a ClientApp's process does, and leave the answer there."""
    site = read_site(folder / "site.toml", digest)
    fl_client.local_round.private_round = counted(folder / "steps")
    kind, _, content = (folder / "question").read_bytes().partition(b"\n")
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
    asked = Message(recorddict_from_proto(Written.FromString(content)), dst_node_id=5, message_type=kind.decode())
    reply = make_client_app(lambda *_: site)(asked, context)
    if reply.has_error():
        print(reply.error.reason, file=sys.stderr, flush=True)
        os._exit(1)
    write_atomically(folder / "answer", recorddict_to_proto(reply.content).SerializeToString(), durable=False)
    os._exit(0)


def request(study: Study, number: int, seed: int) -> RecordDict:
    arrays = {name: Array(tensor.numpy()) for name, tensor in global_state(build_model(study, seed=seed)).items()}
    return RecordDict({ARRAYS: ArrayRecord(arrays), CONFIG: ConfigRecord({STUDY_KEY: study.digest, ROUND_KEY: number})})


def main() -> None:
    """Start a process for each line read."""
    folder, digest, order = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    site = read_site(folder / "site.toml", digest)
    if site.budget is not None:
        epsilon_of_history(site.budget, [Spending(2.0, 0.5, 5)])  # whatever is imported late is imported now
    if order != "asked":
        fl_client.local_round.private_round = counted(folder / "steps")
    if order == "late":
        late = paid_late(fl_client.app.train_here, fl_client.app._spend)
        fl_client.app.train_here, fl_client.app._spend = late
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            if order == "asked":
                answer_one(Path(line.split(maxsplit=1)[1].strip()), digest)
            train_for_ever(replace(site), folder / "sent")
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
