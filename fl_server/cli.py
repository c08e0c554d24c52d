"""`fl_server`: the coordinator's command line."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import Annotated

import typer

from icmoe import __version__
from icmoe.backbones import choices
from icmoe.errors import Fault, IcmoeError, exit_on_fault
from icmoe.platform import require_supported_platform
from icmoe.usage import Commands

app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)


@app.callback(invoke_without_command=True)
def fl_server(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Coordinate a study between hospitals."""
    with exit_on_fault():
        if version:
            sys.stdout.write(f"icmoe-federated {__version__}\n")
            raise typer.Exit


@app.command()
def check(
    study: Annotated[Path, typer.Argument(help="Study file, TOML.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the study with every default spelled out, as JSON.")] = False,
) -> None:
    """Explain every fault of a study file at once, or print the study's digest."""
    from fl_server.checking import check_study

    with exit_on_fault():
        require_supported_platform()
        check_study(study, as_json=as_json)


@app.command("new-study")
def new_study(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Study file to write, TOML.")] = Path("study.toml"),
    name: Annotated[str | None, typer.Option(help="Short name.")] = None,
    labels: Annotated[str | None, typer.Option(help='Classes and their mask values: "lesion=1,255; edema=2".')] = None,
    rounds: Annotated[str | None, typer.Option(help="Rounds.")] = None,
    quorum: Annotated[str | None, typer.Option(help="Sites without which a round does not count.")] = None,
    deadline_s: Annotated[str | None, typer.Option(help="Seconds that a round waits.")] = None,
    backbone: Annotated[str | None, typer.Option(help=f"{choices(seeded=False)}.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights file of a backbone that brings none, or its SHA-256.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; drawn if absent.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Ask what a study needs and write a commented study file, with a schema beside it for completion in editors."""
    with exit_on_fault():
        from fl_server.asking import asking
        from fl_server.new_study import make_study, require_new, write_study

        require_new(path, force=force)
        given = {
            "name": name,
            "labels": labels,
            "rounds": rounds,
            "quorum": quorum,
            "deadline_s": deadline_s,
            "backbone": backbone,
            "weights": weights,
        }
        study = make_study(given, asking(), seed=seed)
        write_study(study, path)
        sys.stdout.write(f"{path} is written: study {study.name}\ndigest  {study.digest}\n")


@app.command()
def schema(of: Annotated[str, typer.Argument(metavar="study|consortium", help="Which file.")]) -> None:
    """Print the JSON Schema of a file, for completion in editors; a hospital prints its own with fl_client schema."""
    from fl_server.consortium import Consortium
    from icmoe.config import Section, json_schema
    from icmoe.study import Study

    with exit_on_fault():
        known: dict[str, type[Section]] = {"study": Study, "consortium": Consortium}
        if of not in known:
            raise IcmoeError(Fault(number=210, where="schema", value=of, limit=", ".join(known)))
        sys.stdout.write(json_schema(known[of]))


Home = Annotated[Path, typer.Option("--home", help="Folder that fl_server provision made.")]


@app.command()
def provision(
    consortium: Annotated[Path, typer.Argument(help="Consortium file, TOML.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make, or to complete; the other commands call it --home.")],
    renew: Annotated[bool, typer.Option("--renew", help="Renew certificates that end within 60 days, or begin later.")] = False,
) -> None:
    """Make CA, server certificate and start kits; what is there is kept, what is missing is added."""
    from fl_server.provisioning import print_provisioned
    from fl_server.provisioning import provision as run

    with exit_on_fault():
        print_provisioned(run(consortium, out, renew=renew, now=dt.datetime.now(tz=dt.UTC)))


@app.command()
def admit(
    request: Annotated[Path, typer.Argument(help="request.json as the site sent it.")],
    home: Home,
    fingerprint: Annotated[str | None, typer.Option(help="The key's fingerprint as the hospital read it out; compared.")] = None,
) -> None:
    """Register a site's key with the running SuperLink under the site's name."""
    with exit_on_fault():
        from fl_server.admission import admit as run

        found = run(request, home, expected=fingerprint)
        sys.stdout.write(f"{found.site} is admitted as node {found.node_id}\nkey fingerprint  {found.fingerprint}\n")
        if fingerprint is None:
            sys.stdout.write("Compare the fingerprint with the hospital by telephone; if it differs: fl_server revoke.\n")


@app.command()
def revoke(site: Annotated[str, typer.Argument(help="Name of the site.")], home: Home) -> None:
    """Take a site's key out of the federation for good; its SuperNode stops within half a minute."""
    with exit_on_fault():
        from fl_server.admission import revoke as run

        sys.stdout.write(f"{site} is revoked\nkey fingerprint  {run(site, home)}\n")


@app.command()
def expiry(
    home: Home,
    days: Annotated[int, typer.Option(help="Report certificates that end within this many days.", min=0)] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show when certificates end; exit code 1 where one ends soon, for a timer to watch."""
    from fl_server.provisioning import print_expiry

    with exit_on_fault():
        if not print_expiry(home, dt.datetime.now(tz=dt.UTC), warn_days=days, as_json=as_json):
            raise typer.Exit(1)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def superlink(
    home: Home,
    execute: Annotated[bool, typer.Option("--exec", help="Run and supervise the commands instead of printing them.")] = False,
    listen: Annotated[
        str | None, typer.Option(help="ADDRESS:PORT of nginx where it is not every address and the public port.")
    ] = None,
) -> None:
    """Write nginx.conf and print the exact Flower commands of this consortium, or run them."""
    from fl_server.superlink import serve

    with exit_on_fault():
        require_supported_platform()
        serve(home, execute=execute, listen=listen)


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="Study file, TOML.")],
    home: Home,
    resume: Annotated[bool, typer.Option("--resume", help="Stop a live run of the study first, then go on with it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a study and follow its rounds; exits with 0 only when it completed, with 3 where it was stopped."""
    from fl_server.commands import run_study

    with exit_on_fault():
        require_supported_platform()
        run_study(home, study, resume=resume, as_json=as_json)


@app.command()
def status(
    home: Home,
    run_id: Annotated[str | None, typer.Argument(help="Run; the newest where absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a run came."""
    from fl_server.commands import show_runs

    with exit_on_fault():
        show_runs(home, run_id=run_id, newest=True, as_json=as_json)


@app.command(name="list")
def list_runs(home: Home, as_json: AsJson = False) -> None:
    """List all runs."""
    from fl_server.commands import show_runs

    with exit_on_fault():
        show_runs(home, run_id=None, newest=False, as_json=as_json)


@app.command()
def dashboard(
    home: Home,
    study: Annotated[str | None, typer.Argument(help="Name of the study, or its folder; the newest of all where absent.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback by TLS and with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65_535)] = 8765,
    results: Annotated[
        Path | None, typer.Option(help="results.json of a rehearsal, for lines of own-site local and pooled training.")
    ] = None,
    token: Annotated[bool, typer.Option("--token", help="Ask for a token on loopback too.")] = False,
    http: Annotated[bool, typer.Option("--http", help="No TLS beyond loopback: token and page can be read on the way.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="Further name of the page, such as a proxy's; repeatable.")] = None,
) -> None:
    """Show a study's rounds, sites, scores, bytes, privacy and refused updates as a live page; it only reads."""
    from fl_server.dashboard.serve import Listening, serve

    with exit_on_fault():
        where = Listening(host=host, port=port, allowed=tuple(allow_host or ()), with_token=token, plain=http)
        serve(home, study, where, results=results)


@app.command()
def stop(run_id: Annotated[str, typer.Argument(help="Run.")], home: Home) -> None:
    """Stop a run; its finished rounds are kept, and the study can go on later."""
    from fl_server.commands import stop_run

    with exit_on_fault():
        stop_run(home, run_id)


@app.command()
def lift(
    site: Annotated[str, typer.Argument(help="Name of the site.")],
    run_id: Annotated[str, typer.Argument(help="Run.")],
    home: Home,
) -> None:
    """Let a site in again that sits out after three refused updates."""
    from fl_server.commands import lift_site

    with exit_on_fault():
        lift_site(home, site, run_id)


def main() -> None:
    """Run the command."""
    app()
