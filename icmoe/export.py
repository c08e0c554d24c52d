"""The trained part of a model for other programs: from the backbone's features to class probabilities.

What was written is loaded again and compared with the model before it takes its place: an export that differs is none.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from icmoe.atomic import write_atomically
from icmoe.backbone import chosen_backbone, grid_of, require_taken, widths
from icmoe.errors import Fault, IcmoeError
from icmoe.features import Features
from icmoe.mixture import Mixture
from icmoe.model import ICMoE
from icmoe.modelfile import ModelHeader, read_model
from icmoe.study import Study
from icmoe.tensor_file import METADATA_KEY

Form = Literal["torchscript", "onnx"]
TOLERANCE = 1e-4
"""Largest difference of a probability between model and export."""
OPSET = 18
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DID = "Nothing was written."
Run = Callable[[tuple[Tensor, ...]], Tensor]


class Head(nn.Module):
    """The trained part as a function of plain tensors.

    Parameters
    ----------
    model
        In evaluation mode.
    rest
        What comes after the cut of the backbone, where it is cut before its last stage.
    """

    def __init__(self, model: ICMoE | Mixture, rest: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.rest = model, rest

    def forward(self, embedding_BCHW: Tensor, *blocks: Tensor) -> Tensor:
        """Return class probabilities on twice the grid, B K 2H 2W, from the backbone's features where it is cut."""
        output = self.model(Features(embedding_BCHW, blocks, self.rest))
        return torch.softmax(output.logits_BKhw, dim=1)


def export_model(path: Path, out: Path, form: str, *, force: bool, checkpoint: Path | None = None) -> dict[str, Any]:
    """Write the trained part of a model file in another format and return what was written.

    Parameters
    ----------
    path
        Model file.
    out
        File to write.
    form
        torchscript or onnx.
    force
        Whether a file that is there may be replaced.
    checkpoint
        Weights of a backbone that brings none; used where it is cut before its last stage, which then is part of the export.

    Raises
    ------
    IcmoeError
        141 where the output is there, 144 where the export gives other probabilities or cannot be made, 205, 208, 209 and 301 as
        `read_model`, 206, 207 and 210 for the checkpoint, 210 for the format, 213 where ONNX's packages are not installed.
    """
    if form not in get_args(Form):
        raise IcmoeError(Fault(number=210, where="--format", value=form, limit=", ".join(get_args(Form)), did=DID))
    if form == "onnx":
        _require_onnx()
    if out.exists() and not (force and out.is_file() and not (path.exists() and out.samefile(path))):
        todo = "Name another --output, or replace a file with --force; the model itself is never replaced."
        raise IcmoeError(Fault(number=141, where=str(out), did=DID, todo=todo))
    model, header = read_model(path)
    head = Head(model, _rest_of(header.study, checkpoint)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data, run = (_onnx if form == "onnx" else _torchscript)(head, header)
            apart = max(_apart(head, run, example(header.study, batch, seed=batch)) for batch in (1, 3))
        except Exception as error:  # noqa: BLE001  (exporters and run times raise almost anything)
            what, value = f"the model cannot be written as {form}", type(error).__name__
            raise IcmoeError(Fault(number=144, where=str(out), what=what, value=value, did=DID)) from None
    if not apart <= TOLERANCE:
        raise IcmoeError(Fault(number=144, where=str(out), value=f"{apart:.2e}", limit=f"{TOLERANCE:.0e}", did=DID))
    write_atomically(out, data)
    inputs = {name: list(tensor.shape[1:]) for name, tensor in zip(_names(header), example(header.study, 1, seed=0), strict=True)}
    labels = [label.name for label in header.study.labels]
    return {"format": form, "bytes": len(data), "largest_difference": apart, "inputs": inputs, "classes": labels}


def example(study: Study, batch: int, *, seed: int) -> tuple[Tensor, ...]:
    """Return random features as the study's backbone gives them: embedding or tokens, then blocks, each `batch` C H W."""
    channels, blocks, _ = widths(study.backbone)
    side, generator = grid_of(study.backbone), torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, width, side, side, generator=generator) for width in (channels, *blocks))


def _rest_of(study: Study, checkpoint: Path | None) -> nn.Module | None:
    require_taken(study.backbone.name, checkpoint)
    if study.backbone.cut == "end":
        if checkpoint is not None:
            what, todo = "this model's export needs no weights: its experts stand on the embedding", "Leave it out."
            raise IcmoeError(Fault(number=210, where="--checkpoint", what=what, value=str(checkpoint), did=DID, todo=todo))
        return None
    return chosen_backbone(study.backbone, checkpoint=checkpoint, device=torch.device("cpu")).rest


def _names(header: ModelHeader) -> list[str]:
    blocks = len(example(header.study, 1, seed=0)) - 1
    first = "embedding" if header.study.backbone.cut == "end" else "tokens"
    return [first, *(f"block{index}" for index in range(blocks))]


@torch.no_grad()
def _apart(head: Head, run: Run, features: tuple[Tensor, ...]) -> float:
    return float((head(*features) - run(features)).abs().max())


@torch.no_grad()
def _torchscript(head: Head, header: ModelHeader) -> tuple[bytes, Run]:
    traced = torch.jit.trace(head, example(header.study, 2, seed=0), check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={METADATA_KEY: header.metadata()[METADATA_KEY]})
    again = torch.jit.load(io.BytesIO(buffer.getvalue()))
    return buffer.getvalue(), lambda features: again(*features)


def _onnx(head: Head, header: ModelHeader) -> tuple[bytes, Run]:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which nothing here needs
    names = _names(header)
    free = torch.export.Dim("batch", min=1, max=4096)
    blocks = tuple({0: free} for _ in names[1:])
    program = torch.onnx.export(
        head,
        example(header.study, 2, seed=0),
        input_names=names,
        output_names=["probabilities"],
        dynamic_shapes=({0: free}, *([blocks] if blocks else [])),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[METADATA_KEY] = header.metadata()[METADATA_KEY]
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(features: tuple[Tensor, ...]) -> Tensor:
        fed = {name: tensor.numpy() for name, tensor in zip(names, features, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return data, run


def _require_onnx() -> None:
    absent = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise IcmoeError(Fault(number=213, value=", ".join(absent), did=DID, todo="Install icmoe-federated[onnx]."))
