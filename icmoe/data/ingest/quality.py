"""What a site's data are like, before any training: per series and per reason, for people of the site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icmoe.data.ingest import index
from icmoe.data.ingest.index import FrameRow, LeftOut
from icmoe.errors import Fault
from icmoe.study import Label


def quality_record(store: Path, labels: Sequence[Label]) -> dict[str, Any]:
    """Return found and used images, reasons, intensities, spacing and label volumes as plain values.

    Parameters
    ----------
    store
        Folder of the index.
    labels
        Classes of the study.
    """
    rows, out = index.published(store)
    series = sorted({row.series for row in rows} | {item.series for item in out if item.series})
    return {
        "found": len(rows) + sum(item.frames for item in out if item.series),
        "used": len(rows),
        "patients": len({row.patient for row in rows}),
        "labels": [label.name for label in labels],
        "series": [_series(name, [r for r in rows if r.series == name], [i for i in out if i.series == name]) for name in series],
        "reasons": _reasons(out),
    }


def _series(name: str, rows: list[FrameRow], out: list[LeftOut]) -> dict[str, Any]:
    first = rows[0] if rows else None
    pixels = np.sum([row.result.class_px for row in rows], axis=0).tolist() if rows else []
    spacing = first.spacing if first else None
    return {
        "series": name,
        "patient": first.patient if first else next((item.patient for item in out if item.patient), ""),
        "split": first.split if first else "",
        "modality": first.modality if first else "",
        "used": len(rows),
        "left_out": sum(item.frames for item in out),
        "with_label": sum(any(row.result.class_px[1:]) for row in rows),
        "class_px": pixels,
        "class_ml": [value * spacing[0] * spacing[1] * spacing[2] / 1000.0 for value in pixels] if spacing else None,
        "spacing_mm": spacing,
        "window": (first.result.low, first.result.high) if first else None,
        "mean": float(np.mean([row.result.mean for row in rows])) if rows else None,
        "reasons": [{"number": item.number, "why": item.why, "frames": item.frames} for item in out],
    }


def _reasons(out: Sequence[LeftOut]) -> list[dict[str, Any]]:
    counts: dict[tuple[int, str], int] = {}
    for item in out:
        counts[item.number, item.why] = counts.get((item.number, item.why), 0) + item.frames
    return [
        {"number": number, "frames": frames, "sentence": str(Fault(number=number, what=why))}
        for (number, why), frames in sorted(counts.items())
    ]
