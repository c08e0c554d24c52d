"""A site short of memory or disk: smaller parts first, then a numbered refusal, and the next round as if nothing had been."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_client import ask, command, hospital, number_of, request, site, write_site_file, write_study_file

from fl_client.approval import read_approvals
from fl_client.audit import LOG, read_log
from fl_client.participant import Participant
from icmoe.backbone import load_backbone
from icmoe.data.folder import read_folder
from icmoe.dataset import TrainingSet
from icmoe.errors import CATALOGUE
from icmoe.exchange import global_state
from icmoe.features import FeatureCache
from icmoe.messages import UPDATE
from icmoe.model import ICMoE, build_model
from icmoe.parts import Parts, is_out_of_memory
from icmoe.patient_batches import draw_samples
from icmoe.prepare import encode_slices
from icmoe.privacy import private_round
from icmoe.training import train_round

__all__ = ["hospital", "site"]
CPU = torch.device("cpu")
SPARE = {"loss": {"contrast": 0.0}, "model": {"router_noise": 0.0}}  # nothing drawn at random inside a step


class Memory:
    """A device that holds so many slices at once; the loss asks it first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
        self.slices, self.asked = slices, []
        losses = ICMoE.losses

        def limited(model: ICMoE, features, target_BKhw, *more):
            self.asked.append(len(target_BKhw))
            if len(target_BKhw) > self.slices:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return losses(model, features, target_BKhw, *more)

        monkeypatch.setattr(ICMoE, "losses", limited)


def test_what_is_known_as_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)  # a pebibyte, refused by the real allocator
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(("holds", "tried"), [(8, [8]), (7, [8, 4]), (3, [8, 4, 2]), (1, [8, 4, 2, 1])])
def test_halves_until_it_fits_and_stays_there(holds: int, tried: list[int]) -> None:
    seen: list[int] = []

    def attempt(at_once: int) -> str:
        seen.append(at_once)
        if at_once > holds:
            raise MemoryError
        return "done"

    parts = Parts(8)
    assert parts.run(attempt) == "done"
    assert seen == tried
    assert parts.run(attempt) == "done"
    assert seen[len(tried) :] == tried[-1:]


def test_gives_up_at_one_slice_and_lets_any_other_fault_through() -> None:
    def attempt(at_once: int) -> None:
        raise MemoryError if at_once < 8 else torch.OutOfMemoryError

    with pytest.raises(MemoryError):
        Parts(8).run(attempt)
    with pytest.raises(ZeroDivisionError):
        Parts(8).run(lambda at_once: 1 // (at_once - 8))


@pytest.fixture(scope="module")
def cache(hospital: Path, make_study, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    study = make_study()
    found = FeatureCache.of(tmp_path_factory.mktemp("cache"), study)
    backbone = load_backbone("sam-vit-test", image_size=32, device=CPU)
    encode_slices(read_folder(hospital, study.labels)["Alder"].slices, study, backbone, found)
    return found


def training_set(hospital: Path, study, cache: FeatureCache) -> TrainingSet:
    return TrainingSet(read_folder(hospital, study.labels)["Alder"].of("train"), study, cache)


@pytest.mark.parametrize("mu", [0.0, 0.1])
def test_a_round_in_parts_learns_the_same(hospital, cache, make_study, monkeypatch, mu: float) -> None:
    study = make_study(**SPARE, training={"batch_size": 5, "proximal_mu": mu, "local_epochs": 3})
    results, states = [], []
    for holds in (5, 3, 1):
        with monkeypatch.context() as patched:
            memory = Memory(patched, holds)
            model = build_model(study, seed=1)
            data = training_set(hospital, study, cache)
            results.append(train_round(model, data, study, round_number=1, seed=4, device=CPU))
            states.append(torch.cat([tensor.flatten() for tensor in global_state(model).values()]))
            failed = [size for size in memory.asked if size > holds]
            assert failed == {5: [], 3: [5], 1: [5, 3, 2]}[holds]  # tried once, not at every step
    for result, state in zip(results[1:], states[1:], strict=True):
        assert result.loss == pytest.approx(results[0].loss, rel=1e-4)
        assert result.usage_M == pytest.approx(results[0].usage_M, rel=1e-4)
        torch.testing.assert_close(state, states[0], rtol=1e-3, atol=1e-4)


def test_a_private_round_draws_nobody_twice(hospital, cache, make_study, monkeypatch) -> None:
    privacy = {"noise_multiplier": 1.0, "delta": 1e-2, "patients": 2, "sample_rate": 1.0, "steps": 3, "slices_per_patient": 4}
    study = make_study(privacy={"site": privacy})
    memory, drawn = Memory(monkeypatch, 2), []

    def spy(*given, **more):
        drawn.append(draw_samples(*given, **more))
        return drawn[-1]

    monkeypatch.setattr("icmoe.privacy.draw_samples", spy)
    monkeypatch.setattr("icmoe.privacy.mixing_faults", lambda *_: [])  # its probe of three slices is not at issue here
    result = private_round(build_model(study, seed=1), training_set(hospital, study, cache), study, round_number=1, device=CPU)
    assert result.steps == len(drawn) == 3
    assert memory.asked.count(3) == 3  # tried with 16, 8 and 4 at once in the first step, never again
    assert memory.asked[-4:] == [2, 1, 2, 1]


def test_features_encoded_in_parts_are_the_same(hospital, cache, make_study, tmp_path, monkeypatch) -> None:
    study, other = make_study(), FeatureCache.of(tmp_path, make_study())
    backbone, sizes = load_backbone("sam-vit-test", image_size=32, device=CPU), []
    encode = backbone.encode

    def limited(image_B3HW):
        sizes.append(len(image_B3HW))
        if len(image_B3HW) > 2:
            raise torch.OutOfMemoryError
        return encode(image_B3HW)

    monkeypatch.setattr(backbone, "encode", limited)
    monkeypatch.setattr("icmoe.prepare.CPU_BATCH", 6)
    slices, steps = read_folder(hospital, study.labels)["Alder"].slices, []
    done = encode_slices(slices, study, backbone, other, on_progress=lambda at, most: steps.append((at, most)))
    assert sizes[:3] == [6, 3, 2]
    assert max(sizes[2:]) == 2
    assert steps[-1] == (done, done)
    keys = [cache.key(item.image_digest, "identity") for item in slices]
    assert torch.allclose(other.load(keys).embedding_BCHW, cache.load(keys).embedding_BCHW, atol=1e-3)


def audited(site: Participant, state: Path) -> Participant:
    return replace(site, audited=True, state_folder=state)


FAILURES = {
    "no memory for one slice": (torch.OutOfMemoryError("CUDA out of memory at /data/Mustermann"), 334),
    "no memory in the machine": (MemoryError(), 334),
    "disk full": (OSError(errno.ENOSPC, "No space left on device", "/data/Mustermann"), 315),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 315),
    "disk gone": (OSError(errno.EIO, "Input/output error"), 335),
    "anything else": (ValueError("Mustermann"), 304),
}


@pytest.mark.parametrize(("failure", "number"), FAILURES.values(), ids=FAILURES.keys())
def test_the_coordinator_hears_the_cause_by_number_alone(site, tmp_path, monkeypatch, failure, number) -> None:
    own, study = audited(site, tmp_path), site.studies[0]

    def fails(*_):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(ICMoE, "losses", fails)
        reply = ask(own, request(study))
    assert reply.error.reason == f"ICM{number} {CATALOGUE[number].title}"
    assert '"event":"declined"' in (tmp_path / LOG).read_text().replace(" ", "")
    again, calm = ask(own, request(study)), ask(site, request(study))
    assert all(np.array_equal(again.content[UPDATE][name].numpy(), array.numpy()) for name, array in calm.content[UPDATE].items())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass


def test_a_full_disk_costs_the_site_the_round_and_nothing_else(site, small_disk: Path) -> None:
    own, study = audited(site, small_disk), site.studies[0]
    assert not ask(own, request(study, 1)).has_error()
    before = (small_disk / LOG).read_bytes()
    filler = small_disk / "filler"
    fill(filler)
    assert number_of(ask(own, request(study, 2))) == 315
    assert (small_disk / LOG).read_bytes().startswith(before)
    filler.unlink()
    again, calm = ask(own, request(study, 2)), ask(site, request(study, 2))
    assert not again.has_error(), again.error
    assert all(np.array_equal(again.content[UPDATE][name].numpy(), array.numpy()) for name, array in calm.content[UPDATE].items())


def approvals_and_lines(state: Path) -> tuple[int, int]:
    return len(read_approvals(state)), len(read_log(state))


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_full_disk_leaves_no_line_without_its_approval_and_no_approval_without_its_line(
    hospital: Path, make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    path, file = write_site_file(tmp_path, hospital), write_study_file(tmp_path / "study.toml", make_study())
    calls, fsync = itertools.count(1), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        done = command(path, "approve", str(file), "--yes")
    failed = failing < 3  # the approval and its line are what waits for the disk
    assert (done.exit_code, "ICM205" in done.stderr) == (int(failing < 4), failed)
    assert ("is approved at" in done.stdout, "ICM315" in done.stderr) == (not failed, failing == 3)  # the third: a new ledger's
    assert approvals_and_lines(tmp_path / "state") == ((0, 0) if failed else (1, 1))
    assert not list(tmp_path.rglob(".*.json.*"))
    assert command(path, "approve", str(file), "--yes").exit_code == 0
    assert approvals_and_lines(tmp_path / "state") == (1, 1 if failed else 2)


def test_an_approval_on_a_really_full_disk(hospital: Path, make_study, tmp_path: Path, small_disk: Path) -> None:
    path, file = write_site_file(tmp_path, hospital), write_study_file(tmp_path / "study.toml", make_study())
    path.write_text(f'state = "{small_disk}/state"\n' + path.read_text())
    pages = 40
    while pages:
        fill(small_disk / "filler")
        os.truncate(small_disk / "filler", max(0, (small_disk / "filler").stat().st_size - 4096 * (40 - pages)))
        done, (stand, lines) = command(path, "approve", str(file), "--yes"), approvals_and_lines(small_disk / "state")
        assert stand == bool(lines), done.stderr
        assert (done.exit_code == 0) == (not done.stderr), done.stderr
        if done.exit_code == 0:
            break
        pages -= 1
    assert 0 < pages < 40, "the disk was never full, or never empty enough"
