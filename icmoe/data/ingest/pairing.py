"""Masks to images: by the instances that a mask refers to; by geometry or names only where it refers to none."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from icmoe.data.ingest.background import not_background
from icmoe.data.ingest.catalogue import Catalogue, Key, Use
from icmoe.data.ingest.folding import folded
from icmoe.data.ingest.geometry import OFF_GRID_PX, Grid, grid_between, matrix_of
from icmoe.data.ingest.nearest import marks, nearest
from icmoe.data.ingest.placing import overlaps, patch_grid, same_plane
from icmoe.data.ingest.records import FileRecord, Patch
from icmoe.data.ingest.refusals import Refusal
from icmoe.data.ingest.walking import bare, called_image, case, case_names, closest, own_folders, stem

Said = TypeVar("Said")

ROUNDED = 1e-3
"""How far the planes of two copies of an image may differ: millimetres, and lengths of directions."""


class Images:
    """The images of an export, found by instance, frame of reference, name or place.

    Parameters
    ----------
    files
        Sorted.
    """

    def __init__(self, files: Catalogue) -> None:
        self._files = files
        self.of_several = files.of_several_patients()
        self._owners = files.owners_by_folder()
        self.patients = set().union(*self._owners.values())
        self._closest: dict[str, set[str]] = {}

    def __getitem__(self, path: str) -> FileRecord:
        """Return the record of an image."""
        return self._files.record(path)

    def by_uid(self, uid: str) -> list[str]:
        """Return the first image that has an instance UID, none where there is none.

        Raises
        ------
        Refusal
            122 where several have it that are no copies of it by their size and place; decoding compares their pixels.
        """
        first, *others = self._files.images("uid", uid) or [""]
        if any(not _may_be_copy(self[first], self[other]) for other in others):
            raise Refusal(122, "images of different size or place have the instance UID that it refers to")
        return [first] if first else []

    def by_name(self, name: str) -> list[str]:
        """Return the images of one frame that have a `stem`."""
        return self._files.images("name", os.fsencode(name))

    def by_bare(self, name: str) -> list[str]:
        """Return the images of one frame that have a `bare` name, none where nothing is left of it."""
        return self._files.images("bare", os.fsencode(name)) if name else []

    def by_space(self, space: str) -> list[str]:
        """Return the images of a frame of reference."""
        return self._files.images("space", space)

    def closest_owners(self, path: str) -> set[str]:
        """Return the patients of the images in the folders that are closest to a mask's, whatever their names."""
        own = str(PurePosixPath(path).parent)
        if own not in self._closest:
            folders = closest(path, {folder: f"{folder}/image" for folder in self._owners})
            self._closest[own] = set().union(*(self._owners[folder] for folder in folders))
        return self._closest[own]

    @cached_property
    def called_folders(self) -> set[PurePosixPath]:
        """Folders in which a volume of classes is called like a folder or a patient of images."""
        names = {folded(part) for folder in self._owners for part in own_folders(f"{folder}/image")}
        masks = self._files.mask_volumes()
        return {PurePosixPath(path).parent for path in masks if stem(path) in names or self[path].patient in self.patients}

    def near(self, mask_matrix: npt.NDArray[np.float64]) -> list[Key]:
        """Return the frames whose first pixel lies on a voxel of the mask's grid, continued beyond its ends."""
        where_N3 = (self._points_N4 @ np.linalg.inv(mask_matrix).T)[:, :3]
        near = (np.abs(where_N3 - np.rint(where_N3)) <= OFF_GRID_PX).all(axis=1)
        return [(self._placed[file], int(frame)) for file, frame in self._keys_N2[near]]

    @cached_property
    def _points_N4(self) -> npt.NDArray[np.float64]:
        """First pixels of all frames, with numbers of file and frame in `_keys_N2` and the files in `_placed`."""
        points, keys = array("d"), array("q")
        self._placed: list[str] = []
        for path, record in self._files.all_images():
            self._placed.append(path)
            for frame, place in enumerate(record.frames):
                if place.plane is not None and place.plane[9]:
                    points.extend((*place.plane[:3], 1.0))
                    keys.extend((len(self._placed) - 1, frame))
        self._keys_N2 = np.asarray(keys, dtype=np.int64).reshape(-1, 2)
        return np.asarray(points, dtype=np.float64).reshape(-1, 4)


def pair(files: Catalogue) -> None:
    """Note in the catalogue which masks belong to which frames, and which to none.

    Parameters
    ----------
    files
        Sorted.
    """
    images = Images(files)
    for path in files.masks():
        try:
            files.add_uses(_uses(path, files.record(path), images))
        except Refusal as refusal:
            files.refuse(path, refusal)
    files.prefer()


def _uses(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    if record.kind == "picture":
        return _by_name(path, record, images)
    if record.kind == "volume":
        return _by_grid(path, record, images)
    if record.listed or any(patch.image for patch in record.patches):
        return _by_reference(path, record, images)
    return _by_space(path, record, images)


def _by_reference(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    """Match by the instances that the parts of a mask name; parts that name none lie on a listed image in their plane."""
    if images.of_several & {*record.listed, *(patch.image for patch in record.patches)}:
        raise Refusal(122, "images of several patients have the instance UID that it refers to")
    listed = [target for uid in record.listed for target in images.by_uid(uid)]
    found: dict[Key, list[tuple[Patch, Grid | None]]] = {
        (target, frame): [] for target in listed if _is_stack(images[target]) for frame in range(len(images[target].frames))
    }
    if any(not patch.image for patch in record.patches) and len(_spaces(listed, images)) > 1:
        raise Refusal(122, "parts of it name no image, and its images lie in several frames of reference")
    placed, off = False, False
    for patches in marks(record.patches):
        alone = patches[0].plane is None and len(record.listed) == 1
        sure = (bool(patches[0].image) or alone) and len(patches) == 1
        targets = [(patch, target) for patch in patches for target in (images.by_uid(patch.image) if patch.image else listed)]
        parts = [(*part, frame) for part in targets for frame in _marked_frames(record, part[0], images[part[1]], sure=sure)]
        marked = parts if sure else _nearest(parts, images)
        for patch, target, frame in marked:
            found.setdefault((target, frame), []).append((patch, patch_grid(record, patch, images[target], frame)))
        placed, off = placed or bool(marked), off or bool(targets and not marked)
    if not found and not off:
        raise Refusal(123, "none of the images that it refers to is in the folder")
    if off and not placed:
        raise Refusal(121, "none of the images that it refers to lies in the plane of its marks")
    _same_patient(record, images, found)
    places = {(path, n): images[path].frames[n].plane for (path, n), parts in found.items() if not parts}
    silent = not_background(record, {key: plane for key, plane in places.items() if images[key[0]].space == record.space != ""})
    return {key: _use(path, record, parts) for key, parts in found.items() if key not in silent}


def _same_patient(record: FileRecord, images: Images, found: Iterable[Key]) -> None:
    """Refuse a mask that names another patient than its images, as after two exports that were numbered alike."""
    if record.patient and any(images[target].patient and not _may_be_one(record, images[target]) for target, _ in found):
        raise Refusal(121, "it refers to images of another patient than its own")


def _may_be_one(one: FileRecord, other: FileRecord) -> bool:
    """Return whether two files may be one patient's: who gave the number counts where both say it."""
    bare = (one.number or one.patient) == (other.number or other.patient)
    return one.patient == other.patient or (bare and not (one.number and other.number))


def _may_be_copy(one: FileRecord, other: FileRecord) -> bool:
    """Return whether two images are of one size and lie in one place; systems round what they copy."""
    if (one.rows, one.columns, len(one.frames)) != (other.rows, other.columns, len(other.frames)):
        return False
    pairs = [(a.plane, b.plane) for a, b in zip(one.frames, other.frames, strict=True) if a.plane != b.plane]
    return all(a is not None and b is not None and np.allclose(a, b, rtol=0.0, atol=ROUNDED) for a, b in pairs)


def _spaces(targets: Iterable[str], images: Images) -> set[str]:
    return {images[target].space for target in targets}


def _is_stack(image: FileRecord) -> bool:
    """Return whether a mask that names the whole image speaks of each of its frames: none of them is a later look."""
    planes = [place.plane for place in image.frames]
    return len(planes) == 1 or (None not in planes and len({plane[:3] for plane in planes if plane}) == len(planes))


def _marked_frames(record: FileRecord, patch: Patch, image: FileRecord, *, sure: bool) -> list[int]:
    """Return the frames of an image that a part of a mask marks: the one that it names, else those in its plane.

    The plane has its say too where the part names several images (not `sure`), as one drawn on a whole series does.
    """
    if patch.frame >= len(image.frames) > 1:
        raise Refusal(121, f"it refers to frame {patch.frame + 1} of an image of {len(image.frames)} frames")
    named = patch.frame if len(image.frames) > 1 else 0
    if named >= 0 and (sure or (patch.image and None in {patch.plane, image.frames[named].plane})):
        return [named]
    if patch.plane is None:
        raise Refusal(121, "a part of it names no frame and does not say where it lies")
    return [
        frame
        for frame, place in enumerate(image.frames)
        if named in {-1, frame} and place.plane is not None and same_plane(record, patch.plane, place.plane)
    ]


def _nearest(parts: Sequence[tuple[Patch, str, int]], images: Images) -> list[tuple[Patch, str, int]]:
    """Return the frames on which one part of a mask lies, without those that another of their series hides from it."""
    planes = [(part, images[part[1]].series, images[part[1]].frames[part[2]].plane) for part in parts]
    placed = [(part, series, plane) for part, series, plane in planes if plane is not None]
    mark = parts[0][0].plane if parts else None
    return list(parts) if mark is None or len(placed) < len(parts) else nearest(mark, placed)


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
    visit = {name: target for name, target in folders.items() if record.study and images[target].study == record.study}
    best = closest(path, visit or folders)
    if not best:
        raise Refusal(123, "it refers to no image, and no image shares its frame of reference and planes")
    if len(best) > 1:
        raise Refusal(122, f"it refers to no image, and {len(best)} series share its geometry")
    _same_patient(record, images, series[best[0]])
    if not record.patient and not visit:  # an anonymiser may have written one frame of reference for everybody
        _may_be_its_own(path, folders[best[0]], images)
    return {key: _use(path, record, parts) for key, parts in _seen_once(series[best[0]], images).items()}


def _in_plane(record: FileRecord, images: Images) -> Iterator[tuple[Patch, str, int]]:
    """Yield the frames of the same frame of reference on which the parts of a mask lie."""
    close: list[list[tuple[Patch, str, int]]] = [[] for _ in record.patches]
    for target in images.by_space(record.space) if record.space else []:
        for frame, place in enumerate(images[target].frames):
            for patch, parts in zip(record.patches, close, strict=True):
                if place.plane is not None and patch.plane is not None and same_plane(record, patch.plane, place.plane):
                    parts.append((patch, target, frame))
    for parts in close:
        yield from _nearest(parts, images)


def _by_grid(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    """Match a volume of classes with the series on its grid: of its own name or patient first, then of the closest folder."""
    series: dict[str, dict[Key, Use]] = {}
    folders: dict[str, str] = {}
    matrix = matrix_of(record)
    for target, frame in images.near(matrix):
        image = images[target]
        plane, shape = image.frames[frame].plane, (image.rows, image.columns)
        grid = grid_between(matrix, plane, shape) if plane is not None else None
        if grid is not None and overlaps(grid, record.shape, shape):
            series.setdefault(image.series, {})[target, frame] = Use(path, "volume", record.patches, (grid,))
            folders[image.series] = target
    volumes = {name: target for name, target in folders.items() if images[target].kind == "volume"}
    named = {name: target for name, target in volumes.items() if stem(target) == stem(path)}
    channels = {name: target for name, target in volumes.items() if case(target) == stem(path) or _is_sequence(target, path)}
    owned = {name: target for name, target in folders.items() if images[target].patient == record.patient}
    alike = {name: at for name, at in (owned or volumes).items() if name in volumes and bare(at) == bare(path) != ""}
    homed = {name: target for name, target in folders.items() if stem(path) in map(folded, own_folders(target))}
    beside = any(
        target not in volumes.values() and set(own_folders(target)) & set(own_folders(path)) for target in folders.values()
    )
    if beside and not (named or channels or alike) and set(owned) & set(volumes):  # such as a label map of the same series
        raise Refusal(122, "a volume and a DICOM series beside it lie on the grid of this volume")
    best = closest(path, named or channels or alike or owned or homed or folders)
    if not best:
        raise Refusal(121, "no image lies on the grid of this volume")
    by_place = not (named or channels or alike or owned or homed)
    if by_place and PurePosixPath(path).parent in images.called_folders:
        raise Refusal(121, "masks beside it are called like folders or patients of images, and it is called like none")
    if len(best) > 1 and (named or not channels):
        raise Refusal(122, f"{len(best)} series lie on the grid of this volume, equally close by name and folder")
    _no_other_patients(record, images[folders[best[0]]], images)
    if by_place:
        _may_be_its_own(path, folders[best[0]], images)
    return {key: use for name in best for key, use in _seen_once(series[name], images).items()}


def _is_sequence(target: str, path: str) -> bool:
    """Return whether a volume is a sequence of a mask's case as BraTS names them: X_t1 and X_flair for X_seg."""
    return any(case_names(target, {stem(path): {PurePosixPath(path).parent}}))


def _by_name(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    """Match a picture with the closest of the images of its name, else of each channel of its case, else of its bare name."""
    found, named = {}, images.by_name(stem(path))
    for same in [named] if named else [*_channels(path, images)] or [images.by_bare(bare(path))]:
        best = closest(path, {target: target for target in same})
        if len(best) > 1:
            raise Refusal(122, f"{len(best)} images have its name, equally close by folder")
        for target in best:
            _require_its_own(path, record, target, images)
            found[target, 0] = Use(path, "picture")
    if not found:
        raise Refusal(123, "no image of one frame has its name")
    return found


def _channels(path: str, images: Images) -> Iterator[list[str]]:
    """Return the images of each channel of a mask's case, as nnU-Net names them: imagesTr/X_0000 and on for labelsTr/X."""
    named = (images.by_name(f"{stem(path)}_{number:04}") for number in itertools.count())
    return itertools.takewhile(bool, ([target for target in same if called_image(target)] for same in named))


def _require_its_own(path: str, record: FileRecord, target: str, images: Images) -> None:
    """Refuse a picture of marks that its name alone, or its size, makes doubtful on an image."""
    image = images[target]
    _at_home(path, image, images)
    _no_other_patients(record, image, images)
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


def _no_other_patients(record: FileRecord, image: FileRecord, images: Images) -> None:
    """Refuse a mask that lies with one patient of the export, or is named for one, and fits an image of another."""
    if record.patient in images.patients and image.patient != record.patient:
        raise Refusal(121, "the image that it fits is another patient's, and the export has images of its own")


def _at_home(path: str, image: FileRecord, images: Images) -> None:
    """Refuse the image of another patient than those whose images lie closest to a mask: its own may be missing or damaged."""
    if image.patient not in images.closest_owners(path):
        raise Refusal(121, "the image that it fits is another patient's than the images closest to it by folder")


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


def _use(path: str, record: FileRecord, parts: Iterable[tuple[Patch, Grid | None]]) -> Use:
    listed = list(parts)
    return Use(path, record.kind, tuple(patch for patch, _ in listed), tuple(grid for _, grid in listed))
