"""How the feature cache names its files: all that was ever computed of one image can be found and removed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

FORMAT = "icmoe-features-1"
PREPROCESSING_VERSION = 2
"""Part of every key; raised whenever `normalise`, `prepare` or `apply_view` give other pixels."""
IMAGE_DIGITS, KEY_DIGITS = 24, 64


def default_cache_folder() -> Path:
    """Return the user's cache folder for features."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "icmoe" / "features"


def forget_images(folder: Path, image_digests: Iterable[str]) -> int:
    """Remove every entry of the images, of every backbone and view, and return how many there were.

    Parameters
    ----------
    folder
        A cache folder.
    image_digests
        As in `Slice.image_digest`.
    """
    removed = 0
    for part in map(_image_part, image_digests):
        for path in (folder / part[:2]).glob(f"{part}*.safetensors"):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def entry_key(image_digest: str, rest: str) -> str:
    """Return the key of an entry, 64 hexadecimal digits: a hash of the image's digest, then one of all that makes it."""
    return _image_part(image_digest) + hashlib.sha256(rest.encode()).hexdigest()[: KEY_DIGITS - IMAGE_DIGITS]


def entry_path(folder: Path, key: str) -> Path:
    """Return the file of a key."""
    return folder / key[:2] / f"{key}.safetensors"


def _image_part(image_digest: str) -> str:
    return hashlib.sha256(image_digest.encode()).hexdigest()[:IMAGE_DIGITS]
