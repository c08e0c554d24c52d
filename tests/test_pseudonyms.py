"""Pseudonyms of a site: what they are made of, so that no version names a patient anew, and who may read their secret."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from icmoe.data.ingest.pseudonyms import SECRET_FILE, Pseudonyms, site_pseudonyms
from icmoe.errors import IcmoeError

SECRET = bytes(range(32))


def keyed(text: str) -> str:
    return hmac.new(SECRET, text.encode(), hashlib.sha256).hexdigest()[:16]


def test_a_patient_keeps_pseudonym_and_share_from_version_to_version() -> None:
    """With others, patients of the test would come into the training."""
    hashes = Pseudonyms(SECRET)
    assert hashes.patient("m\u00fcller^anna") == "P-" + keyed("patient\0m\u00fcller^anna") == "P-f2fd99e46f5e8a28"
    assert hashes.share("P-1") == int(keyed("split\0P-1"), 16) / 16**16
    assert len({hashes.patient(name) for name in ("M\u00fcller^Anna", " m\u00fcller^anna ", "mu\u0308ller^anna")}) == 1
    assert hashes.patient("mueller^anna") != hashes.patient("m\u00fcller^anna")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610])
def test_a_secret_that_anybody_else_may_use_is_refused(mode: int, tmp_path: Path) -> None:
    known = site_pseudonyms(tmp_path).patient("17")
    (tmp_path / SECRET_FILE).chmod(mode)
    with pytest.raises(IcmoeError, match="ICM129") as caught:
        site_pseudonyms(tmp_path)
    assert f"{mode & 0o077:03o} (allowed: 000)" in str(caught.value)
    (tmp_path / SECRET_FILE).chmod(0o600)
    assert site_pseudonyms(tmp_path).patient("17") == known
