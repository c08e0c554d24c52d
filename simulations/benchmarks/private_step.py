"""What differential privacy costs in a step: DP-SGD by both back ends beside a plain step, profile `lite`, 128 px.

`python simulations/benchmarks/private_step.py` prints time and peak memory with their bars: at most 3 and 2 times the
plain step. Each row is a process of its own: one torch thread, process CPU seconds, the least of the repeats; memory is
what the peak resident set grew by. Features are random: the cost does not depend on them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from icmoe.backbone import grid_of, widths
from icmoe.backbones import DEFAULT_WEIGHTS
from icmoe.clipping import clipped_sum, noised
from icmoe.config import parse
from icmoe.dataset import Batch
from icmoe.device import available_device
from icmoe.errors import exit_on_fault
from icmoe.features import Features
from icmoe.model import ICMoE, build_model, total_loss
from icmoe.patient_gradients import BackEnd, Objective, all_at_once, one_by_one
from icmoe.privacy import only_trained
from icmoe.profiles import spelled_out
from icmoe.study import Study
from icmoe.training import anchor_of
from icmoe.usage import run_command
from simulations.benchmarks.row import Row
from simulations.measuring import peak_bytes

TIME_BAR, MEMORY_BAR = 3.0, 2.0
PRIVACY = {"noise_multiplier": 1.0, "delta": 1e-3, "patients": 100, "sample_rate": 0.2, "steps": 1}
BACK_ENDS: dict[str, BackEnd | None] = {"plain step": None, "one by one": one_by_one, "all at once": all_at_once}


@dataclass(frozen=True, slots=True)
class Cost:
    """A kind of step and its cost, absolute and relative to the plain step on the same batch."""

    what: str
    seconds: float
    megabytes: float
    time_ratio: float
    memory_ratio: float


def lite_study() -> Study:
    """Return the profile `lite` over the default backbone at 128 px, with privacy at the site."""
    values = {
        "name": "benchmark",
        "seed": 1,
        "profile": "lite",
        "labels": [{"name": "background", "values": [0]}, {"name": "lesion", "values": [255]}],
        "backbone": {"digest": DEFAULT_WEIGHTS.digest},
        "privacy": {"site": PRIVACY},
    }
    return parse(Study, spelled_out(values, where="benchmark"), where="benchmark")


def batch_of(study: Study, slices: int, device: torch.device) -> Batch:
    """Return random features and targets of so many slices."""
    channels, blocks, _ = widths(study.backbone)
    grid = grid_of(study.backbone)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(slices, *shape, generator=generator).to(device)

    features = Features(drawn(channels, grid, grid), tuple(drawn(width, grid, grid) for width in blocks))
    return Batch(features, drawn(study.classes, 2 * grid, 2 * grid).softmax(dim=1))


def step_of(model: ICMoE, study: Study, batch: Batch, back_end: BackEnd | None, slices_at_once: int) -> Callable[[], None]:
    """Return one training step, with AdamW, as a call without arguments."""
    device = batch.target_BKhw.device
    objective = Objective(model, study.loss, torch.Generator(device).manual_seed(0), anchor_of(model, study))
    trained = list(objective.trained().values())
    optimizer = torch.optim.AdamW(trained, 1e-3)
    privacy = study.privacy.site
    assert privacy is not None

    def plain() -> None:
        terms, _ = model.losses(batch.features, batch.target_BKhw, study.loss, objective.generator)
        optimizer.zero_grad(set_to_none=True)
        total_loss(terms, study.loss).backward()
        optimizer.step()

    def private() -> None:
        assert back_end is not None
        sum_X = torch.zeros(sum(tensor.numel() for tensor in trained) + study.model.experts, device=device)
        for start in range(0, len(batch.target_BKhw), slices_at_once):
            end = min(start + slices_at_once, len(batch.target_BKhw))
            part = Batch(Features(batch.features.embedding_BCHW[start:end], ()), batch.target_BKhw[start:end])
            for gradient_PD, usage_PM in back_end(objective, part, [1] * (end - start), slices_at_once):
                sum_X += clipped_sum(gradient_PD, usage_PM, privacy)
        mean_D = noised(sum_X, privacy, 1.0)[: -study.model.experts or None]
        for parameter, gradient in zip(trained, mean_D.split([tensor.numel() for tensor in trained]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimizer.step()

    return plain if back_end is None else private


def cost(what: str, slices: int, slices_at_once: int, repeats: int, device_name: str) -> tuple[float, float]:
    """Return seconds and MB of one kind of step, measured in this process, which should be a fresh one."""
    torch.set_num_threads(1)
    study, device = lite_study(), available_device(device_name)
    batch = batch_of(study, slices, device)
    model = build_model(study, seed=1).to(device).train()
    best = float("inf")
    with only_trained(model, study):
        step = step_of(model, study, batch, BACK_ENDS[what], slices_at_once)
        before = _peak_bytes(device)
        for _ in range(repeats):
            began = _now(device)
            step()
            best = min(best, _now(device) - began)
    return best, (_peak_bytes(device) - before) / 1e6


def measure(slices: int, slices_at_once: int, repeats: int, device_name: str) -> list[Cost]:
    """Return a row per kind of step, the plain one first."""
    found = {}
    for what in BACK_ENDS:
        with get_context("spawn").Pool(1) as process:
            found[what] = process.apply(cost, (what, slices, slices_at_once, repeats, device_name))
    plain_s, plain_mb = found["plain step"]
    return [Cost(what, seconds, mb, seconds / plain_s, mb / plain_mb) for what, (seconds, mb) in found.items()]


def rows(*, quick: bool) -> list[Row]:
    """Return time and memory of each private step beside the plain one; `quick` takes two patients and one step."""
    plain, *private = measure(2, 1, 1, "cpu") if quick else measure(16, 16, 5, "cpu")
    found = []
    for cost in private:
        common: dict[str, Any] = {"what": f"step with DP-SGD, {cost.what}", "against": "the plain step", "at_most": True}
        found.append(Row(ours=cost.seconds, limit=plain.seconds, unit="CPU s", bar=TIME_BAR, **common))
        found.append(Row(ours=cost.megabytes, limit=plain.megabytes, unit="MB peak", bar=MEMORY_BAR, **common))
    return found


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return peak_bytes()
    return torch.cuda.max_memory_allocated(device)


def main(
    slices: Annotated[int, typer.Option(min=1, help="Patients of the batch, one slice each.")] = 16,
    slices_at_once: Annotated[int, typer.Option(min=1, help="Slices computed together.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of which the fastest counts.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
) -> None:
    """Compare a private training step with a plain one on the same batch."""
    with exit_on_fault():
        rows = measure(slices, slices_at_once, repeats, device)
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        return
    table = Table("step", "s", "times plain", "bar", "peak MB", "times plain", "bar")
    for row in rows:
        bars = ("", "") if row.what == "plain step" else (f"{TIME_BAR:g}", f"{MEMORY_BAR:g}")
        table.add_row(
            *(row.what, f"{row.seconds:.3f}", f"{row.time_ratio:.2f}", bars[0]),
            *(f"{row.megabytes:.0f}", f"{row.memory_ratio:.2f}", bars[1]),
        )
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
