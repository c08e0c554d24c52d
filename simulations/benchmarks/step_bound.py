"""The training step on cached features beside its own matrix products and convolutions, timed alone.

    python -m simulations.benchmarks --only step-bound
    python simulations/benchmarks/step_bound.py --profile

Every product and convolution that a step of the default model calls, forward and backward, is recorded with shapes, strides and
types, and called again by itself on random numbers: what they take together is the least that a step with these shapes could
take, were everything between them free. One torch thread, process CPU seconds, the least of the repeats, in turns.
The profile is PyTorch's: self time of each kind of operation in a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from icmoe.adamw import AdamW
from icmoe.backbone import grid_of, widths
from icmoe.errors import exit_on_fault
from icmoe.features import Features
from icmoe.model import build_model, total_loss
from icmoe.usage import run_command
from simulations.benchmarks.row import Row, show
from simulations.benchmarks.training_step import lite_medsam
from simulations.measuring import least_cpu_s

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "dot", "mv"}
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Recorder(TorchDispatchMode):
    """Note each matrix product and convolution, with tensors of the same form in place of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Note the call and make it."""
        del types
        if func.overloadpacket.__name__ in PRODUCTS:
            self.calls.append((func, tree_map(_alike, args), tree_map(_alike, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _alike(value: Any) -> Any:  # noqa: ANN401  # an argument of any kind
    if not isinstance(value, torch.Tensor):
        return value
    length = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return torch.randn(max(length, 1)).to(value.dtype).as_strided(value.shape, value.stride())


def a_step() -> Callable[[], None]:
    """Return a training step of the default model on random features that are in memory already, as a call."""
    study, _ = lite_medsam()
    grid = grid_of(study.backbone)
    model = build_model(study, seed=1).train()
    generator = torch.Generator().manual_seed(1)
    channels, blocks, _ = widths(study.backbone)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(study.training.batch_size, *shape, generator=generator)

    features = Features(drawn(channels, grid, grid), tuple(drawn(width, grid, grid) for width in blocks))
    target_BKhw = drawn(study.classes, 2 * grid, 2 * grid).softmax(dim=1)
    trained = list(model.parameters())
    optimizer = AdamW(trained, weight_decay=study.training.weight_decay, fused=False)

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        terms, _ = model.losses(features, target_BKhw, study.loss, generator)
        total_loss(terms, study.loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, study.training.clip_norm)
        optimizer.step(study.training.learning_rate)

    return step


def products_of(step: Callable[[], None]) -> list[Call]:
    """Return the products and convolutions that a step calls, ready to be called again."""
    recorder = Recorder()
    with recorder:
        step()
    return recorder.calls


def rows(*, quick: bool) -> list[Row]:
    """Return the comparison; `quick` takes two turns."""
    return measure(2 if quick else 25)


def measure(turns: int) -> list[Row]:
    """Return the comparison of so many turns."""
    torch.set_num_threads(1)
    step = a_step()
    step()  # what the first one sets up
    products = products_of(step)

    def alone() -> None:
        for function, arguments, named in products:
            function(*arguments, **named)

    cpu_s = least_cpu_s({"step": step, "alone": alone}, turns)
    study, _ = lite_medsam()
    return [
        Row(
            what=f"training step, lite-medsam, {study.backbone.image_size} px, {study.training.batch_size} slices",
            against=f"its {len(products)} matrix products and convolutions alone",
            ours=cpu_s["step"],
            limit=cpu_s["alone"],
            unit="CPU s",
            bar=0.5,
            at_most=False,
        )
    ]


def profiled() -> str:
    """Return where the time of a step goes, by kind of operation."""
    torch.set_num_threads(1)
    step = a_step()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            step()
    table: str = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
    return table


def main(
    turns: Annotated[int, typer.Option(min=1, help="Steps of which the fastest counts.")] = 25,
    show_profile: Annotated[bool, typer.Option("--profile", help="Print the profile of a step instead.")] = False,  # noqa: FBT002
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
) -> None:
    """Compare a training step with what its matrix products take alone."""
    with exit_on_fault():
        if show_profile:
            sys.stdout.write(profiled() + "\n")
            return
        found = measure(turns)
    show(found, as_json=as_json)


if __name__ == "__main__":
    run_command(main)
