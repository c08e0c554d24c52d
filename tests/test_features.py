"""The feature cache: exact keys, fp16, damage noticed and cured, several processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from icmoe import features as features_module
from icmoe.backbone import load_backbone
from icmoe.cache_entries import IMAGE_DIGITS, default_cache_folder, forget_images
from icmoe.entry_file import EntryFile
from icmoe.errors import Fault, IcmoeError
from icmoe.features import FeatureCache, Wanted
from icmoe.prepare import encode_missing
from icmoe.tensor_file import read_tensors


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    features_module._CHECKED.clear()
    return FeatureCache(tmp_path, "d" * 64, 32, block_features=True)


def sample(seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 3, generator=generator), [torch.randn(2, 3, 3, generator=generator)]


def test_what_is_put_is_loaded_as_float32_in_the_order_asked(cache: FeatureCache) -> None:
    keys = [cache.key(str(seed), "identity") for seed in range(3)]
    for seed, key in enumerate(keys):
        cache.put(key, *sample(seed))
    batch = cache.load([keys[2], keys[0]])
    assert batch.embedding_BCHW.dtype == torch.float32
    assert torch.equal(batch.embedding_BCHW[0], sample(2)[0].half().float())
    assert torch.equal(batch.blocks[0][1], sample(0)[1][0].half().float())


def test_the_key_names_everything_that_changes_the_features(cache: FeatureCache, tmp_path: Path) -> None:
    keys = {
        cache.key("a", "identity"),
        cache.key("b", "identity"),
        cache.key("a", "flip"),
        FeatureCache(tmp_path, "e" * 64, 32, block_features=True).key("a", "identity"),
        FeatureCache(tmp_path, "d" * 64, 64, block_features=True).key("a", "identity"),
    }
    assert len(keys) == 5
    without = FeatureCache(tmp_path, "d" * 64, 32, block_features=False)
    assert without.key("a", "identity") in keys  # both kinds of study share the entries


def test_another_arithmetic_has_other_keys_and_the_first_has_those_that_it_always_had(tmp_path: Path, make_study) -> None:
    lite, sam = ({"name": name, "digest": "d" * 64, "image_size": 128} for name in ("lite-medsam", "sam-vit-b"))
    first, second = (FeatureCache.of(tmp_path, make_study(backbone=choice)).key("a", "flip") for choice in (lite, sam))
    assert first == "ca978112ca1bbdcafac231b36a399e7a063a2b40386702bf8aeda621df799659"
    assert first != second
    assert first[:IMAGE_DIGITS] == second[:IMAGE_DIGITS]


def test_all_that_was_computed_of_an_image_goes_whatever_study_asked_for_it(cache: FeatureCache, tmp_path: Path) -> None:
    other = FeatureCache(tmp_path, "e" * 64, 64, block_features=False)
    for place in (cache, other):
        for view in ("identity", "flip", "dark", "bright"):
            place.put(place.key("gone", view), *sample())
            place.put(place.key("kept", view), *sample())
    assert forget_images(tmp_path, ["gone", "never seen"]) == 8
    assert not any(place.contains(place.key("gone", "identity")) for place in (cache, other))
    assert all(place.contains(place.key("kept", view)) for place in (cache, other) for view in ("identity", "flip"))


def test_a_study_without_block_features_gets_none(cache: FeatureCache, tmp_path: Path) -> None:
    key = cache.key("a", "identity")
    cache.put(key, *sample())
    assert FeatureCache(tmp_path, "d" * 64, 32, block_features=False).load([key]).blocks == ()


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "another key's entry", "empty", "not safetensors"])
def test_a_damaged_or_foreign_entry_counts_as_absent_and_is_never_used(cache: FeatureCache, damage: str) -> None:
    key, other = (cache.key(name, "identity") for name in "ab")
    cache.put(key, *sample())
    cache.put(other, *sample(1))
    path = cache.path(key)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    content = {
        "flip a bit": bytes(data),
        "truncate": bytes(data[:-7]),
        "another key's entry": cache.path(other).read_bytes(),
        "empty": b"",
        "not safetensors": b"x" * 200,
    }
    path.write_bytes(content[damage])
    assert not cache.contains(key)
    assert cache.contains(other)
    assert (cache.is_whole(key), cache.is_whole(other)) == (damage in {"flip a bit", "another key's entry"}, True)
    with pytest.raises(IcmoeError) as caught:
        cache.load([other, key])
    assert (caught.value.faults[0].number, caught.value.faults[0].where) == (111, str(path))


def test_what_is_cut_off_after_it_was_checked_is_not_used(cache: FeatureCache) -> None:
    key = cache.key("a", "identity")
    cache.put(key, *sample())
    cache.load([key])
    os.truncate(cache.path(key), cache.path(key).stat().st_size - 1)
    with pytest.raises(IcmoeError) as caught:
        cache.load([key])
    assert caught.value.faults[0].number == 111


def test_a_batch_travels_in_half_precision_and_is_widened_on_the_device(cache: FeatureCache) -> None:
    keys = [cache.key(str(seed), "identity") for seed in range(2)]
    for seed, key in enumerate(keys):
        cache.put(key, *sample(seed))
    embedding_BCHW, block_BCHW = cache.halves(keys)
    assert embedding_BCHW.dtype == block_BCHW.dtype == torch.float16
    assert torch.equal(embedding_BCHW.float(), cache.load(keys).embedding_BCHW)
    there = cache.load(keys, torch.device("meta"))
    assert there.embedding_BCHW.device.type == there.blocks[0].device.type == "meta"
    assert there.embedding_BCHW.dtype == torch.float32


def test_an_entry_is_read_as_safetensors_reads_it(cache: FeatureCache) -> None:
    key = cache.key("a", "identity")
    cache.put(key, *sample())
    expected, _ = read_tensors(cache.path(key))
    with EntryFile(cache.path(key)) as file:
        assert {name: place.shape for name, place in file.places.items()} == {n: tuple(t.shape) for n, t in expected.items()}
        for name, tensor in expected.items():
            file.read_into(name, row := torch.empty_like(tensor))
            assert torch.equal(row, tensor)
        with pytest.raises(ValueError, match="embedding"):
            file.read_into("embedding", torch.empty(4, 9, dtype=torch.float16))
        with pytest.raises(KeyError):
            file.read_into("block7", torch.empty(2, 3, 3, dtype=torch.float16))


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xff",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F16", "shape": [-2, -2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F16", "shape": [4], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F16", "shape": [4], "data_offsets": [4, 12]}}',
        b'{"a": {"dtype": "F16", "shape": ["4"], "data_offsets": [0, 8]}}',
    ],
)
def test_a_table_that_contradicts_itself_or_the_file_is_refused(tmp_path: Path, table: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(len(table).to_bytes(8, "little") + table + bytes(8))
    with pytest.raises(ValueError):  # noqa: PT011  # of JSON, of Unicode or our own: each counts as damage
        EntryFile(path)
    path.write_bytes((2**40).to_bytes(8, "little") + table)
    with pytest.raises(ValueError, match="no table"):
        EntryFile(path)


def test_a_picture_that_cannot_be_read_or_a_full_disk_stops_the_encoding(cache: FeatureCache, monkeypatch) -> None:
    backbone = load_backbone("sam-vit-test", image_size=32, device=torch.device("cpu"))

    def gone() -> torch.Tensor:
        raise IcmoeError(Fault(number=101, where="Alder/x.png"))

    keys = [cache.key(str(number), "identity") for number in range(4)]
    wanted = [Wanted(key, lambda: torch.zeros(3, 32, 32)) for key in keys]
    with pytest.raises(IcmoeError, match="101"):
        encode_missing([*wanted[:3], Wanted(keys[3], gone)], backbone, cache)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(features_module, "write_atomically", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space"):
        encode_missing([Wanted(cache.key("new", "identity"), wanted[0].read)], backbone, cache)


def test_damage_is_cured_by_encoding_again_and_the_rest_is_left_alone(cache: FeatureCache, tmp_path: Path) -> None:
    backbone = load_backbone("sam-vit-test", image_size=32, device=torch.device("cpu"))
    own = FeatureCache(tmp_path, backbone.digest, 32, block_features=True)
    images = {own.key(str(seed), "identity"): torch.rand(3, 32, 32) for seed in range(4)}
    wanted = [Wanted(key, lambda image=image: image) for key, image in images.items()]
    progress: list[tuple[int, int]] = []
    assert encode_missing(wanted, backbone, own, on_progress=lambda done, total: progress.append((done, total))) == 4
    assert progress[-1] == (4, 4)
    before = {key: own.path(key).read_bytes() for key in images}
    broken = next(iter(images))
    own.path(broken).write_bytes(b"broken")
    features_module._CHECKED.clear()
    assert encode_missing(wanted, backbone, own) == 1
    assert {key: own.path(key).read_bytes() for key in images} == before  # equal features, equal bytes
    assert encode_missing(wanted, backbone, own) == 0


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_features_outside_fp16_are_refused(cache: FeatureCache, value: float) -> None:
    embedding, blocks = sample()
    embedding[0, 0, 0] = value
    with pytest.raises(IcmoeError, match="fp16"):
        cache.put(cache.key("a", "identity"), embedding, blocks)
    assert list(cache.folder.rglob("*.safetensors")) == []


def test_entries_are_readable_by_their_owner_only(cache: FeatureCache) -> None:
    key = cache.key("a", "identity")
    cache.put(key, *sample())
    assert cache.path(key).stat().st_mode & 0o077 == 0


def test_two_processes_may_write_the_same_entries(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom icmoe.features import FeatureCache\n"
        "cache = FeatureCache(Path(sys.argv[1]), 'd' * 64, 32, block_features=True)\n"
        "for n in range(100):\n"
        "    key = cache.key(str(n % 5), 'identity')\n"
        "    cache.put(key, torch.full((4, 3, 3), float(n % 5)), [])\n"
        "    assert cache.load([key]).embedding_BCHW[0, 0, 0, 0] == n % 5\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(list(tmp_path.rglob("*.*"))) == 5  # no temporary file is left


def test_the_cache_lives_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "icmoe" / "features"
