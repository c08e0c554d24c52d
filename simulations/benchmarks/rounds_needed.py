"""How many rounds a study needs: local epochs and the server's optimiser, beside plain FedAvg's settings.

    python simulations/benchmarks/rounds_needed.py
    python -m simulations.benchmarks --only rounds-needed

The embedded phantom study is rehearsed with each setting. Counted is the first round whose validation Dice reaches 95 % of what
plain FedAvg (McMahan et al., arXiv 1602.05629: one local epoch, a constant rate, weights by size alone, no optimiser at the
server) has after its last round: one target for all. A setting that does not get there within the rounds is printed as such.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from icmoe.atomic import write_atomically
from icmoe.errors import exit_on_fault
from icmoe.strategies import SERVER_OPTIMIZERS
from icmoe.study import Training
from icmoe.usage import run_command
from simulations.benchmarks.row import Row
from simulations.methods import PLAIN_AVERAGE

SCRIPT = Path(__file__).parents[1] / "run_sim.py"
ROUNDS = 6
EPOCHS = (1, 2, 4)
SHARE = 0.95
DEADLINE_S = 3600.0
PLAIN = ("plain FedAvg", 1, "none")
RECIPE = ("router-aware", Training().local_epochs, "none")
Setting = tuple[str, int, str]
"""Method, local epochs, server's optimiser."""


def settings() -> list[Setting]:
    """Return plain FedAvg and every pair of epochs and optimiser."""
    return [PLAIN, *(("router-aware", epochs, optimizer) for optimizer in SERVER_OPTIMIZERS for epochs in EPOCHS)]


def scenario_of(setting: Setting) -> str:
    """Return the scenario file of a setting."""
    method, epochs, optimizer = setting
    plain = method == "plain FedAvg"
    aggregation = {**PLAIN_AVERAGE, "balance_step": 0.0} if plain else {"optimizer": optimizer}
    lines = ["[study.training]", f"local_epochs = {epochs}", *(['schedule = "constant"'] if plain else []), "[study.aggregation]"]
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in aggregation.items())]) + "\n"


def dice_by_round(setting: Setting, rounds: int, extra: tuple[str, ...] = ()) -> list[float]:
    """Rehearse a setting and return the validation Dice after each round."""
    with TemporaryDirectory() as folder:
        scenario = Path(folder) / "scenario.toml"
        write_atomically(scenario, scenario_of(setting).encode())
        command = [sys.executable, str(SCRIPT), "--scenario", str(scenario), "--methods", "router-aware", "--rounds", str(rounds)]
        command += ["--out", str(Path(folder) / "run"), "--json", *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    [run] = json.loads(done.stdout)["methods"]["router-aware"].values()
    return [row["val_dice"] for row in run["rounds"]]


def rounds_to(target: float, dice: list[float]) -> int | None:
    """Return the first round, from 1, that reaches the target; None where none does."""
    return next((number for number, value in enumerate(dice, start=1) if value >= target), None)


def measure(chosen: list[Setting], rounds: int, extra: tuple[str, ...] = ()) -> dict[Setting, list[float]]:
    """Return the validation Dice by round of each setting."""
    with Console(stderr=True).status("") as status:
        found = {}
        for setting in chosen:
            status.update(f"{setting[0]}, {setting[1]} epochs, {setting[2]}")
            found[setting] = dice_by_round(setting, rounds, extra)
    return found


def rows(*, quick: bool) -> list[Row]:
    """Return the recipe beside plain FedAvg; `quick` takes two rounds of a tiny backbone."""
    extra = ("--backbone", "sam-vit-test", "--image-size", "32") if quick else ()
    found = measure([PLAIN, RECIPE], 2 if quick else ROUNDS, extra)
    target = SHARE * found[PLAIN][-1]
    reached = {setting: rounds_to(target, dice) for setting, dice in found.items()}
    never = len(found[RECIPE]) + 1
    return [
        Row(
            what=f"rounds to {SHARE:.0%} of plain FedAvg's final Dice, the default recipe",
            against="plain FedAvg's settings",
            ours=reached[RECIPE] or never,
            limit=reached[PLAIN] or never,
            unit="rounds",
            bar=1.0,
            at_most=True,
            note="all settings: simulations/benchmarks/rounds_needed.py",
        )
    ]


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of each rehearsal.")] = ROUNDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002
) -> None:
    """Rehearse the phantom study with each setting and print the rounds that it needs."""
    with exit_on_fault():
        found = measure(settings(), rounds)
    target = SHARE * found[PLAIN][-1]
    told = [record_of(setting, dice, target) for setting, dice in found.items()]
    if as_json:
        sys.stdout.write(json.dumps({"target": target, "settings": told}, indent=1) + "\n")
        return
    table = Table("weights", "local epochs", "server", f"rounds to {target:.3f}", "epochs to it", "Dice by round")
    for one in told:
        reached = one["rounds"]
        cells = [str(reached or f"not in {rounds}"), str(reached * one["local_epochs"] if reached else "-")]
        dice = "  ".join(f"{value:.3f}" for value in one["val_dice"])
        table.add_row(one["weights"], str(one["local_epochs"]), one["server"], *cells, dice)
    Console(width=120).print(table)


def record_of(setting: Setting, dice: list[float], target: float) -> dict[str, Any]:
    """Return a setting and what it reached, for JSON."""
    method, epochs, optimizer = setting
    return {"weights": method, "local_epochs": epochs, "server": optimizer, "rounds": rounds_to(target, dice), "val_dice": dice}


if __name__ == "__main__":
    run_command(main)
