"""Masks to images: by the instances that a mask refers to; by geometry or names only where it refers to none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from icmoe.data.ingest.catalogue import Catalogue, Key, Use
from icmoe.data.ingest.folding import folded
from icmoe.data.ingest.geometry import Grid, grid_between, matrix_of, slice_distance_mm
from icmoe.data.ingest.known_images import Images
from icmoe.data.ingest.marked import of_another_organ, of_what_is_not
from icmoe.data.ingest.placing import is_across, overlaps, patch_grid, require_its_box, same_plane
from icmoe.data.ingest.records import FileRecord, Patch, Plane
from icmoe.data.ingest.references import by_reference, nearest_frames, same_patient, use_of
from icmoe.data.ingest.refusals import Refusal
from icmoe.data.ingest.walking import (
    GENERIC,
    MASK,
    SCAN,
    bare,
    called_image,
    case,
    closest,
    is_named_after,
    is_sequence,
    of_another_look,
    of_one_visit,
    own_folders,
    parted,
    stem,
)

Said = TypeVar("Said")
MANY = 3
"""Masks of one thing each from which on they are of several things; two may be two readings."""
OTHER_LOOK = "the image that it fits is of another visit, frame, side or sequence than its name or folder says"


def pair(files: Catalogue) -> None:
    """Note in the catalogue which masks belong to which frames, and which to none.

    Parameters
    ----------
    files
        Sorted.
    """
    images = Images(files)
    unnamed: dict[str, dict[Key, Use]] = {}
    for path in files.masks():
        try:
            uses = _uses(path, files.record(path), images)
            if files.record(path).unnamed:
                unnamed[path] = uses
            else:
                files.add_uses(uses)
        except Refusal as refusal:
            files.refuse(path, refusal)
    _spoil(unnamed, files)
    files.prefer()


def _spoil(unnamed: Mapping[str, Mapping[Key, Use]], files: Catalogue) -> None:
    """Let masks with values that mean no class spoil those images alone of which no other mask speaks."""
    used = {path: {key: use for key, use in uses.items() if not files.is_used(key)} for path, uses in unnamed.items()}
    for path, uses in used.items():
        if uses:
            files.add_uses(uses)
        else:
            files.refuse(path, Refusal(106, f"mask cannot be used: value {files.record(path).unnamed}"))


def _uses(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    if record.kind == "picture":
        return _by_name(path, record, images)
    if record.kind == "volume":
        return _by_grid(path, record, images)
    if record.listed or any(patch.image for patch in record.patches):
        return by_reference(path, record, images)
    return _by_space(path, record, images)


def _by_space(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    """Match by plane among the images of the same frame of reference, with the series that lies on its grid as a whole."""
    series: dict[str, dict[Key, list[tuple[Patch, Grid | None]]]] = {}
    folders, off = dict[str, str](), dict[str, Refusal]()
    for patch, target, frame in _in_plane(record, images):
        image = images[target]
        try:
            grid = patch_grid(record, patch, image, frame)
        except Refusal as refusal:  # such as the PET of a mask of the CT
            off[image.series] = refusal
            continue
        series.setdefault(image.series, {}).setdefault((target, frame), []).append((patch, grid))
        folders[image.series] = target
    if off.keys() >= folders.keys() and off:
        raise next(iter(off.values()))
    folders = {name: target for name, target in folders.items() if name not in off}
    along = {name: target for name, target in folders.items() if not _runs_across(record, series[name], images)}
    folders = along or folders  # where contours run across every series, drawing them tells
    visit = {name: target for name, target in folders.items() if record.study and images[target].study == record.study}
    best = closest(path, visit or folders)
    if not best and record.listed_series:
        raise Refusal(123, "the series that it refers to is not in the folder, or has no image in its planes")
    if not best:
        raise Refusal(123, "it refers to no image, and no image shares its frame of reference and planes")
    if len(best) > 1:
        raise Refusal(122, f"it refers to no image, and {len(best)} series share its geometry")
    same_patient(record, images, series[best[0]])
    if not record.patient and not visit:  # an anonymiser may have written one frame of reference for everybody
        _may_be_its_own(path, folders[best[0]], images)
    return {key: use_of(path, record, parts) for key, parts in _seen_once(series[best[0]], images).items()}


def _runs_across(record: FileRecord, found: Mapping[Key, list[tuple[Patch, Grid | None]]], images: Images) -> bool:
    """Return whether all contours that meet the planes of a series run across them."""
    planes = [(patch, images[path].frames[frame].plane) for (path, frame), parts in found.items() for patch, _ in parts]
    return all(plane is not None and is_across(record, patch, plane) for patch, plane in planes)


def _in_plane(record: FileRecord, images: Images) -> Iterator[tuple[Patch, str, int]]:
    """Yield the frames of the same frame of reference, of the series that it may name, on which the parts of a mask lie."""
    close: list[list[tuple[Patch, str, int]]] = [[] for _ in record.patches]
    near = images.by_space(record.space) if record.space else []
    for target in (one for one in near if not record.listed_series or images[one].series in record.listed_series):
        for frame, place in enumerate(images[target].frames):
            for patch, parts in zip(record.patches, close, strict=True):
                if place.plane is not None and patch.plane is not None and same_plane(record, patch.plane, place.plane):
                    parts.append((patch, target, frame))
    for parts in close:
        yield from nearest_frames(parts, images)


def _by_grid(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    """Match a volume of classes with the series on its grid: of its own name or patient first, then of the closest folder."""
    series = _on_grid(path, record, images)
    last = {name: max(target for target, _ in uses) for name, uses in series.items()}
    found = {name: target for name, target in last.items() if not of_another_look(path, target)}
    if last and not found:
        raise Refusal(121, OTHER_LOOK)
    fitting = _Fitting.of(path, record, found, images)
    if fitting.beside and not fitting.called and set(fitting.owned) & set(fitting.volumes):  # as a label map of the same series
        raise Refusal(122, "a volume and a DICOM series beside it lie on the grid of this volume")
    if record.single and not (record.patches or fitting.is_cases(path) or fitting.homed) and _is_another_thing(path, images):
        raise Refusal(120, "it is called like no class of the study, as masks beside it are")
    best = fitting.best(path)
    if fitting.by_place and PurePosixPath(path).parent in images.called_folders:
        raise Refusal(121, "masks beside it are called like folders or patients of images, and it is called like none")
    if len(best) > 1 and not fitting.all_channels and not _are_sequences([found[name] for name in best], images):
        raise Refusal(122, f"{len(best)} series lie on the grid of this volume, equally close by name and folder")
    fitting.require_its_own(path, record, found[best[0]], images)
    if any(_is_packed(record, series[name], images.planes(name)) for name in best):
        raise Refusal(121, "it has as many slices as its series has images, but not where these lie: packed across a gap")
    for name in best:
        require_its_box(record.shape, _grid_of(series[name]), images.extents(name), images.places(series[name]))
    if record.single:
        _require_meant(path, found[best[0]], called=record.called, whole=record.called and record.called_at == 0)
    if not (fitting.called or fitting.homed or fitting.is_patients) and _is_one_of_many(path, images):
        raise Refusal(120, "it is one of several masks of one thing each, and none is called like a class of the study")
    return {key: use for name in best for key, use in _seen_once(series[name], images).items()}


def _on_grid(path: str, record: FileRecord, images: Images) -> dict[str, dict[Key, Use]]:
    """Return the frames of each series that lie on the grid of a volume of classes, each with where."""
    series: dict[str, dict[Key, Use]] = {}
    matrix = matrix_of(record)
    for target, frame in images.near(matrix):
        image = images[target]
        plane, shape = image.frames[frame].plane, (image.rows, image.columns)
        grid = grid_between(matrix, plane, shape) if plane is not None else None
        if grid is not None and overlaps(grid, record.shape, shape):
            series.setdefault(image.series, {})[target, frame] = Use(path, "volume", _meant(path, record, target), (grid,))
    return series


def _is_packed(record: FileRecord, uses: Mapping[Key, Use], planes: Sequence[Plane | None]) -> bool:
    """Return whether a volume was made of the images of an uneven series one by one, as if there were no gaps between them.

    Converters do so where a slice was lost; behind the gap, each of its slices lies where another image does.
    """
    grid = _grid_of(uses)
    across = grid.steps_33[:, :2].any(axis=1).argmin()
    return len(uses) < len(planes) == record.shape[across] and slice_distance_mm(planes) is None


def _grid_of(uses: Mapping[Key, Use]) -> Grid:
    """Return where a volume of classes lies on the first of its frames."""
    (grid,) = next(iter(uses.values())).grids
    assert grid is not None
    return grid


def _meant(path: str, record: FileRecord, target: str) -> tuple[Patch, ...]:
    """Return the class that a mask of one thing is called like, none where the image is called so too: that is a case's name."""
    if record.called_at < 0:
        cases = bare(target).startswith(bare(path)) or stem(path) in map(folded, own_folders(target))
        return () if cases else record.patches
    folders = {folded(part) for part in PurePosixPath(target).parent.parts}
    named = record.called_at > 0 and folded(PurePosixPath(path).parts[record.called_at - 1]) in folders
    return () if named else record.patches


@dataclass(frozen=True, slots=True)
class _Fitting:
    """The series on the grid of a volume of classes, each by a file of it, and which of them names and patients speak for."""

    found: dict[str, str]
    volumes: dict[str, str]
    named: dict[str, str]
    channels: dict[str, str]
    alike: dict[str, str]
    owned: dict[str, str]
    homed: dict[str, str]
    beside: bool
    is_patients: bool

    @classmethod
    def of(cls, path: str, record: FileRecord, found: dict[str, str], images: Images) -> _Fitting:
        volumes = {name: target for name, target in found.items() if images[target].kind == "volume"}
        named = {name: target for name, target in volumes.items() if stem(target) == stem(path)}
        channels = {name: target for name, target in volumes.items() if case(target) == stem(path) or is_sequence(target, path)}
        owned = {name: target for name, target in found.items() if images[target].patient == record.patient}
        own = {name: target for name, target in (owned or volumes).items() if name in volumes}
        alike = {name: target for name, target in own.items() if bare(target) == bare(path) != ""}
        after = {name: target for name, target in own.items() if is_named_after(path, target)}
        longest = max((len(stem(target)) for target in after.values()), default=0)
        alike = alike or {name: target for name, target in after.items() if len(stem(target)) == longest}
        homed = {name: target for name, target in found.items() if stem(path) in map(folded, own_folders(target))}
        series = [target for name, target in found.items() if name not in volumes]
        beside = any(set(own_folders(target)) & set(own_folders(path)) for target in series)
        return cls(
            found, volumes, named, channels, alike, owned, homed, beside, is_patients=bool(owned and not own_folders(path))
        )

    @property
    def called(self) -> dict[str, str]:
        """Those that the mask is called like."""
        return self.named or self.channels or self.alike

    def is_cases(self, path: str) -> bool:
        """Return whether a mask is called like a case and no more, rather than like what is marked on it too."""
        return any(not is_named_after(path, target) for target in self.called.values())

    @property
    def all_channels(self) -> bool:
        """Whether all that are meant are channels of one case."""
        return bool(self.channels) and not self.named

    @property
    def by_place(self) -> bool:
        """Whether nothing but the grid speaks for any of them."""
        return not (self.called or self.owned or self.homed)

    def best(self, path: str) -> list[str]:
        """Return the series that most speaks for, the closest by folder."""
        best = closest(path, self.called or self.owned or self.homed or self.found)
        if not best:
            raise Refusal(121, "no image lies on the grid of this volume")
        if not (meant := of_one_visit(path, {name: self.found[name] for name in best})):
            raise Refusal(122, "images of several visits or sides have its name and lie on its grid, and it names none of them")
        return meant

    def require_its_own(self, path: str, record: FileRecord, target: str, images: Images) -> None:
        """Refuse a mask whose name, number or folder makes doubtful that it is of an image."""
        _no_other_patients(path, record, target, images)
        by_folder = bool(own_folders(path)) and not (self.called or self.homed)
        if (self.by_place or by_folder) and images.is_numbered_like(path, target):
            raise Refusal(121, "it has the number of another patient, folder or volume than the image that it fits")
        if self.by_place:
            _may_be_its_own(path, target, images)


def _are_sequences(targets: list[str], images: Images) -> bool:
    """Return whether volumes of a patient are called by the sequences they are of, X_t1 and X_t2 or t1 and t2, and else alike.

    Such are laid over each other before anybody marks them.
    """
    names = [SCAN.fullmatch(stem(target)) for target in targets]
    alike = {(PurePosixPath(target).parent, images[target].patient) for target in targets}
    return None not in names and len({name.group(1) for name in names if name}) == len(alike) == 1


def _is_another_thing(path: str, images: Images) -> bool:
    """Return whether a mask of one thing lies beside others that are called like classes, under the name of something else.

    As an organ that the study does not ask for (TotalSegmentator writes a hundred), not as a second reading of the same.
    """
    name, called = stem(path), images.called_masks.get(PurePosixPath(path).parent, set())
    return bool(called) and not (MASK.search(name) or GENERIC.fullmatch(name) or any(other in name for other in called))


def _is_one_of_many(path: str, images: Images) -> bool:
    """Return whether a mask lies among others of other things, which may be empty: 1 in it is not what the study calls 1."""
    single = images.single_masks.get(PurePosixPath(path).parent, set())
    return stem(path) in single and len(single) >= MANY


def _by_name(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    """Match a picture with the closest of the images of its name, else of each channel of its case, else of its bare name.

    One whose name ends with that of a class (x_edema) is matched by what stands before that (x) where no image is called so too.
    """
    found, named = {}, images.by_name(stem(path))
    channels = [named] if named else [*_channels(path, images)]
    for same in channels or [images.by_bare(bare(path)) or _before_class(path, record, images)]:
        looked = [target for target in same if not of_another_look(path, target)]
        if same and not looked:
            raise Refusal(121, OTHER_LOOK)
        best = closest(path, {target: target for target in looked})
        if len(best) > 1:
            raise Refusal(122, f"{len(best)} images have its name, equally close by folder")
        for target in best:
            _require_its_own(path, record, target, images)
            _require_meant(path, target, called=bool(record.called_at))
            found[target, 0] = Use(path, "picture", _meant(path, record, target))
    if not found:
        raise Refusal(123, "no image of one frame has its name")
    return found


def _require_meant(path: str, target: str, *, called: bool, whole: bool = False) -> None:
    """Refuse marks of something else than a class, by a name that their image has not; not of an organ where it names a class."""
    if not called and of_another_organ(path, target):
        raise Refusal(120, "it is called for an organ that is no class of the study")
    if not whole and of_what_is_not(path, target):
        raise Refusal(120, "it is called for what is beside or about a class, or not it")


def _before_class(path: str, record: FileRecord, images: Images) -> list[str]:
    """Return the images that a mask is called like up to the name of a class, of the longest such name."""
    name = stem(path) if record.called_at < 0 else ""
    return next(filter(None, (images.by_name(start) for start, _ in reversed(parted(name)))), [])


def _channels(path: str, images: Images) -> Iterator[list[str]]:
    """Return the images of each channel of a mask's case, as nnU-Net names them: imagesTr/X_0000 and on for labelsTr/X."""
    named = (images.by_name(f"{stem(path)}_{number:04}") for number in itertools.count())
    return itertools.takewhile(bool, ([target for target in same if called_image(target)] for same in named))


def _require_its_own(path: str, record: FileRecord, target: str, images: Images) -> None:
    """Refuse a picture of marks that its name alone, or its size, makes doubtful on an image."""
    image = images[target]
    _at_home(path, image, images)
    _no_other_patients(path, record, target, images)
    if image.patient != record.patient:
        _same_name(path, target, images)
    if (image.rows, image.columns) != (record.rows, record.columns):
        raise Refusal(105, f"mask {record.rows} x {record.columns}, image {image.rows} x {image.columns}")


def _seen_once(found: Mapping[Key, Said], images: Images) -> dict[Key, Said]:
    """Return what a mask that names no image says of the places that its series shows once.

    Of a place that was taken several times it marks one look, and nobody knows which: what moved lies elsewhere on the others.
    """
    looks: dict[tuple[float, ...], set[Key]] = {}
    places: dict[Key, tuple[float, ...]] = {}
    for path, frame in found:
        plane = images[path].frames[frame].plane
        places[path, frame] = tuple(round(value, 2) for value in plane[:9]) if plane is not None else ()
        looks.setdefault(places[path, frame], set()).add((images[path].image or path, frame))  # copies of an image are one look
    once = {key: said for key, said in found.items() if len(looks[places[key]]) == 1}
    if not once:
        raise Refusal(122, "it refers to no image, and its series has several images in each place")
    return once


def _no_other_patients(path: str, record: FileRecord, target: str, images: Images) -> None:
    """Refuse a mask that lies with one patient, or is named for one of the export, and fits an image of another."""
    images.require_own_folder(path, target)
    if record.patient in images.patients and images[target].patient != record.patient:
        raise Refusal(121, "the image that it fits is of another patient or series, and the export has images of its own")


def _at_home(path: str, image: FileRecord, images: Images) -> None:
    """Refuse the image of another patient than those whose images lie closest to a mask: its own may be missing or damaged."""
    if image.patient not in images.closest_owners(path):
        raise Refusal(121, "the image that it fits is of another patient or series than the images closest to it by folder")


def _same_name(path: str, target: str, images: Images) -> None:
    """Refuse an image of several patients' whose folders all have other names than a mask's: its own may be missing."""
    own, other = set(own_folders(path)), set(own_folders(target))
    if len(images.patients) > 1 and own and other and not own & other:
        raise Refusal(121, "the image that it fits lies in a folder of another name, and the export has several patients")


def _may_be_its_own(path: str, target: str, images: Images) -> None:
    """Refuse a mask that fits by its place alone: those of many patients in one space, or of one scanner, lie on the same."""
    _at_home(path, images[target], images)
    _same_name(path, target, images)
    if images[target].kind == "volume" and not set(own_folders(path)) & set(own_folders(target)):
        raise Refusal(121, "the volume on its grid has another name and lies in a folder of another name")
