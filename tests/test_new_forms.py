"""CONTRIBUTING's recipe for a form of masks: a module and a line are enough, in all processes of an ingest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from dicom_builders import image, save

from icmoe.data.ingest.forms import MASKS, VOLUMES
from icmoe.data.ingest.records import FileRecord

ROOT = Path(__file__).resolve().parents[1]
BOXES = "1.2.826.0.1.3680043.8.498.7"
# Python runs this at the start of every process, as the two lines in `forms.py` would be.
REGISTERED = f"""
from icmoe.data.ingest.forms import MASKS, VOLUMES, MaskForm, VolumeForm
VOLUMES["cube"] = VolumeForm(module="cubes", title="Cube", endings=(".cube",))
MASKS["boxes"] = MaskForm(module="boxes", sop_classes=frozenset({{"{BOXES}"}}), on_planes=False)
"""
CUBES = """
import numpy as np
def is_one(head):
    return head.startswith(b"CUBE")
def read(path):
    data = path.read_bytes()
    return np.frombuffer(data, "<u2", offset=10).reshape(np.frombuffer(data, "<u2", 3, offset=4)), np.diag([1.0, 1.0, 3.0, 1.0])
"""
DRAWN = """
import numpy as np
from icmoe.data.ingest.headers import identity, named_patient
from icmoe.data.ingest.opening import open_dicom
from icmoe.data.ingest.records import FileRecord, Patch
def record(path, header, names, hashes):
    data = open_dicom(path, pixels=False)
    label, named = names.index([str(data.SeriesDescription)]), hashes.of("uid", str(data.FrameOfReferenceUID))
    own = identity(data, hashes) | named_patient(data, hashes)
    patches = (Patch(number=0, label=label, image=named),)
    return FileRecord(kind="boxes", rows=int(data.Rows), columns=int(data.Columns), patches=patches, **own)
def opened(path):
    return [int(number) for number in str(open_dicom(path, pixels=False).ImageComments).split()]
def draw(box, patches, grids, plane, shape):
    classes = np.zeros(shape, np.uint8)
    for patch in patches:
        classes[box[0]:box[1], box[2]:box[3]] = patch.label
    return classes
"""
INGEST = """
import json, sys
from pathlib import Path
from exports import LESION, export_of, taken
from icmoe.data.slices import load_mask
if __name__ == "__main__":
    root, place = map(Path, sys.argv[1:])
    data = taken(export_of(root, place, shares=(1.0, 0.0, 0.0)))
    print(json.dumps([int(load_mask(part.mask, LESION).sum()) for part in data.slices] + [str(why) for why in data.exclusions]))
"""


def ingested(root: Path, tmp_path: Path, *, registered: bool) -> list[object]:
    code = tmp_path / f"code-{registered}"
    code.mkdir()
    sources = {"sitecustomize": REGISTERED if registered else "", "cubes": CUBES, "boxes": DRAWN, "ingest": INGEST}
    for name, text in sources.items():
        (code / f"{name}.py").write_text(text)
    path = os.pathsep.join(map(str, (code, ROOT, ROOT / "tests")))
    command = [sys.executable, str(code / "ingest.py"), str(root), str(tmp_path / "place")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_new_form_of_volumes_serves_images_and_masks(tmp_path: Path):
    rng, root = np.random.default_rng(3), tmp_path / "export"
    voxels = rng.integers(0, 4000, (16, 20, 4)).astype("<u2")
    marks = np.zeros_like(voxels)
    marks[3:9, 4:11, 1:3] = 1
    for folder, values in (("images", voxels), ("labels", marks)):
        (root / folder).mkdir(parents=True)
        (root / folder / "p1.cube").write_bytes(b"CUBE" + np.asarray(values.shape, "<u2").tobytes() + values.tobytes())
    before = ingested(root, tmp_path, registered=False)
    assert sum("ICM116" in str(said) for said in before) == len(before) - 1 == 2  # and ICM108: there is no image
    assert sorted(ingested(root, tmp_path, registered=True)) == [0, 0, 42, 42]


def test_a_new_dicom_object_of_marks_is_drawn_on_the_image_that_it_names(tmp_path: Path):
    root = tmp_path / "export"
    root.mkdir()
    grey = image(np.random.default_rng(4).integers(0, 4000, (20, 24)).astype(np.uint16))
    said = {"FrameOfReferenceUID": grey.SOPInstanceUID, "SeriesDescription": "lesion", "ImageComments": "2 8 5 15"}
    marks = image(np.zeros((20, 24), np.uint16), SOPClassUID=BOXES, **said)
    save(grey, root / "image.dcm")
    save(marks, root / "marks.dcm")
    before = ingested(root, tmp_path, registered=False)
    assert not any(isinstance(said, int) and said for said in before)
    assert ingested(root, tmp_path, registered=True) == [60]


def test_keys_of_forms_fit_into_records_and_are_nobody_elses():
    keys = [*VOLUMES, *MASKS]
    assert all(FileRecord(kind=key).kind == key for key in keys)
    assert len({*keys, "image", "volume", "picture", "none", "dicom", "png", "other"}) == len(keys) + 7
