"""What a round of the product costs beside a bare Flower app that trains the same step: TLS, keys, nginx, pin, approval, audit.

`python simulations/benchmarks/federated_round.py` starts both federations on loopback, two sites each, and lets them take
turns, block after block of rounds. Prints the medians of the time from one round's end to the next, their ratio with a
bootstrap interval, and milliseconds per phase. Needs nginx.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from icmoe.backbone import backbone_digest
from icmoe.errors import exit_on_fault
from icmoe.processes import free_port, program
from icmoe.usage import run_command
from simulations.benchmarks.row import Row
from simulations.phantoms import PhantomSite, write_phantoms

SITES = ("Alder", "Birch")
DEADLINE_S = 1200.0
BLOCKS, ROUNDS = 5, 9
BARE = """\
[project]
name = "bare"
version = "1.0.0"
[tool.flwr.app]
publisher = "benchmark"
fab-include = ["*.py"]
[tool.flwr.app.components]
serverapp = "bare_app:server"
clientapp = "bare_app:client"
[tool.flwr.app.config]
study = ""
data = ""
caches = ""
log = ""
"""
STUDY = """\
name = "{name}"
seed = {seed}
rounds = {rounds}
quorum = 2
deadline_s = 300.0
test_only = true
[[labels]]
name = "background"
values = [0]
[[labels]]
name = "lesion"
values = [1, 255]
[backbone]
name = "sam-vit-test"
image_size = 32
digest = "{digest}"
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """One round: wall time since the end of the one before, and what is known of it, seconds."""

    whole_s: float
    train_s: float
    aggregate_s: float


@dataclass(frozen=True, slots=True)
class Bench:
    """Both federations below one folder.

    Parameters
    ----------
    folder
        Root.
    public, superlink, bare
        Ports: nginx, the product's SuperLink, the bare SuperLink.
    """

    folder: Path
    public: int
    superlink: int
    bare: int

    @property
    def home(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "home"

    def site_file(self, site: str) -> Path:
        """Return a hospital's site file, in a folder of its own."""
        return self.folder / "hospitals" / site / f"{site}.toml"

    @property
    def environment(self) -> dict[str, str]:
        """Of the bare federation; the product sets its own."""
        quiet = {"FLWR_HOME": str(self.folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        scripts = str(Path(program("flwr")).parent)
        path = os.pathsep.join([scripts, os.environ.get("PATH", ""), "/usr/sbin"])
        return {**os.environ, **quiet, "PATH": path, "OMP_NUM_THREADS": "1"}

    def command(self, *words: object) -> str:
        """Run a command to its end and return what it printed."""
        line = [program(str(words[0])), *map(str, words[1:])]
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
        return done.stdout

    def client(self, site: str, *words: object) -> str:
        """Run a command of a hospital."""
        return self.command("fl_client", "--site", site, "--config", self.site_file(site), *words)

    @contextmanager
    def running(self, *words: object) -> Iterator[None]:
        """Keep a program running."""
        line = [str(words[0]) if "/" in str(words[0]) else program(str(words[0])), *map(str, words[1:])]
        with (self.folder / f"{Path(line[0]).name}.log").open("ab") as log:
            process = subprocess.Popen(line, env=self.environment, stdout=log, stderr=log)
            try:
                yield
            finally:
                process.terminate()
                process.wait(30)


def lay_out(bench: Bench) -> None:
    """Write data, consortium and bare app, and take the hospitals through kit and site file."""
    sites = [PhantomSite(name=site, train_patients=4, val_patients=1, test_patients=1) for site in SITES]
    write_phantoms(bench.folder / "data", seed=1, size_px=32, sites=sites)
    text = f'name = "benchmark"\n[coordinator]\naddress = "127.0.0.1:{bench.public}"\nsuperlink_port = {bench.superlink}\n'
    (bench.folder / "consortium.toml").write_text(text + "".join(f'[[sites]]\nname = "{site}"\n' for site in SITES))
    bench.command("fl_server", "provision", bench.folder / "consortium.toml", "--out", bench.home)
    for site in SITES:
        bench.client(site, "init", "--kit", bench.home / "sites" / site / "kit")
        made = bench.site_file(site).read_text()
        own = f'data = "{bench.folder / "data"}"\ncache = "cache"\nallow_test_only = true\n'
        bench.site_file(site).write_text(made[: made.index("[ingest]")] + own + made[made.index("[coordinator]") :])
    (bench.folder / "bare").mkdir()
    (bench.folder / "bare" / "pyproject.toml").write_text(BARE)
    shutil.copy(Path(__file__).with_name("bare_app.py"), bench.folder / "bare")
    (bench.folder / "flwr").mkdir()
    connection = f'[superlink]\ndefault = "bare"\n[superlink.bare]\naddress = "127.0.0.1:{bench.bare}"\ninsecure = true\n'
    (bench.folder / "flwr" / "config.toml").write_text(connection)


def write_study(bench: Bench, block: int, rounds: int) -> Path:
    """Write the study of a block and let the hospitals approve it."""
    path = bench.folder / f"block{block}.toml"
    digest = backbone_digest("sam-vit-test", None)
    path.write_text(STUDY.format(name=path.stem, seed=block, rounds=rounds, digest=digest))
    for site in SITES:
        bench.client(site, "approve", path, "--yes")
        bench.client(site, "prepare")
    return path


def product_block(bench: Bench, study: Path) -> list[Timing]:
    """Run a study as the product does and return its rounds after the first."""
    ended: dict[int, float] = {}
    line = [program("fl_server"), "run", str(study), "--home", str(bench.home), "--json"]
    with subprocess.Popen(line, env=bench.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        while run.poll() is None:
            for state in (bench.home / "coordinator" / "runs").glob(f"{study.stem}-*/study.state.safetensors"):
                ended.setdefault(state.stat().st_mtime_ns, state.stat().st_mtime_ns / 1e9)
            time.sleep(0.02)
        assert run.stdout is not None
        records = [json.loads(text) for text in run.stdout]
    ends = sorted(ended.values())[: len(records)]  # the last commit is that of the closing evaluation
    rows = [
        {
            "ended": end,
            "train": max(one["seconds"] for one in record["sites"].values()),
            "aggregate": record["seconds"]["aggregate"],
        }
        for end, record in zip(ends, records, strict=True)
    ]
    return timings(rows)


def bare_block(bench: Bench, study: Path, rounds: int) -> list[Timing]:
    """Run the same study as a bare Flower app and return its rounds after the first."""
    log = study.with_suffix(".jsonl")
    paths = {"study": study, "data": bench.folder / "data", "caches": bench.folder / "hospitals", "log": log}
    settings = " ".join(f"{key}={json.dumps(str(value))}" for key, value in paths.items())
    told = bench.command("flwr", "run", bench.folder / "bare", "bare", "--run-config", settings, "--format", "json")
    run_id = json.loads(told[told.index("{") :])["run-id"]
    ends, status = time.monotonic() + DEADLINE_S, ""
    while not log.exists() or log.read_text().count("\n") < rounds:  # a command asked meanwhile would take a core from it
        if time.monotonic() > ends:
            raise RuntimeError(f"{log} has too few rounds")
        time.sleep(0.5)
    while status != "finished:completed":
        if time.monotonic() > ends or status.startswith("finished"):
            raise RuntimeError(status)
        time.sleep(2.0)
        listed = bench.command("flwr", "list", "bare", "--run-id", run_id, "--format", "json")
        status = json.loads(listed[listed.index("{") :])["runs"][0]["status"]
    return timings([json.loads(text) for text in log.read_text().splitlines()])


def timings(rows: Sequence[dict[str, Any]]) -> list[Timing]:
    """Return the rounds after the first of rows with `ended`, `train` and `aggregate`."""
    return [Timing(now["ended"] - before["ended"], now["train"], now["aggregate"]) for before, now in pairwise(rows)]


@contextmanager
def both(folder: Path) -> Iterator[Bench]:
    """Start both federations, each with its sites connected."""
    bench = Bench(folder, free_port(), free_port(), free_port())
    lay_out(bench)
    write_study(bench, 0, 1)  # the sites start with a study that they approved
    nginx = shutil.which("nginx", path=bench.environment["PATH"])
    if nginx is None:
        raise RuntimeError("nginx is not installed")
    with ExitStack() as stack:
        stack.enter_context(bench.running("fl_server", "superlink", "--home", bench.home, "--exec"))
        stack.enter_context(bench.running("flower-superlink", "--insecure", "--port", bench.bare))
        time.sleep(15.0)
        configuration = bench.home / "coordinator" / "proxy" / "nginx.conf"
        stack.enter_context(bench.running(nginx, "-e", "stderr", "-c", configuration))
        for site in SITES:
            bench.command("fl_server", "admit", bench.site_file(site).with_suffix("") / "request.json", "--home", bench.home)
            stack.enter_context(bench.running("fl_client", "--site", site, "--config", bench.site_file(site)))
            node = ["--insecure", "--superlink", f"127.0.0.1:{bench.bare}", "--port", free_port()]
            stack.enter_context(bench.running("flower-supernode", *node, "--node-config", f'site="{site}"'))
        time.sleep(15.0)
        yield bench


RESAMPLES = 4000


def ratio_interval(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of the medians and its 95 % percentile bootstrap interval."""
    rng = np.random.default_rng(0)
    sample = [np.median(rng.choice(side, (RESAMPLES, len(side))), axis=1) for side in (np.asarray(ours), np.asarray(other))]
    low, high = np.quantile(sample[0] / sample[1], [0.025, 0.975])
    return float(np.median(ours) / np.median(other)), float(low), float(high)


def figures(product: Sequence[Timing], bare: Sequence[Timing]) -> dict[str, Any]:
    """Return medians in milliseconds per phase and the ratio of whole rounds."""
    found: dict[str, Any] = {"rounds": [len(product), len(bare)]}
    for name, rows in (("product", product), ("bare", bare)):
        phases = {
            "whole": [row.whole_s for row in rows],
            "training": [row.train_s for row in rows],
            "aggregation": [row.aggregate_s for row in rows],
            "rest": [row.whole_s - row.train_s - row.aggregate_s for row in rows],
        }
        found[name] = {phase: round(1000 * float(np.median(values)), 1) for phase, values in phases.items()}
    found["ratio"] = ratio_interval([row.whole_s for row in product], [row.whole_s for row in bare])
    return found


def compared(blocks: int, rounds: int) -> dict[str, Any]:
    """Let both take turns and return the figures."""
    product: list[Timing] = []
    bare: list[Timing] = []
    with TemporaryDirectory() as folder, both(Path(folder)) as bench:
        for block in range(1, blocks + 1):
            study = write_study(bench, block, rounds)
            product += product_block(bench, study)
            bare += bare_block(bench, study, rounds)
            sys.stderr.write(f"block {block}: {json.dumps(figures(product, bare))}\n")
    return figures(product, bare)


def rows(*, quick: bool) -> list[Row]:
    """Return the comparison of at least forty rounds a side; `quick` takes one."""
    found = compared(1, 2) if quick else compared(BLOCKS, ROUNDS)
    ours, other = found["product"], found["bare"]
    phases = ", ".join(f"{phase} {ours[phase]:,.0f} and {other[phase]:,.0f}" for phase in ("training", "aggregation", "rest"))
    note = "{}; ratio {:.3f} ({:.3f} to {:.3f})".format(phases, *found["ratio"])
    what = f"round of a deployed study, {len(SITES)} sites, median of {found['rounds'][0]}"
    against = f"a bare Flower app that trains the same, median of {found['rounds'][1]}"
    return [
        Row(what=what, against=against, ours=ours["whole"], limit=other["whole"], unit="ms", bar=1.05, at_most=True, note=note)
    ]


def main(
    blocks: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = BLOCKS,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of a block; the first is not timed.")] = ROUNDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
) -> None:
    """Let the product and a bare Flower app take turns and compare their rounds."""
    with exit_on_fault():
        found = compared(blocks, rounds)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    table = Table("median, ms", "whole round", "training", "aggregation", "rest")
    for name in ("product", "bare"):
        table.add_row(name, *(f"{found[name][phase]:,.1f}" for phase in ("whole", "training", "aggregation", "rest")))
    Console().print(table)
    Console().print("{} and {} rounds; ratio {:.3f} ({:.3f} to {:.3f})".format(*found["rounds"], *found["ratio"]))


if __name__ == "__main__":
    run_command(main)
