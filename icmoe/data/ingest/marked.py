"""What the name of a mask says that it marks: an organ, what is beside a class, a part of one, and which reading it is."""

from __future__ import annotations

import re

from icmoe.data.ingest.folding import folded
from icmoe.data.ingest.walking import KINDS, SEPARATOR, WHAT, own_folders, parted, stem

ORGAN = re.compile(
    r"((left|right|l|r)[ _.-]+)?(liver|spleen|kidney|pancreas|lung|heart|brain|prostate|bladder|stomach|gall[ _-]?bladder"
    r"|o?esophagus|duodenum|colon|rectum|bowel|uterus|breast|thyroid|adrenal([ _-]?gland)?|aorta|pelvis|spine|spinal[ _-]?cord"
    r"|vertebra(e|l.*)?|rib|skull|skin|body|bone|muscle|femur|femoral[ _-]?head|trachea|brain[ _-]?stem|cerebellum|parotid"
    r"|mandible|eye|lens|vessel|artery|vein|bet|fov)s?([ _.-]+(parenchyma|tissue|matter|lobes?|capsule|cavity|glands?|field))?"
    r"([ _.-]+(left|right|l|r|\d+))?"
)
"""Names of what scans show beside what a study is about, as masks of one thing are called: organs, what a program left of the
head (bet), the field of view."""
READING = re.compile(
    rf"[ _.-]+({KINDS}|contours?|final|auto|automatic|manual|corrected|edited|(reader|rater|observer|expert)\d*|[vr]?\d+"
    r"|(?!ca$|pz$|tz$|cz$|gm$|wm$)[a-z]{2})$"
)
"""Last word in the name of a mask that says which reading it is, or whose by two letters (others are a lesion or a tissue)."""
READERS = re.compile(r"reader|rater|observer|expert")
NEGATED = re.compile(r"(?<![a-z])((no|non|not|without|peri)[ _.-]+(?!contrast|enhanc)[a-z]{3}|(?P<box>(b|bounding[ _.-]?)?box$))")
"""Words in the name of a mask for what is not what they stand beside."""
SIDES = frozenset({"left", "right"})


def of_another_organ(relative: str, other: str) -> bool:
    """Return whether a mask is called for an organ, by the end of its name or a folder, and an image is not."""
    name, folders = stem(relative), [*map(kindless, own_folders(other))]
    called = [organ_in(part) for part in (name, *(end for _, end in parted(name)))]
    lies = [organ_in(folder) for folder in map(kindless, own_folders(relative)) if folder not in folders]
    return any(lies) or any(organ and organ not in stem(other) for organ in called)


def of_what_is_not(relative: str, other: str) -> bool:
    """Return whether a mask is called for what is beside or about something, and an image is not: no_lesion, lesion_bbox.

    tumor_no_necrosis is a tumour: before the negation stands a word that is not the image's.
    """
    found = NEGATED.search(stem(relative))
    if found is None or found.group() in stem(other):
        return False
    before = re.findall(r"[^\W\d_]{4,}", stem(relative)[: found.start()])
    return found["box"] is not None or all(word in stem(other) for word in before)


def is_another_part(relative: str, other: str) -> bool:
    """Return whether two masks are of two sides of one thing, by a word of their names or their folders: left and right."""
    sides = [SIDES.intersection(_words(path)) for path in (relative, other)]
    return all(len(found) == 1 for found in sides) and sides[0] != sides[1]


def is_a_reading(relative: str) -> bool:
    """Return whether a path names who marked: what two of them mark apart from each other are no parts."""
    return bool(READERS.search(folded(relative)))


def _words(relative: str) -> list[str]:
    return [word for name in (stem(relative), *map(kindless, own_folders(relative))) for word in SEPARATOR.split(name)]


def kindless(name: str) -> str:
    """Return a name, `folded`, without a word for masks, also one that is written together with it: brain of brainmasks."""
    return re.sub(r"(?<=[a-z])masks?(?=$|[ _.-])", "", WHAT.sub("", folded(name)))


def says_reading(rest: str) -> bool:
    """Return whether the end of a mask's name says which reading it is and whose, and no more."""
    while (shorter := READING.sub("", rest)) != rest:
        rest = shorter
    return not rest.strip()


def organ_in(name: str) -> str:
    """Return the organ that a name says beside words for masks, readings and readers: liver of liver_seg_final; empty if none."""
    name = kindless(name)
    while not ORGAN.fullmatch(name) and (shorter := READING.sub("", name)) != name:
        name = shorter
    return name if ORGAN.fullmatch(name) else ""
