"""`fl_client --site NAME`: a hospital's command line."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from icmoe import __version__
from icmoe.errors import Fault, IcmoeError, exit_on_fault
from icmoe.platform import require_supported_platform

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


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
    site: Annotated[str | None, typer.Option(help="Name of this hospital in the study.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Site file. Default: sites/NAME.toml in the user's configuration folder.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Speak for one hospital: check its site file, prepare its features."""
    if version:
        sys.stdout.write(f"icmoe-federated {__version__}\n")
        raise typer.Exit
    with exit_on_fault():
        require_supported_platform()
        if site is None:
            raise IcmoeError(
                Fault(number=203, where="fl_client", value="--site", did="Nothing was started.", todo="Name this hospital.")
            )
        context.obj = Chosen(site, config or default_site_file(site))
        if context.invoked_subcommand is None:
            show(context)


@app.command()
def init(
    context: typer.Context,
    kit: Annotated[Path, typer.Option(help="Folder of the start kit that the coordinator handed over.")],
    digest: Annotated[str | None, typer.Option(help="The kit's digest as the coordinator read it out; compared.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Replace this site's key, after it was revoked.")] = False,
) -> None:
    """Take a start kit: make this site's key, which never leaves, and the request to send to the coordinator."""
    from fl_client.kit import join, print_joined

    chosen: Chosen = context.obj
    with exit_on_fault():
        now = dt.datetime.now(tz=dt.UTC)
        print_joined(chosen.site, join(kit, chosen.site, chosen.path, digest=digest, new_key=new_key, now=now))


@app.command()
def check(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at everything that could stop this site: connection, certificates, clock, data, room; every fault at once."""
    chosen: Chosen = context.obj
    with exit_on_fault():
        from fl_client.preflight import print_checks, run_preflight

        if not print_checks(chosen.site, run_preflight(chosen.path, site=chosen.site), as_json=as_json):
            raise typer.Exit(1)


@app.command("it-sheet")
def it_sheet(context: typer.Context) -> None:
    """Print one sheet for the hospital's IT: what goes where, over which port, what never leaves."""
    chosen: Chosen = context.obj
    with exit_on_fault():
        from fl_client.it_sheet import sheet

        sys.stdout.write(sheet(chosen.path, chosen.site))


@app.command()
def show(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the site: approved studies, images found and used."""
    from fl_client.site import read_site_file, site_data

    chosen: Chosen = context.obj
    with exit_on_fault():
        settings, studies = read_site_file(chosen.path)
        _same_name(chosen, settings.name)
        site = site_data(chosen.path, settings, studies[0])
        found, used = (site.images_found, site.images_used) if site is not None else (0, 0)
        exclusions = [str(fault) for fault in site.exclusions] if site is not None else []
        approved = {study.name: study.digest for study in studies}
        record = {
            "site": settings.name,
            "studies": approved,
            "images_found": found,
            "images_used": used,
            "exclusions": exclusions,
        }
        if as_json:
            sys.stdout.write(json.dumps(record, indent=1) + "\n")
            return
        table = Table("site", "studies", "found", "used")
        table.add_row(
            settings.name, ", ".join(f"{name} {digest[:12]}" for name, digest in approved.items()), str(found), str(used)
        )
        Console().print(table)
        for line in exclusions:
            Console().print(line, highlight=False, soft_wrap=True)


@app.command()
def prepare(
    context: typer.Context, checkpoint: Annotated[Path | None, typer.Option(help="Weights file of a sam-vit backbone.")] = None
) -> None:
    """Run the frozen backbone over the site's images once and keep the features at the site."""
    from fl_client.site import read_site_file, site_slices
    from icmoe.backbone import load_backbone
    from icmoe.device import available_device
    from icmoe.features import FeatureCache, default_cache_folder
    from icmoe.prepare import encode_slices

    chosen: Chosen = context.obj
    with exit_on_fault(), Progress(console=Console(stderr=True), transient=True) as progress:
        settings, studies = read_site_file(chosen.path)
        _same_name(chosen, settings.name)
        for study in studies:
            slices = site_slices(chosen.path, settings, study)
            backbone = load_backbone(
                study.backbone.name,
                image_size=study.backbone.image_size,
                checkpoint=checkpoint or (chosen.path.parent / settings.backbone if settings.backbone else None),
                expected_digest=study.backbone.digest,
                device=available_device(settings.device),
            )
            folder = chosen.path.parent / settings.cache if settings.cache else default_cache_folder()
            bar = progress.add_task(study.name, total=None)
            encoded = encode_slices(
                slices,
                study,
                backbone,
                FeatureCache.of(folder, study),
                on_progress=lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),  # type: ignore[misc]
            )
            Console().print(f"{study.name}: {encoded} views encoded, {len(slices)} images ready", highlight=False)


@app.command()
def ingest(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be used; keep nothing.")] = False,
) -> None:
    """Read the export named under [ingest]: find series, pair them with masks, check them, keep what may be used."""
    from fl_client.ingesting import ingest_site, print_report

    chosen: Chosen = context.obj
    with exit_on_fault():
        reports = ingest_site(chosen.path, chosen.site, dry_run=dry_run)
        if as_json:
            sys.stdout.write(json.dumps(reports, indent=1) + "\n")
        else:
            print_report(reports)


@app.command()
def forget(context: typer.Context, patient: Annotated[str, typer.Argument(help="The hospital's number, or P-....")]) -> None:
    """Take a patient out for good: pixels, features, index; the patient's files are not read again."""
    from fl_client.ingesting import forget_patient

    chosen: Chosen = context.obj
    with exit_on_fault():
        frames, features = forget_patient(chosen.path, chosen.site, patient)
        Console().print(f"{frames} images and {features} cached views removed; the patient is not read again.", highlight=False)


def _same_name(chosen: Chosen, name: str) -> None:
    if chosen.site != name:
        fault = Fault(number=210, where=str(chosen.path), what="--site and the site file differ", value=chosen.site, limit=name)
        raise IcmoeError(fault)


def main() -> None:
    """Run the command."""
    app()
