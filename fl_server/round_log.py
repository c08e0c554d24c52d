"""The records of a study's rounds: the last one in memory, the settled ones in a file that only grows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

from icmoe.atomic import regular

RoundRecord = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settled:
    """How much of the file belongs to a commit.

    Parameters
    ----------
    rounds
        Records.
    size_bytes
        Of these records' lines.
    sha256
        Of these bytes.
    """

    rounds: int
    size_bytes: int
    sha256: str


class RoundLog(Sequence[RoundRecord]):
    """Records by round, first to last; memory holds the last ones alone, whose scores may still come.

    A study of many sites and rounds has records of many megabytes. They are written once, as lines of JSON, instead of with
    each commit, and are read from the file where they are asked for.
    """

    def __init__(self, records: Sequence[RoundRecord] = ()) -> None:
        self._path: Path | None = None
        self._settled, self._size_bytes, self._sha = 0, 0, hashlib.sha256()
        self._fresh = list(records)

    def append(self, record: RoundRecord) -> None:
        """Add the record of a round."""
        self._fresh.append(record)

    def settle(self, path: Path) -> tuple[Settled, list[RoundRecord]]:
        """Write all records but the last to the file, and return what it holds now, and the last.

        What stands in the file beyond this log, left by a commit that was never finished, is cut off. Nothing that an
        earlier commit refers to is written again.
        """
        if self._path != path:
            self._fresh = list(self)
            self._path, self._settled, self._size_bytes, self._sha = path, 0, 0, hashlib.sha256()
        done, last = self._fresh[:-1], self._fresh[-1:]
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in done)
        if lines or not path.exists() or path.stat().st_size != self._size_bytes:
            _write_at(path, self._size_bytes, lines)
        self._sha.update(lines)
        self._settled, self._size_bytes, self._fresh = self._settled + len(done), self._size_bytes + len(lines), last
        return Settled(self._settled, self._size_bytes, self._sha.hexdigest()), list(last)

    @staticmethod
    def opened(path: Path, settled: Mapping[str, Any], last: Sequence[RoundRecord]) -> RoundLog:
        """Return the log of a commit.

        Raises
        ------
        OSError, ValueError, KeyError, TypeError
            Where the file is not what the commit left there.
        """
        log, wanted = RoundLog(last), Settled(**settled)
        log._path, log._settled, log._size_bytes = path, wanted.rounds, wanted.size_bytes
        for line in log._lines():
            log._sha.update(line)
        if log._sha.hexdigest() != wanted.sha256:
            raise ValueError(f"{path.name}: its digest differs")
        return log

    def _lines(self) -> Iterator[bytes]:
        if self._path is None or not self._size_bytes:
            return
        with open(self._path, "rb", opener=regular) as file:
            left = self._size_bytes
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                yield line

    def __iter__(self) -> Iterator[RoundRecord]:
        """Yield every record; those in the file are new objects each time."""
        yield from self._from(0)

    def _from(self, start: int) -> Iterator[RoundRecord]:
        if start < self._settled:
            for line in islice(self._lines(), start, None):
                yield json.loads(line)
        yield from self._fresh[max(0, start - self._settled) :]

    def __len__(self) -> int:
        return self._settled + len(self._fresh)

    @overload
    def __getitem__(self, index: int) -> RoundRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[RoundRecord]: ...

    def __getitem__(self, index: int | slice) -> RoundRecord | list[RoundRecord]:
        """Return one record, or those of a slice; what is in the file is read for it."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return list(islice(self._from(start), 0, max(0, stop - start), step)) if step > 0 else list(self)[index]
        at = range(len(self))[index]
        return next(self._from(at))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _write_at(path: Path, offset_bytes: int, lines: bytes) -> None:
    """Let the file end with these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "r+b" if path.exists() else "wb", opener=regular) as file:
            file.truncate(offset_bytes)
            file.seek(offset_bytes)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def last_score(history: Sequence[RoundRecord]) -> float | None:
    """Return the validation Dice of the last round that has one."""
    found = None
    for record in history:
        found = found if record["val_dice"] is None else record["val_dice"]
    return found
