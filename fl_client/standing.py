"""Where a site stands with an approved study: what it has for it, and what it would tell of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_client.approval import approved_studies
from fl_client.site import SiteFile, site_data
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Study
from icmoe.summary import summarise


def study_records(path: Path, settings: SiteFile) -> tuple[list[dict[str, Any]], list[Fault]]:
    """Return the `study_record` of each approved study that has one, and why others have none, such as a new one.

    Raises
    ------
    IcmoeError
        As `approved_studies`.
    """
    records, faults = list[dict[str, Any]](), list[Fault]()
    for study in approved_studies(path.parent / settings.state):
        try:
            records.append(study_record(path, settings, study))
        except IcmoeError as error:
            faults += error.faults
    return records, faults


def study_record(path: Path, settings: SiteFile, study: Study) -> dict[str, Any]:
    """Return images found and used, what was left out, and the summary of `share_summary`, as plain values.

    Raises
    ------
    IcmoeError
        As `site_data`.
    """
    site = site_data(path, settings, study)
    train = site.of("train") if site is not None else ()
    return {
        "study": study.name,
        "digest": study.digest,
        "images_found": site.images_found if site is not None else 0,
        "images_used": site.images_used if site is not None else 0,
        "exclusions": [str(fault) for fault in site.exclusions] if site is not None else [],
        "summary": summarise(train, study.classes).model_dump(mode="json") if train else None,
    }
