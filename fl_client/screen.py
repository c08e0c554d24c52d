"""What a person, a service's log or a machine reads while a site takes part."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fl_client.doing import doing_now, note_said
from fl_client.site import SiteFile
from fl_client.status import now_line, stamp_of, status_of, table_of
from icmoe.errors import IcmoeError, printable

Form = Literal["live", "plain", "json"]
Say = Callable[[str], None]
_NUMBER = re.compile(r"^ICM(\d{3}) ")


class Run:
    """Number of the run that the coordinator's last message belongs to, as Flower's lines tell it."""

    def __init__(self) -> None:
        self.number: str | None = None


@contextmanager
def screen(path: Path, settings: SiteFile, form: Form, run: Run) -> Iterator[Say]:
    """Show what is said, in one of three forms, while inside; what was said last is kept for `fl_client status`.

    Parameters
    ----------
    path
        The site file.
    settings
        What it says.
    form
        "live" a panel that stays below the sentences, "plain" sentences alone, "json" an object per line on the standard
        output with time, site, run, number of the error and sentence.
    run
        The present run.

    Yields
    ------
    callable
        To call with a sentence.
    """
    state = path.parent / settings.state
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    show = _json_lines(settings.name, run) if form == "json" else _sentences(settings.name, console)

    def say(sentence: str) -> None:
        sentence = printable(sentence)  # it may quote the coordinator, and a terminal or a page shows it
        with suppress(OSError):  # a log without room, or that nobody reads any more, is no reason to leave
            show(sentence)
        note_said(state, sentence, run.number)

    if form != "live":
        yield say
        return
    panel = Panel(path, settings)
    with Live(get_renderable=panel.render, console=console, refresh_per_second=2, transient=True):
        yield say


def form_of(*, plain: bool, as_json: bool) -> Form:
    """Return the form that the options ask for; a panel only where somebody can see it."""
    if as_json:
        return "json"
    return "plain" if plain or not sys.stderr.isatty() else "live"


class Panel:
    """The site's status, read anew when its records change, and the bar of the round that is being trained."""

    def __init__(self, path: Path, settings: SiteFile) -> None:
        self.path, self.settings, self.state = path, settings, path.parent / settings.state
        self.stamp: tuple[int, ...] = ()
        self.status: dict[str, Any] | None = None
        self.trouble = ""

    def render(self) -> RenderableType:
        """Return what is shown at this moment."""
        if (stamp := stamp_of(self.state)) != self.stamp:
            self.stamp = stamp
            self._read()
        if self.status is None:
            return Text(self.trouble, "red")
        doing = doing_now(self.state)
        if doing is None:
            return table_of({**self.status, "doing": None})
        now = asdict(doing)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=max(doing.steps, 1), completed=doing.step, width=40), now_line(now))
        return Group(table_of({**self.status, "doing": now}), bar)

    def _read(self) -> None:
        try:
            self.status, self.trouble = status_of(self.path, self.settings), ""
        except (IcmoeError, OSError) as error:
            self.status, self.trouble = None, str(error)


def _sentences(name: str, console: Console) -> Say:
    def say(sentence: str) -> None:
        style = "bold red" if sentence.startswith("ICM") else ""
        console.print(
            Text.assemble((f"{datetime.now().astimezone():%H:%M:%S} ", "dim"), (f"{name}: ", "bold"), (sentence, style))
        )

    return say


def _json_lines(name: str, run: Run) -> Say:
    def say(sentence: str) -> None:
        number = _NUMBER.match(sentence)
        about = {"time": datetime.now(UTC).isoformat(), "site": name, "run": run.number}
        record = {**about, "number": int(number[1]) if number else None, "says": sentence}
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()

    return say
