"""`icmoe`: what one does with a trained model. Also `python -m icmoe`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icmoe import __version__
from icmoe.errors import Fault, IcmoeError, exit_on_fault, print_faults
from icmoe.platform import require_supported_platform
from icmoe.usage import Commands

app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)
Mirrored = Annotated[
    bool,
    typer.Option("--mirrored", help="Average with the prediction of the mirrored image: better, at twice the backbone's time."),
]
TESTS_ONLY = " (for tests only)"


@app.callback(invoke_without_command=True)
def icmoe(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Use a model that hospitals trained together."""
    with exit_on_fault():
        if version:
            sys.stdout.write(f"icmoe-federated {__version__}\n")
            raise typer.Exit


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="Model file written by a study or a rehearsal, *.safetensors.")],
    data: Annotated[Path, typer.Option(help="Folder DIR/<site>/{images,masks} with DIR/splits/NAME.csv or DIR/NAME.csv.")],
    split: Annotated[str, typer.Option(help="NAME of the split to score.")] = "test",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights file, for a model over a backbone that brings none.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    cache: Annotated[Path | None, typer.Option(help="Feature cache. Default: the user's cache folder.")] = None,
    mirrored: Mirrored = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Score a saved model on any folder of hospitals, also on sites it never saw."""
    with exit_on_fault():
        require_supported_platform()
        # Imported late: --help and a mistyped option are answered without waiting for PyTorch.
        from icmoe.scoring import score_folder

        record, faults = score_folder(
            model,
            data,
            split,
            checkpoint=checkpoint,
            device_name=device,
            cache_folder=cache,
            mirrored=mirrored,
            console=Console(stderr=True),
        )
        if as_json:
            print_faults(faults)
            sys.stdout.write(json.dumps(record, indent=1) + "\n")
        else:
            _print_scores(record, faults)


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="Model file written by a study or a rehearsal, *.safetensors.")],
    source: Annotated[Path, typer.Option("--input", help="DICOM file or folder of any depth; NIfTI and PNG are read too.")],
    output: Annotated[Path, typer.Option(help="Folder to make: one folder per stack of slices, and prediction.json.")],
    form: Annotated[str, typer.Option("--format", help="dicom-seg, nifti or png.")] = "dicom-seg",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights file, for a model over a backbone that brings none.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    maps: Annotated[
        bool, typer.Option(help="Also write, as PNG: overlay, the experts' disagreement, and which expert decided.")
    ] = True,
    mirrored: Mirrored = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a former prediction in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print prediction.json on standard output.")] = False,
) -> None:
    """Segment a study and write the result in its own geometry; exit code 1 where something was left out."""
    with exit_on_fault():
        require_supported_platform()
        from icmoe.data.ingest.run import require_packages

        require_packages()
        from icmoe.predict.run import predict_study

        record, faults = predict_study(
            model,
            source,
            output,
            form,
            checkpoint=checkpoint,
            device_name=device,
            maps=maps,
            mirrored=mirrored,
            force=force,
            console=Console(stderr=True),
        )
        if as_json:
            sys.stdout.write(json.dumps(record, indent=1) + "\n")
        else:
            _print_prediction(record, output)
        if faults:
            raise IcmoeError(*faults)


@app.command()
def export(
    model: Annotated[Path, typer.Option(help="Model file written by a study or a rehearsal, *.safetensors.")],
    output: Annotated[Path, typer.Option(help="File to write.")],
    form: Annotated[str, typer.Option("--format", help="torchscript, or onnx with the extra \\[onnx].")] = "torchscript",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of a backbone that brings none, if it is cut.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Write the trained part, from the backbone's features to probabilities, for other programs; compared with the model."""
    with exit_on_fault():
        require_supported_platform()
        from icmoe.export import export_model

        record = export_model(model, output, form, force=force, checkpoint=checkpoint)
        if as_json:
            sys.stdout.write(json.dumps(record, indent=1) + "\n")
        else:
            shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in record["inputs"].items())
            difference = f"largest difference of a probability {record['largest_difference']:.1e}"
            told = f"{output}: {record['bytes']} bytes, {difference}\ninputs: {shapes}"
            Console().print(told, markup=False, highlight=False, soft_wrap=True)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a rehearsal, or its results.json.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Put two rehearsals side by side: what was set differently, and what that changed, seed by seed."""
    with exit_on_fault():
        from icmoe.compare_print import compare_and_print

        compare_and_print(a, b, as_json=as_json)


@app.command("audit-privacy")
def audit_privacy(
    model: Annotated[Path | None, typer.Option(help="Model file written by a study or a rehearsal, *.safetensors.")] = None,
    canaries: Annotated[int, typer.Option(min=2, max=1_000_000, help="Made-up patients whose coins are guessed.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of coins, made-up patients and attacks.")] = 0,
    checks: Annotated[bool, typer.Option("--checks", help="Run the named checks of the installed private step.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Attack a study's privacy on made-up patients; exit code 1 where its promise is refuted."""
    with exit_on_fault():
        require_supported_platform()
        if model is None and not checks:
            todo = "Name --model FILE, or --checks, or both."
            raise IcmoeError(
                Fault(number=210, what="neither --model nor --checks is given", did="Nothing was audited.", todo=todo)
            )
        from icmoe.privacy_audit.report import audit_and_print

        audit_and_print(model, canaries=canaries, seed=seed, checks=checks, as_json=as_json)


def _print_prediction(record: dict[str, Any], output: Path) -> None:
    console, about = Console(), record["model"]
    stamp = " (trained on phantoms: not for patients)" if about["phantoms"] else TESTS_ONLY if about["test_only"] else ""
    table = Table(title=escape(f"{about['method']}, study {about['study']}{stamp}"), title_justify="left")
    for column in ("stack", "frames", "pixels", *(f"{label['name']} ml" for label in record["labels"][1:])):
        table.add_column(column, justify="right")
    for row in record["stacks"]:
        volumes = row["volume_ml"] or {}
        sizes = [_millilitres(volumes.get(label["name"])) for label in record["labels"][1:]]
        table.add_row(row["folder"], str(row["frames"]), f"{row['rows']} x {row['columns']}", *sizes)
    console.print(table)
    if passed_over := len(record["passed_over"]):
        console.print(
            f"Taken for no image: {passed_over} of the files; prediction.json names them and says why.", highlight=False
        )
    told = f"Written to {output}. Research use: a physician looks at every result."
    console.print(told, markup=False, highlight=False, soft_wrap=True)


def _print_scores(record: dict[str, Any], faults: list[Fault]) -> None:
    console = Console()
    print_faults(faults, stderr=False)
    about = record["model"]
    stamp = " (trained on phantoms)" if about["phantoms"] else TESTS_ONLY if about["test_only"] else ""
    title = escape(f"{about['method']}, study {about['study']}, seed {about['seed']}") + f"[bold red]{stamp}[/bold red]"
    table = Table(title=title, title_justify="left")
    for column in ("site", "Dice", "IoU", "HD95 mm", "patients", "found", "used"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name, row in record["sites"].items():
        counts = [str(row[key]) for key in ("patients", "images_found", "images_used")]
        table.add_row(escape(name), _shown(row["dice"]), _shown(row["iou"]), _shown(row["hd95_mm"], 1), *counts)
    table.add_section()
    table.add_row("mean of sites", _shown(record["mean"]["dice"]), _shown(record["mean"]["iou"]))
    table.add_row(
        "all patients", _shown(record["pooled"]["dice"]), _shown(record["pooled"]["iou"]), "", str(record["pooled"]["patients"])
    )
    console.print(table)


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _millilitres(volume: float | None) -> str:
    """Return a volume in tenths, a smaller one in its first digits: what was found is never shown as nothing."""
    return f"{volume:.2g}" if volume is not None and 0.0 < volume < 0.1 else _shown(volume, 1)


def main() -> None:
    """Run the command."""
    app()
