"""From records to series: which frames are decoded with which masks, in which order, and what is left out before that."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from icmoe.data.ingest.catalogue import Catalogue, Key, Use
from icmoe.data.ingest.folding import counted
from icmoe.data.ingest.geometry import height_mm, is_one_grid, normal, parallel, slice_distance_mm, upright
from icmoe.data.ingest.index import LeftOut
from icmoe.data.ingest.jobs import SeriesJob, Wanted, file_state
from icmoe.data.ingest.persons import UNDECIDED
from icmoe.data.ingest.pseudonyms import Pseudonyms
from icmoe.data.ingest.records import RECIPE_VERSION, FileRecord, FramePlace, Plane, whose
from icmoe.data.ingest.refusals import Refusal
from icmoe.study import Label


@dataclass(frozen=True, slots=True)
class Planned:
    """A series to decode.

    Parameters
    ----------
    mark
        Fingerprint of all that goes into its result.
    patient, number
        Whose it is, and the hash of the bare number where its issuer is named.
    study
        Keyed hash of the study, empty where no file names it.
    modality
        Of its first file.
    planes
        In the order of its frames.
    job
        What is decoded.
    """

    mark: str
    patient: str
    number: str
    study: str
    modality: str
    planes: tuple[Plane | None, ...]
    job: SeriesJob


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


def plan(files: Catalogue, site: Site) -> Iterator[Planned | LeftOut]:
    """Yield what there is to decode series by series, and what is left out before that.

    Parameters
    ----------
    files
        With what masks say about frames.
    site
        Where and for whom.
    """
    yield from files.set_aside()
    for series in files.series():
        yield from _series(f"S-{series}", [(path, files.record(path)) for path in files.images("series", series)], files, site)


def _series(series: str, members: list[tuple[str, FileRecord]], files: Catalogue, site: Site) -> Iterator[Planned | LeftOut]:
    patients = {whose(record) for _, record in members}
    owner, first = patients.pop() if len(patients) == 1 else "", members[0][1]
    held = next((record.held for _, record in members if record.held), "")
    names = {owner, first.number, *(name for _, record in members for name in (record.patient, *record.others))}
    fault = _whole(owner, names, held if series not in site.allow else "", site)
    owner = owner.replace(UNDECIDED, "")
    total = sum(len(record.frames) for _, record in members)
    if fault:
        yield LeftOut(subject=series, number=fault.number, why=fault.why, patient=owner, series=series, frames=total)
        return
    uses = {key: listed for path, _ in members for key, listed in files.uses(path).items()}
    frames = [(path, n, place) for path, record in members for n, place in enumerate(record.frames) if (path, n) in uses]
    paths = {path for path, _, _ in frames}
    taken = {record.image for path, record in members if path in paths} - {""}
    copies = sum(len(record.frames) for path, record in members if path not in paths and record.image in taken)
    gaps = (Refusal(125, "a copy of it is used"), copies), (Refusal(124, "no mask speaks of it"), total - len(frames) - copies)
    for gap, count in gaps:
        if count:
            yield LeftOut(subject=series, number=gap.number, why=gap.why, patient=owner, series=series, frames=count)
    if frames:
        frames = ordered(frames)
        mark, job = _job(series, frames, dict(members), uses, files, site)
        yield Planned(mark, owner, first.number, first.study, first.modality, tuple(place.plane for _, _, place in frames), job)


def _job(
    series: str,
    frames: Sequence[tuple[str, int, FramePlace]],
    members: Mapping[str, FileRecord],
    uses: Mapping[Key, list[Use]],
    files: Catalogue,
    site: Site,
) -> tuple[str, SeriesJob]:
    named = {path: members[path].image for path, _, _ in frames if members[path].image}
    copies = {path: tuple(other for other in files.images("uid", uid) if other != path) for path, uid in named.items()}
    masks = {use.path for path, n, _ in frames for use in uses[path, n]}
    involved = sorted({path for path, _, _ in frames}.union(masks, *copies.values()))
    said = [f"{path}#{n}:{[(use.form, files.mark(use.path), _meant(use)) for use in uses[path, n]]}" for path, n, _ in frames]
    text = "\n".join([RECIPE_VERSION, series, *map(files.mark, involved), *said])
    mark = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    plain = {path: (record.plain, record.pixels_at) for path, record in members.items()}
    wanted = tuple(
        Wanted(
            path,
            n,
            place.plane,
            tuple(uses[path, n]),
            site.hashes.of("frame", f"{mark}\0{path}\0{n}"),
            plain[path],
            copies.get(path, ()),
        )
        for path, n, place in frames
    )
    kinds = {path: record.kind for path, record in members.items()}
    states = tuple((path, file_state(*files.state(path)[1:])) for path in involved)
    return mark, SeriesJob(series, site.root, site.store, site.labels, kinds, wanted, states)


def _meant(use: Use) -> list[tuple[int, int, int, int]]:
    """Return which part of a mask counts as which class: the site's names for the classes may change where no file does."""
    return [(patch.number, patch.value, patch.label, patch.group) for patch in use.patches]


def _whole(owner: str, names: set[str], held: str, site: Site) -> Refusal | None:
    """Return why no frame of a series may be used; `names` are all those of its patient."""
    if not owner:
        return Refusal(117, "its files name no patient, or several")
    if owner == UNDECIDED:
        return Refusal(127, "its folders may be a patient's each or series of one; patient_pattern under [ingest] can tell")
    if names.intersection(site.forgotten):
        return Refusal(132, "its patient was forgotten on request")
    return Refusal(126, held) if held else None


def ordered(frames: list[tuple[str, int, FramePlace]]) -> list[tuple[str, int, FramePlace]]:
    """Return frames along the normal of their planes, then in time; without known planes in the order of acquisition.

    Pictures know neither: they lie in the order in which people number files.
    """
    first = next((place.plane for _, _, place in frames if place.plane is not None), None)

    def key(frame: tuple[str, int, FramePlace]) -> tuple[object, ...]:
        path, number, place = frame
        plane = place.plane
        if first is None or plane is None:
            return (1, 0.0, place.order, counted(path), path, number)
        group = 0 if parallel(first, plane) else 1
        sign = 1.0 if _points_up(first) else -1.0
        return (group, round(sign * height_mm((*plane[:3], *first[3:11])), 2), place.order, counted(path), path, number)

    return sorted(frames, key=key)


def _points_up(plane: Plane) -> bool:
    """Return whether the normal points along its main body axis, so that the order does not hang on how rows run."""
    return max(normal(plane), key=abs) > 0.0


def spacing_of(planes: Sequence[Plane | None]) -> tuple[float, float, float] | None:
    """Return the distances of slices, rows and columns of a series turned upright, None where they are not regular."""
    distance, first = slice_distance_mm(planes), planes[0]
    if distance is None or first is None or not first[9] or not is_one_grid(planes):
        return None
    rows, columns = (first[10], first[9]) if upright(first).transpose else (first[9], first[10])
    return (distance, rows, columns)
