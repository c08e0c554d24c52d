"""What a site's data are like, before any training: per patient, series, split and reason, for people of the site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from icmoe.data.ingest import index
from icmoe.data.ingest.index import FrameRow, LeftOut
from icmoe.data.ingest.run import SPLITS
from icmoe.errors import CATALOGUE, Fault
from icmoe.study import Label

Values = dict[str, Any]
"""Plain values, as JSON gives them back; of a patient only keyed hashes and technical fields."""
Item = TypeVar("Item")


def quality_record(store: Path, labels: Sequence[Label]) -> Values:
    """Return found and used images, reasons, intensities, spacing, label volumes and label rates as plain values.

    Parameters
    ----------
    store
        Folder of the index.
    labels
        Classes of the study.
    """
    rows, out = index.published(store)
    names = [label.name for label in labels]
    used = _grouped(rows, lambda row: row.series)
    missed = _grouped((item for item in out if item.series), lambda item: item.series)
    series = [_series(name, used.get(name, []), missed.get(name, [])) for name in sorted(used.keys() | missed.keys())]
    by_split = {split: [row for row in rows if row.split == split] for split in SPLITS}
    return {
        "found": sum(item["found"] for item in series),
        "used": len(rows),
        "patients": len({row.patient for row in rows}),
        "files_set_aside": sum(not item.series for item in out),
        "labels": names,
        "splits": {split: _counts(chosen) for split, chosen in by_split.items()},
        "label_rates": {"site": _rates(rows, names)} | {split: _rates(chosen, names) for split, chosen in by_split.items()},
        "per_patient": _patients(series),
        "series": series,
        "reasons": _reasons(out),
    }


def _grouped(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _series(name: str, rows: Sequence[FrameRow], out: Sequence[LeftOut]) -> Values:
    first = rows[0] if rows else None
    left_out = sum(item.frames for item in out)
    pixels = _class_px(rows) if rows else []
    spacing = first.spacing if first else None
    return {
        "series": name,
        "patient": first.patient if first else next((item.patient for item in out if item.patient), ""),
        "split": first.split if first else "",
        "modality": first.modality if first else "",
        "found": len(rows) + left_out,
        "used": len(rows),
        "left_out": left_out,
        "with_label": sum(any(row.result.class_px[1:]) for row in rows),
        "class_px": pixels,
        "class_ml": [value * float(np.prod(spacing)) / 1000.0 for value in pixels] if spacing else None,
        "spacing_mm": list(spacing) if spacing else None,
        "window": [first.result.low, first.result.high] if first else None,
        "mean": float(np.mean([row.result.mean for row in rows])) if rows else None,
        "shown": _most_labelled(rows).result.entry if rows else "",
        "reasons": _counted(out),
    }


def _most_labelled(rows: Sequence[FrameRow]) -> FrameRow:
    """Return the frame with most label, the middle one where none has any."""
    middle = len(rows) // 2
    best = max(range(len(rows)), key=lambda place: (sum(rows[place].result.class_px[1:]), place == middle))
    return rows[best]


def _patients(series: Sequence[Values]) -> list[Values]:
    groups = _grouped(series, lambda item: str(item["patient"]))
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


def _counts(rows: Sequence[FrameRow]) -> Values:
    return {
        "patients": len({row.patient for row in rows}),
        "series": len({row.series for row in rows}),
        "images": len(rows),
    }


def _rates(rows: Sequence[FrameRow], names: Sequence[str]) -> list[Values]:
    """Return for each class how many images show it and how many pixels it takes; shares are None without images."""
    pixels = _class_px(rows) if rows else [0] * len(names)
    images = [sum(row.result.class_px[place] > 0 for row in rows) for place in range(len(names))]
    return [
        {
            "label": name,
            "images": images[place],
            "images_share": images[place] / len(rows) if rows else None,
            "pixels": pixels[place],
            "pixels_share": pixels[place] / sum(pixels) if rows else None,
        }
        for place, name in enumerate(names)
    ]


def _class_px(rows: Sequence[FrameRow]) -> list[int]:
    return [int(value) for value in np.sum([row.result.class_px for row in rows], axis=0)]


def _counted(out: Iterable[LeftOut]) -> list[Values]:
    counts: dict[tuple[int, str], int] = {}
    for item in out:
        counts[item.number, item.why] = counts.get((item.number, item.why), 0) + item.frames
    return [{"number": number, "why": why, "frames": frames} for (number, why), frames in sorted(counts.items())]


def _reasons(out: Sequence[LeftOut]) -> list[Values]:
    """Return the reasons, `frames` being images of series, or files where `of` says so, with what to do about them."""
    return [
        {
            **item,
            "of": kind,
            "title": CATALOGUE[item["number"]].title,
            "remedy": CATALOGUE[item["number"]].remedy,
            "sentence": str(Fault(number=item["number"], what=item["why"])),
        }
        for kind in ("images", "files")
        for item in _counted(item for item in out if bool(item.series) == (kind == "images"))
    ]
