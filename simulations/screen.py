"""What a person sees while a rehearsal runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fl_server.round_log import RoundRecord
from fl_server.round_strategy import unheard
from icmoe.server_privacy import spending_sentence
from simulations.alone import by_method
from simulations.cross_site import matrix_rows
from simulations.federation import Job, Listener, Scored
from simulations.results import CHECK_COLUMNS, check_rows

MOST_ROWS = 20
"""Longest list on the screen."""
WIDEST = 10_000
"""Characters; more than any terminal has."""


class Screen:
    """Live view of a rehearsal.

    Parameters
    ----------
    console
        Where to print; lines instead of a live view where it is no terminal.
    also, also_scored
        Told of each event, and of each round's validation scores, after the screen.
    """

    def __init__(self, console: Console, also: Listener = unheard, also_scored: Scored = unheard) -> None:
        self._console, self._also, self._also_scored = console, also, also_scored
        self._progress = Progress(
            TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._live = Live(self._progress, console=console, refresh_per_second=4) if console.is_terminal else None
        self._rows: dict[str, RoundRecord] = {}
        self._job: Job | None = None
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, float] = defaultdict(time.monotonic)

    def __enter__(self) -> Screen:
        """Start the live view."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the live view, whatever happened."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: RenderableType) -> None:
        """Print one line, or a table."""
        self._console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Name a piece of work and, at its end, its seconds.

        Parameters
        ----------
        name
            For example "encode".

        Yields
        ------
        None
        """
        began = time.monotonic()
        yield
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))
        self.say(f"[dim]{name}: {time.monotonic() - began:.1f} s[/dim]")

    def progress(self, name: str, done: int, total: int) -> None:
        """Move the bar called `name`; without a terminal, a line every fifth."""
        if self._live is None:
            if total >= 20 and done % max(1, total // 5) == 0 and done:
                self.say(f"{name} {done}/{total}")
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def on_event(self, job: Job, record: RoundRecord | None, site: str) -> None:
        """Show a reply of a site, or the end of a round."""
        self._show(job, record, site)
        self._also(job, record, site)

    def on_scored(self, job: Job, record: RoundRecord) -> None:
        """Say how good the model of a round is, which the answers to the next one bring."""
        if self._live is None:
            dice = "  ".join(f"{name} {part['val_dice']:.3f}" for name, part in by_method(job.method, record).items())
            self.say(f"{job.method} seed {job.study.seed}  val Dice after round {record['round']}: {dice}")
        self._also_scored(job, record)

    def _show(self, job: Job, record: RoundRecord | None, site: str) -> None:
        name = f"{job.method} seed {job.study.seed}"
        if job is not self._job:
            self._job, self._rows = job, {}
        if record is None:
            self._waiting(name, site)
            return
        self._rows[str(record["round"])] = record
        for fault in record["faults"]:
            self.say(f"[red]{escape(fault['sentence'])}[/red]")
        self.progress(name, record["round"], job.study.rounds)
        if self._live is None:
            self.say(self._line(job, name, record))
        else:
            self._live.update(Group(self._table(job, record), self._progress))
        if record["round"] == job.study.rounds and name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))

    def _waiting(self, name: str, site: str) -> None:
        if self._live is not None and name in self._tasks:
            self._progress.update(self._tasks[name], description=f"{name} < {escape(site)}")

    def _line(self, job: Job, name: str, record: RoundRecord) -> str:
        began_s = self._began[name]  # first, since the first look sets it
        elapsed_s = time.monotonic() - began_s
        sites = "  ".join(f"{escape(site)} {_loss(row)}" for site, row in record["sites"].items())
        size = f"  {record['bytes_up'] / 1e6:.1f} MB up" if job.method != "alone" else ""
        spent = f"  {spending_sentence(record['privacy'])}" if record.get("privacy") else ""
        return f"{name}  round {record['round']}/{job.study.rounds}  loss {sites}{size}  {elapsed_s:.0f} s{spent}"

    def _table(self, job: Job, record: RoundRecord) -> RenderableType:
        title = f"{job.method}, seed {job.study.seed}, round {record['round']} of {job.study.rounds}"
        table = Table(title=title, title_justify="left")
        for column in ("site", "loss", "val Dice before", "usage per expert", "steps", "MB up"):
            table.add_column(column, justify="left" if column in ("site", "usage per expert") else "right")
        before = self._rows.get(str(record["round"] - 1), {"sites": {}})
        for site, row in record["sites"].items():
            dice = before["sites"].get(site, {}).get("val_dice")
            usage = " ".join(_shade(share, len(row["usage"])) for share in row["usage"])
            size = "-" if job.method == "alone" else f"{row['bytes_up'] / 1e6:.2f}"
            table.add_row(escape(site), _loss(row), "-" if dice is None else f"{dice:.3f}", usage, str(row["steps"]), size)
        return table


def _loss(row: RoundRecord) -> str:
    """Return a site's loss, a dash where privacy withholds it."""
    return "-" if row["loss"] is None else f"{row['loss']:.3f}"


def _shade(share: float, experts: int) -> str:
    """Return a bar of eight levels; half height is even use."""
    level = min(7, int(share * experts * 4))
    return "▁▂▃▄▅▆▇█"[level]


def final_table(results: dict[str, Any]) -> Table:
    """Return the test Dice per method and site, mean over the seeds."""
    sites = [name for name, row in results["sites"].items() if row["patients"]["test"]]
    table = Table(
        title="Test Dice (per patient, mean over seeds)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    for name in [*sites, "mean of sites", "worst site", "all patients"]:
        table.add_column(escape(name), justify="right")
    partly = [name for name, row in results["summary"].items() if not all(_scored(row, site) for site in sites)]
    table.caption = f"{', '.join(partly)}: of the scored sites alone, which is no match for the other rows." if partly else None
    for method, row in results["summary"].items():
        cells = [_cell(row["per_site"].get(name, {}).get("mean"), row["per_site"].get(name, {}).get("std")) for name in sites]
        table.add_row(
            method,
            *cells,
            _cell(row["dice_mean"], row["dice_mean_std"]),
            _cell(row["dice_worst_site"], None),
            _cell(row["dice_pooled"], row["dice_std"]),
        )
    return table


def _scored(row: dict[str, Any], site: str) -> bool:
    return row["per_site"].get(site, {}).get("mean") is not None


def cross_table(results: dict[str, Any], console: Console) -> RenderableType | None:
    """Return the Dice of each model at each site, or where to find it if it does not fit; None where one row says nothing new."""
    columns, rows = matrix_rows(results)
    if len(rows) < 2:
        return None
    table = Table(title="Test Dice of each model at each site", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", *columns):
        table.add_column(escape(column), no_wrap=True, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    if len(rows) > MOST_ROWS or console.measure(table, options=console.options.update(width=WIDEST)).maximum > console.width:
        return f"Each of {len(rows)} models at each site: in the report."
    return table


def check_table(check: dict[str, Any]) -> Table:
    """Return what the sites told of their training images, as the coordinator of a real study would see it."""
    table = Table(title="What the sites told of their training data", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in CHECK_COLUMNS:
        longest_word = max(len(word) for word in column.split())
        table.add_column(column, justify="left" if column == "site" else "right", min_width=longest_word)
    rows = check_rows(check)
    for row in rows[:MOST_ROWS]:
        table.add_row(*map(escape, row))
    table.caption = f"and {len(rows) - MOST_ROWS} more, all in results.json" if len(rows) > MOST_ROWS else None
    return table


def _cell(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ±{std:.3f}"


def comparison_lines(results: dict[str, Any]) -> list[str]:
    """Return the answers of the rehearsal, one line each, with the bar where there is one."""
    lines = []
    for row in results["comparisons"]:
        verdict = "" if row["bar"] is None else f" [bar {row['bar']}: {'met' if row['met'] else 'not met'}]"
        lines.append(row["sentence"] + verdict.replace("[", "(").replace("]", ")"))
    return lines
