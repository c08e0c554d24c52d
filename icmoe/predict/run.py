"""Segment a study with a saved model: the machinery behind `icmoe predict`.

Two passes over each series, so that memory stays that of one frame and the class maps of one stack: the first finds the
window that all slices share, the second segments. Features are not kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress

from icmoe.atomic import write_atomically
from icmoe.backbone import Backbone, chosen_backbone, require_taken
from icmoe.backbones import file_digest
from icmoe.data.ingest.decoding import frames_of, on_deep_scale
from icmoe.data.ingest.geometry import slice_distance_mm, upright
from icmoe.data.ingest.pixels import Shown
from icmoe.data.ingest.refusals import Refusal
from icmoe.data.ingest.same_instance import agreeing
from icmoe.data.ingest.walking import walk
from icmoe.data.picture import Picture
from icmoe.device import available_device
from icmoe.errors import Fault, IcmoeError
from icmoe.evaluation import ALONE, MIRRORED
from icmoe.mixture import Mixture
from icmoe.model import ICMoE
from icmoe.modelfile import ModelHeader, read_model
from icmoe.predict import dicom_seg, nifti, pictures
from icmoe.predict.maps import Maps, maps_of
from icmoe.predict.output import RECORD, require_free, staged
from icmoe.predict.stacks import Frame, Series, Stack, find_series
from icmoe.study import Label, View
from icmoe.window import ValueCounts, Window, normalise

Form = Literal["dicom-seg", "nifti", "png"]
LEFT_OUT = "It was not segmented."


@dataclass(slots=True, kw_only=True)
class Prediction:
    """What is done to every series.

    Parameters
    ----------
    root
        Folder of the input.
    model, header, digest, backbone
        The model, what its file says, the file's SHA-256, and the backbone on the same device.
    form
        What is written.
    maps
        Whether overlays, disagreement and deciding experts are written too.
    views
        Views of each picture whose predictions are averaged.
    progress
        Bars "decode" and "segment".
    passed_over
        Files that were taken for no image, each with the reason.
    """

    root: Path
    model: ICMoE | Mixture
    header: ModelHeader
    digest: str
    backbone: Backbone
    form: Form
    maps: bool
    views: tuple[View, ...]
    progress: Progress
    passed_over: list[list[str]]
    stacks: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def segment(self, series: Series, out: Path) -> None:
        """Segment the stacks of a series, each into a folder of its own below `out`; what cannot be is named."""
        shown = Shown()
        windows, refusals, blank = self._first_pass(series, shown)
        for stack in series.stacks:
            folder = out / f"{len(self.stacks) + 1:03d}"
            try:
                self._require(series, stack, refusals, blank)
                # `shown` again: inverted frames are turned about the value about which those that made the window were.
                self.stacks.append(self._stack(series, stack, windows, blank, folder, shown))
            except IcmoeError as error:
                path = stack.frames[0].path  # for what the backbone or the model refuses: they know no file
                self.faults += [replace(one, where=one.where or path, did=one.did or LEFT_OUT) for one in error.faults]
            except Refusal as refusal:
                self.faults.append(Fault(number=refusal.number, where=stack.frames[0].path, what=refusal.why, did=LEFT_OUT))
            if not self.stacks or self.stacks[-1]["folder"] != folder.name:
                shutil.rmtree(folder, ignore_errors=True)

    def _first_pass(
        self, series: Series, shown: Shown
    ) -> tuple[dict[str, Window], dict[tuple[str, int], Refusal], set[tuple[str, int]]]:
        """Return the window of each file of a series, the frames that cannot be decoded, and those of one grey value."""
        counts, deep = dict[bool, ValueCounts](), dict[str, bool]()
        refusals, blank = dict[tuple[str, int], Refusal](), set[tuple[str, int]]()
        bar = self.progress.add_task("decode", total=sum(len(stack.frames) for stack in series.stacks))
        frames = [frame for stack in series.stacks for frame in stack.frames]
        for key, picture in self._pictures(series, frames, shown):
            if isinstance(picture, Refusal):
                refusals[key] = picture
            elif np.count_nonzero(picture.finite_V) < 2:
                blank.add(key)
            else:
                depth = deep.setdefault(key[0], on_deep_scale(self.root / key[0], series.files[key[0]].kind))
                counts.setdefault(depth, ValueCounts()).add_counts(picture.values_V, picture.counts_V)
            self.progress.advance(bar)
        windows = {depth: shown.bound(found.window()) for depth, found in counts.items()}
        return {path: windows[depth] for path, depth in deep.items()}, refusals, blank

    def _pictures(
        self, series: Series, frames: Iterable[Frame], shown: Shown
    ) -> Iterator[tuple[tuple[str, int], Picture | Refusal]]:
        """Yield every frame, file by file; one that the file does not hold is refused."""
        by_file: dict[str, list[int]] = {}
        for frame in frames:
            by_file.setdefault(frame.path, []).append(frame.number)
        for path, numbers in by_file.items():
            record, left = series.files[path], set(numbers)
            reason = Refusal(118, "the file holds fewer frames than its header says")
            try:
                pictures = frames_of(self.root / path, record.kind, sorted(numbers), shown, (record.plain, record.pixels_at))
                for copy in series.copies.get(path, ()):
                    pictures = agreeing(pictures, self.root / path, self.root / copy, sorted(numbers), shown)
                for number, picture in pictures:
                    left.discard(number)
                    yield (path, number), picture
            except Refusal as refusal:
                reason = refusal
            yield from (((path, number), reason) for number in left)

    def _require(
        self, series: Series, stack: Stack, refusals: dict[tuple[str, int], Refusal], blank: set[tuple[str, int]]
    ) -> None:
        bad = [(frame, refusals[frame.path, frame.number]) for frame in stack.frames if (frame.path, frame.number) in refusals]
        if bad:
            frame, refusal = bad[0]
            what = f"{len(bad)} of {len(stack.frames)} frames cannot be used: {refusal.why}"
            raise IcmoeError(Fault(number=142, where=frame.path, what=what, did=LEFT_OUT))
        if len({record.patient for record in series.files.values()}) > 1:
            what = "its files name several patients"
            raise IcmoeError(Fault(number=117, where=stack.frames[0].path, what=what, did=LEFT_OUT))
        if what := stack.gap:
            raise IcmoeError(Fault(number=142, where=stack.frames[0].path, what=what, did=LEFT_OUT))
        if blank.issuperset((frame.path, frame.number) for frame in stack.frames):  # "nothing found" would mislead
            what, todo = f"all of its {len(stack.frames)} frames have one grey value each", "Look at the export."
            raise IcmoeError(Fault(number=113, where=stack.frames[0].path, what=what, did=LEFT_OUT, todo=todo))
        if self.form == "dicom-seg":
            dicom_seg.require_planes(series, stack)
        elif self.form == "nifti":
            nifti.affine_of(series, stack)

    def _stack(
        self, series: Series, stack: Stack, windows: dict[str, Window], blank: set[tuple[str, int]], folder: Path, shown: Shown
    ) -> dict[str, Any]:
        classes_DHW = np.zeros((len(stack.frames), *stack.shape), np.uint8)
        places = {(frame.path, frame.number): place for place, frame in enumerate(stack.frames)}
        bar = self.progress.add_task("segment", total=len(places))
        for key, picture in self._pictures(series, stack.frames, shown):
            place = places[key]
            if isinstance(picture, Refusal):
                raise picture  # the file changed since the first pass
            if key not in blank and (window := windows.get(key[0])) is not None:
                turn = upright(stack.frames[place].plane)
                grey_HW = normalise(picture.values_V, window).take(picture.ranks_HW)
                maps = maps_of(self.model, self.backbone, turn.turn(grey_HW), self.views)
                classes_DHW[place] = turn.turned_back(maps.classes_HW)
                if self.maps:
                    self._write_maps(folder, place, grey_HW, classes_DHW[place], maps, turn.turned_back)
            self.progress.advance(bar)
        self._write(series, stack, classes_DHW, folder)
        return self._record(series, stack, classes_DHW, len(blank & places.keys()), folder)

    def _write_maps(
        self,
        folder: Path,
        place: int,
        grey_HW: npt.NDArray[np.float32],
        classes_HW: npt.NDArray[np.uint8],
        maps: Maps,
        turned_back: Any,  # noqa: ANN401  # of any array
    ) -> None:
        drawn = {"overlay": pictures.overlay(grey_HW, classes_HW)}
        if maps.disagreement_HW is not None and maps.experts_HW is not None:
            drawn["disagreement"] = pictures.shares(turned_back(maps.disagreement_HW))
            drawn["expert"] = pictures.choices(turned_back(maps.experts_HW))
        for name, picture in drawn.items():
            _put(folder / name / f"{place + 1:04d}.png", pictures.png(picture))

    def _write(self, series: Series, stack: Stack, classes_DHW: npt.NDArray[np.uint8], folder: Path) -> None:
        values_DHW = pictures.mask_values(classes_DHW, self.header.study.labels)
        match self.form:
            case "dicom-seg":
                made = dicom_seg.segmentation_bytes(
                    self.root, series, stack, classes_DHW, self.header, self.digest, len(self.stacks)
                )
                _put(folder / "segmentation.dcm", made)
            case "nifti":
                _put(folder / "segmentation.nii.gz", nifti.nifti_bytes(self.root, series, stack, values_DHW))
            case "png":
                for place, values_HW in enumerate(values_DHW):
                    _put(folder / "mask" / f"{place + 1:04d}.png", pictures.png(pictures.mask(values_HW)))

    def _record(
        self, series: Series, stack: Stack, classes_DHW: npt.NDArray[np.uint8], blank: int, folder: Path
    ) -> dict[str, Any]:
        labels, plane, distance_mm = self.header.study.labels, stack.frames[0].plane, slice_distance_mm(stack.planes)
        pixels = {label.name: int(np.count_nonzero(classes_DHW == k)) for k, label in enumerate(labels) if k}
        voxel_ml = distance_mm * plane[9] * plane[10] / 1000.0 if distance_mm and plane and plane[9] else None
        return {
            "folder": folder.name,
            "modality": series.first.modality,
            "frames": len(stack.frames),
            "rows": stack.shape[0],
            "columns": stack.shape[1],
            "blank_frames": blank,
            "pixels": pixels,
            "volume_ml": None if voxel_ml is None else {name: count * voxel_ml for name, count in pixels.items()},
            "sources": [[frame.path, frame.number + 1] for frame in stack.frames],
        }


def predict_study(
    model_path: Path,
    source: Path,
    out: Path,
    form: str,
    *,
    checkpoint: Path | None,
    device_name: str,
    maps: bool,
    mirrored: bool = False,
    force: bool,
    console: Console,
) -> tuple[dict[str, Any], list[Fault]]:
    """Segment what is in a file or folder and return the record that `--json` prints and what was left out.

    Parameters
    ----------
    model_path, source, out
        Model file, input, output folder.
    form
        Of `Form`.
    checkpoint
        Weights of a backbone that brings none.
    device_name
        cpu, cuda or cuda:N.
    maps
        Whether to write overlays, disagreement and deciding experts too.
    mirrored
        Whether the prediction is averaged with that of the mirrored picture.
    force
        Whether a former prediction may be replaced.
    console
        For the progress bars.

    Raises
    ------
    IcmoeError
        109 and 140 for the input, 141, 205 and 210 for the output, 205-211 and 301 for model, backbone and device. Nothing is
        written then.
    """
    if form not in get_args(Form):
        raise IcmoeError(Fault(number=210, where="--format", value=form, limit=", ".join(get_args(Form)), did=LEFT_OUT))
    require_free(out, source, [model_path, *([checkpoint] if checkpoint else [])], force=force)
    device = available_device(device_name)
    model, header = read_model(model_path)
    require_taken(header.study.backbone.name, checkpoint)
    root, paths = _files_of(source)
    backbone = chosen_backbone(header.study.backbone, checkpoint=checkpoint, device=device)
    torch.set_num_threads(os.cpu_count() or 1)
    progress = Progress(console=console, transient=True)
    with progress if console.is_terminal else nullcontext():
        series, faults, passed_over = _read(source, root, paths, header.study.labels, progress)
        with staged(out) as folder:
            work = Prediction(
                root=root,
                model=model.to(device),
                header=header,
                digest=file_digest(model_path),
                backbone=backbone,
                form=form,  # type: ignore[arg-type]  # checked above
                maps=maps,
                views=MIRRORED if mirrored else ALONE,
                progress=progress,
                passed_over=passed_over,
                faults=faults,
            )
            record = _segmented(work, series, folder)
    return record, work.faults


def _read(
    source: Path, root: Path, paths: Sequence[str], labels: Sequence[Label], progress: Progress
) -> tuple[list[Series], list[Fault], list[list[str]]]:
    """Return the series of the input, what was left out of them, and the files that were taken for no image.

    Raises
    ------
    IcmoeError
        140 where there is no series.
    """
    bar, passed_over = progress.add_task("read", total=len(paths)), list[list[str]]()
    series, faults = find_series(
        root,
        paths,
        labels,
        on_progress=lambda done, _: progress.update(bar, completed=done),
        on_passed_over=lambda path, why: passed_over.append([path, why]),
    )
    if not series:
        raise IcmoeError(*faults[:20], _nothing_in(source, len(paths), passed_over))
    return series, faults, passed_over


def _segmented(work: Prediction, series: Iterable[Series], folder: Path) -> dict[str, Any]:
    """Segment every series into `folder` and return the record, which is kept there.

    Raises
    ------
    IcmoeError
        The faults where nothing could be segmented.
    """
    for one in series:
        work.segment(one, folder)
    if not work.stacks:
        raise IcmoeError(*work.faults[:20])
    record = _whole(work)
    _put(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode("utf-8", "surrogateescape"))
    return record


def _nothing_in(source: Path, count: int, passed_over: Sequence[Sequence[str]]) -> Fault:
    reasons = "".join(f"; {path}: {why}" for path, why in passed_over[:3])
    return Fault(number=140, where=str(source), value=f"{count} files looked at{reasons}", did="Nothing was segmented.")


def _whole(work: Prediction) -> dict[str, Any]:
    return {
        "model": work.header.record() | {"digest": work.digest},
        "format": work.form,
        "views": list(work.views),
        "labels": [label.model_dump(mode="json") for label in work.header.study.labels],
        "experts": list(work.model.expert_names),
        "stacks": work.stacks,
        "passed_over": work.passed_over,
        "faults": [fault.record() for fault in work.faults],
    }


def _files_of(source: Path) -> tuple[Path, list[str]]:
    """Return the folder of the input and its files below it.

    Raises
    ------
    IcmoeError
        109 where the input is not there or cannot be read.
    """
    if source.is_file():
        return source.parent, [source.name]
    if not source.is_dir():
        what, todo = "input is not there", "Correct --input."
        raise IcmoeError(Fault(number=109, where=str(source), what=what, did="Nothing was segmented.", todo=todo))
    return source, [path for path, _, _ in walk(source, ())]


def _put(path: Path, data: bytes) -> None:
    write_atomically(path, data, durable=False, private=True)
