"""Before the first round: each site is asked once for its summary, and sites that differ from the others are named.

The question carries the study's digest alone and is no part of the study: a site may decline it and takes part all the
same, and nothing that is found here changes the training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fl_server.exchanging import ask
from fl_server.outliers import Finding, outliers
from fl_server.replies import reported_number
from icmoe.errors import Fault, IcmoeError
from icmoe.messages import CONFIG, STUDY_KEY, SUMMARY_KEY
from icmoe.study import Study
from icmoe.summary import SiteSummary, parse_summary

DECLINED = 214
TAKES_PART = "The site takes part without it."


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """What the sites told of their data and what was found in it.

    Parameters
    ----------
    study_digest
        Of the study that was asked for.
    summaries
        By site.
    declined
        Sites whose file does not allow a summary.
    faults
        One per site that failed, was silent or answered badly.
    findings
        Outliers between the sites.
    """

    study_digest: str
    summaries: Mapping[str, SiteSummary]
    declined: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = field(default=())
    findings: tuple[Finding, ...] = ()

    def lines(self) -> list[str]:
        """Return the outcome in sentences."""
        declined = [f"{name} declined to share a summary." for name in self.declined]
        return [*map(str, self.findings), *declined, *map(str, self.faults)]

    def record(self) -> dict[str, Any]:
        """Return the check as plain values for JSON."""
        return {
            "study_digest": self.study_digest,
            "summaries": {name: summary.model_dump(mode="json") for name, summary in self.summaries.items()},
            "declined": list(self.declined),
            "faults": [fault.record() for fault in self.faults],
            "findings": [{**asdict(finding), "sentence": str(finding)} for finding in self.findings],
        }

    def data(self) -> bytes:
        """Return the check as a JSON file."""
        return (json.dumps(self.record(), indent=1) + "\n").encode()


def check_data(grid: Grid, sites: Mapping[int, str], study: Study, *, poll_s: float = 1.0) -> DataCheck:
    """Ask every site once, until the study's deadline, and compare what came.

    Parameters
    ----------
    grid
        Flower's Grid.
    sites
        Names by node.
    study
        Names the classes and the deadline.
    poll_s
        Seconds between looks for answers.
    """
    content = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: study.digest})})
    questions = [Message(content, dst_node_id=node, message_type="query.summary") for node in sites]
    replies = {}
    for reply in ask(grid, questions, deadline_s=study.deadline_s, poll_s=poll_s):
        replies[sites.get(reply.metadata.src_node_id, "")] = reply
    summaries: dict[str, SiteSummary] = {}
    declined: list[str] = []
    faults: list[Fault] = []
    for name in sorted(sites.values()):
        try:
            summaries[name] = _summary(replies.get(name), name, study)
        except IcmoeError as error:
            declined += [name for fault in error.faults if fault.number == DECLINED]
            faults += [fault for fault in error.faults if fault.number != DECLINED]
    return DataCheck(
        study_digest=study.digest,
        summaries=summaries,
        declined=tuple(declined),
        faults=tuple(faults),
        findings=tuple(outliers(summaries, [label.name for label in study.labels])),
    )


def _summary(reply: Message | None, site: str, study: Study) -> SiteSummary:
    if reply is None:
        what = f"no summary within {study.deadline_s:g} s"
        raise IcmoeError(Fault(number=304, where=site, what=what, did=TAKES_PART))
    if reply.has_error():
        raise IcmoeError(Fault(number=reported_number(reply.error.reason), where=site, did=TAKES_PART))
    config = reply.content.get(CONFIG)
    if set(reply.content) != {CONFIG} or not isinstance(config, ConfigRecord) or set(config) != {SUMMARY_KEY}:
        what = "summary was refused: other records or keys than one summary"
        raise IcmoeError(Fault(number=504, where=site, what=what, did=TAKES_PART))
    return parse_summary(config[SUMMARY_KEY], study.classes, where=site)
