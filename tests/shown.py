"""A coordinator's folder as a run leaves it, for tests of the page that shows it; only the wire is a fake."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from consortium import FL_SERVER, TEXT, environment
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from test_rounds import Wire, registered

from fl_server import audit
from fl_server.app import make_strategy, only_run_of, start_state
from fl_server.beside import audit_path
from fl_server.dashboard import page
from fl_server.dashboard.snapshot import Snapshot
from fl_server.home import Home, find_home
from fl_server.new_study import study_toml
from fl_server.roster import Roster
from fl_server.rounds import run_rounds
from fl_server.run_state import KEPT, RunState, latest_state
from fl_server.submit import StudyFolder, folder_of
from fl_server.waiting import write_wait
from icmoe.kinds import BALANCE_BIAS
from icmoe.messages import ARRAYS, CONFIG, NUMBERS, ROUND_KEY, UPDATE
from icmoe.study import Study

NAMES = ("Alder", "Birch", "Cedar", "Dogwood")
SLICES, ANNOUNCED = 30, 100
Answer = Callable[[Message, str], Message | None]


def make_home(root: Path, *sites: str) -> Home:
    """A folder with a consortium's file and no certificate yet."""
    root.mkdir(parents=True, exist_ok=True)
    entries = "".join(f'[[sites]]\nname = "{site}"\n' for site in sites or NAMES)
    (root / "consortium.toml").write_text(TEXT.format(port=8000) + entries)
    return find_home(root)


def lifelike(message: Message, site: str, *, usage: int = 3) -> Message | None:
    """A site whose scores, losses and usage move as those of a training do."""
    number, place = int(message.content[CONFIG][ROUND_KEY]), (len(site) + ord(site[0])) % 5
    numbers = {"val-dice": 0.9 - 0.06 * place - 0.5 * 0.75**number, "val-patients": 2}
    if message.metadata.message_type == "evaluate":
        return Message(RecordDict({NUMBERS: MetricRecord(numbers)}), reply_to=message)
    rng = np.random.default_rng([place, number])
    update = {
        name: Array(rng.normal(0, 0.01, array.numpy().shape).astype(np.float32))
        for name, array in message.content[ARRAYS].items()
        if name != BALANCE_BIAS
    }
    numbers |= {"slices": SLICES, "steps": 3, "seconds": 40.0, "loss": 0.2 + 0.03 * place + 1.1 * 0.8**number}
    numbers["usage"] = rng.dirichlet(np.full(usage, 4.0)).tolist()
    return Message(RecordDict({UPDATE: ArrayRecord(update), NUMBERS: MetricRecord(numbers)}), reply_to=message)


def with_infinities(bad: str, number: int, inner: Answer = lifelike) -> Answer:
    """Sites as `inner` of which one sends an update that holds infinity in one round."""

    def answer(message: Message, site: str) -> Message | None:
        reply = inner(message, site)
        if reply is not None and site == bad and message.content[CONFIG][ROUND_KEY] == number:
            arrays = reply.content.array_records.get(UPDATE, {})
            for name, array in arrays.items():
                arrays[name] = Array(np.full_like(array.numpy(), np.inf))
        return reply

    return answer


def play(
    home: Home,
    study: Study,
    *,
    rounds: int,
    answer: Answer = lifelike,
    names: tuple[str, ...] = NAMES,
    offline: tuple[str, ...] = (),
    run_id: str = "4242",
) -> StudyFolder:
    """Play rounds of a study from where it stands, as the ServerApp does, and stop after so many."""
    folder = folder_of(home, study)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.study.write_text(study_toml(study))
    folder.note_run(run_id)
    sites = dict(enumerate(names, start=11))
    nodes = [registered(node, name, "offline" if name in offline else "online") for node, name in sites.items()]
    wire = Wire(answer, nodes, sites)
    state = latest_state(folder.state, study) or start_state(study)
    strategy = make_strategy(
        study, Roster(sites, dict.fromkeys(names, ANNOUNCED)), note=partial(audit.note, audit_path(folder.study))
    )
    commit = partial(RunState.commit, path=folder.state, keep=KEPT)

    def stop(record: Mapping[str, object]) -> None:
        if record["round"] == rounds:
            raise KeyboardInterrupt

    watch = partial(write_wait, folder.study)
    with suppress(KeyboardInterrupt):
        run_rounds(wire, strategy, study, state, sites=sites, commit=commit, poll_s=0.001, on_round=stop, watch=watch)
    return folder


@contextmanager
def living(folder: StudyFolder) -> Iterator[None]:
    """A run of the study lives meanwhile."""
    with only_run_of(folder.study):
        yield


class Page(HTMLParser):
    """What a page says, and what it would run, load or style by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.inline, self.tags, self.ids, self.links = [], [], [], [], []
        self._inside = ""
        self.feed(text)
        self.said = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.inline += [name for name in values if name == "style" or name.startswith("on")]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in values) else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def standings(snapshot: Snapshot) -> dict[str, str]:
    return {site.name: site.standing for site in snapshot.sites}


def said(snapshot: Snapshot, **options: object) -> str:
    return Page(page.render(snapshot, **options)).said


def numbers(snapshot: Snapshot) -> list[int]:
    return [fault.number for fault in snapshot.faults]


@contextmanager
def serving(home: Home, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`fl_server dashboard` as a process on a free port, and the address that it printed."""
    command = [*FL_SERVER, "dashboard", "--home", str(home.root), "--port", "0", *words]
    log = home.root / "page.log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment())
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http"), log.read_text()
            yield address, process
        finally:
            process.terminate()
            process.wait(timeout=30)
