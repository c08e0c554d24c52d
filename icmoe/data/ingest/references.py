"""Masks that name their images by instance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from icmoe.data.ingest.background import not_background
from icmoe.data.ingest.catalogue import Key, Use
from icmoe.data.ingest.forms import MASKS
from icmoe.data.ingest.geometry import OFF_PLANE_MM, Grid, height_mm
from icmoe.data.ingest.known_images import Images
from icmoe.data.ingest.nearest import marks, nearest
from icmoe.data.ingest.placing import patch_grid, same_plane
from icmoe.data.ingest.records import FileRecord, Patch, Plane
from icmoe.data.ingest.refusals import Refusal

Found = dict[Key, list[tuple[Patch, Grid | None]]]
"""What the parts of a mask say of each frame, each with where its pixels lie."""


def by_reference(path: str, record: FileRecord, images: Images) -> dict[Key, Use]:
    """Match by the instances that the parts of a mask name; parts that name none lie on a listed image in their plane."""
    if images.of_several & {*record.listed, *(patch.image for patch in record.patches)}:
        raise Refusal(122, "images of several patients have the instance UID that it refers to")
    listed = _listed(record, images)
    found: Found = {
        (target, frame): [] for target in listed if _is_stack(images[target]) for frame in range(len(images[target].frames))
    }
    placed, off, apart, astray = False, False, dict[str, Refusal](), list[Patch]()
    for patches in marks(record.patches):
        alone = patches[0].plane is None and len(record.listed) == 1
        sure = (bool(patches[0].image) or alone) and len(patches) == 1
        targets = [(patch, target) for patch in patches for target in (images.by_uid(patch.image) if patch.image else listed)]
        parts = [(*part, frame) for part in targets for frame in _marked_frames(record, part[0], images[part[1]], sure=sure)]
        marked = nearest_frames(parts, images)
        if patches[0].plane is None and len(marked) > 1:
            _require_one_place([images[target].frames[frame].plane for _, target, frame in marked])
        for patch, target, frame in marked:
            try:
                found.setdefault((target, frame), []).append((patch, patch_grid(record, patch, images[target], frame)))
            except Refusal as refusal:
                if patch.image:
                    raise
                apart[images[target].series] = refusal
        placed, off = placed or bool(marked), off or bool(targets and not marked)
        astray += [] if marked else patches[:1]
    if not off and not (any(found.values()) if record.patches else found):  # of marks elsewhere no image here is background
        raise Refusal(123, "none of the images that it refers to is in the folder")
    if off and not placed:
        raise Refusal(121, "none of the images that it refers to lies in the plane of its marks")
    found = _on_its_grid(found, apart, images)
    found = _of_one_look(record, found, images)
    same_patient(record, images, found)
    silent = _silent(record, found, astray, images)
    return {key: use_of(path, record, parts) for key, parts in found.items() if key not in silent}


def _silent(record: FileRecord, found: Found, astray: Sequence[Patch], images: Images) -> set[Key]:
    """Return the frames that are no background, or not where a class is marked on an image that is not there (`astray`).

    As where one region was drawn on the CT and another on the MR beside it, which was not exported.
    """
    near = {key: parts for key, parts in found.items() if images[key[0]].space == record.space != ""}
    places = {key: images[key[0]].frames[key[1]].plane for key in near}
    silent = not_background(record, {key: places[key] for key, parts in near.items() if not parts})
    for label in {patch.label for patch in astray}:
        own = record.model_copy(update={"patches": tuple(patch for patch in astray if patch.label == label)})
        without = {key: places[key] for key, parts in near.items() if parts and all(patch.label != label for patch, _ in parts)}
        silent |= not_background(own, without)
    return silent


def _require_one_place(planes: Sequence[Plane | None]) -> None:
    """Refuse images in several places of a part that does not say where it lies: it was derived from all, and drawn on one."""
    known = [plane for plane in planes if plane is not None]
    if any(abs(height_mm((*plane[:3], *known[0][3:])) - height_mm(known[0])) > OFF_PLANE_MM for plane in known[1:]):
        raise Refusal(122, "a part of it names images in several places and does not say in which of them it lies")


def _listed(record: FileRecord, images: Images) -> list[str]:
    """Return the listed images; where parts of a mask name none, only those on which such parts may lie.

    These are of the series that other parts name, as of the one phase of several that was drawn on, or else in the frame of
    reference of a mask with pixels; points alone fit anywhere.
    """
    listed = [target for uid in record.listed for target in images.by_uid(uid)]
    if all(patch.image for patch in record.patches):
        return listed
    named = {images[target].series for patch in record.patches if patch.image for target in images.by_uid(patch.image)}
    listed = [target for target in listed if images[target].series in named] or listed
    absent = not MASKS[record.kind].on_planes and not named and not all(map(images.by_uid, record.listed))
    spaces = {images[target].space for target in listed}
    spaces |= {record.space} - {""} if absent and "" not in spaces else set()  # of what it was drawn on
    if len(spaces) < 2:
        return listed
    own = [target for target in listed if images[target].space == record.space and not MASKS[record.kind].on_planes]
    if not own:
        raise Refusal(122, "parts of it name no image, and its images lie in several frames of reference")
    return own


def _of_one_look(record: FileRecord, found: Found, images: Images) -> Found:
    """Return what is found on series that show each place of a mark that names no frame once: of a cine one phase was drawn on.

    Points on planes fit any series, so that of all that are listed one alone may show their place. A mask with pixels may list
    a dynamic PET beside the CT that it was drawn on.
    """
    on_planes = MASKS[record.kind].on_planes
    looks = Counter(
        ("" if on_planes else images[path].series, patch)
        for (path, _), parts in found.items()
        for patch, _ in parts
        if not patch.image or (patch.frame < 0 and len(images[path].frames) > 1)
    )
    several = {place for place, count in looks.items() if count > 1}
    moving = {series for series, _ in several}
    kept = {key: parts for key, parts in found.items() if images[key[0]].series not in moving}
    if (on_planes and several) or not {patch for _, patch in several} <= {patch for parts in kept.values() for patch, _ in parts}:
        raise Refusal(122, "parts of it name no frame, and several of the images that it may mean lie in their places")
    return kept


def _on_its_grid(found: Found, apart: Mapping[str, Refusal], images: Images) -> Found:
    """Return what is found on series on whose grid the mask lies: it may list the PET beside the CT that it was drawn on."""
    kept = {key: parts for key, parts in found.items() if images[key[0]].series not in apart}
    if apart and not any(kept.values()):
        raise next(iter(apart.values()))
    return kept


def same_patient(record: FileRecord, images: Images, found: Iterable[Key]) -> None:
    """Refuse a mask that names another patient than its images, as after two exports that were numbered alike."""
    if record.patient and any(images[target].patient and not _may_be_one(record, images[target]) for target, _ in found):
        raise Refusal(121, "it refers to images of another patient than its own")


def _may_be_one(one: FileRecord, other: FileRecord) -> bool:
    """Return whether two files may be one patient's: who gave the number counts where both say it."""
    bare = (one.number or one.patient) == (other.number or other.patient)
    return one.patient == other.patient or (bare and not (one.number and other.number))


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


def nearest_frames(parts: Sequence[tuple[Patch, str, int]], images: Images) -> list[tuple[Patch, str, int]]:
    """Return the frames on which one part of a mask lies, without those that another of their series hides from it."""
    planes = [(part, images[part[1]].series, images[part[1]].frames[part[2]].plane) for part in parts]
    placed = [(part, series, plane) for part, series, plane in planes if plane is not None]
    mark = parts[0][0].plane if parts else None
    return list(parts) if mark is None or len(placed) < len(parts) else nearest(mark, placed)


def use_of(path: str, record: FileRecord, parts: Iterable[tuple[Patch, Grid | None]]) -> Use:
    """Return what a mask says of one frame by these of its parts, each with where its pixels lie."""
    listed = list(parts)
    return Use(path, record.kind, tuple(patch for patch, _ in listed), tuple(grid for _, grid in listed))
