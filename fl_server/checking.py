"""What `fl_server check` finds and prints: every fault of a study before a site is asked to approve it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from icmoe.study import Study, read_study


def check_study(path: Path, *, as_json: bool) -> None:
    """Print a study's digest and what it amounts to; refuse one whose promises cannot be kept.

    Raises
    ------
    IcmoeError
        201-205 for the file, 403 where no noise keeps a patient's epsilon, 420 and 421 as `fl_server.private`.
    """
    study = read_study(path)
    rows = privacy_rows(study)
    if as_json:
        sys.stdout.write(json.dumps({"digest": study.digest, "study": study.model_dump(mode="json")}, indent=1) + "\n")
        return
    table = Table(title=study.name, title_justify="left", show_header=False)
    table.add_row("digest", study.digest)
    table.add_row("labels", ", ".join(label.name for label in study.labels))
    table.add_row("backbone", study.backbone.told)
    table.add_row("experts", f"{study.model.experts}, {min(study.model.top_k, study.model.experts)} fused per pixel")
    table.add_row("rounds", f"{study.rounds}, quorum {study.quorum}, deadline {study.deadline_s:.0f} s")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def privacy_rows(study: Study) -> list[tuple[str, str]]:
    """Return what all rounds together spend of a patient's and of a site's privacy; the accountants are imported here alone."""
    rows, site, server = [], study.privacy.site, study.privacy.server
    if site is not None:
        from icmoe.accounting import study_epsilon

        spent = f"epsilon {study_epsilon(study):.3g} at delta {site.delta:g}"
        rows.append(("privacy", f"{spent} per {site.unit} (add/remove; {site.accountant})"))
    if server is not None:
        from fl_server.private import require_affordable
        from icmoe.gaussian import ACCOUNTANT, epsilon_of
        from icmoe.server_noise import noise_of

        noise = noise_of(server, study.rounds)
        require_affordable(study, noise, study.rounds)
        spent = f"epsilon {epsilon_of(study.rounds, noise.whole, server.delta):.3g} at delta {server.delta:g}"
        rows.append(("privacy", f"{spent} per {server.unit} ({server.adjacency}; {ACCOUNTANT})"))
    return rows
