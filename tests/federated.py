"""One federation for a file of tests: a coordinator, four studies and three admitted hospitals that are connected."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from consortium import Coordinator, client, coordinating, fl_server, listens, participating, wait_until

from fl_server.home import Home
from fl_server.new_study import study_toml
from icmoe.study import Study, UpdateForm
from simulations.phantoms import PhantomSite, write_phantoms

NAMES = ("hospitalA", "hospitalB", "hospitalC")


@pytest.fixture(scope="module")
def studies(make_study) -> dict[str, Study]:
    base = make_study(name="first", quorum=3, deadline_s=180.0)
    inside = base.backbone.model_copy(update={"cut": "last-stage"})
    return {
        "first": base,
        "second": base.model_copy(update={"name": "second", "seed": 4, "update": UpdateForm(form="int8"), "backbone": inside}),
        "unknown": base.model_copy(update={"name": "unknown", "seed": 5}),
        # Its run waits for sites that have approved it until its deadline.
        "unapproved": base.model_copy(update={"name": "unapproved", "seed": 6, "deadline_s": 60.0}),
    }


@pytest.fixture(scope="module")
def coordinator(studies: dict[str, Study]) -> Iterator[Coordinator]:
    with coordinating(*NAMES) as found:
        for name, study in studies.items():
            found.study(name).write_text(study_toml(study))
        _make_hospitals(found.home, ["first", "second"])
        yield found


def _make_hospitals(home: Home, approved: list[str]) -> None:
    """From kit to features, by the hospital's own commands; the site file is filled in by hand in between."""
    people = {"train_patients": 2, "val_patients": 1, "test_patients": 1}
    write_phantoms(home.root / "data", seed=1, size_px=32, sites=[PhantomSite(name=name, **people) for name in NAMES])
    for name in NAMES:
        path = home.root / "hospitals" / f"{name}.toml"
        assert "request.json to the coordinator" in client(path, "init", "--kit", str(home.site(name) / "kit"))
        own = f'data = "../data"\ncache = "{name}/cache"\nstate = "{name}/state"\nallow_test_only = true\n'
        made = path.read_text()
        path.write_text(made[: made.index("[ingest]")] + own + made[made.index("[coordinator]") :])
        for study in approved:
            assert study in client(path, "approve", str(home.root / f"{study}.toml"), "--yes")
        client(path, "prepare")


@pytest.fixture(scope="module")
def sites(coordinator: Coordinator) -> Iterator[None]:
    """Three admitted hospitals, connected through the public port by `fl_client --site NAME`."""
    home = coordinator.home
    with ExitStack() as stack:
        for name in NAMES:
            path = coordinator.site_file(name)
            done = fl_server("admit", str(path.with_suffix("") / "request.json"), "--home", str(home.root))
            assert f"{name} is admitted as node " in done.stdout, done.stderr
            stack.enter_context(participating(path, home.root / f"{name}.log"))
        for name in NAMES:
            wait_until(lambda name=name: "connected; waiting" in said_by(coordinator, name), f"{name} to be connected", 120)
        yield


def said_by(coordinator: Coordinator, name: str) -> str:
    return (coordinator.home.root / f"{name}.log").read_text()


def end_and_leave_nothing(coordinator: Coordinator) -> None:
    """Ask the coordinator to end; none of its processes is there afterwards and nobody listens on its port."""
    coordinator.supervisor.send_signal(signal.SIGTERM)
    assert coordinator.supervisor.wait(timeout=20) == 0
    marker = str(coordinator.home.superlink).encode()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"flower-superexec" in _read(path) and marker in _read(path)]
    assert left == []
    assert not listens(coordinator.home.superlink_port)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
