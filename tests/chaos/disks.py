"""A disk of few megabytes for one hospital, to be filled to its last byte."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOM = 700 * 10**6  # a hospital that has less than 0.5 GB free does not start (ICM315)
BALLAST = "ballast"
SOURCE = "icmoe-chaos-"
_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def mount_small(folder: Path, size_bytes: int) -> str:
    """Put a small tmpfs there; returns why it could not be done."""
    options = f"size={size_bytes},mode=0700".encode()
    done = _libc.mount(f"{SOURCE}{os.getpid()}".encode(), str(folder).encode(), b"tmpfs", 0, options)
    return "" if done == 0 else f"a tmpfs cannot be mounted: {os.strerror(ctypes.get_errno())}"


def unmount(folder: Path) -> None:
    _libc.umount2(str(folder).encode(), _DETACH)


def unmount_left_behind() -> None:
    """Unmount the disks of a chaos run that was killed before it could."""
    for line in Path("/proc/mounts").read_text().splitlines():
        source, folder = line.split()[:2]
        if source.startswith(SOURCE) and not Path(f"/proc/{source.removeprefix(SOURCE)}").exists():
            unmount(Path(folder))


def why_no_disks() -> str:
    with tempfile.TemporaryDirectory() as name:
        why = mount_small(Path(name), 2**20)
        if not why:
            unmount(Path(name))
        return why


@contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    if why := mount_small(folder, size_bytes):
        raise OSError(why)
    try:
        yield
    finally:
        unmount(folder)


def fill(folder: Path) -> None:
    """Leave not one byte free."""
    with (folder / BALLAST).open("ab", buffering=0) as file:
        for size in (2**22, 2**12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def make_room(folder: Path) -> None:
    (folder / BALLAST).unlink(missing_ok=True)
