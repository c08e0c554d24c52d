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
from rich.table import Table

from icmoe import __version__
from icmoe.errors import NOT_STARTED, Fault, IcmoeError, exit_on_fault, printable
from icmoe.platform import require_supported_platform
from icmoe.usage import Commands

app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)
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
    plain: Annotated[
        bool, typer.Option("--plain", help="Taking part: sentences alone, as a service's log wants them, and no panel.")
    ] = False,
    json_log: Annotated[
        bool, typer.Option("--json-log", help="Taking part: an object per line on standard output, with the run's number.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Speak for one hospital; --site stands before the command. Without a command: take part in the approved studies."""
    with exit_on_fault():
        if version:
            sys.stdout.write(f"icmoe-federated {__version__}\n")
            raise typer.Exit
        require_supported_platform()
        context.obj = Options(site, config)
        if context.invoked_subcommand is None:
            from fl_client.screen import form_of
            from fl_client.supervisor import run_site

            chosen = _chosen(context)
            raise typer.Exit(run_site(chosen.path, chosen.site, form_of(plain=plain, as_json=json_log)))


@app.command()
def init(
    context: typer.Context,
    kit: Annotated[Path, typer.Option(help="Folder of the start kit that the coordinator handed over.")],
    digest: Annotated[str | None, typer.Option(help="The kit's digest as the coordinator read it out; compared.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Replace this site's key, after it was revoked.")] = False,
) -> None:
    """Take a start kit: make this site's key, which never leaves, and the request to send to the coordinator."""
    from fl_client.kit import join, print_joined

    with exit_on_fault():
        chosen = _chosen(context)
        now = dt.datetime.now(tz=dt.UTC)
        print_joined(chosen.site, join(kit, chosen.site, chosen.path, digest=digest, new_key=new_key, now=now))


@app.command()
def check(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at everything that could stop this site: connection, certificates, clock, data, room; every fault at once."""
    with exit_on_fault():
        chosen = _chosen(context)
        from fl_client.preflight import print_checks, run_preflight

        if not print_checks(chosen.site, run_preflight(chosen.path, site=chosen.site), as_json=as_json):
            raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the site file, for completion in editors."""
    from fl_client.site import SiteFile
    from icmoe.config import json_schema

    with exit_on_fault():
        sys.stdout.write(json_schema(SiteFile))


@app.command("it-sheet")
def it_sheet(context: typer.Context) -> None:
    """Print one sheet for the hospital's IT: what goes where, over which port, what never leaves."""
    with exit_on_fault():
        chosen = _chosen(context)
        from fl_client.it_sheet import sheet

        sys.stdout.write(sheet(chosen.path, chosen.site))


@app.command()
def show(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show, for each approved study, the images found and used, and the summary that the coordinator may have."""
    from fl_client.site import read_named
    from fl_client.standing import study_records

    with exit_on_fault():
        chosen = _chosen(context)
        settings = read_named(chosen.path, chosen.site)
        studies, faults = study_records(chosen.path, settings)
        if as_json:
            record = {"site": settings.name, "share_summary": settings.share_summary, "studies": studies}
            sys.stdout.write(json.dumps(record, indent=1) + "\n")
        elif studies or not faults:
            table = Table("study", "digest", "found", "used", title=settings.name, title_justify="left")
            for row in studies:
                table.add_row(row["study"], row["digest"][:12], str(row["images_found"]), str(row["images_used"]))
            Console().print(table)
            for line in _shortened([line for row in studies for line in row["exclusions"]]):
                Console().print(line, highlight=False, markup=False, soft_wrap=True)
        if faults:
            raise IcmoeError(*faults)


@app.command()
def status(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show where this site stands: connection, round, memory, Dice, privacy budget, last release."""
    from fl_client.status import show_status

    with exit_on_fault():
        chosen = _chosen(context)
        show_status(chosen.path, chosen.site, as_json=as_json)


@app.command()
def history(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List every round that this site was asked to train, and what came of it."""
    from fl_client.history import show_history

    with exit_on_fault():
        chosen = _chosen(context)
        show_history(chosen.path, chosen.site, as_json=as_json)


@app.command()
def report(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="File. Default: report.html in the state folder.")] = None,
) -> None:
    """Write a page on this site's studies: rounds, Dice, privacy, what left; it stays here."""
    from fl_client.site_report import write_report

    with exit_on_fault():
        chosen = _chosen(context)
        written = write_report(chosen.path, chosen.site, out)
        Console().print(f"Report: {written}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def approve(
    context: typer.Context,
    study: Annotated[Path, typer.Argument(help="Study file, received by another way than the federation.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show what a study asks this site to run, with which data, and what leaves; keep a copy of it once you agree."""
    from fl_client.approving import approve_study

    with exit_on_fault():
        chosen = _chosen(context)
        approve_study(chosen.path, chosen.site, study, agreed=yes)


@app.command()
def approvals(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the studies that this site approved."""
    from fl_client.approving import list_approvals

    with exit_on_fault():
        chosen = _chosen(context)
        list_approvals(chosen.path, chosen.site, as_json=as_json)


@app.command()
def withdraw(context: typer.Context, study: Annotated[str, typer.Argument(help="Name of the study, or its digest.")]) -> None:
    """Withdraw an approval: from the next message on the site refuses the study."""
    from fl_client.approving import withdraw_study

    with exit_on_fault():
        chosen = _chosen(context)
        withdraw_study(chosen.path, chosen.site, study)


@app.command()
def audit(
    context: typer.Context,
    what: Annotated[str | None, typer.Argument(help="digest or verify; nothing for the whole log.")] = None,
    round_number: Annotated[int | None, typer.Argument(metavar="ROUND", help="Round whose digests are printed.")] = None,
    study: Annotated[str | None, typer.Option(help="Name or digest of the study; the last one where absent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check and print the audit log; `audit digest ROUND` prints what hospitals compare by telephone.

    `audit verify` also checks the signatures and compares the log with the ledger: no line edited, removed, moved, cut off.
    """
    from fl_client.accounts import verify_records
    from fl_client.approving import print_audit

    with exit_on_fault():
        chosen = _chosen(context)
        if (what, round_number, study) == ("verify", None, None):
            verify_records(chosen.path, chosen.site, as_json=as_json)
            return
        if (what is None) != (round_number is None) or what not in {None, "digest"}:
            value = " ".join(str(word) for word in (what, round_number) if word is not None)
            raise IcmoeError(Fault(number=210, where="audit", value=value, limit="audit, audit verify, or audit digest ROUND"))
        print_audit(chosen.path, chosen.site, round_number, study, as_json=as_json)


@app.command()
def ledger(
    context: typer.Context,
    page: Annotated[Path | None, typer.Option(help="Also write a page for the data protection officer: FILE.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this site's studies have spent of its privacy budget, and what is left."""
    from fl_client.accounts import show_ledger

    with exit_on_fault():
        chosen = _chosen(context)
        show_ledger(chosen.path, chosen.site, page=page, as_json=as_json)


@app.command()
def prepare(context: typer.Context) -> None:
    """Run the frozen backbone over the site's images once and keep the features at the site."""
    from fl_client.approval import approved_studies
    from fl_client.preparing import prepare_study
    from fl_client.progress import bars
    from fl_client.site import read_named

    with exit_on_fault():
        chosen = _chosen(context)
        settings, faults = read_named(chosen.path, chosen.site), list[Fault]()
        for study in approved_studies(chosen.path.parent / settings.state):
            try:
                with bars() as on_progress:
                    encoded, images = prepare_study(chosen.path, settings, study, on_progress=on_progress)
            except IcmoeError as error:  # what one study lacks keeps no other waiting
                faults += error.faults
                continue
            Console().print(f"{study.name}: {encoded} views encoded, {images} images ready", highlight=False)
        if faults:
            raise IcmoeError(*faults)


@app.command()
def ingest(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be used; keep nothing, not even the hashes.")
    ] = False,
    encode: Annotated[bool, typer.Option(help="Run the frozen backbone over the images at the end.")] = True,
) -> None:
    """Read the export that the site file names: find series, pair and check them, keep what may be used.

    Exit code 1 where that is no image at all.
    """
    from fl_client.ingesting import encode_site, ingest_site, print_encoded, print_report

    with exit_on_fault():
        chosen = _chosen(context)
        reports = ingest_site(chosen.path, chosen.site, dry_run=dry_run)
        if not as_json:
            print_report(reports)
        try:
            if encode and not dry_run:
                encode_site(chosen.path, chosen.site, reports)
                if not as_json:
                    print_encoded(reports)
        finally:  # what was ingested stays and is told, whatever keeps the backbone from running
            if as_json:
                sys.stdout.write(json.dumps(reports, indent=1) + "\n")
        if not all(report["used"] for report in reports):
            raise typer.Exit(1)  # told above; a script must not go on


@app.command("personalise")
def personalise_command(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="Name of an approved study, or its digest.")],
    model: Annotated[Path, typer.Option(help="The study's final model, as the coordinator handed it out.")],
) -> None:
    """Make this site's own model from the study's final one, and choose it on the site's patients; it stays here."""
    from fl_client.personalising import personalise_study
    from fl_client.progress import bars

    with exit_on_fault():
        chosen = _chosen(context)
        with bars() as on_progress:
            path, found = personalise_study(chosen.path, chosen.site, study, model, on_progress=on_progress)
        for name, dice in found.val_dice.items():
            shown = f"{sum(dice) / len(dice):.3f}" if dice else "no validation patient"
            Console().print(f"{name:<15} {shown}{'  <- chosen' if name == found.choice else ''}", highlight=False)
        if found.untaught:
            why = f"No training image of this site shows {', '.join(found.untaught)}: the global model is taken as it is."
            Console().print(why, highlight=False, markup=False, soft_wrap=True)
        Console().print(f"This site's own model: {path}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def which(context: typer.Context, name: Annotated[str, typer.Argument(help="P-..., S-... or F-... of a report.")]) -> None:
    """Name the files behind a hash of the report, to look at them; the names go to this terminal and nowhere else."""
    from fl_client.ingesting import files_named

    with exit_on_fault():
        chosen = _chosen(context)
        for path in files_named(chosen.path, chosen.site, name):
            sys.stdout.write(f"{printable(path)}\n")


@app.command()
def forget(
    context: typer.Context, patient: Annotated[str, typer.Argument(help="The hospital's own number, or the P-... of ingest.")]
) -> None:
    """Take a patient out for good: pixels, features, index, page, unsent updates; what the study has learned stays learned."""
    from fl_client.ingesting import forget_patient

    with exit_on_fault():
        chosen = _chosen(context)
        frames, features, others = forget_patient(chosen.path, chosen.site, patient)
        line = f"{frames} images and {features} cached views removed; the patient is not read again."
        if not frames:
            line = "No image of this patient was in use here: check the number. Files that bear it are not read from now on."
        if features and not frames:  # the index went first, and then the command was ended
            line = f"{features} cached views removed that an interrupted command had left. {line}"
        Console().print(line, highlight=False, soft_wrap=True)
        if others:
            line = f"Equal pictures are there under {', '.join(others)}: forget them too if it is the same person."
            Console().print(line, highlight=False, soft_wrap=True)


def _chosen(context: typer.Context) -> Chosen:
    """Return whom the command speaks of; asked for when it runs, so that its --help needs no site."""
    options: Options = context.obj
    if options.site is None:
        todo = "Name this hospital before the command: fl_client --site NAME ingest."
        raise IcmoeError(Fault(number=203, where="fl_client", value="--site", did=NOT_STARTED, todo=todo))
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


def main() -> None:
    """Run the command."""
    app()
