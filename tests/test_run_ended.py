"""A rehearsal that is looked at again, or that somebody ends: nothing is shown as what it is not, and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_run_sim import RUN_SIM, TINY

from icmoe.errors import IcmoeError
from icmoe.study import Study
from simulations.folder import RunFolder
from simulations.hospitals import find_hospitals
from simulations.phantoms import PhantomSite, write_phantoms
from simulations.rehearsal import identity_of, make_jobs
from simulations.scenario import Simulation, read_scenario


def finished_folder(place: Path) -> tuple[RunFolder, Study, Simulation]:
    study, simulation = read_scenario(None, {"test_only": True}, {"methods": ["local"]})
    configuration = {"study": study.model_dump(mode="json"), "simulation": simulation.model_dump(mode="json")}
    kept = {"schema_version": 1, "kind": "icmoe-simulation", "study_digest": study.digest, "data_digest": "d", "phantoms": True}
    place.mkdir()
    (place / "results.json").write_text(json.dumps({**kept, "configuration": configuration, "methods": {}}))
    return RunFolder(place), study, simulation


def test_a_complete_run_is_not_shown_as_another_one(tmp_path: Path) -> None:
    folder, study, simulation = finished_folder(tmp_path / "run")
    assert folder.finished(study, simulation)["study_digest"] == study.digest
    with pytest.raises(IcmoeError, match=r"ICM502 .*other study"):
        folder.finished(study.model_copy(update={"rounds": 5}), simulation)
    with pytest.raises(IcmoeError, match=r"ICM502 .*other methods"):
        folder.finished(study, simulation.model_copy(update={"methods": ("pooled",)}))


def test_a_complete_run_is_not_shown_for_other_data(tmp_path: Path) -> None:
    folder, study, simulation = finished_folder(tmp_path / "run")
    own = simulation.model_copy(update={"data": str(tmp_path / "own")})
    site = PhantomSite(name="Alder", train_patients=1, val_patients=1, test_patients=1)
    for name, seed in (("own", 1), ("other", 2)):
        write_phantoms(tmp_path / name, seed=seed, size_px=32, sites=[site])
    for changed in (own, simulation.model_copy(update={"phantom_seed": 8})):
        with pytest.raises(IcmoeError, match=r"ICM502 .*other (data|phantom_seed)"):
            folder.finished(study, changed)

    results = json.loads(folder.results.read_text()) | {"phantoms": False}
    results["data_digest"] = find_hospitals(own, study, tmp_path / "none").digest()
    folder.results.write_text(json.dumps(results))
    (tmp_path / "own").rename(tmp_path / "moved")
    assert folder.finished(study, own.model_copy(update={"data": str(tmp_path / "moved")}))["phantoms"] is False
    for changed in (simulation, own.model_copy(update={"data": str(tmp_path / "other")})):
        with pytest.raises(IcmoeError, match=r"ICM502 .*other data"):
            folder.finished(study, changed)


def test_a_complete_run_is_not_shown_for_masks_that_were_drawn_anew(tmp_path: Path) -> None:
    folder, study, simulation = finished_folder(tmp_path / "run")
    own = simulation.model_copy(update={"data": str(tmp_path / "own")})
    site = PhantomSite(name="Alder", train_patients=1, val_patients=1, test_patients=1)
    write_phantoms(tmp_path / "own", seed=1, size_px=32, sites=[site])
    found = find_hospitals(own, study, tmp_path / "none")
    kept = json.loads(folder.results.read_text()) | {"phantoms": False, "data_digest": found.digest()}
    folder.results.write_text(json.dumps({**kept, "masks_digest": found.masks_digest()}))
    assert folder.finished(study, own)
    for mask in sorted((tmp_path / "own" / "Alder" / "masks").glob("*.png")):
        Image.fromarray(np.roll(np.asarray(Image.open(mask)), 1, axis=0)).save(mask)
    with pytest.raises(IcmoeError, match=r"ICM502 .*other data"):
        folder.finished(study, own)
    folder.results.write_text(json.dumps(kept))  # of a version that did not note them
    assert folder.finished(study, own)


def test_a_stopped_run_does_not_go_on_over_masks_that_were_drawn_anew(tmp_path: Path) -> None:
    site = PhantomSite(name="Alder", train_patients=1, val_patients=1, test_patients=1)
    write_phantoms(tmp_path / "data", seed=1, size_px=32, sites=[site])
    study, simulation = read_scenario(
        None,
        {"test_only": True, "backbone": {"name": "sam-vit-test", "image_size": 32}},
        {"methods": ["local"], "data": str(tmp_path / "data")},
    )

    def identity() -> dict[str, str]:
        hospitals = find_hospitals(simulation, study, tmp_path / "none")
        jobs = make_jobs(study, simulation, hospitals, RunFolder(tmp_path / "run"))
        return identity_of(jobs, simulation, hospitals, "backbone")

    folder = RunFolder(tmp_path / "run")
    with folder.claimed(resume=False):
        folder.check_identity(identity())
        former = folder.work / "run.json"
        for mask in sorted((tmp_path / "data" / "Alder" / "masks").glob("*.png")):
            pixels = np.asarray(Image.open(mask))
            Image.fromarray(np.roll(pixels, 1, axis=0)).save(mask)
        with pytest.raises(IcmoeError, match=r"ICM502 .*differs: masks"):
            folder.check_identity(identity())
        kept = json.loads(former.read_text())
        former.write_text(json.dumps({key: value for key, value in kept.items() if key != "masks"}))
        folder.check_identity(identity())  # a run that an earlier version began goes on


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"schema_version": 1'])
def test_damaged_results_are_told_on_resume(content: bytes, tmp_path: Path) -> None:
    folder, study, simulation = finished_folder(tmp_path / "run")
    folder.results.write_bytes(content)
    with pytest.raises(IcmoeError, match=r"ICM217 .*Nothing was started\. Remove it: --resume makes it again"):
        folder.finished(study, simulation)


@pytest.mark.parametrize(("number", "later_s"), [(signal.SIGINT, 0.5), (signal.SIGINT, 4.0), (signal.SIGTERM, 4.0)])
def test_an_interrupted_rehearsal_ends_at_once_and_says_how_to_go_on(number: int, later_s: float, tmp_path: Path) -> None:
    command = [*RUN_SIM, *TINY, "--rounds", "50", "--methods", "router-aware", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    ends = time.monotonic() + 120
    while "encode:" not in log.read_text() and time.monotonic() < ends:
        time.sleep(0.1)
    time.sleep(later_s)  # the engine starts, or its first rounds run
    process.send_signal(number)
    try:
        code = process.wait(60)
    finally:
        process.kill()
    assert code == 130 or (number == signal.SIGTERM and code == -number), log.read_text()
    assert code != 130 or "ICM503 interrupted" in log.read_text()
