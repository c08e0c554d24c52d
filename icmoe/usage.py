"""What is wrong with a command line, as a numbered sentence like every other fault."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import click
from typer import Typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from icmoe.ending import unwinding
from icmoe.errors import NOT_STARTED, Fault, IcmoeError, exit_on_fault, print_faults

EXIT_CODE = 2
STANDARD = 2
"""Largest number of a standard stream."""


class Commands(TyperGroup):
    """Commands of a program whose usage errors are numbered: `typer.Typer(cls=Commands)`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401  (Click's own signature)
        super().__init__(*arguments, **settings)
        for command in self.commands.values():
            restore_help(command)

    def main(self, *arguments: Any, **settings: Any) -> NoReturn:  # noqa: ANN401  (Click's own signature)
        """Run the command that the arguments name and end the process."""
        _end_with(partial(super().main, *arguments, **{**settings, "standalone_mode": False}))


class OneCommand(TyperCommand):
    """The only command of a script, with the same sentences: `@app.command(cls=OneCommand)`."""

    def main(self, *arguments: Any, **settings: Any) -> NoReturn:  # noqa: ANN401  (Click's own signature)
        """Run the command and end the process."""
        _end_with(partial(super().main, *arguments, **{**settings, "standalone_mode": False}))


def run_command(function: Callable[..., object]) -> None:
    """Run a function as the only command of a script and end the process; `typer.run` would use other sentences."""
    script = Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command(cls=OneCommand)(function)
    script()


def _end_with(run: Callable[[], object]) -> NoReturn:
    """Run what the arguments ask for and end the process with its code, or with what is wrong about them."""
    open_closed_streams()
    escape_what_cannot_be_printed()
    with unwinding(), output_written():
        with exit_on_fault():
            require_working_directory()
        sys.exit(_code_of(run))


def _code_of(run: Callable[[], object]) -> int:
    try:
        with exit_on_fault():  # of the help itself, which no command prints
            code = run()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_CODE
    except click.UsageError as error:
        print_faults([usage_fault(error)])
        return EXIT_CODE
    except click.Abort:
        return 1
    return code if isinstance(code, int) else 0


@contextmanager
def output_written() -> Iterator[None]:
    """Write out at the end what was printed, and fail where that is lost; a reader that has gone is told nothing.

    Yields
    ------
    None
    """
    try:
        yield
    except SystemExit as end:
        try:
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try, and complain, once more
            if end.code:
                raise end from None
            if not isinstance(error, BrokenPipeError):
                print_faults([_lost(error)])
            sys.exit(1)
        raise


def _lost(error: OSError) -> Fault:
    what, did = "what was printed is lost, in whole or in part", "What was done stands."
    todo = "Lead the output to a place that takes it; look at what stands before the command is given again."
    return Fault(number=205, where="standard output", what=what, value=error.strerror or "", did=did, todo=todo)


def open_closed_streams() -> None:
    """Lead standard streams that the caller closed to nowhere: what is printed then is lost, and what is done is done."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: the stream's own
            os.set_inheritable(descriptor, descriptor <= STANDARD)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))


def require_working_directory() -> None:
    """Refuse to start in a folder that was removed: libraries that load then end the process with words of their own.

    Raises
    ------
    IcmoeError
        205 where there is none.
    """
    try:
        Path.cwd()
    except OSError as error:
        what, value, todo = "working directory is not there", error.strerror or "", "Change to a folder that exists."
        raise IcmoeError(Fault(number=205, what=what, value=value, did=NOT_STARTED, todo=todo)) from None


def escape_what_cannot_be_printed() -> None:
    """Let standard output escape the letters that its encoding lacks, as standard error does: a name may hold any."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def restore_help(command: click.Command) -> None:
    """Give arguments their help again: from 8.5 on, Click empties what this Typer has set before it calls Click."""
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True) if command.callback else {}
    for parameter in command.params:
        told = [extra.help for extra in getattr(hints.get(parameter.name or ""), "__metadata__", ()) if extra.help]
        if isinstance(parameter, TyperArgument) and told:
            parameter.help = told[0]


def usage_fault(error: click.UsageError) -> Fault:
    """Return what the command line did wrong."""
    program = error.ctx.command_path if error.ctx is not None else Path(sys.argv[0]).name
    sentence = error.message if _names_no_command(error) else error.format_message()  # which would suggest twice
    return Fault(
        number=_number_of(error), where=program, what=sentence.rstrip(".?"), todo=f"{program} --help shows what it takes."
    )


def _number_of(error: click.UsageError) -> int:
    if isinstance(error, click.MissingParameter):
        return 203
    if isinstance(error, click.BadParameter):
        return 205 if error.param is not None and isinstance(error.param.type, click.Path) else 202
    return 201 if isinstance(error, click.NoSuchOption) or _names_no_command(error) else 210


def _names_no_command(error: click.UsageError) -> bool:
    return error.message.startswith("No such command")
