"""From records to series: which frames are decoded with which masks, in which order, and what is left out before that."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from icmoe.data.ingest.geometry import height_mm, normal, parallel, slice_distance_mm, upright
from icmoe.data.ingest.index import LeftOut
from icmoe.data.ingest.jobs import SeriesJob, Wanted
from icmoe.data.ingest.pairing import Key, Use, is_image, pair
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import RECIPE_VERSION, FileRecord, FramePlace, Plane
from icmoe.data.ingest.refusals import Refusal
from icmoe.data.ingest.walking import case, stem
from icmoe.study import Label


@dataclass(slots=True)
class Plan:
    """What there is to decode.

    Parameters
    ----------
    jobs
        By series, with the fingerprint of all that goes into its result.
    patients
        By series.
    modalities
        By series.
    planes
        By series, in the order of its frames.
    left_out
        What is not decoded at all.
    """

    jobs: dict[str, tuple[str, SeriesJob]] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    modalities: dict[str, str] = field(default_factory=dict)
    planes: dict[str, list[Plane | None]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Site:
    """What planning needs to know of the site.

    Parameters
    ----------
    root, store
        Export and the folder of the index.
    hashes
        Of the site.
    labels
        Classes of the study.
    allow
        Series that somebody found free of burned-in text.
    forgotten
        Patients that are not read.
    """

    root: Path
    store: Path
    hashes: Pseudonyms
    labels: tuple[Label, ...]
    allow: Collection[str]
    forgotten: Collection[str]


def plan(files: Mapping[str, FileRecord], marks: Mapping[str, str], site: Site) -> Plan:
    """Return what there is to decode.

    Parameters
    ----------
    files
        Records by path below the export.
    marks
        Keyed hash, size and time of change of each file as one text.
    site
        Where and for whom.
    """
    made, files = Plan(), _with_case_owners(files, site.hashes)
    pairing = pair(files)
    grouped: dict[str, list[tuple[str, FileRecord]]] = {}
    for path, record in files.items():
        refusal = pairing.refusals.get(path)
        number, why = (refusal.number, refusal.why) if refusal else (record.fault, record.why)
        if number:
            made.left_out.append(LeftOut(subject=f"F-{site.hashes.of('file', path)}", number=number, why=why))
        elif is_image(record):
            grouped.setdefault(f"S-{record.series}", []).append((path, record))
    for series, members in sorted(grouped.items()):
        _series(series, members, marks, site, pairing.uses, made)
    return made


def _with_case_owners(files: Mapping[str, FileRecord], hashes: Pseudonyms) -> dict[str, FileRecord]:
    """Return records in which the channels of one case (case_0000, case_0001) are one patient, named like their mask."""
    volumes = {path: record for path, record in files.items() if record.kind == "volume"}
    cases = {stem(path) for path in volumes}
    channels = {
        path: record.model_copy(update={"patient": hashes.patient(case(path))})
        for path, record in volumes.items()
        if stem(path) != case(path) in cases and record.patient == hashes.patient(stem(path))
    }
    return {**files, **channels}


def _series(
    series: str,
    members: list[tuple[str, FileRecord]],
    marks: Mapping[str, str],
    site: Site,
    uses: Mapping[Key, list[Use]],
    made: Plan,
) -> None:
    patients = {record.patient for _, record in members}
    owner = patients.pop() if len(patients) == 1 else ""
    held = next((record.held for _, record in members if record.held), "")
    fault = _whole(owner, held if series not in site.allow else "", site)
    total = sum(len(record.frames) for _, record in members)
    if fault:
        made.left_out.append(
            LeftOut(subject=series, number=fault.number, why=fault.why, patient=owner, series=series, frames=total)
        )
        return
    frames = [(path, n, place) for path, record in members for n, place in enumerate(record.frames) if (path, n) in uses]
    paths = {path for path, _, _ in frames}
    taken = {record.image for path, record in members if path in paths} - {""}
    copies = sum(len(record.frames) for path, record in members if path not in paths and record.image in taken)
    gaps = (Refusal(125, "a copy of it is used"), copies), (Refusal(124, "no mask speaks of it"), total - len(frames) - copies)
    made.left_out += [
        LeftOut(subject=series, number=gap.number, why=gap.why, patient=owner, series=series, frames=count)
        for gap, count in gaps
        if count
    ]
    if not frames:
        return
    frames = ordered(frames)
    involved = sorted({path for path, _, _ in frames} | {use.path for path, n, _ in frames for use in uses[path, n]})
    said = [f"{path}#{n}:{[(use.form, marks[use.path], _meant(use)) for use in uses[path, n]]}" for path, n, _ in frames]
    text = "\n".join([RECIPE_VERSION, series, *(marks[path] for path in involved), *said])
    mark = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    plain = {path: (record.plain, record.pixels_at) for path, record in members}
    wanted = tuple(
        Wanted(path, n, place.plane, tuple(uses[path, n]), site.hashes.of("frame", f"{mark}\0{path}\0{n}"), plain[path])
        for path, n, place in frames
    )
    kinds = {path: record.kind for path, record in members}
    made.jobs[series] = (mark, SeriesJob(series, site.root, site.store, site.labels, kinds, wanted))
    made.patients[series], made.modalities[series] = owner, members[0][1].modality
    made.planes[series] = [place.plane for _, _, place in frames]


def _meant(use: Use) -> list[tuple[int, int, int]]:
    """Return which part of a mask counts as which class: the site's names for the classes may change where no file does."""
    return [(patch.number, patch.value, patch.label) for patch in use.patches]


def _whole(owner: str, held: str, site: Site) -> Refusal | None:
    """Return why no frame of a series may be used."""
    if not owner:
        return Refusal(117, "its files name no patient, or several")
    if owner in site.forgotten:
        return Refusal(132, "its patient was forgotten on request")
    return Refusal(126, held) if held else None


def ordered(frames: list[tuple[str, int, FramePlace]]) -> list[tuple[str, int, FramePlace]]:
    """Return frames along the normal of their planes, then in time; without known planes in the order of acquisition."""
    first = next((place.plane for _, _, place in frames if place.plane is not None), None)

    def key(frame: tuple[str, int, FramePlace]) -> tuple[object, ...]:
        path, number, place = frame
        plane = place.plane
        if first is None or plane is None:
            return (1, 0.0, place.order, path, number)
        group = 0 if parallel(first, plane) else 1
        sign = 1.0 if _points_up(first) else -1.0
        return (group, round(sign * height_mm((*plane[:3], *first[3:11])), 2), place.order, path, number)

    return sorted(frames, key=key)


def _points_up(plane: Plane) -> bool:
    """Return whether the normal points along its main body axis, so that the order does not hang on how rows run."""
    return max(normal(plane), key=abs) > 0.0


def spacing_of(planes: list[Plane | None]) -> tuple[float, float, float] | None:
    """Return the distances of slices, rows and columns of a series turned upright, None where they are not regular."""
    distance, first = slice_distance_mm(planes), planes[0]
    if distance is None or first is None or not first[9]:
        return None
    rows, columns = (first[10], first[9]) if upright(first).transpose else (first[9], first[10])
    return (distance, rows, columns)
