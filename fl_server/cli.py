"""`fl_server`: the coordinator's command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from icmoe import __version__
from icmoe.errors import exit_on_fault
from icmoe.platform import require_supported_platform

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def fl_server(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Coordinate a study between hospitals."""
    if version:
        sys.stdout.write(f"icmoe-federated {__version__}\n")
        raise typer.Exit


@app.command()
def check(
    study: Annotated[Path, typer.Argument(help="Study file, TOML.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the study with every default spelled out, as JSON.")] = False,
) -> None:
    """Explain every fault of a study file at once, or print the study's digest."""
    from icmoe.study import read_study

    with exit_on_fault():
        require_supported_platform()
        proposal = read_study(study)
        if as_json:
            sys.stdout.write(json.dumps({"digest": proposal.digest, "study": proposal.model_dump(mode="json")}, indent=1) + "\n")
            return
        table = Table(title=proposal.name, title_justify="left", show_header=False)
        table.add_row("digest", proposal.digest)
        table.add_row("labels", ", ".join(label.name for label in proposal.labels))
        table.add_row("backbone", f"{proposal.backbone.name} {proposal.backbone.digest[:12]}, {proposal.backbone.image_size} px")
        table.add_row("experts", f"{proposal.model.experts}, {min(proposal.model.top_k, proposal.model.experts)} fused per pixel")
        table.add_row("rounds", f"{proposal.rounds}, quorum {proposal.quorum}, deadline {proposal.deadline_s:.0f} s")
        Console().print(table)


def main() -> None:
    """Run the command."""
    app()
