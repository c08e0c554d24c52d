"""What `fl_client approve`, `approvals`, `withdraw` and `audit` do and print."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fl_client.approval import (
    Approval,
    approving,
    changes,
    is_named,
    one_at_a_time,
    read_approvals,
    unrecorded,
    withdraw,
    withdrawal,
)
from fl_client.audit import digests_of_round, read_log
from fl_client.budget import budget_faults, prospect
from fl_client.leaves import IN_INT8, LEAVES, RECORDS
from fl_client.records import Records
from fl_client.site import SiteFile, read_named, records_of, site_data, study_faults
from icmoe.accounting import study_epsilon
from icmoe.bundle import installed_digest
from icmoe.chain import START, Entry
from icmoe.data.slices import SiteData
from icmoe.errors import CATALOGUE, Fault, IcmoeError, faults_of
from icmoe.study import Study, read_study
from icmoe.study_privacy import SitePrivacy


def approve_study(path: Path, name: str, study_file: Path, *, agreed: bool) -> None:
    """Show a study, ask, and keep a copy of it as approved together with the digest of the installed package.

    Parameters
    ----------
    path
        The site file.
    name
        The site.
    study_file
        The study as the hospital received it.
    agreed
        Whether not to ask.

    Raises
    ------
    IcmoeError
        2xx for the files, 212 and 319 where site file or policy exclude the study, 402 where the site's patients do not
        fit its privacy, 410, 411 and 417 where the budget excludes it, 321 and 412 to 415 where the records are damaged.
    """
    settings = read_named(path, name)
    study = read_study(study_file)
    records = records_of(path, settings)
    book, lines = records.agreement()
    most = settings.policy.max_epsilon
    if faults := [*study_faults(path, settings, study), *budget_faults(settings.budget, book, study, most)]:
        raise IcmoeError(*faults)
    package = installed_digest()
    last = _approved_last(records.state, lines, study.name)
    console = Console()
    budget = {"budget": prospect(settings.budget, book, study, most)}
    data, unread = _data(path, settings, study)
    console.print(_table({**_terms(study), **budget, **_site_terms(settings, data, unread)}, study.name))
    for what, digest in (("study", study.digest), ("package", package)):
        console.print(f"{what:10} {digest}", highlight=False, soft_wrap=True)  # whole lines: they are read out and compared
    console.print(_difference(last, study) if last else "No study of this name was approved before.", soft_wrap=True)
    if not agreed and not _asks(console):
        console.print("Nothing was approved.")
        sys.exit(1)
    told = f"{study.name} {study.digest[:12]} is approved at {name}."
    _keep(records, study, package, partial(console.print, told, highlight=False))
    for fault in unread:
        later = replace(fault, did="The site cannot take part in it before.")
        console.print(str(later), highlight=False, markup=False, soft_wrap=True)


def _approved_last(state: Path, lines: Sequence[Entry], name: str) -> Study | None:
    """Return the study of a name that was approved last by the order of the audit log: a clock may have been set back."""
    placed = {line["study"]: number for number, line in enumerate(lines) if line["event"] == "approved"}
    named = [approval for approval in read_approvals(state) if approval.study.name == name]
    return sorted(named, key=lambda one: placed.get(one.digest, -1))[-1].study if named else None


def _keep(records: Records, study: Study, package: str, tell: Callable[[], None]) -> None:
    """Keep the approval and its line of the audit log, after the lines that withdrawals before it are owed."""
    state = records.state
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with one_at_a_time(state):
        for before in unrecorded(read_approvals(state), read_log(state)):
            records.write("withdrawn", withdrawal(before))
        with approving(state, study, package, datetime.now(UTC)):  # neither without the other, on a full disk either
            head = records.add("approved", {"study": study.digest, "name": study.name, "bundle": package})
        try:
            records.keep(head)
        finally:  # whatever is wrong with the ledger, it is approved
            tell()


def _data(path: Path, settings: SiteFile, study: Study) -> tuple[SiteData | None, tuple[Fault, ...]]:
    """Return the site's data, or why it has none for the study yet: labels of a study's own need an ingest of its own.

    Raises
    ------
    IcmoeError
        402 where its patients do not fit the study's privacy.
    """
    try:
        data = site_data(path, settings, study)
    except IcmoeError as error:
        return None, error.faults
    _require_patients(study, data)
    return data, ()


def withdraw_study(path: Path, name: str, which: str) -> None:
    """Withdraw the approval of a study by name or digest and say which went."""
    records = records_of(path, read_named(path, name))
    with one_at_a_time(records.state):
        try:
            gone = withdraw(records.state, which, datetime.now(UTC))
        except IcmoeError:
            if not (gone := _owed_lines(records, which)):
                raise
        # Written before it is told: a terminal may be gone.
        faults = [fault for approval in gone for fault in _withdrawal_faults(records, approval)]
    for approval in gone:
        Console().print(f"{approval.study.name} {approval.digest[:12]} is withdrawn at {name}.", highlight=False)
    if faults:
        raise IcmoeError(*faults)


def _owed_lines(records: Records, which: str) -> tuple[Approval, ...]:
    """Return the approvals of a name or digest that are withdrawn without a line in the audit log."""
    withdrawn = [approval for approval in read_approvals(records.state) if approval.withdrawn_at and is_named(approval, which)]
    return unrecorded(withdrawn, read_log(records.state)) if withdrawn else ()


def _withdrawal_faults(records: Records, approval: Approval) -> list[Fault]:
    """Write the line of a withdrawal, which holds whatever is wrong with the log, and return what kept it from being written."""
    did = "The study is withdrawn all the same, but the audit log has no line on it."
    kept = approval in read_approvals(records.state)
    then = "Then withdraw it again: its line is written then." if kept else "The list of approvals has lost it."
    try:
        head = records.add("withdrawn", withdrawal(approval))
        did, then = "The study is withdrawn and the audit log says so, but the ledger does not know of that line.", ""
        records.keep(head)
    except (IcmoeError, OSError) as error:
        faults = faults_of(error)
        return [replace(one, did=did, todo=f"{one.todo or CATALOGUE[one.number].remedy} {then}".strip()) for one in faults]
    return []


def list_approvals(path: Path, name: str, *, as_json: bool) -> None:
    """Print every approval, the oldest first, and whether it stands with the package that is installed now."""
    settings = read_named(path, name)
    package = installed_digest()
    rows = [
        {
            "study": approval.study.name,
            "digest": approval.digest,
            "approved": approval.approved_at,
            "withdrawn": approval.withdrawn_at,
            "package": "as approved" if approval.bundle == package else "changed since: approve again",
        }
        for approval in read_approvals(path.parent / settings.state)
    ]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    table = Table("study", "digest", "approved", "withdrawn", "package")
    for row in rows:
        texts = (str(row[key] or "-") for key in ("approved", "withdrawn", "package"))
        table.add_row(row["study"], str(row["digest"])[:12], *texts)
    Console().print(table)


def print_audit(path: Path, name: str, round_number: int | None, study: str | None, *, as_json: bool) -> None:
    """Check the audit log and print it, or of one round the digests of the model received and of the update sent.

    What is there is printed before the ledger is asked whether lines were cut off.

    Raises
    ------
    IcmoeError
        321 where the log was changed or shortened, 210 where it holds no such round; else as `Records.agreement`.
    """
    records = records_of(path, read_named(path, name))
    entries = read_log(records.state)
    rows = entries if round_number is None else digests_of_round(entries, round_number, study)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        _print_lines(rows, entries if round_number is None else None)
    records.agreement()


def _print_lines(rows: Sequence[Entry], whole: Sequence[Entry] | None) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        about = " ".join(f"{key}={row[key]}" for key in ("name", "kind", "round", "within_bounds") if key in row)
        console.print(f"{row['time'][:19]} {row['event']:9} {row.get('digest') or row.get('study', '')} {about}")
    if whole is not None:
        console.print(f"{len(whole)} lines, unbroken; hash of the last: {whole[-1]['hash'] if whole else START}")


def _terms(study: Study) -> dict[str, str]:
    from fl_client.manifest import update_shapes  # PyTorch, which the lists and the log can do without
    from icmoe.exchange import global_state
    from icmoe.model import build_model
    from icmoe.quantise import sent_shapes

    shapes, in_int8 = update_shapes(study), study.update.form == "int8"
    down = 4 * sum(tensor.numel() for tensor in global_state(build_model(study, seed=0)).values())
    up = sum(map(math.prod, sent_shapes(shapes).values())) if in_int8 else 4 * sum(map(math.prod, shapes.values()))
    labels = ", ".join(f"{label.name} {list(label.values)}" for label in study.labels)
    return {
        "labels": labels,
        "backbone": study.backbone.told,
        "privacy": _privacy(study),
        "rounds": f"{study.rounds} of {_work(study)}",
        "quorum": f"{study.quorum} (the coordinator's word)",
        "deadline": f"{study.deadline_s:g} s per round; training that takes longer is ended",
        "bytes": f"{down:,} in and {up:,} out per round",
        **({"form": IN_INT8} if in_int8 else {}),
        "what leaves": LEAVES if study.privacy.site is None else _leaves(study.privacy.site),
        "test": "yes: the backbone may be untrained, results say nothing" if study.test_only else "no",
    }


def _privacy(study: Study) -> str:
    privacy = study.privacy.site
    if privacy is None:
        return "no differential privacy: updates can leak about training data"
    return (
        f"epsilon {study_epsilon(study):.3g} for the whole study at delta {privacy.delta:g}; "
        f"unit: the {privacy.unit} with all slices; adjacency: add or remove one patient; accountant: {privacy.accountant}; "
        f"public number of patients {privacy.patients}, {privacy.sample_rate:g} of them per step"
    )


def _work(study: Study) -> str:
    privacy = study.privacy.site
    if privacy is None:
        return f"{study.training.local_epochs} passes over the training slices"
    return f"{privacy.steps} steps of {privacy.expected_batch:g} patients expected"


def _leaves(privacy: SitePrivacy) -> str:
    scores = "noised validation Dice and number of patients; " if privacy.scores == "noised" else ""
    return (
        "trained tensors minus the round's global ones and share of pixels per expert, both noised; "
        f"{scores}the public number of patients; the number of steps; {RECORDS}; the site's name"
    )


def _require_patients(study: Study, data: SiteData | None) -> None:
    privacy = study.privacy.site
    if privacy is not None and data is not None:
        from icmoe.privacy import patient_faults

        patients = len({item.patient for item in data.of("train")})
        if faults := patient_faults(privacy, patients):
            raise IcmoeError(*faults)


def _site_terms(settings: SiteFile, data: SiteData | None, unread: Sequence[Fault]) -> dict[str, str]:
    """Return with which data; where they have not been read yet, why."""
    used = f"{data.images_used} of {data.images_found} images used, {len(data.of('train'))} for training" if data else "none"
    used = f"not read yet ({unread[0]})" if unread else used
    limits = {key: value for key, value in settings.policy.model_dump().items() if value}
    policy = ", ".join(f"{key} = {value}" for key, value in limits.items())
    return {"data": used, "site's policy": policy}


def _difference(old: Study, new: Study) -> Text | Table:
    rows = changes(old, new)
    if not rows:
        return Text("Equal to the study of this name that was approved last.")
    table = Table("setting", "approved last", "now", title=f"Changed since {old.name} {old.digest[:12]}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def _table(rows: dict[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _asks(console: Console) -> bool:
    if not sys.stdin.isatty():
        todo = "Add --yes where nobody can be asked."
        raise IcmoeError(
            Fault(number=210, where="approve", what="nobody can be asked here", did="Nothing was approved.", todo=todo)
        )
    return console.input("Approve? Type yes: ").strip().lower() == "yes"
