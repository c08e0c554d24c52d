"""`fl_client --site NAME`: a hospital's command line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from icmoe import __version__
from icmoe.errors import Fault, IcmoeError, exit_on_fault
from icmoe.platform import require_supported_platform

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
LINES_PER_NUMBER = 5
"""So many exclusions of one kind are shown; an export may hold thousands."""


@dataclass(frozen=True, slots=True)
class Options:
    """What stood before the command."""

    site: str | None
    config: Path | None


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which site the command speaks of."""

    site: str
    path: Path


def default_site_file(site: str) -> Path:
    """Return where the site file of `site` is looked for: the user's configuration folder."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "icmoe" / "sites" / f"{site}.toml"


@app.callback(invoke_without_command=True)
def fl_client(
    context: typer.Context,
    site: Annotated[str | None, typer.Option(help="Name of this hospital, as in its site file.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Site file. Default: sites/NAME.toml in the user's configuration folder.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Speak for one hospital: read its export, prepare its features, show what it offers. --site stands before the command."""
    if version:
        sys.stdout.write(f"icmoe-federated {__version__}\n")
        raise typer.Exit
    with exit_on_fault():
        require_supported_platform()
        context.obj = Options(site, config)
        if context.invoked_subcommand is None:
            show(context)


@app.command()
def show(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the site: approved studies, images found and used."""
    from fl_client.site import read_site_file, site_data
    from icmoe.summary import summarise

    with exit_on_fault():
        chosen = _chosen(context)
        settings, studies = read_site_file(chosen.path)
        _same_name(chosen, settings.name)
        site = site_data(chosen.path, settings, studies[0])
        found, used = (site.images_found, site.images_used) if site is not None else (0, 0)
        exclusions = [str(fault) for fault in site.exclusions] if site is not None else []
        train = site.of("train") if site is not None else ()
        approved = {study.name: study.digest for study in studies}
        record = {
            "site": settings.name,
            "studies": approved,
            "images_found": found,
            "images_used": used,
            "exclusions": exclusions,
            "share_summary": settings.share_summary,
            "summary": summarise(train, studies[0].classes).model_dump(mode="json") if train else None,
        }
        if as_json:
            sys.stdout.write(json.dumps(record, indent=1) + "\n")
            return
        table = Table("site", "studies", "found", "used")
        table.add_row(
            settings.name, ", ".join(f"{name} {digest[:12]}" for name, digest in approved.items()), str(found), str(used)
        )
        Console().print(table)
        for line in _shortened(exclusions):
            Console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def prepare(context: typer.Context) -> None:
    """Run the frozen backbone over the site's images once and keep the features at the site."""
    from fl_client.preparing import prepare_study
    from fl_client.progress import bars
    from fl_client.site import read_site_file

    with exit_on_fault():
        chosen = _chosen(context)
        settings, studies = read_site_file(chosen.path)
        _same_name(chosen, settings.name)
        for study in studies:
            with bars() as on_progress:
                encoded, images = prepare_study(chosen.path, settings, study, on_progress=on_progress)
            Console().print(f"{study.name}: {encoded} views encoded, {images} images ready", highlight=False)


@app.command()
def ingest(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be used; keep nothing, not even the hashes.")
    ] = False,
    encode: Annotated[bool, typer.Option(help="Run the frozen backbone over the images at the end.")] = True,
) -> None:
    """Read the export that the site file names: find series, pair them with masks, check them, keep what may be used."""
    from fl_client.ingesting import encode_site, ingest_site, print_encoded, print_report

    with exit_on_fault():
        chosen = _chosen(context)
        reports = ingest_site(chosen.path, chosen.site, dry_run=dry_run)
        if not as_json:
            print_report(reports)
        try:
            if encode and not dry_run:
                encode_site(chosen.path, reports)
                if not as_json:
                    print_encoded(reports)
        finally:  # what was ingested stays and is told, whatever keeps the backbone from running
            if as_json:
                sys.stdout.write(json.dumps(reports, indent=1) + "\n")


@app.command()
def which(context: typer.Context, name: Annotated[str, typer.Argument(help="P-..., S-... or F-... of a report.")]) -> None:
    """Name the files behind a hash of the report, to look at them; the names go to this terminal and nowhere else."""
    from fl_client.ingesting import files_named

    with exit_on_fault():
        chosen = _chosen(context)
        for path in files_named(chosen.path, chosen.site, name):
            sys.stdout.write(f"{path}\n")


@app.command()
def forget(
    context: typer.Context, patient: Annotated[str, typer.Argument(help="The hospital's own number, or the P-... of ingest.")]
) -> None:
    """Take a patient out for good: pixels, features, index, report page; what the study has learned stays learned."""
    from fl_client.ingesting import forget_patient

    with exit_on_fault():
        chosen = _chosen(context)
        frames, features = forget_patient(chosen.path, chosen.site, patient)
        line = f"{frames} images and {features} cached views removed; the patient is not read again."
        if not frames:
            line = "No image of this patient was in use here: check the number. Files that bear it are not read from now on."
        Console().print(line, highlight=False, soft_wrap=True)


def _chosen(context: typer.Context) -> Chosen:
    """Return whom the command speaks of; asked for when it runs, so that its --help needs no site."""
    options: Options = context.obj
    if options.site is None:
        todo = "Name this hospital before the command: fl_client --site NAME ingest."
        raise IcmoeError(Fault(number=203, where="fl_client", value="--site", did="Nothing was started.", todo=todo))
    return Chosen(options.site, options.config or default_site_file(options.site))


def _shortened(sentences: list[str]) -> list[str]:
    """Return the sentences, those of each number together and no more than `LINES_PER_NUMBER` of them."""
    by_number: dict[str, list[str]] = {}
    for sentence in sentences:
        by_number.setdefault(sentence.split()[0], []).append(sentence)
    lines = []
    for number, alike in by_number.items():
        rest = len(alike) - LINES_PER_NUMBER
        lines += alike[:LINES_PER_NUMBER] + ([f"{number} holds for {rest} more; show --json lists all."] if rest > 0 else [])
    return lines


def _same_name(chosen: Chosen, name: str) -> None:
    if chosen.site != name:
        fault = Fault(number=210, where=str(chosen.path), what="--site and the site file differ", value=chosen.site, limit=name)
        raise IcmoeError(fault)


def main() -> None:
    """Run the command."""
    app()
