"""Our optimiser is PyTorch's, without the compiler that its class imports."""

from __future__ import annotations

import pytest
import torch
from fresh import printed

from icmoe.adamw import AdamW


@pytest.mark.parametrize("fused", [False, True])
def test_the_steps_are_those_of_pytorchs_class_to_the_bit(*, fused: bool):
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (2, 3, 3, 3))]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    own, stock = AdamW(ours, weight_decay=0.03, fused=fused), torch.optim.AdamW(theirs, weight_decay=0.03, fused=fused)
    for number in range(12):
        rate = 0.01 * (1.0 - number / 12)
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(mine.shape, generator=generator) if (number, index) != (3, 1) else None
            mine.grad, other.grad = (None, None) if gradient is None else (gradient, gradient.clone())
        own.step(rate)
        stock.param_groups[0]["lr"] = rate
        stock.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_a_step_does_not_import_the_compiler():
    script = (
        "import sys, torch\n"
        "from icmoe.adamw import AdamW\n"
        "tensor = torch.ones(3, requires_grad=True)\n"
        "tensor.grad = torch.ones(3)\n"
        "AdamW([tensor], weight_decay=0.0, fused=False).step(0.1)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert printed(script) == "False"
