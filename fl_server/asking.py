"""Questions on a terminal: asked again until the answer is one, with the reason; without a terminal the usual answer counts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from fl_server.new_study import DID, Ask
from icmoe.errors import Fault, IcmoeError, print_faults


def asking() -> Ask:
    """Return how to ask here."""
    return _on_terminal if sys.stdin.isatty() else _usual_answer


def _on_terminal(key: str, question: str, suggestion: str | None, check: Callable[[str], Any]) -> Any:  # noqa: ANN401  # a value
    del key
    while True:
        text = typer.prompt(question, default=suggestion)
        try:
            return check(text)
        except IcmoeError as error:
            print_faults(error.faults)


def _usual_answer(key: str, question: str, suggestion: str | None, check: Callable[[str], Any]) -> Any:  # noqa: ANN401  # a value
    if suggestion is None:
        todo = f"Give --{key.replace('_', '-')}, or answer on a terminal."
        raise IcmoeError(Fault(number=221, where=f"--{key.replace('_', '-')}", value=question, did=DID, todo=todo))
    return check(suggestion)
