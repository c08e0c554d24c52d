"""A long, bad line between two ports of this machine: each frame comes late, and some never.

`python wire.py PORT PORT DELAY_S LOSS SEED`. Linux has this as tc's netem, which this kernel may lack. Frames are taken and
given with their offload headers, so that the kernel finishes a checksum that the sender left to the device.
"""

from __future__ import annotations

import heapq
import random
import selectors
import socket
import struct
import sys
import time

SOL_PACKET, IGNORE_OUTGOING, OFFLOAD_HEADER, ALL = 263, 23, 15, 3
LONGEST = 70_000


def opened(port: str) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
    raw.setsockopt(SOL_PACKET, IGNORE_OUTGOING, struct.pack("i", 1))
    raw.setsockopt(SOL_PACKET, OFFLOAD_HEADER, struct.pack("i", 1))
    raw.bind((port, ALL))
    raw.setblocking(False)
    return raw


def carry(first: socket.socket, second: socket.socket, delay_s: float, loss: float, chance: random.Random) -> None:
    """Carry frames both ways until the process is ended."""
    other, queue, count = {first: second, second: first}, list[tuple[float, int, socket.socket, bytes]](), 0
    looks = selectors.DefaultSelector()
    for raw in other:
        looks.register(raw, selectors.EVENT_READ)
    while True:
        wait_s = max(0.0, queue[0][0] - time.monotonic()) if queue else None
        for key, _ in looks.select(wait_s):
            frame = key.fileobj.recv(LONGEST)  # type: ignore[union-attr]
            if chance.random() >= loss:
                count += 1
                heapq.heappush(queue, (time.monotonic() + delay_s, count, other[key.fileobj], frame))  # type: ignore[index]
        while queue and queue[0][0] <= time.monotonic():
            _, _, out, frame = heapq.heappop(queue)
            try:
                out.send(frame)
            except OSError:
                continue  # a port without room loses a frame, as a port does


def main() -> None:
    first, second, delay_s, loss, seed = sys.argv[1:]
    ends = opened(first), opened(second)
    print("carrying", flush=True)
    carry(*ends, float(delay_s), float(loss), random.Random(int(seed)))


if __name__ == "__main__":
    main()
