"""What a site sends up in a round, `[update] form = "int8"` in the study, beside what SAMed would send.

`python -m simulations.benchmarks --only bytes` counts the bytes of the one array in which an update's tensors travel. SAMed
(Zhang and Liu, arXiv 2304.13785) trains updates of rank 4 to query and value in SAM ViT-B's attention, and SAM's whole mask
decoder; its side is that many float32 without any header.

What the form does to Dice, on the four phantom hospitals of `make demo`, router-aware, seeds 1 to 3: `run_sim.py --scenario`
with and without ``[study.update] form = "int8"``, then `icmoe compare`. Test Dice over all patients is 0.7339, 0.7427 and
0.7261 in int8, 0.7339, 0.7425 and 0.7261 in float32 (commit `84b2594`); validation Dice over all patients differs by at most
0.0004 in any round.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from flwr.app import Array
from torch import Tensor, nn

from fl_client.owed import quantised_update
from icmoe.backbones import DEFAULT_WEIGHTS
from icmoe.exchange import global_state, update_of
from icmoe.model import build_model
from icmoe.packing import pack
from icmoe.sam import SHAPES, import_image_encoder
from icmoe.study import BackboneChoice, Study, UpdateForm
from simulations.benchmarks.row import Row
from simulations.benchmarks.training_step import study_of

RANK = 4


def samed_parameters() -> int:
    """Return how many parameters SAMed trains on SAM ViT-B."""
    import_image_encoder()  # makes the package importable where torchvision is absent
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder: nn.Module = MaskDecoder(transformer_dim=256, transformer=transformer, num_multimask_outputs=3)
    shape = SHAPES["sam-vit-b"]
    of_attention = 2 * RANK * (shape.width + shape.width)  # query and value, down and up
    return sum(parameter.numel() for parameter in decoder.parameters()) + shape.depth * of_attention


def changed(study: Study) -> dict[str, Tensor]:
    """Return an update of the study's model; how large its values are changes no byte's count."""
    model = build_model(study, seed=1)
    update = update_of(model, global_state(model), personal=False, shape=study.model)
    generator = torch.Generator().manual_seed(1)
    return {name: 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in update.items()}


def sent_bytes(update: Mapping[str, Tensor]) -> int:
    """Return the bytes of a message's array that holds these tensors."""
    return len(Array(pack({name: tensor.numpy() for name, tensor in update.items()})).data)


def rows(*, quick: bool) -> list[Row]:
    """Return the comparison; there is nothing to shorten.

    Parameters
    ----------
    quick
        Changes nothing.
    """
    del quick
    plain = study_of(BackboneChoice(digest=DEFAULT_WEIGHTS.digest))
    study = plain.model_copy(update={"update": UpdateForm(form="int8")})
    update = changed(study)
    with TemporaryDirectory() as folder:
        in_int8 = quantised_update(update, Path(folder), study, "site", 1, bits=23)
    return [
        Row(
            what="update of a site and round, up, in int8",
            against="what SAMed trains on SAM ViT-B, in float32",
            ours=sent_bytes(in_int8),
            limit=4 * samed_parameters(),
            unit="bytes",
            bar=1 / 30,
            at_most=True,
            note=f"the default model; {sent_bytes(update):,} bytes in float32",
        )
    ]
