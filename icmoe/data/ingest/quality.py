"""What a site's data are like, before any training: per patient, series, split and reason, for people of the site.

The index is gone through frame by frame; what is held in memory grows with the series, as the record itself does.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icmoe.data.ingest import index
from icmoe.data.ingest.index import FrameRow
from icmoe.data.splits import SPLITS
from icmoe.errors import CATALOGUE, Fault
from icmoe.study import Label

Values = dict[str, Any]
"""Plain values, as JSON gives them back; of a patient only keyed hashes and technical fields."""
LEFT_OUT = """with missed as (select place, json_extract(record, '$.series') series,
    json_extract(record, '$.patient') patient, json_extract(record, '$.number') number,
    json_extract(record, '$.why') why, json_extract(record, '$.frames') frames from left_out) """
MISSED = """select series, number, why, sum(frames) from missed where series <> ''
    group by series, number, why order by series, number, why"""
SET_ASIDE = "select count(*) from missed where series = ''"
OWNERS = "select series, patient, min(place) from missed where series <> '' and patient <> '' group by series"
REASONS = """select series <> '' of_series, number, why, sum(frames) from missed
    group by of_series, number, why order by of_series desc, number, why"""


def quality_record(store: Path, labels: Sequence[Label]) -> Values:
    """Return found and used images, reasons, intensities, spacing, label volumes and label rates as plain values.

    Parameters
    ----------
    store
        Folder of the index.
    labels
        Classes of the study.
    """
    names = [label.name for label in labels]
    sums = {split: _Sums(len(names)) for split in SPLITS}
    with index.opened(store) as connection:
        missed = _missed(connection)
        used = [_used(count, rows, missed, sums) for count, rows in index.rows_by_series(connection)]
        reasons = _reasons(connection)
        set_aside = connection.execute(LEFT_OUT + SET_ASIDE).fetchone()[0]
    series = sorted([*used, *map(_not_used, missed.values())], key=lambda item: str(item["series"]))
    site = _Sums.of(sums.values(), len(names))
    return {
        "found": sum(item["found"] for item in series),
        "used": site.images,
        "patients": len(site.patients),
        "files_set_aside": set_aside,
        "labels": names,
        "splits": {split: found.counts() for split, found in sums.items()},
        "label_rates": {"site": site.rates(names)} | {split: found.rates(names) for split, found in sums.items()},
        "per_patient": _patients(series),
        "series": series,
        "reasons": reasons,
    }


class _Sums:
    """What is said of a split, frame by frame."""

    def __init__(self, classes: int) -> None:
        self.images, self.patients, self.series = 0, set[str](), set[str]()
        self._showing, self._pixels = [0] * classes, [0] * classes

    @classmethod
    def of(cls, parts: Iterable[_Sums], classes: int) -> _Sums:
        """Return the sums of several splits together."""
        whole = cls(classes)
        for part in parts:
            whole.images += part.images
            whole.patients |= part.patients
            whole.series |= part.series
            whole._showing = _added(whole._showing, part._showing)
            whole._pixels = _added(whole._pixels, part._pixels)
        return whole

    def add(self, row: FrameRow) -> None:
        """Take in a frame."""
        self.images += 1
        self.patients.add(row.patient)
        self.series.add(row.series)
        self._showing = _added(self._showing, [pixels > 0 for pixels in row.result.class_px])
        self._pixels = _added(self._pixels, row.result.class_px)

    def counts(self) -> Values:
        """Return patients, series and images."""
        return {"patients": len(self.patients), "series": len(self.series), "images": self.images}

    def rates(self, names: Sequence[str]) -> list[Values]:
        """Return for each class how many images show it and how many pixels it takes; shares are None without images."""
        return [
            {
                "label": name,
                "images": self._showing[place],
                "images_share": self._showing[place] / self.images if self.images else None,
                "pixels": self._pixels[place],
                "pixels_share": self._pixels[place] / sum(self._pixels) if self.images else None,
            }
            for place, name in enumerate(names)
        ]


def _added(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _used(count: int, rows: Iterable[FrameRow], missed: dict[str, Values], sums: Mapping[str, _Sums]) -> Values:
    """Return what is said of a series, with what is missed of it, which is then taken off the list; frames go one by one."""
    means, pixels, with_label = array("d"), list[int](), 0
    first: FrameRow | None = None
    shown, best = "", (-1, False)
    for place, row in enumerate(rows):
        first, labelled = first or row, sum(row.result.class_px[1:])
        sums[row.split].add(row)
        means.append(row.result.mean)
        pixels = _added(pixels or [0] * len(row.result.class_px), row.result.class_px)
        with_label += any(row.result.class_px[1:])
        if (labelled, place == count // 2) > best:  # the frame with most label, the middle one where none has any
            shown, best = row.result.entry, (labelled, place == count // 2)
    assert first is not None
    spacing = first.spacing
    out = missed.pop(first.series, {"left_out": 0, "reasons": []})
    return {
        "series": first.series,
        "patient": first.patient,
        "split": first.split,
        "modality": first.modality,
        "found": count + out["left_out"],
        "used": count,
        "left_out": out["left_out"],
        "with_label": with_label,
        "class_px": pixels,
        "class_ml": [value * float(np.prod(spacing)) / 1000.0 for value in pixels] if spacing else None,
        "spacing_mm": list(spacing) if spacing else None,
        "window": [first.result.low, first.result.high],
        "mean": float(np.mean(means)),
        "shown": shown,
        "reasons": out["reasons"],
    }


def _not_used(out: Values) -> Values:
    """Return what is said of a series of which nothing is used."""
    found = {"patient": out["patient"], "split": "", "modality": "", "found": out["left_out"], "used": 0}
    sizes = {"left_out": out["left_out"], "with_label": 0, "class_px": [], "class_ml": None, "spacing_mm": None}
    return {"series": out["series"], **found, **sizes, "window": None, "mean": None, "shown": "", "reasons": out["reasons"]}


def _missed(connection: sqlite3.Connection) -> dict[str, Values]:
    """Return what is left out of each series, with the first patient that is named and the reasons in order."""
    missed: dict[str, Values] = {}
    for series, number, why, frames in connection.execute(LEFT_OUT + MISSED):
        item = missed.setdefault(series, {"series": series, "patient": "", "left_out": 0, "reasons": []})
        item["left_out"] += frames
        item["reasons"].append({"number": number, "why": why, "frames": frames})
    for series, patient, _ in connection.execute(LEFT_OUT + OWNERS):
        missed[series]["patient"] = patient
    return missed


def _patients(series: Sequence[Values]) -> list[Values]:
    groups: dict[str, list[Values]] = {}
    for item in series:
        groups.setdefault(str(item["patient"]), []).append(item)
    sums = ("found", "used", "left_out", "with_label")
    return [
        {
            "patient": patient,
            "split": next((item["split"] for item in group if item["split"]), ""),
            "series": len(group),
            **{key: sum(item[key] for item in group) for key in sums},
        }
        for patient, group in sorted(groups.items())
    ]


def _reasons(connection: sqlite3.Connection) -> list[Values]:
    """Return the reasons, `frames` being images of series, or files where `of` says so, with what to do about them."""
    return [
        {
            "number": number,
            "why": why,
            "frames": frames,
            "of": "images" if of_series else "files",
            "title": CATALOGUE[number].title,
            "remedy": CATALOGUE[number].remedy,
            "sentence": str(Fault(number=number, what=why)),
        }
        for of_series, number, why, frames in connection.execute(LEFT_OUT + REASONS)
    ]
