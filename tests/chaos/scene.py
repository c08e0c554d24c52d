"""A consortium of three hospitals as its users start it: SuperLink, SuperExec, nginx, and `fl_client --site` in namespaces."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from consortium import (
    FL_CLIENT,
    FL_SERVER,
    NGINX,
    NO_NGINX,
    NOBODY,
    client,
    environment,
    fl_server,
    free_port,
    listens,
    make_home,
)
from networks import Cable, hospital_networks, remove_left_behind, why_no_namespaces

from fl_server.home import Home
from fl_server.new_study import study_toml
from fl_server.run_state import RunState, latest_state
from fl_server.submit import StudyFolder, folder_of
from icmoe.backbone import backbone_digest
from icmoe.config import parse
from icmoe.study import Study
from simulations.phantoms import PhantomSite, write_phantoms

from .disks import ROOM, mounted, unmount_left_behind, why_no_disks
from .machines import Service, Services, kill_left_behind, services, until

NAMES = ("hospitalA", "hospitalB", "hospitalC")
ROUNDS = 10
CONNECTED = "connected; waiting"
CONNECT_S = 180.0


def study_of(name: str, seed: int, *, quorum: int, deadline_s: float, rounds: int = ROUNDS) -> Study:
    """Rounds of one local step over the seeded test backbone."""
    values = {
        "name": name,
        "seed": seed,
        "rounds": rounds,
        "quorum": quorum,
        "deadline_s": deadline_s,
        "retries": 5,
        "test_only": True,
        "labels": [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1, 255]}],
        "backbone": {"name": "sam-vit-test", "digest": backbone_digest("sam-vit-test", None), "image_size": 32},
        "model": {"basic_experts": 1, "semantic_experts": 1, "adaptive_experts": 1, "bottleneck": 8},
        "training": {"local_epochs": 1, "batch_size": 64},
    }
    return parse(Study, values, where=name)


@dataclass
class Scene:
    """A running consortium.

    Parameters
    ----------
    root
        Its folder.
    home
        The coordinator's.
    services
        What runs.
    cables
        Of each hospital; none where namespaces are not permitted.
    cannot
        Why something is not possible here.
    """

    root: Path
    home: Home
    services: Services
    cables: dict[str, Cable]
    cannot: dict[str, str]
    studies: dict[str, Study] = field(default_factory=dict)

    def log(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def said(self, name: str) -> str:
        path = self.log(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def site_file(self, site: str) -> Path:
        return self.root / "hospitals" / f"{site}.toml"

    def site_folder(self, site: str) -> Path:
        return self.root / "hospitals" / site

    def clock(self, site: str) -> Path:
        return self.root / f"{site}.clock"

    def study_file(self, name: str) -> Path:
        return self.root / "studies" / f"{name}.toml"

    def folder(self, name: str) -> StudyFolder:
        return folder_of(self.home, self.studies[name])

    def add_study(self, study: Study) -> None:
        """Let every hospital approve a study, by its own command."""
        self.studies[study.name] = study
        path = self.study_file(study.name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(study_toml(study))
        for site in NAMES:
            client(self.site_file(site), "approve", str(path), "--yes")

    def start_site(self, site: str, **changes: str) -> None:
        """`fl_client --site NAME`, as its unit starts it: any exit means start again, after five seconds."""
        words = [*FL_CLIENT, "--site", site, "--config", str(self.site_file(site))]
        command = self.cables[site].inside(*words) if site in self.cables else words
        self.services.start(Service(site, command, environment(COLUMNS="500", **changes), self.log(site)))

    def restart_site(self, site: str, **changes: str) -> None:
        self.services.stop(site)
        before = self.said(site).count(CONNECTED)
        self.start_site(site, **changes)
        until(lambda: self.said(site).count(CONNECTED) > before, f"{site} to be connected", CONNECT_S)

    def start_sites(self) -> None:
        for site in NAMES:
            self.start_site(site)
        until(lambda: all(CONNECTED in self.said(site) for site in NAMES), "the hospitals to be connected", CONNECT_S)

    def progress(self, name: str) -> RunState | None:
        """The committed state of a study."""
        return latest_state(self.folder(name).state, self.studies[name])

    def start_run(self, name: str) -> Service:
        """`fl_server run --resume`, started again where it fails."""
        words = [*FL_SERVER, "run", str(self.study_file(name)), "--home", str(self.root), "--resume"]
        service = Service("run", words, environment(), self.log(f"run-{name}"), always=False)
        self.services.start(service)
        return service


@contextmanager
def scene(*, sites: Sequence[str] = NAMES) -> Iterator[Scene]:
    """A consortium whose hospitals are admitted and prepared; all of it is gone after the block."""
    kill_left_behind()
    remove_left_behind()
    unmount_left_behind()
    cannot = {"namespaces": why_no_namespaces(), "disks": why_no_disks()}
    root = Path(tempfile.mkdtemp(prefix="icmoe-chaos-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        cables = {} if cannot["namespaces"] else dict(zip(sites, stack.enter_context(hospital_networks(len(sites))), strict=True))
        here = next(iter(cables.values())).here if cables else "127.0.0.1"
        home = make_home(root, *sites, address=f"{here}:{free_port()}")
        if not cannot["disks"]:
            for site in sites:
                stack.enter_context(mounted(root / "hospitals" / site, ROOM))
        found = Scene(root, home, stack.enter_context(services()), cables, {key: why for key, why in cannot.items() if why})
        _start_coordinator(found)
        _make_hospitals(found, sites)
        yield found


def why_not() -> str:
    """Why nothing can be played here at all; empty where it can."""
    return NO_NGINX if NGINX is None else ""


def _start_coordinator(found: Scene) -> None:
    home = found.home
    for folder in (home.root, home.folder):
        folder.chmod(0o711)  # nginx runs as nobody
    words = [*FL_SERVER, "superlink", "--home", str(home.root), "--exec"]
    found.services.start(Service("superlink", words, environment(), found.log("superlink"), restart_s=2.0))
    until(lambda: listens(home.superlink_port), "SuperLink on its port", 90)
    user = NOBODY if os.geteuid() == 0 else None
    if user is not None:
        for path in (home.proxy / "run", *home.folder.glob("server.key")):
            os.chown(path, user, user)
    proxy = [str(NGINX), "-e", "stderr", "-c", str(home.proxy / "nginx.conf")]
    found.services.start(Service("proxy", proxy, environment(), found.log("proxy"), restart_s=2.0, user=user))


def _make_hospitals(found: Scene, sites: Sequence[str]) -> None:
    """From kit to features and admission, by the commands of hospital and coordinator."""
    people = {"train_patients": 2, "val_patients": 1, "test_patients": 1}
    write_phantoms(found.root / "data", seed=1, size_px=32, sites=[PhantomSite(name=site, **people) for site in sites])
    for site in sites:
        path = found.site_file(site)
        client(path, "init", "--kit", str(found.home.site(site) / "kit"))
        own = f'data = "../data"\ncache = "{site}/cache"\nstate = "{site}/state"\nallow_test_only = true\n'
        made = path.read_text()
        path.write_text(made[: made.index("[ingest]")] + own + made[made.index("[coordinator]") :])
    found.add_study(study_of("prepare", 1, quorum=1, deadline_s=60.0))
    for site in sites:
        client(found.site_file(site), "prepare")
        done = fl_server("admit", str(found.site_folder(site) / "request.json"), "--home", str(found.home.root))
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
