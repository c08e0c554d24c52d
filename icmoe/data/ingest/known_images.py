"""The images of an export, found by what masks say of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from icmoe.data.ingest.catalogue import Catalogue, Key
from icmoe.data.ingest.folding import folded, unnumbered
from icmoe.data.ingest.geometry import OFF_GRID_PX
from icmoe.data.ingest.persons import GROUP, PERSON
from icmoe.data.ingest.records import FileRecord, Plane
from icmoe.data.ingest.refusals import Refusal
from icmoe.data.ingest.walking import GENERIC, MASK, closest, own_folders, stem

COUNT_DIGITS = 2
"""Length up to which a folder's name may count series."""
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

    def planes(self, series: str) -> list[Plane | None]:
        """Return where the frames of a series lie."""
        return [place.plane for path in self._files.images("series", series) for place in self[path].frames]

    def extents(self, series: str) -> tuple[int, int, int]:
        """Return rows, columns and number of places of a series."""
        members = self._files.images("series", series)
        keys = [(path, frame) for path in members for frame in range(len(self[path].frames))]
        return self[members[0]].rows, self[members[0]].columns, self.places(keys)

    def places(self, keys: Iterable[Key]) -> int:
        """Return in how many places frames lie."""
        planes = [self[path].frames[frame].plane for path, frame in keys]
        return len({plane[:3] for plane in planes if plane is not None})

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

    @cached_property
    def called_masks(self) -> dict[PurePosixPath, set[str]]:
        """Names of the volumes of classes that are called like a class of the study, by folder."""
        found: dict[PurePosixPath, set[str]] = {}
        for path in self._files.mask_volumes():
            if self[path].called:
                found.setdefault(PurePosixPath(path).parent, set()).add(stem(path))
        return found

    @cached_property
    def single_masks(self) -> dict[PurePosixPath, set[str]]:
        """Names of the volumes that mark one thing each and are called neither like a class nor like a mask, by folder."""
        found: dict[PurePosixPath, set[str]] = {}
        for path in self._files.mask_volumes():
            name, record = stem(path), self[path]
            if record.single and not (record.called or MASK.search(name) or GENERIC.fullmatch(name)):
                found.setdefault(PurePosixPath(path).parent, set()).add(name)
        return found

    def is_numbered_like(self, path: str, target: str) -> bool:
        """Return whether a mask has another number than an image, of the same row of names: its folder's or its patient's."""
        name = "" if GENERIC.fullmatch(stem(path)) else unnumbered(stem(path))  # a date numbers nobody
        others = [*map(folded, own_folders(target)), *([stem(target)] if self[target].kind == "volume" else [])]
        return name != "" and (name in map(unnumbered, others) or self._files.pattern(name) == self[target].pattern)

    def require_own_folder(self, path: str, target: str) -> None:
        """Refuse a mask and an image in folders that number two patients: P2 and P1, or 67890 and 12345 at the top.

        Raises
        ------
        Refusal
            121.
        """
        own, other = ([*map(folded, own_folders(one))] for one in (path, target))
        apart = [(one, two) for one in own for two in other if one not in other and two not in own]
        for one, two in apart:
            at_top = one == own[0] and two == other[0] and len(one) > COUNT_DIGITS and not GROUP.fullmatch(one)
            if (at_top or PERSON.fullmatch(one)) and unnumbered(one) == unnumbered(two) != "":
                raise Refusal(121, "it lies in the folder of another patient than the image that it fits")

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


def _may_be_copy(one: FileRecord, other: FileRecord) -> bool:
    """Return whether two images are of one size and lie in one place; systems round what they copy."""
    if (one.rows, one.columns, len(one.frames)) != (other.rows, other.columns, len(other.frames)):
        return False
    pairs = [(a.plane, b.plane) for a, b in zip(one.frames, other.frames, strict=True) if a.plane != b.plane]
    return all(a is not None and b is not None and np.allclose(a, b, rtol=0.0, atol=ROUNDED) for a, b in pairs)
