"""What is wrong with a command line, as a numbered sentence like every other fault."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import click
from typer.core import TyperGroup

from icmoe.errors import Fault, print_faults

EXIT_CODE = 2


class Commands(TyperGroup):
    """Commands of a program whose usage errors are numbered: `typer.Typer(cls=Commands)`."""

    def main(self, *arguments: Any, **settings: Any) -> NoReturn:  # noqa: ANN401  (Click's own signature)
        """Run the command that the arguments name and end the process."""
        try:
            code = super().main(*arguments, **{**settings, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(EXIT_CODE)
        except click.UsageError as error:
            print_faults([usage_fault(error)])
            sys.exit(EXIT_CODE)
        except click.Abort:
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


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
