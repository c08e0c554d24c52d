"""Study after study of a seed: what is done is in `results.jsonl` and is not done again."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from consortium import ROOT
from rich.console import Console
from safetensors.numpy import load_file, save_file

from .events import CYCLE, LIAR, MALICIOUS, Plan, plans
from .judge import faults_of
from .play import Player, identical
from .scene import ROUNDS, Scene, scene, why_not
from .table import show

Row = dict[str, Any]
PACKAGES = ("icmoe", "fl_client", "fl_server")


@dataclass(frozen=True)
class Options:
    """What to play.

    Parameters
    ----------
    seed
        Of everything that is drawn.
    out
        Folder of log and results.
    hours, studies
        When to end; either may be absent.
    rounds, cycle
        Of each study; which families take turns.
    """

    seed: int
    out: Path
    hours: float | None = None
    studies: int | None = None
    rounds: int = ROUNDS
    cycle: Sequence[str] = CYCLE


class Log:
    """Lines for people on the screen and in `chaos.log`."""

    def __init__(self, path: Path) -> None:
        self.file, self.screen = path.open("a"), Console(highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        text = f"{time.strftime('%H:%M:%S')} {line}"
        self.screen.print(text, markup=False)
        self.file.write(text + "\n")
        self.file.flush()


def code_digest() -> str:
    """Name of the product's code: another code's calm run is no measure."""
    sha = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


def results(out: Path) -> list[Row]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: Options) -> int:
    """Play, print the tables, and return 0 where everything held."""
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "chaos.log")
    if why := why_not():
        log.say(f"nothing can be played here: {why}")
        return 2
    ends = time.monotonic() + 3600 * options.hours if options.hours is not None else float("inf")
    done = {(row["study"], row["family"]) for row in results(options.out) if row["seed"] == options.seed and "study" in row}
    wanted = [
        plan
        for plan in islice(plans(options.seed, options.rounds, options.cycle), options.studies or 10**4)
        if (plan.index, plan.family) not in done
    ]
    if wanted:
        with scene() as found:
            try:
                _play_all(found, options, wanted, ends, log)
            finally:
                _keep_logs(found, options.out)
    rows = [row for row in results(options.out) if row["seed"] == options.seed]
    with (options.out / "table.txt").open("w") as file:
        show(rows, Console(file=file, width=170))
    show(rows, Console())
    return 1 if any(row.get("faults") for row in rows) else 0


def _play_all(found: Scene, options: Options, wanted: Sequence[Plan], ends: float, log: Log) -> None:
    for what, why in found.cannot.items():
        log.say(f"{what}: not possible here: {why}")
    log.say(f"seed {options.seed}, code {code_digest()}; the hospitals connect")
    found.start_sites()
    player = Player(found, options.seed, log.say, options.rounds)
    for plan in wanted:
        if time.monotonic() > ends:
            return
        calm, about = _reference(player, "calm", {}, options, log)
        player.round_s = about["seconds"] / (options.rounds + 3)
        log.say(f"study {plan.index}: {plan.family}")
        row = player.play(plan)
        if row["finished"]:
            weights = load_file(found.folder(plan.name).model)
            row |= {"identical": identical(weights, calm), "calm_dice": about["dice"]}
            if plan.family == MALICIOUS:
                schedule = {str(event.after_round + 1): "absent" for event in plan.events}
                absent, _ = _reference(player, "absent", schedule, options, log)
                row["as_absent"] = identical(weights, absent)
        row["faults"] = faults_of(row)
        row["verdict"] = _verdict(row)
        _add(options.out, row)
        log.say(f"study {plan.index}: {row['verdict']}; {row['repeated']} rounds asked again, {row['seconds']:.0f} s")


def _verdict(row: Row) -> str:
    if row["faults"]:
        return "; ".join(row["faults"])
    if row["family"] == MALICIOUS:
        return f"nothing of {LIAR}'s poison in the model: bits of the run in which it stays away"
    return "held; bits of the calm run" if row["identical"] else "held; other bits: a round went on without a hospital"


def _reference(
    player: Player, name: str, schedule: dict[str, str], options: Options, log: Log
) -> tuple[dict[str, np.ndarray], Row]:
    """Return the calm run of this code, played once and kept."""
    path = options.out / f"{name}-{options.seed}-{options.rounds}-{code_digest()}.safetensors"
    if not path.exists():
        log.say(f"the {name} run")
        weights, row = player.calm(name, schedule)
        save_file(weights, path)
        row |= {"seed": options.seed, "rounds": options.rounds, "verdict": "a measure for the others"}
        path.with_suffix(".json").write_text(json.dumps(row))
        _add(options.out, row)
        log.say(f"the {name} run took {row['seconds']:.0f} s")
    return load_file(path), json.loads(path.with_suffix(".json").read_text())


def _add(out: Path, row: Row) -> None:
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _keep_logs(found: Scene, out: Path) -> None:
    """Keep what the programs said."""
    folder = out / time.strftime("logs-%m%d-%H%M%S")
    folder.mkdir(exist_ok=True)
    for path in found.root.glob("*.log"):
        shutil.copy(path, folder / path.name)
    for path in (found.root / "hospitals").glob("*/state/supernode.log"):
        shutil.copy(path, folder / f"{path.parts[-3]}.supernode.log")
