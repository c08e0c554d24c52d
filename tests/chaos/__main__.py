"""`python -m tests.chaos [--hours H] [--seed S] [--out DIR] [--studies N] [--only FAMILY...]`: see tests/chaos/README.md."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules, as pytest finds them

from .campaign import Options, run  # after the path
from .events import CYCLE, DECKS


def arguments(words: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Play studies on which bad days fall.")
    parser.add_argument("--hours", type=float, help="end after so many hours, once the study that runs is done")
    parser.add_argument(
        "--studies", type=int, help="end after so many studies; as many as there are families in a cycle where neither is given"
    )
    parser.add_argument("--seed", type=int, default=1, help="what happens, where and when")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="log and results; again with the same folder: go on")
    parser.add_argument("--only", choices=list(DECKS), nargs="+", default=CYCLE, metavar="FAMILY", help=f"of {', '.join(DECKS)}")
    found = parser.parse_args(words)
    studies = len(found.only) if found.hours is None and found.studies is None else found.studies
    return Options(found.seed, found.out.resolve(), found.hours, studies, cycle=tuple(found.only))


def ended(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts it in the background has it ignored
    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGHUP, ended)
    try:
        sys.exit(run(arguments(sys.argv[1:])))
    except KeyboardInterrupt:
        sys.exit("Ended by Ctrl-C; what is done is kept, the same command goes on.")
