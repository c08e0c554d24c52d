"""What the functional groups of an enhanced object say of its frames (PS3.3 C.7.6.16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset

from icmoe.data.ingest.headers import Header, integer, sequence, written


@dataclass(frozen=True, slots=True)
class Groups:
    """An object with its functional groups, which are looked up once: there may be a hundred thousand.

    Parameters
    ----------
    header
        The object.
    own
        Groups of each frame; none in other objects.
    shared
        Groups of all frames, at most one item.
    """

    header: Header
    own: Sequence[Dataset]
    shared: Sequence[Dataset]

    @classmethod
    def of(cls, header: Header) -> Groups:
        """Return those of an object."""
        own = sequence(header, "PerFrameFunctionalGroupsSequence")
        return cls(header, own, sequence(header, "SharedFunctionalGroupsSequence")[:1])

    def element(self, number: int, group: str, names: Sequence[str]) -> Header:
        """Return a data set with the elements `names` that hold for a frame: its own group's, the shared one's, or the object.

        Parameters
        ----------
        number
            Frame number from 0.
        group
            Functional group that holds them in an enhanced object.
        names
            Keywords; those without a value are left out.
        """
        places = [item for place in (*self.own[number : number + 1], *self.shared) for item in sequence(place, group)[:1]]
        if not places or not isinstance(self.header, Dataset):
            return self.header
        source, found = places[0], Dataset()
        found.file_meta = self.header.file_meta  # with the next, tells byte order and sign of what stands in a table
        found.PixelRepresentation = integer(self.header, "PixelRepresentation")
        for name in names:
            if name in source and (name.endswith("Sequence") or written(source, name)):
                found[name] = source.get_item(name)  # not converted: a number in a wrong form must still be there
        return found
