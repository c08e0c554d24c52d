"""What `icmoe audit-privacy` prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icmoe.errors import IcmoeError
from icmoe.privacy_audit.checks import Finding
from icmoe.privacy_audit.run import audit_faults, audit_model, check_faults, run_checks


def audit_and_print(model: Path | None, *, canaries: int, seed: int, checks: bool, as_json: bool) -> None:
    """Run what is asked for and print it.

    Parameters
    ----------
    model
        Model file, or None.
    canaries, seed
        As for `audit_model`.
    checks
        Whether the named checks are run.
    as_json
        JSON in place of tables.

    Raises
    ------
    IcmoeError
        425 where a promise is refuted, after everything is printed; else as `audit_model`.
    """
    torch.set_num_threads(1)  # many small tensors: threads would only wait for each other
    progress = Console(stderr=True)
    with progress.status("privacy audit") as status:
        # The model first: one that cannot be audited is refused at once, not after the checks, whose findings would be lost.
        record = audit_model(model, canaries=canaries, seed=seed, say=status.update) if model is not None else {}
        findings = run_checks(status.update) if checks else []
    if as_json:
        whole = {**record, **({"checks": [asdict(finding) for finding in findings]} if checks else {})}
        sys.stdout.write(json.dumps(whole, indent=1) + "\n")
    else:
        _print(Console(), findings, record)
    if faults := [*check_faults(findings), *(audit_faults(record) if record else [])]:
        raise IcmoeError(*faults)


def _print(console: Console, findings: list[Finding], record: dict[str, Any]) -> None:
    if findings:
        table = Table("check", "", "measured", "at most", "what", title="private step of this installation", title_justify="left")
        for one in findings:
            table.add_row(one.name, "passed" if one.passed else "FAILED", f"{one.measured:.3g}", f"{one.limit:.3g}", one.what)
        console.print(table)
    if record:
        console.print(_table(record))
        console.print(record["meaning"], highlight=False, soft_wrap=True)


def _table(record: dict[str, Any]) -> Table:
    about, claim, found = record["model"], record["claim"], record["canaries"]
    table = Table("", "", title=escape(f"{about['method']}, study {about['study']}"), title_justify="left", show_header=False)
    if claim is None:
        table.add_row("claimed epsilon", "none: no privacy at the site")
    else:
        promise = f"delta {claim['delta']:g}, unit {claim['unit']}, {claim['accountant']}, {claim['of']}"
        table.add_row("claimed epsilon", f"{claim['epsilon']:.3f} ({promise})")
        guessed = f"{found['correct']} of {found['guesses']} guesses right, {found['canaries']} canaries"
        table.add_row("measured lower bound", f"{found['lower_bound']:.3f} with {found['confidence']:.0%} confidence ({guessed})")
    attack, inversion = record["membership"], record["inversion"]
    scope = f"{attack['models']} models, {attack['patients']} made-up patients, {attack['rounds']} round"
    table.add_row("membership AUC", f"{attack['auc']:.3f} (chance 0.5; {scope})")
    table.add_row("true positives at 1 % false positives", f"{attack['tpr_at_1_fpr']:.3f} (chance 0.01)")
    began = f"random features {inversion['random_cosine']:.3f}; the attacker's best of {inversion['starts']} guesses"
    table.add_row("gradient inversion, cosine", f"{inversion['cosine']:.3f} ({began})")
    table.add_row(
        "gradient inversion, PSNR", f"{inversion['psnr_db']:.1f} dB (random features {inversion['random_psnr_db']:.1f} dB)"
    )
    return table
