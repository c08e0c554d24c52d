"""The study: one digest for one meaning, every fault of a file at once, the nearest key for a mistyped one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_client.site import read_site_file
from fl_server.consortium import read_consortium
from icmoe.config import parse
from icmoe.errors import IcmoeError
from icmoe.study import Study, canonical, derived_seed, is_digest, read_study
from simulations.scenario import read_scenario

DIGEST = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
SMALL = f"""
name = "lesion-study"
seed = 1
[[labels]]
name = "background"
values = [0]
[[labels]]
name = "lesion"
values = [1, 255]
[backbone]
digest = "{DIGEST}"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def faults_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(IcmoeError) as caught:
        read_study(write(folder, text))
    return [str(fault) for fault in caught.value.faults]


def test_the_digest_of_a_known_study_never_changes(tmp_path: Path) -> None:
    # A change of this value is a change of the schema: sites would refuse studies that they have approved.
    study = read_study(write(tmp_path, SMALL))
    assert study.digest == "8b137bb04b6d8a39d032720ee511ec857aea9b9e0107c88e8126aa117556ee33"


def test_the_digest_does_not_depend_on_order_or_on_spelled_out_defaults(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, SMALL))
    turned = dict(reversed(list(json.loads(canonical(study)).items())))
    assert parse(Study, turned, where="turned").digest == study.digest
    assert read_study(write(tmp_path, SMALL + "[training]\nbatch_size = 4\n")).digest == study.digest
    assert read_study(write(tmp_path, SMALL + "[training]\nbatch_size = 5\n")).digest != study.digest


def test_every_setting_enters_the_digest(make_study) -> None:
    base = make_study()
    changes = [
        {"rounds": 3},
        {"deadline_s": 9.0},
        {"loss": {"contrast": 0.0}},
        {"model": {"voting": False}},
        {"aggregation": {"usage_exponent": 0.0}},
        {"backbone": {"block_features": False}},
    ]
    assert len({base.digest, *(make_study(**change).digest for change in changes)}) == len(changes) + 1


def test_all_faults_of_a_file_come_together(tmp_path: Path) -> None:
    lines = faults_of(
        tmp_path,
        SMALL.replace("seed = 1", "seed = -4\nround = 3")
        + '[training]\nlearning_rate = "fast"\nlocal_epoch = 2\n[aggregation]\ncap = 0.0\n',
    )
    assert sorted(line[:6] for line in lines) == ["ICM201", "ICM201", "ICM202", "ICM202", "ICM202"]
    assert any('round. Nothing was started. Did you mean "rounds"?' in line for line in lines)
    assert any('training.local_epoch. Nothing was started. Did you mean "local_epochs"?' in line for line in lines)
    assert any("seed = -4 (allowed: greater than or equal to 0)" in line for line in lines)
    assert any("training.learning_rate = 'fast' (allowed: a valid number)" in line for line in lines)
    assert all("study.toml" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "number", "said"),
    [
        (lambda text: text.replace('name = "lesion-study"\n', ""), 203, "name"),
        (lambda text: text.replace("[1, 255]", "[0]"), 202, "each label name and each mask value once"),
        (lambda text: text.replace("[1, 255]", "[1, -5]"), 202, "labels.1.values.1 = -5"),
        (lambda text: text.replace(DIGEST, "79d8"), 202, "backbone.digest"),
        (lambda text: text.replace("[backbone]", '[backbone]\nname = "sam-vit-test"'), 202, "test_only = true"),
        (lambda text: text.replace("seed = 1", "seed = 1.0"), 202, "seed = 1.0"),
        (lambda text: text.replace("seed = 1", "seed = true"), 202, "seed = True"),
        (lambda text: text.replace("seed = 1", "seed = 1\ndeadline_s = inf"), 202, "deadline_s"),
        (lambda text: text.replace("seed = 1", "seed = 1\nschema_version = 2"), 202, "schema_version"),
        (lambda text: text.replace("seed = 1", f"seed = 0x{'f' * 5000}"), 204, "digits"),
        (lambda text: f"profile = 0x{'f' * 5000}\n" + text, 204, "digits"),
        (lambda text: text + "[[labels]\n", 204, "study.toml"),
    ],
)
def test_bad_studies_are_refused_by_number(change, number: int, said: str, tmp_path: Path) -> None:
    lines = faults_of(tmp_path, change(SMALL))
    assert len(lines) == 1
    assert lines[0].startswith(f"ICM{number} ")
    assert said in lines[0]


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(IcmoeError) as caught:
        read_study(tmp_path / "absent.toml")
    assert caught.value.faults[0].number == 205
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IcmoeError) as caught:
        read_study(tmp_path / "binary.toml")
    assert caught.value.faults[0].number == 204


def test_a_study_cannot_be_changed(make_study) -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_study().rounds = 5


@given(st.integers(0, 2**31 - 1), st.integers(1, 1000))
def test_seeds_differ_by_purpose_site_and_round_and_fit_numpy_and_torch(seed: int, number: int) -> None:
    study = parse(Study, {**_values(), "seed": seed}, where="test")
    seeds = {
        derived_seed(study, "train", "Alder", number),
        derived_seed(study, "train", "Birch", number),
        derived_seed(study, "train", "Alder", number + 1),
        derived_seed(study, "model"),
    }
    assert len(seeds) == 4
    assert all(0 <= value < 2**63 for value in seeds)


def test_the_method_does_not_enter_a_seed() -> None:
    study = parse(Study, _values(), where="test")
    fedavg = study.model_copy(update={"aggregation": study.aggregation.model_copy(update={"usage_exponent": 0.0})})
    assert derived_seed(study, "train", "Alder", 1) == derived_seed(fedavg, "train", "Alder", 1)


def test_digests_are_recognised() -> None:
    assert is_digest(DIGEST)
    assert not any(map(is_digest, ("", DIGEST[:-1], DIGEST.upper(), DIGEST + "\n")))


def _values() -> dict:
    labels = [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1]}]
    return {"name": "s", "seed": 1, "labels": labels, "backbone": {"digest": DIGEST}}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_in_utf16_is_told_to_be_saved_as_utf8(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(SMALL if encoding == "utf-16" else "\ufeff" + SMALL, encoding=encoding)
    with pytest.raises(IcmoeError) as caught:
        read_study(path)
    told = f"ICM204 {path}: file is text in UTF-16, as Windows writes it, not in UTF-8. Nothing was started. Save it as UTF-8: "
    assert str(caught.value).startswith(told)


OFF = "\n[loss]\n" + "".join(
    f"{name} = 0.0\n"
    for name in ("cross_entropy", "dice", "contrast", "vote", "label_consistency", "load_balance", "router_z", "router_anchor")
)
ALONE = "\n[model]\nbasic_experts = 0\nsemantic_experts = 0\nadaptive_experts = 0\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (OFF, "loss.contrast, loss.cross_entropy, loss.dice, loss.label_consistency, loss.load_balance, loss.router_anchor"),
        (ALONE + OFF.replace("vote = 0.0", "vote = 0.3"), "needs no experts is off: one of loss.contrast, loss.cross_entropy,"),
    ],
)
def test_a_study_that_learns_nothing_is_refused_before_it_is_approved(change: str, said: str, tmp_path: Path) -> None:
    (line,) = faults_of(tmp_path, SMALL + change)
    assert line.startswith("ICM202")
    assert said in line
    assert read_study(write(tmp_path, SMALL + change.replace("contrast = 0.0", "contrast = 0.1"))).loss.dice == 0.0
    assert read_study(write(tmp_path, SMALL + OFF.replace("router_z = 0.0", "router_z = 0.1"))).loss.dice == 0.0


@pytest.mark.parametrize("value", ["2020-01-01", "12:30:00", "2020-01-01 12:30:00+00:00", "1979-05-27 07:32:00"])
def test_a_date_that_nobody_quoted_is_no_text(value: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(SMALL.replace('"lesion-study"', value).replace("seed = 1", "seed = 1\nunheard_of = 1"))
    with pytest.raises(IcmoeError) as caught:
        read_study(path)
    date, other = map(str, caught.value.faults)
    told = f'name = {value} (allowed: no date or time; text stands in quotation marks, "{value}"). Nothing was started.'
    assert date.startswith(f"ICM202 {path}: value is outside its allowed range or of another type: {told}")
    assert "ICM201" in other


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_site_file, 'name = 2020-01-01\ndata = "here"\n'),
        (read_site_file, 'name = "Alder"\ndata = "here"\n[policy]\nlabels = ["lesion", 2020-01-01]\n'),
        (read_consortium, 'name = "G"\nsites = [{name = 2020-01-01}]\n[coordinator]\naddress = "a.example:443"\n'),
        (partial(read_scenario, study_options={}, simulation_options={}), "[study]\nname = 2020-01-01\n"),
    ],
)
def test_no_file_of_settings_takes_a_date_for_text(read: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(IcmoeError, match=r'ICM202 .* 2020-01-01 \(allowed: no date or time; .* "2020-01-01"\)'):
        read(path)


@pytest.mark.parametrize("harm", ["a pipe", "a device", "too large"])
def test_what_is_no_file_of_settings_keeps_nobody_waiting(harm: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    if harm == "a pipe":
        os.mkfifo(path)
    elif harm == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("# " + "x" * 2**20)
    with pytest.raises(IcmoeError, match=r"ICM205 .*study.toml.* at most 1024 KiB"):
        read_study(path)
