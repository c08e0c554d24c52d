"""Progress bars of the long steps at a site: how much, how fast, how long still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

UNITS = {"read": "files", "decode": "images", "report": "series", "encode": "views", "train": "rounds"}
"""What the steps count."""


class RateColumn(ProgressColumn):
    """What a step does per second on average, and the time that the rest will take at that rate."""

    def render(self, task: Task) -> Text:
        """Return the rate, and while there is a rest the time left as hours, minutes and seconds."""
        seconds = task.finished_time or task.elapsed
        if not task.completed or not seconds or task.total is None:
            return Text("")
        rate = task.completed / seconds
        left_s = round((task.total - task.completed) / rate)
        left = "" if task.finished else f", {left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left"
        return Text(f"{rate:,.1f} {UNITS[task.description]}/s{left}", "cyan")


@contextmanager
def bars() -> Iterator[Any]:
    """Show one bar per step on the error stream while inside.

    Yields
    ------
    callable
        To call with the step's name, how much is done and how much there is.
    """
    columns = (TextColumn("{task.description:<6}"), BarColumn(), MofNCompleteColumn(), RateColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown: dict[str, Any] = {}

        def on_progress(step: str, done: int, total: int) -> None:
            if total and step not in shown:
                shown[step] = progress.add_task(step, total=total)
            if total:
                progress.update(shown[step], completed=done, total=total)

        yield on_progress
