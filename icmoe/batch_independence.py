"""Whether what one patient adds to a step depends on the others: then clipping each patient would promise nothing.

The check is by behaviour, on random features: the first slice's loss terms, their gradients and the output of every
module must stay as they are when all other slices change. That finds batch statistics, balancing over a batch and
contrast across images alike, without a list of layer types. Buffers must not move either: a running mean remembers
patients without any noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from icmoe.backbone import widths
from icmoe.backbones import architecture_of
from icmoe.dataset import Batch
from icmoe.errors import NOTHING_SENT, Fault
from icmoe.features import Features
from icmoe.model import ICMoE
from icmoe.rest import drawn_rest
from icmoe.study import Study

_GRID, _SLICES = 8, 3
_TOLERANCE = 1e-5

Record = dict[str, Tensor]


def mixing_faults(model: ICMoE, study: Study) -> list[Fault]:
    """Return a fault 404 per module, loss term or buffer that carries something from one sample to another.

    Parameters
    ----------
    model
        As it will be trained; a copy is looked at.
    study
        Loss weights and backbone.
    """
    model = copy.deepcopy(model).cpu().float().train()
    model.start_round()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    choice = study.backbone.model_copy(update={"image_size": _GRID * architecture_of(study.backbone.name).stride})
    rest = None if choice.cut == "end" else drawn_rest(choice, seed=0)
    first, second = (_record(model, study, rest, others=others) for others in (1, 2))
    names = [name for name, value in first.items() if not _same(value, second[name])]
    names += [f"buffer {name}" for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    # A module that mixes spoils what comes after it and the modules around it; the first ones are the cause.
    modules = [name for name in names if name.startswith("module ")]
    others = [name for name in names if not name.startswith("module ")]
    return [Fault(number=404, value=name, did=NOTHING_SENT) for name in modules[:1] + others]


def _record(model: ICMoE, study: Study, rest: nn.Module | None, *, others: int) -> Record:
    """Return all that concerns the first slice, with the other slices drawn from the seed `others`."""
    record: Record = {}
    hooks = [module.register_forward_hook(_noting(record, name)) for name, module in model.named_modules() if name]
    batch = _batch(study, rest, others)
    anchor = copy.deepcopy(model.router) if study.loss.router_anchor and model.shape.experts else None
    generator = torch.Generator().manual_seed(0)
    terms, _ = model.losses(batch.features, batch.target_BKhw, study.loss, generator, anchor)
    for hook in hooks:
        hook.remove()
    parameters = list(model.parameters())
    for name, value_B in terms.items():
        if value_B.shape != (_SLICES,):
            record[f"loss term {name}"] = torch.full((1,), float(others))  # no value per slice: it is of the whole batch
            continue
        gradient = torch.autograd.grad(value_B[0], parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        record[f"loss term {name}"] = torch.cat([value_B[:1].detach(), *(tensor.flatten() for tensor in gradient)])
    return record


def _noting(record: Record, name: str) -> Callable[[nn.Module, object, object], None]:
    def note(module: nn.Module, inputs: object, output: object) -> None:
        del module, inputs
        if isinstance(output, Tensor):
            key = f"module {name}"
            seen = output.detach()[:1].flatten() if len(output) == _SLICES else output.detach().flatten()
            record[key] = torch.cat([record[key], seen]) if key in record else seen

    return note


def _batch(study: Study, rest: nn.Module | None, others: int) -> Batch:
    channels, blocks, _ = widths(study.backbone)

    def drawn(*shape: int) -> Tensor:
        first = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        rest = torch.randn(_SLICES - 1, *shape, generator=torch.Generator().manual_seed(others))
        return torch.cat([first, rest])

    features = Features(drawn(channels, _GRID, _GRID), tuple(drawn(width, _GRID, _GRID) for width in blocks), rest)
    return Batch(features, drawn(study.classes, 2 * _GRID, 2 * _GRID).softmax(dim=1))


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool((first - second).abs().max() <= _TOLERANCE * (1.0 + first.abs().max()))
