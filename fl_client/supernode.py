"""Flower's SuperNode as a child of `fl_client`: held to the installed package, gone when its parent is.

`python -m fl_client.supernode PARENT FLAGS...`, with the process number of the parent and the flags of
`flower-supernode`; the environment names the site file.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fl_client.connection import is_refused
from fl_client.credentials import read_node_key
from fl_client.flower_private import run_supernode
from fl_client.own_lines import tag_own_lines
from fl_client.site import read_site_file, site_file_of_environment
from fl_client.supervisor import KEY_NOT_KNOWN, SUPEREXEC_GONE
from fl_client.watchdog import CONNECTION_ENDED, end_with_child, end_with_parent, leave
from icmoe.bundle import NAME, PUBLISHER, VERSION, bundle_files
from icmoe.errors import IcmoeError, faults_of

log = logging.getLogger("fl_client")


def main(arguments: Sequence[str]) -> None:
    """Run the SuperNode until it ends, and this process with it.

    Parameters
    ----------
    arguments
        Process number of the parent, then flags of `flower-supernode`.
    """
    tag_own_lines()
    parent, *flags = arguments
    end_with_parent(int(parent))
    gone = end_with_child("flower-superexec")  # what starts the ClientApps; Flower would stay connected and never answer
    try:
        _run(flags)
        code: object = CONNECTION_ENDED
    except SystemExit as end:
        code = end.code
    except (IcmoeError, OSError) as error:
        log.error("%s", "\n".join(map(str, faults_of(error))))
        code = 1
    except Exception:
        log.exception("Flower's SuperNode failed")
        code = 1
    leave(SUPEREXEC_GONE if gone.is_set() else code)


def _run(flags: Sequence[str]) -> None:
    path = site_file_of_environment()
    chosen = read_site_file(path).coordinator
    # Flower's own refusal is the same for a key that is not known and for a last connection that has not run out.
    if chosen and is_refused(chosen.address, path.parent / chosen.ca, read_node_key(path.parent / chosen.key)):
        sys.exit(KEY_NOT_KNOWN)
    home = Path(os.environ["FLWR_HOME"])
    shutil.rmtree(home / "apps", ignore_errors=True)  # Flower would run what lies there without another look
    run_supernode(bundle_files(), f"{PUBLISHER}/{NAME}", VERSION, home, flags)


if __name__ == "__main__":
    main(sys.argv[1:])
