"""What a round of many virtual sites costs in Ray beside Flower's own simulation of the same number and the same tensors.

Both sides run in processes of their own and take turns (`no_training.py`); nobody trains. Time is that of a round after the
first, from the end of the one before: the median of the rounds. CPU seconds are those of the process and of everything that
it started, Ray too, and count where others use the machine: the mean of the rounds, because the kernel counts them in
hundredths, of which a round of ten sites takes twenty. Memory is the driver's alone, VmHWM of `/proc/PID/status`: all
that was resident at once, libraries, files and the touched part of Ray's shared store counted; ours keeps the answers of a
round in files, whose pages are the kernel's and count on neither side. Ray lowers the priority of its workers unless
`RAY_worker_niceness` says otherwise; it is 0 here, for both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from scipy import stats

from icmoe.errors import Fault, IcmoeError
from simulations.benchmarks.row import Row

DEADLINE_S = 1200.0
SIDES = ("ours", "flower")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one side with a number of sites: a round's clock and CPU seconds, the driver's peak in MB.

    Parameters
    ----------
    sites
        How many.
    round_s, cpu_s
        Median and mean.
    peak_mb
        The largest.
    """

    sites: int
    round_s: float
    cpu_s: float
    peak_mb: float

    @property
    def site_ms(self) -> float:
        """CPU milliseconds of a site's round."""
        return 1000.0 * self.cpu_s / self.sites


def run(side: str, sites: int, rounds: int) -> dict[str, Any]:
    """Run one side and return what it printed.

    Raises
    ------
    IcmoeError
        503 with its last words, such as those of Ray where the machine is too busy to start it in time.
    """
    command = [sys.executable, "-m", "simulations.benchmarks.no_training", "--side", side]
    command += ["--sites", str(sites), "--rounds", str(rounds)]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if done.returncode:
        value = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise IcmoeError(Fault(number=503, where=f"{side}, {sites} sites", value=value, did="Nothing is compared."))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def costs(sites: int, *, turns: int, rounds: int) -> dict[str, Cost]:
    """Let both sides take turns and return what each cost."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(turns):
        for side in SIDES:
            runs[side].append(run(side, sites, rounds))
    return {
        side: Cost(
            sites,
            median(value for one in found for value in one["round_s"]),
            fmean(value for one in found for value in one["round_cpu_s"]),
            max(one["peak_mb"] for one in found),
        )
        for side, found in runs.items()
    }


def rows(*, quick: bool) -> list[Row]:
    """Return time, CPU and memory with a hundred and with a thousand sites, and how a site's cost grows.

    Parameters
    ----------
    quick
        Two and four sites, two rounds.
    """
    plan = {2: (1, 2), 4: (1, 2)} if quick else {10: (2, 24), 100: (2, 4), 1000: (1, 3)}
    found = {sites: costs(sites, turns=turns, rounds=rounds) for sites, (turns, rounds) in plan.items()}
    compared = [row for sites in list(plan)[1 - len(plan) :] for row in _compared(found[sites])]
    return [*compared, _growth([found[sites]["ours"] for sites in plan], [found[sites]["flower"] for sites in plan])]


def _compared(found: Mapping[str, Cost]) -> list[Row]:
    ours, flower = found["ours"], found["flower"]
    what = f"{ours.sites} virtual sites in Ray, nobody trains"
    common: dict[str, Any] = {"against": "Flower's simulation with FedAvg and a client that answers at once", "at_most": True}
    return [
        Row(what=f"{what}: a round", ours=ours.round_s, limit=flower.round_s, unit="s", bar=1.1, **common),
        Row(what=f"{what}: a round", ours=ours.cpu_s, limit=flower.cpu_s, unit="CPU s", bar=1.1, **common),
        Row(what=f"{what}: peak of the driver", ours=ours.peak_mb, limit=flower.peak_mb, unit="MB", bar=0.6, **common),
    ]


def _growth(ours: Sequence[Cost], flower: Sequence[Cost]) -> Row:
    """Return what a site's round costs among many beside what it costs among few."""
    told = "; ".join(f"{name} {_slope_us(costs):+.2f}" for name, costs in (("ours", ours), ("Flower's", flower)))
    return Row(
        what=f"a site's round among {ours[-1].sites}",
        against=f"the same among {ours[0].sites}",
        ours=ours[-1].site_ms,
        limit=ours[0].site_ms,
        unit="CPU ms",
        bar=1.1,
        at_most=True,
        note=f"microseconds that each further site adds to every site's round, least squares: {told}",
    )


def _slope_us(found: Sequence[Cost]) -> float:
    return float(stats.linregress([one.sites for one in found], [1000.0 * one.site_ms for one in found]).slope)
