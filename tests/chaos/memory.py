"""`python -m tests.chaos.memory [--rounds 42]`: whether the programs of a study without bad days grow with its rounds.

The scene of the chaos suite. After each commit the resident memory of every process that lives through the study is noted;
the slope is that of block means after the first 20 rounds, with the 95 % interval of an ordinary fit.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules, as pytest finds them

from simulations.benchmarks.memory import slope_of

from .machines import processes  # after the path
from .scene import NAMES, Scene, scene, study_of

WARM_UP = 20
DEADLINE_S = 240.0
PROGRAMS = {
    "main() superlink": "fl_server superlink",
    "bin/flower-superlink": "flower-superlink",
    "bin/flower-superexec": "flower-superexec",
    "main() run": "fl_server run",
    "bin/flwr-serverapp": "ServerApp",
    "main() --site": "fl_client",
    "fl_client.supernode": "SuperNode",
}
"""Part of the command line and what the program is called."""

Process = tuple[str, str, int]
"""Program, service, process number."""


def resident_bytes(found: Scene) -> dict[Process, int]:
    """Resident memory of each of the programs now."""
    held = {}
    for name, service in found.services.by_name.items():
        for pid, line in processes(service.mark).items():
            for part, program in PROGRAMS.items():
                if part in line:
                    with suppress(OSError):
                        held[program, name, pid] = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return held


def played(rounds: int) -> list[dict[Process, int]]:
    """Resident memory after each commit of a study of so many rounds."""
    samples: list[dict[Process, int]] = []
    console = Console(stderr=True)
    with scene() as found:
        found.start_sites()
        found.add_study(study_of("memory", 1, quorum=len(NAMES), deadline_s=DEADLINE_S, rounds=rounds))
        run, ends = found.start_run("memory"), time.monotonic() + DEADLINE_S
        while run.wanted and len(samples) < rounds:
            state = found.progress("memory")
            if state is not None and state.round > len(samples):
                samples.append(resident_bytes(found))
                ends = time.monotonic() + DEADLINE_S
                console.print(f"round {state.round} of {rounds}", highlight=False)
            if time.monotonic() > ends:
                sys.exit(f"no round within {DEADLINE_S:.0f} s; look at {found.root}")
            time.sleep(0.5)
        found.services.stop("run")
    if len(samples) < rounds:
        sys.exit(f"the run ended after {len(samples)} of {rounds} rounds")
    return samples


def shown(samples: list[dict[Process, int]]) -> Table:
    """A row per process that was there in every round after the warm-up."""
    table = Table("program", "service", "MB after the warm-up", "MB at the end", "kB per round", "95 % interval")
    kept = samples[WARM_UP:]
    for process in sorted(set.intersection(*(set(sample) for sample in kept))):
        held = [sample[process] for sample in kept]
        found = slope_of(held, 0)
        ends = f"{found.low / 1e3:.1f} to {found.high / 1e3:.1f}"
        table.add_row(*process[:2], f"{held[0] / 1e6:.1f}", f"{held[-1] / 1e6:.1f}", f"{found.slope / 1e3:.1f}", ends)
    return table


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.memory", description=__doc__)
    parser.add_argument("--rounds", type=int, default=42, help=f"rounds of the study, at least {WARM_UP + 20}")
    rounds = parser.parse_args(words).rounds
    if rounds < WARM_UP + 20:
        parser.error(f"--rounds {rounds}: at least {WARM_UP + 20} are needed")
    Console().print(shown(played(rounds)))


if __name__ == "__main__":
    main(sys.argv[1:])
