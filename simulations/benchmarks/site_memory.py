"""The peak of a site's memory while it trains, beside the model and one batch of features.

A fresh process imports all that a round needs, reads a folder of phantoms and notes its resident memory; then it trains as the
ClientApp does (`TrainingSet`, `train_round`, `update_of`) on cached features, and the kernel's own record of the peak less that
memory is ours. The limit is what no training can do without: parameters and buffers, and one batch as the model is given it,
features in float32 and targets. The note takes ours apart: what the round of a model so small that it holds nothing needs
(libraries' code and work space at their first use), what automatic differentiation keeps of one step between forward and
backward, and gradients with AdamW's two moments, three times the trained tensors. Default study, batches of four, one thread.

Seen, MB, LiteMedSAM at 128 px (limit 10.2) and SAM ViT-B at 1024 px (limit 44.3):

    with the next batch in float32, the last one held, a copy of the start     217 to 235   723
    the next batch in half precision, the last one let go, the copy left out    185          691
    with the allocator's threshold fixed at 1 MiB as well                      64 less      275 less   1.5x, 1.9x CPU: out

The bar cannot be met with this model as it is. What differentiation keeps of a step is 73 MB and 303 MB by itself, 7 times
the limit; the libraries' first use is 45 MB; and glibc, which hands freed blocks of some MiB out again in pieces, needs
about as much once more, for faster steps. Taking the slices of a batch one at a time, as a site does where memory is short
(`icmoe/parts.py`), would need a quarter of what is kept, other random draws, and still pass the bar.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from icmoe.backbone import grid_of, widths
from icmoe.data.folder import read_folder
from icmoe.dataset import Batch, TrainingSet
from icmoe.exchange import global_state, update_of
from icmoe.features import FeatureCache
from icmoe.model import ICMoE, build_model, model_of, total_loss
from icmoe.study import BackboneChoice, Study
from icmoe.training import train_round
from simulations.benchmarks.loading import CHOICES
from simulations.benchmarks.row import Row
from simulations.benchmarks.training_step import LABELS
from simulations.measuring import peak_bytes
from simulations.phantoms import PhantomSite, write_phantoms

SITE, SLICES, STEPS = "Alder", 12, 6
CPU = torch.device("cpu")
SMALL = BackboneChoice(name="sam-vit-test", digest="0" * 64, image_size=32)
MEASURE = """
import sys
from pathlib import Path
from simulations.benchmarks.site_memory import print_peak
print_peak(sys.argv[1], Path(sys.argv[2]))
"""
DEADLINE_S = 1200.0


def rows(*, quick: bool) -> list[Row]:
    """Return a row per backbone.

    Parameters
    ----------
    quick
        The backbone for tests alone.
    """
    library = measured(SMALL)
    if quick:
        return [_row("a small one", library, library)]
    return [_row(what, measured(choice), library) for what, choice in CHOICES.items()]


def _row(what: str, found: Mapping[str, float], library: Mapping[str, float]) -> Row:
    parts = {
        "of it libraries": library["peak"] - library["model_and_batch"],
        "kept for backward": found["kept"],
        "gradients and moments": found["gradients_and_moments"],
    }
    return Row(
        what=f"peak of a site's memory in training, {what}",
        against="model and one batch",
        ours=found["peak"],
        limit=found["model_and_batch"],
        unit="MB",
        bar=2.5,
        at_most=True,
        note="; ".join(f"{name} {size:.1f} MB" for name, size in parts.items()),
    )


def measured(choice: BackboneChoice) -> dict[str, float]:
    """Return megabytes of a round in a fresh process.

    Parameters
    ----------
    choice
        Backbone whose features are made up; it is not loaded.
    """
    study = _study(choice)
    with TemporaryDirectory() as name:
        folder = Path(name)
        site = PhantomSite(name=SITE, train_patients=SLICES // 4, val_patients=0, test_patients=0, slices_per_patient=4)
        write_phantoms(folder / "export", seed=1, sites=[site])
        _fill(FeatureCache.of(folder / "cache", study), study, folder)
        command = [sys.executable, "-c", MEASURE, choice.model_dump_json(), str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=DEADLINE_S)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _study(choice: BackboneChoice) -> Study:
    return Study(name="benchmark", seed=1, labels=LABELS, backbone=choice, test_only=choice.name == SMALL.name)


def _fill(cache: FeatureCache, study: Study, folder: Path) -> None:
    grid, generator = grid_of(study.backbone), torch.Generator().manual_seed(1)
    channels, block_channels, _ = widths(study.backbone, block_features=True)
    for item in read_folder(folder / "export", study.labels)[SITE].slices:
        for view in study.training.views:
            embedding, *blocks = (torch.randn(count, grid, grid, generator=generator) for count in (channels, *block_channels))
            cache.put(cache.key(item.image_digest, view), embedding, blocks)


def print_peak(choice: str, folder: Path) -> None:
    """Train a round in this process and print what it needed as JSON; called in a fresh one.

    Parameters
    ----------
    choice
        Of the backbone, as JSON.
    folder
        With export and cache.
    """
    torch.set_num_threads(1)
    study = _study(BackboneChoice.model_validate_json(choice))
    slices = read_folder(folder / "export", study.labels)[SITE].slices
    start = global_state(build_model(study, seed=1))
    cache = FeatureCache.of(folder / "cache", study)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's record of the peak begins anew
    before = _resident_bytes() - _bytes(start.values())  # what came in is part of a round
    model = model_of(study, start)
    data = TrainingSet(slices, study, cache)
    train_round(model, data, study, round_number=1, seed=1, device=CPU, steps=STEPS)
    update_of(model, start, personal=False, shape=study.model)
    peak = peak_bytes() - before
    batch = data.read(range(study.training.batch_size), [0] * study.training.batch_size, CPU)
    given = _bytes([*model.state_dict().values(), batch.features.embedding_BCHW, *batch.features.blocks, batch.target_BKhw])
    trained = 3 * _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    sizes = {"peak": peak, "model_and_batch": given, "kept": kept_bytes(model, study, batch), "gradients_and_moments": trained}
    sys.stdout.write(json.dumps({name: size / 1e6 for name, size in sizes.items()}))


def kept_bytes(model: ICMoE, study: Study, batch: Batch) -> int:
    """Return what one step keeps between forward and backward, beside the model and what it is given."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        terms, _ = model.losses(batch.features, batch.target_BKhw, study.loss, torch.Generator().manual_seed(0))
        loss = total_loss(terms, study.loss)
    given = [*model.parameters(), *model.buffers(), batch.features.embedding_BCHW, *batch.features.blocks, batch.target_BKhw]
    del loss
    return sum(storages.values()) - sum(storages.get(tensor.untyped_storage().data_ptr(), 0) for tensor in given)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _resident_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
