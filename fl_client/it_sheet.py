"""One sheet for the hospital's IT: what goes where, over which port, what never leaves."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from fl_client.connection import proxy_of
from fl_client.credentials import Coordinator
from fl_client.flower_private import AHEAD_S, BEHIND_S, OTHER_APIS
from fl_client.leaves import LEAVES
from fl_client.site import SiteFile, cache_folder_of, read_site_file, require_name
from icmoe.errors import Fault, IcmoeError
from icmoe.joining import split_address

SHEET = """\
# IT sheet: {site}

This machine takes part in training a segmentation model between hospitals. Images stay here; trained numbers leave.

## Network

| from | to | port | protocol |
| --- | --- | --- | --- |
| this machine | {host} | TCP {port}, outbound only | HTTPS (TLS 1.2 or newer), POST to /v1/fleet/* |
| this machine | your DNS and NTP servers | as usual | DNS, NTP |

* It asks for work every few seconds and sends updates in pieces of up to 5 MiB.
* `check`, which also runs before each start, asks once for
  {others}.
  The coordinator must refuse them with 404; whoever drops them on the way changes nothing.
* The clock may be at most {ahead_s} s ahead of the coordinator's and {behind_s} s behind it.
* No inbound port. Nothing on this machine listens to the network; Flower's own local port is on 127.0.0.1.
* Outbound proxy: {proxy}. It is taken from HTTPS_PROXY; NO_PROXY must name 127.0.0.1 and localhost.
* TLS inspection must exempt {host}: the server is recognised by the consortium's own CA ({ca}).
* Nothing is downloaded or installed while it runs; telemetry of the libraries is switched off.

## On this machine

| what | where | who may read |
| --- | --- | --- |
| site file | {path} | the service's user |
| private key of this site; made here, never leaves | {key} | the service's user only (0600) |
| images, read only | {data} | the service's user |
| features of images: patient data | {cache} | the service's user only; delete with the images |
| state between rounds: patient data | {state} | the service's user only |

The service needs no administrator's rights. Lost or copied key: tell the coordinator, who revokes it within half a minute.

## What leaves

{leaves}.

## What never leaves

Images, masks, features, routing maps, optimiser state; names, numbers, dates or any text of patients and files; the private
key; the text of errors and logs.

## Looking at it

    fl_client --site {site} check          # every fault at once, with its remedy
    fl_client --site {site} check --json   # the same for a monitoring system; exit code 1 on a fault
"""


def sheet(path: Path, site: str) -> str:
    """Return the sheet of a site, Markdown.

    Parameters
    ----------
    path
        The site file.
    site
        Name that the command gives; must be the file's.

    Raises
    ------
    IcmoeError
        201-205 for the site file, 203 where it has no section [coordinator], 210 where it is another site's.
    """
    path = path.absolute()
    settings = read_site_file(path)
    require_name(path, settings, site)
    if settings.coordinator is None:
        raise IcmoeError(Fault(number=203, where=str(path), value="[coordinator]", did="Nothing was printed."))
    leaves = fill(LEAVES[0].upper() + LEAVES[1:], width=120)
    return SHEET.format(site=site, path=path, leaves=leaves, **_network(path, settings.coordinator), **_folders(path, settings))


def _network(path: Path, chosen: Coordinator) -> dict[str, str]:
    host, port = split_address(chosen.address)
    found = proxy_of(host)
    proxy = f"{found[0]}:{found[1]}, by CONNECT" if found else "none is set"
    files = {"ca": str(path.parent / chosen.ca), "key": str(path.parent / chosen.key)}
    others = ", ".join(f"{method} {path}" for method, path in OTHER_APIS)
    seconds = {"ahead_s": str(AHEAD_S), "behind_s": str(BEHIND_S)}
    return {"host": host, "port": str(port), "proxy": proxy, "others": others, **seconds, **files}


def _folders(path: Path, settings: SiteFile) -> dict[str, str]:
    folder = settings.ingest.folder if settings.ingest is not None else str(settings.data)
    cache = cache_folder_of(path, settings)
    return {"data": str(path.parent / folder), "cache": str(cache), "state": str(path.parent / settings.state)}
