"""How time, memory and bytes grow with the number of sites, of a site's patients and of the experts.

`python -m simulations.benchmarks.growth --out DIR` measures every point in a process of its own and writes `growth.json` and
`growth.png`; `--json` prints the points. Nothing is compared here, and no bar is set.

Time is CPU seconds, which say the same on a machine in use. Sites: a rehearsal's round in Ray in which nobody trains
(`no_training.py`), Ray's processes counted, the driver's peak, and the bytes of the tensors to and from all sites. Patients:
one site, one slice each, all with the same features under names of their own; a pass, reckoned from `STEPS` measured steps, the
process's peak, and what as many different features take on disk. Experts: a step, the process's peak, and the bytes of an
update.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from icmoe.atomic import write_atomically
from icmoe.backbone import backbone_digest, load_backbone
from icmoe.backbones import DEFAULT_WEIGHTS
from icmoe.data.picture import marks_digest
from icmoe.data.slices import Slice, load_mask
from icmoe.dataset import TrainingSet
from icmoe.errors import exit_on_fault
from icmoe.features import FeatureCache
from icmoe.model import build_model
from icmoe.study import BackboneChoice, ModelShape, Study
from icmoe.training import train_round
from icmoe.usage import run_command
from icmoe.window import Window
from simulations.benchmarks.simulation import run
from simulations.benchmarks.training_step import LABELS, update_bytes
from simulations.measuring import peak_bytes
from simulations.scenario import chosen

STEPS = 5
CPU = torch.device("cpu")
SIZES = {"sites": (2, 10, 100, 1000), "patients": (10, 100, 1000, 10_000), "experts": (3, 6, 12, 24)}
QUICK = {"sites": (2, 3), "patients": (10, 20), "experts": (3, 6)}
UNITS = {
    "sites": ("CPU s, a round", "MB, driver", "MB, to and from all"),
    "patients": ("CPU s, a pass over all", "MB, process", "MB, features on disk"),
    "experts": ("CPU s, a step", "MB, process", "MB, an update"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was measured with one number of one thing.

    Parameters
    ----------
    of
        "sites", "patients" or "experts".
    number
        How many.
    seconds, peak_mb, bytes
        As the module says.
    """

    of: str
    number: int
    seconds: float
    peak_mb: float
    bytes: int


def with_sites(number: int, *, quick: bool) -> Point:
    """Return a round of so many virtual sites."""
    found = run("ours", number, 2 if quick or number >= 1000 else 4)
    return Point(
        of="sites",
        number=number,
        seconds=float(np.median(found["round_cpu_s"])),
        peak_mb=found["peak_mb"],
        bytes=found["round_bytes"],
    )


def with_patients(number: int, *, quick: bool) -> Point:
    """Return a pass over the slices of so many patients."""
    study = study_of(ModelShape(), quick=quick)
    step_s, entry_bytes, steps = trained(study, number)
    return Point(of="patients", number=number, seconds=steps * step_s, peak_mb=peak_bytes() / 1e6, bytes=number * entry_bytes)


def with_experts(number: int, *, quick: bool) -> Point:
    """Return a step with so many experts, a third of each kind."""
    third = number // 3
    shape = ModelShape(basic_experts=third, semantic_experts=third, adaptive_experts=third)
    study = study_of(shape, quick=quick)
    step_s, _, _ = trained(study, 8)
    return Point(of="experts", number=number, seconds=step_s, peak_mb=peak_bytes() / 1e6, bytes=update_bytes(study)[0])


MEASURED: dict[str, Callable[..., Point]] = {"sites": with_sites, "patients": with_patients, "experts": with_experts}


def study_of(shape: ModelShape, *, quick: bool) -> Study:
    """Return a study over the default backbone, over the seeded one where it shall be quick."""
    if quick:
        small = BackboneChoice(name="sam-vit-test", digest=backbone_digest("sam-vit-test", None), image_size=32)
        return Study(name="growth", seed=1, labels=LABELS, backbone=small, model=shape, test_only=True)
    return Study(name="growth", seed=1, labels=LABELS, backbone=BackboneChoice(digest=DEFAULT_WEIGHTS.digest), model=shape)


def trained(study: Study, patients: int) -> tuple[float, int, int]:
    """Train some steps on the same features under the names of so many patients.

    Returns
    -------
    tuple
        CPU seconds of a step, bytes of one entry of the cache, steps of a pass.
    """
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        cache = FeatureCache.of(folder / "cache", study)
        entry_bytes = _encode_one(study, cache)
        mask = folder / "mask.png"
        side_px = study.backbone.image_size
        Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (side_px, side_px // 2))).save(mask)
        marks = marks_digest(load_mask(mask, study.labels))
        data = TrainingSet([_slice(number, mask, marks, side_px) for number in range(patients)], study, cache)
        model = build_model(study, seed=1)
        began = time.process_time()
        train_round(model, data, study, round_number=1, seed=1, device=CPU, steps=STEPS)
        step_s = (time.process_time() - began) / STEPS
    return step_s, entry_bytes, data.steps(1)


def _encode_one(study: Study, cache: FeatureCache) -> int:
    backbone = load_backbone(study.backbone.name, image_size=study.backbone.image_size, device=CPU)
    side_px = study.backbone.image_size
    one = backbone.encode(torch.rand(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(1)))
    for view in study.training.views:
        cache.put(cache.key("0" * 64, view), one.embedding_BCHW[0], [block[0] for block in one.blocks])
    return sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())


def _slice(number: int, mask: Path, marks: str, side_px: int) -> Slice:
    return Slice(
        site="growth",
        patient=str(number),
        index=0,
        split="train",
        image=mask,
        mask=mask,
        image_digest="0" * 64,
        shape=(side_px, side_px),
        window=Window(0.0, 1.0),
        spacing_mm=None,
        marks=marks,
    )


def drawn(points: Sequence[Point]) -> Figure:
    """Return a row of plots per thing: time, memory, bytes, on logarithmic axes but for memory, which begins at 0."""
    things = list(dict.fromkeys(point.of for point in points))
    figure = Figure(figsize=(10, 3 * len(things)), layout="constrained")
    axes = figure.subplots(len(things), 3, squeeze=False)
    for row, of in zip(axes, things, strict=True):
        mine = [point for point in points if point.of == of]
        numbers = [point.number for point in mine]
        columns = [[point.seconds for point in mine], [point.peak_mb for point in mine], [point.bytes / 1e6 for point in mine]]
        for axis, unit, values in zip(row, UNITS[of], columns, strict=True):
            axis.loglog(numbers, values, "o-")
            axis.set(xlabel=of, ylabel=unit, xticks=numbers, ylim=(0.5 * min(values), 2.0 * max(values)))
            if unit == UNITS[of][1]:
                axis.set(yscale="linear", ylim=(0.0, 1.2 * max(values)))
            axis.set_xticks(numbers, map(str, numbers))
            axis.minorticks_off()
            axis.grid(visible=True, alpha=0.3)
    return figure


def measured(of: str, number: int, *, quick: bool) -> Point:
    """Measure a point in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "simulations.benchmarks.growth",
        "--point",
        f"{of}:{number}",
        *(["--quick"] if quick else []),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=3600)
    if done.returncode:  # it said why
        raise typer.Exit(done.returncode)
    return Point(**json.loads(done.stdout.splitlines()[-1]))


def main(
    only: Annotated[str | None, typer.Option(help="Comma-separated: sites, patients, experts.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for growth.json and growth.png.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two small numbers of each: shows that it runs.")] = False,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
    point: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure how time, memory and bytes grow with sites, patients and experts."""
    if point is not None:
        of, _, number = point.partition(":")
        with exit_on_fault():
            sys.stdout.write(json.dumps(asdict(MEASURED[of](int(number), quick=quick))) + "\n")
        return
    with exit_on_fault():
        names = chosen(only, list(MEASURED), "--only")
    points = [measured(of, number, quick=quick) for of in names for number in (QUICK if quick else SIZES)[of]]
    records: list[dict[str, Any]] = [asdict(one) for one in points]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "growth.json", (json.dumps(records, indent=1) + "\n").encode())
        drawn(points).savefig(out / "growth.png", dpi=120)
    if as_json:
        sys.stdout.write(json.dumps(records, indent=1) + "\n")
        return
    table = Table("of", "number", "time", "memory", "bytes")
    for one in points:
        time_unit, memory_unit, bytes_unit = UNITS[one.of]
        cells = (f"{one.seconds:.3g} {time_unit}", f"{one.peak_mb:.0f} {memory_unit}", f"{one.bytes / 1e6:.3g} {bytes_unit}")
        table.add_row(one.of, str(one.number), *cells)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
