"""The feature cache: what the frozen backbone says of each view, computed once and kept at the site.

One safetensors file per view, fp16, named by its key: first a hash of the normalised image's digest, so that all that
was ever computed of one image can be removed, whatever study asked for it; then the SHA-256 of backbone digest, input
size, preprocessing version, dtype, image digest, view and the version of the backbone's arithmetic. An entry is written to
a temporary file and renamed, so several processes may share a folder and a kill leaves no half entry. Its header repeats
the key and a CRC-32 of the tensors; an entry that is damaged or foreign counts as absent and is computed again. A process
checks an entry when it first reads it, not on every step.

Features are patient data: the folder has the images' access and deletion rules.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from icmoe.atomic import write_atomically
from icmoe.backbones import BACKBONES
from icmoe.cache_entries import FORMAT, PREPROCESSING_VERSION, entry_key, entry_path
from icmoe.entry_file import EntryFile
from icmoe.errors import Fault, IcmoeError
from icmoe.rest import is_kept, keep_rest, kept_rest
from icmoe.study import BackboneChoice, Study, View
from icmoe.tensor_file import METADATA_KEY, read_tensors

HALF_MAX = 65504.0
CPU = torch.device("cpu")
# Entries that this process has verified; every round makes a new cache object.
_CHECKED: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Features:
    """Output of the backbone for a batch.

    Parameters
    ----------
    embedding_BCHW
        The final embedding or, where the backbone is cut before its last stage, the tokens that enter it.
    blocks
        Intermediate features, each B 128 H W.
    rest
        What makes the embedding of such tokens, frozen and on their device; None where they are the embedding.
    """

    embedding_BCHW: Tensor
    blocks: tuple[Tensor, ...]
    rest: Callable[[Tensor], Tensor] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Return the features with every tensor changed and the same rest."""
        return Features(change(self.embedding_BCHW), tuple(map(change, self.blocks)), self.rest)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A view that has to be in the cache.

    Parameters
    ----------
    key
        Its key.
    read
        Returns the pixels, 3 S S in [0, 1].
    """

    key: str
    read: Callable[[], Tensor]


@dataclass(slots=True)
class FeatureCache:
    """A folder of features of one backbone.

    Parameters
    ----------
    folder
        Where the files are.
    digest
        The backbone's.
    image_size
        Side of its input, pixels.
    block_features
        Whether `load` hands out the blocks; they are always kept, so that both kinds of study share the entries.
    arithmetic
        Of the backbone, as in `BACKBONES`.
    cut
        The chosen backbone where it is cut before its last stage: another part of the key, and its rest is kept here too.
    """

    folder: Path
    digest: str
    image_size: int
    block_features: bool
    arithmetic: int = 1
    cut: BackboneChoice | None = None

    @staticmethod
    def of(folder: Path, study: Study) -> FeatureCache:
        """Return the cache of a study's backbone below `folder`."""
        chosen = study.backbone
        arithmetic = BACKBONES[chosen.name].arithmetic
        cut = None if chosen.cut == "end" else chosen.model_copy(update={"block_features": True})  # one rest for both kinds
        return FeatureCache(folder, chosen.digest, chosen.image_size, chosen.block_features, arithmetic, cut)

    def key(self, image_digest: str, view: View) -> str:
        """Return the key of one view of one image, 64 hexadecimal digits."""
        own = [FORMAT, self.digest, self.image_size, PREPROCESSING_VERSION, "float16"]
        later: list[object] = [self.arithmetic] if self.arithmetic > 1 else []  # keys from before there was a second one stay
        later += [] if self.cut is None else [self.cut.cut]
        return entry_key(image_digest, json.dumps([*own, *later, image_digest, view]))

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return entry_path(self.folder, key)

    def contains(self, key: str) -> bool:
        """Return whether a sound entry is there."""
        try:
            self._read(key)
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        return True

    def is_whole(self, key: str) -> bool:
        """Return whether an entry is there that was not cut off; its values are not looked at, which `contains` does."""
        try:
            with EntryFile(self.path(key)):
                return True
        except (OSError, ValueError):
            return False

    def put(self, key: str, embedding_CHW: Tensor, blocks: Sequence[Tensor]) -> None:
        """Write an entry atomically.

        Raises
        ------
        IcmoeError
            102 as `in_half`.
        """
        halves = {name: half.to("cpu").contiguous() for name, half in in_half(embedding_CHW, blocks).items()}
        # One metadata key: safetensors writes several in random order, and equal features shall be equal bytes.
        header = json.dumps({"format": FORMAT, "key": key, "crc32": _checksum(halves)}, sort_keys=True)
        write_atomically(self.path(key), save(halves, metadata={METADATA_KEY: header}), durable=False, private=True)

    def load(self, keys: Sequence[str], device: torch.device = CPU) -> Features:
        """Return a batch in float32 on a device, in the order of the keys.

        It travels in half precision and is widened on the device; to CUDA it goes from pinned memory, without waiting.

        Parameters
        ----------
        keys
            At least one.
        device
            Where the batch shall be.

        Raises
        ------
        IcmoeError
            111 where an entry is absent or damaged.
        """
        return self.widened(self.halves(keys, pinned=device.type == "cuda"), device)

    def widened(self, halves: Sequence[Tensor], device: torch.device) -> Features:
        """Return what `halves` read as float32 on a device, made there.

        Raises
        ------
        IcmoeError
            111 where the rest of a backbone that is cut is absent or damaged.
        """
        embedding, *blocks = (half.to(device, non_blocking=True).float() for half in halves)
        return Features(embedding, tuple(blocks), self.rest(device))

    def rest(self, device: torch.device) -> nn.Module | None:
        """Return what comes after the cut, on `device`; None where what is kept is the embedding.

        Raises
        ------
        IcmoeError
            111 where it is absent or damaged.
        """
        return None if self.cut is None else kept_rest(self.folder, self.cut, device)

    def lacks_rest(self) -> bool:
        """Return whether what comes after the cut is wanted and not here."""
        return self.cut is not None and not is_kept(self.folder, self.cut)

    def keep_rest(self, rest: nn.Module | None) -> None:
        """Keep what comes after the cut, where there is one."""
        if self.cut is not None:
            if rest is None:
                raise ValueError("a backbone without its rest")
            keep_rest(self.folder, self.cut, rest)

    def halves(self, keys: Sequence[str], *, pinned: bool = False) -> list[Tensor]:
        """Return the embeddings and each block as they are kept, one batch each in the order of the keys.

        Parameters
        ----------
        keys
            At least one.
        pinned
            Whether the memory is pinned, for CUDA.

        Raises
        ------
        IcmoeError
            111 where an entry is absent or damaged.
        """
        key = keys[0]
        try:
            for key in keys:
                if self.path(key) not in _CHECKED:
                    self._read(key)
            with EntryFile(self.path(keys[0])) as first:
                blocks = len(first.places) - 1 if self.block_features else 0
                names = ["embedding", *(f"block{index}" for index in range(blocks))]
                shapes = [first.places[name].shape for name in names]
            batches = [torch.empty(len(keys), *shape, dtype=torch.float16, pin_memory=pinned) for shape in shapes]
            for row, key in enumerate(keys):
                with EntryFile(self.path(key)) as file:
                    for name, batch in zip(names, batches, strict=True):
                        file.read_into(name, batch[row])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            did, todo = (
                "Training stopped.",
                "Start again, at a hospital after prepare or ingest: damaged entries are computed anew.",
            )
            where, value = str(self.path(key)), type(error).__name__
            raise IcmoeError(Fault(number=111, where=where, value=value, did=did, todo=todo)) from None
        return batches

    def _read(self, key: str) -> dict[str, Tensor]:
        tensors, metadata = read_tensors(self.path(key))
        if self.path(key) not in _CHECKED:
            if json.loads(metadata[METADATA_KEY]) != {"format": FORMAT, "key": key, "crc32": _checksum(tensors)}:
                raise ValueError("damaged")
            _CHECKED.add(self.path(key))
        return tensors


def in_half(embedding: Tensor, blocks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return features in half precision, as training and prediction use them, by the names that they have in an entry.

    Raises
    ------
    IcmoeError
        102 where a value does not fit into fp16: it would turn into infinity, and all that follows into no number.
    """
    tensors = {"embedding": embedding, **{f"block{index}": block for index, block in enumerate(blocks)}}
    for name, tensor in tensors.items():
        largest = float(tensor.abs().max())
        if not largest <= HALF_MAX:
            what = f"features ({name}) leave the range of fp16"
            todo = "Look at the picture; where others fail as well, the backbone's weights are of no use here."
            raise IcmoeError(Fault(number=102, what=what, value=str(largest), limit=f"at most {HALF_MAX:g}", todo=todo))
    return {name: tensor.half() for name, tensor in tensors.items()}


def _checksum(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.numpy().data, crc)
    return crc
