"""A hospital that lies: on its path, this module changes what its honest ClientApp sends, in the rounds that a file names.

Python imports it by its name when a process starts; it acts in Flower's `flwr-clientapp` alone. Everything of the product
runs as it is, its own audit log too: the update is changed after it left `fl_client/egress.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SCHEDULE = "ICMOE_CHAOS_POISON"
ABSENT, REPLAY = "absent", "replay"

if SCHEDULE in os.environ and any(word.endswith("flwr-clientapp") for word in sys.orig_argv):
    from flwr.app import Array, ArrayRecord, Context, Error, Message
    from flwr.clientapp import ClientApp
    from poisons import changed

    from icmoe.messages import CONFIG, ROUND_KEY, UPDATE
    from icmoe.packing import pack_records, unpack_records

    _honest = ClientApp.__call__
    _path = Path(os.environ[SCHEDULE])

    def _sent_before(update: ArrayRecord) -> ArrayRecord:
        """Return the first update that passed here, which this one is where there was none."""
        kept = _path.with_suffix(".npz")
        import numpy as np

        if not kept.exists():
            np.savez(kept, **{name: array.numpy() for name, array in update.items()})
        with np.load(kept, allow_pickle=False) as file:
            return ArrayRecord({name: Array(file[name]) for name in file.files})

    def _tampered(self: ClientApp, message: Message, context: Context) -> Message:
        reply = _honest(self, message, context)
        if message.metadata.message_type != "train" or reply.has_error():
            return reply
        kind = json.loads(_path.read_text()).get(str(message.content[CONFIG][ROUND_KEY]))
        if kind == ABSENT:
            return Message(Error(1304, "ICM304 the site stays away"), reply_to=message)
        unpack_records(reply.content)
        earlier = _sent_before(reply.content[UPDATE])
        if kind == REPLAY:
            reply.content[UPDATE] = earlier
        elif kind:
            changed(reply, kind)
        pack_records(reply.content, ArrayRecord, Array)
        return reply

    ClientApp.__call__ = _tampered
