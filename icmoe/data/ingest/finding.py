"""From a hash in the report back to files: only who has the export and the site's secret can."""

from __future__ import annotations

from icmoe.data.ingest import index
from icmoe.data.ingest.pseudonyms import site_pseudonyms
from icmoe.data.ingest.run import Export
from icmoe.data.ingest.walking import walk
from icmoe.errors import Fault, IcmoeError


def files_of(export: Export, name: str) -> list[str]:
    """Return the files of a patient (P-...), a series (S-...) or a file (F-...) that a report names, below the export.

    Raises
    ------
    IcmoeError
        109 where the export cannot be read, 129 and 130 for the store, 210 where nothing has this name.
    """
    hashes = site_pseudonyms(export.secret_folder)
    with index.claimed(export.store) as connection:
        records = index.records(connection)
        wanted = {key for key, record in records if name in {f"S-{record.series}", record.patient, record.person}}
    found = []
    for path, _, _ in walk(export.root, export.settings.exclude):
        key = hashes.of("file", path)
        if name == f"F-{key}" or key in wanted:
            found.append(path)
    if not found:
        what, todo = "nothing in the export has this name", "Copy it from the report, and run ingest first."
        raise IcmoeError(Fault(number=210, where=export.site, what=what, value=name, todo=todo))
    return found
