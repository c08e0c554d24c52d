"""A hospital killed at random instants of its rounds: asked again, it goes on, and the study ends as if nothing had been.

Only the wire is a fake: the site's ClientApp runs in processes of its own. ``ICMOE_KILLS`` and ``ICMOE_KILL_SEED`` choose how
many kills and which.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Written
from test_client import command, hospital, write_site_file, write_study_file
from test_ledger_kill import PRIVACY, started, steps_taken
from test_rounds import Wire, honest

from fl_client.credentials import make_node_key
from fl_client.ledger import read_ledger
from fl_client.records import Records
from fl_client.signing import Signer
from fl_server.app import make_strategy, start_state
from fl_server.receipts import Receipted
from fl_server.roster import Roster
from fl_server.rounds import run_rounds
from fl_server.run_state import RunState
from icmoe.kinds import is_personal
from icmoe.messages import LOSS_KEY, NUMBERS, SECONDS_KEY, SLICES_KEY, UPDATE
from icmoe.study import Study

__all__ = ["hospital"]
KILLS = int(os.environ.get("ICMOE_KILLS", "6"))
SEED = int(os.environ.get("ICMOE_KILL_SEED", "7"))
ROUNDS = 4  # as many finished updates as a site keeps: each new one can be counted
SITES = {11: "Alder", 12: "Birch"}
KEY = '[coordinator]\naddress = "localhost:443"\nca = "ca.crt"\nkey = "node.key"\n'
BUDGET = '[budget]\nepsilon = 1000.0\ndelta = 0.1\naccountant = "rdp"\n'
STUDIES = {
    "plain": {"aggregation": {"personal": True}},
    "private": {"privacy": {"site": PRIVACY}},  # its noise is drawn anew each time: only what it spends can be compared
}


def made(study: Study, hospital: Path, folder: Path) -> Path:
    """Make a hospital that approved the study, with features and a key, and return its folder."""
    folder.mkdir()
    path = write_site_file(folder, hospital)
    make_node_key(folder / "node.key")
    path.write_text(f"{path.read_text()}\n{KEY}{BUDGET if study.privacy.site else ''}")
    for words in (["approve", str(write_study_file(folder / "study.toml", study)), "--yes"], ["prepare"]):
        done = command(path, *words)
        assert done.exit_code == 0, done.output
    return folder


@dataclass
class Hospital:
    """Alder as the wire sees it: a process per question, killed at a random instant while there are kills left."""

    folder: Path
    study: Study
    process: subprocess.Popen[str]
    chosen: random.Random
    usual_s: float = 0.0
    left: int = 0
    longest_s: float = 0.0
    found: Counter[str] = field(default_factory=Counter)
    sent: dict[int, set[bytes]] = field(default_factory=dict)

    def __call__(self, message: Message, site: str) -> Message | None:
        kind = message.metadata.message_type
        if site != "Alder":
            return self.other(message, site)
        question = recorddict_to_proto(message.content).SerializeToString()
        (self.folder / "answer").unlink(missing_ok=True)
        (self.folder / "question").write_bytes(f"{kind}\n".encode() + question)
        before = self.trace()
        began = time.monotonic()
        self.process.stdin.write(f"go {self.folder}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kind == "train" and self.left:
            self.await_instant(before)
            with suppress(ProcessLookupError):  # it has answered and is gone
                os.kill(child, signal.SIGKILL)
        assert self.process.stdout.readline() == "ended\n"
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        return self.answer(message, before)

    def await_instant(self, before: tuple[int, int, int]) -> None:
        """Wait for an instant: any of the usual time, or just after the question was written down or the update was kept."""
        place = self.chosen.choice((None, None, 0, 2))
        if place is None:
            time.sleep(self.chosen.uniform(0.0, 1.1 * self.usual_s))
            return
        ends = time.monotonic() + 2.0 * self.usual_s
        while self.files_of(place) <= before[place] and time.monotonic() < ends and not (self.folder / "answer").exists():
            time.sleep(0.001)
        time.sleep(self.chosen.uniform(0.0, 0.01))

    def files_of(self, place: int) -> int:
        """Return lines of the log for 0, finished updates for 2, without a look into the ledger, which would hold it."""
        log = self.folder / "state/audit.jsonl"
        if place == 0:
            return log.read_bytes().count(b"\n") if log.exists() else 0
        return len(list((self.folder / "state").rglob("finished/*.safetensors")))

    def answer(self, message: Message, before: tuple[int, int, int]) -> Message | None:
        """Return what the process left behind; every kill is counted by how far the round had come."""
        path = self.folder / "answer"
        if path.exists():
            reply = Message(recorddict_from_proto(Written.FromString(path.read_bytes())), reply_to=message)
            if UPDATE in reply.content:
                number = int(message.content["config"]["server-round"])
                self.sent.setdefault(number, set()).add(b"".join(one.data for one in reply.content[UPDATE].values()))
            return reply
        assert self.left, "without a kill there is an answer"
        self.left -= 1
        lines, entries, files = (now - then for now, then in zip(self.trace(), before, strict=True))
        how_far = "finished" if files else "paid" if entries else "received" if lines else "before"
        self.found[how_far] += 1
        return None

    def trace(self) -> tuple[int, int, int]:
        """Return lines of the log, entries of the ledger and finished updates that are kept, of which there are four at most."""
        return self.files_of(0), len(read_ledger(self.folder / "state", "Alder").entries), self.files_of(2)

    def other(self, message: Message, site: str) -> Message:
        """Return the answer of the site that is never killed."""
        reply = honest(message, site)
        if UPDATE in reply.content and self.study.aggregation.personal:
            kept = {key: one for key, one in reply.content[UPDATE].items() if not is_personal(key, self.study.model)}
            reply.content[UPDATE] = ArrayRecord(kept)
        if UPDATE in reply.content and self.study.privacy.site is not None:
            told = {key: one for key, one in reply.content[NUMBERS].items() if key not in {LOSS_KEY, SECONDS_KEY}}
            reply.content[NUMBERS] = MetricRecord({**told, SLICES_KEY: self.study.privacy.site.patients})
        return reply


def studied(hospital: Hospital) -> RunState:
    """Run the whole study; a round without Alder's answer is asked again."""
    study, folder = hospital.study, hospital.folder
    roster = Roster(SITES, {"Alder": 10, "Birch": 20})
    grid = Receipted(Wire(hospital, sites=SITES), SITES, folder / "receipts")
    commit = partial(RunState.commit, path=folder / "study.state.safetensors")
    return run_rounds(grid, make_strategy(study, roster), study, start_state(study), sites=SITES, commit=commit, poll_s=0.001)


def same_bits(one: RunState, other: RunState) -> bool:
    return one.arrays.keys() == other.arrays.keys() and all(
        tensor.tobytes() == other.arrays[name].tobytes() for name, tensor in one.arrays.items()
    )


def kept_by(folder: Path) -> dict[str, bytes]:
    """Return the personal parts that a hospital keeps."""
    state = folder / "state"
    return {str(path.relative_to(state)): path.read_bytes() for path in sorted(state.rglob("personal-*.safetensors"))}


def require_sound(folder: Path) -> int:
    """Check both records of a hospital and that every step was paid for; return its attempts at a round."""
    records = Records(state=folder / "state", site="Alder", signer=Signer(folder / "node.key"))
    book, _, _ = records.verify()
    paid = sum(count for entry in book.entries for *_, count in entry.releases or ())
    assert paid >= steps_taken(folder)
    return len(book.entries)


@pytest.mark.parametrize("kind", STUDIES)
def test_a_site_killed_at_any_instant_ends_with_the_same_bits_and_sound_records(
    kind: str, hospital: Path, make_study, tmp_path: Path
) -> None:
    study = make_study(rounds=ROUNDS, quorum=2, retries=100, deadline_s=0.02, **STUDIES[kind])
    source, chosen = made(study, hospital, tmp_path / "source"), random.Random(SEED)
    found, attempts, studies, kills = Counter[str](), 0, 0, 0
    with started(source, study, "asked") as process:
        calm = Hospital(shutil.copytree(source, tmp_path / "calm"), study, process, chosen)
        ended = studied(calm)
        assert require_sound(calm.folder) == ROUNDS
        while kills < KILLS:
            folder = shutil.copytree(source, tmp_path / f"{studies}")
            killed = Hospital(folder, study, process, chosen, calm.longest_s, KILLS - kills)
            again = studied(killed)
            assert (again.round, again.closed) == (ROUNDS, True)
            attempts += require_sound(folder)
            assert all(len(updates) == 1 for updates in killed.sent.values()), "a round is answered with one update only"
            if kind == "plain":
                assert same_bits(again, ended)
                assert kept_by(folder) == kept_by(calm.folder) != {}
            found, kills, studies = found + killed.found, kills + sum(killed.found.values()), studies + 1
    again_trained = attempts - studies * ROUNDS
    print(f"{kind}: {kills} kills ({dict(found)}), {studies} studies of {ROUNDS} rounds, {again_trained} rounds paid for again")
    assert again_trained <= kills
