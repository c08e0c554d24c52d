"""A study file from answers: what is written is what was answered, and every comment in it is true."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fl_client.cli import app as client
from fl_server.cli import app
from fl_server.new_study import study_toml
from icmoe.study import Study, read_study

ANSWERS = ["--name", "lesions", "--labels", "lesion=1,255; edema=2", "--quorum", "3", "--seed", "5"]


def run(*arguments: str, typed: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), input=typed)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, done.output


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.asking.sys", type("Sys", (), {"stdin": type("Tty", (), {"isatty": lambda: True})}))


def test_options_alone_make_a_study_that_check_accepts(tmp_path: Path):
    path = tmp_path / "study.toml"
    code, told = run("new-study", str(path), *ANSWERS)
    assert code == 0
    study = read_study(path)
    assert (study.name, study.quorum, study.seed, study.rounds) == ("lesions", 3, 5, 10)
    assert [(label.name, label.values) for label in study.labels] == [("background", (0,)), ("lesion", (1, 255)), ("edema", (2,))]
    assert study.digest in told
    assert run("check", str(path))[0] == 0


def test_a_wrong_answer_is_explained_and_asked_again(tmp_path: Path, terminal: None):
    path = tmp_path / "study.toml"
    typed = ["Bad Name", "good-name", "lesion", "lesion=1", "0", "7", "2", "", "sam-vit-b", "nowhere.pth", "a" * 64]
    code, told = run("new-study", str(path), typed="\n".join(typed) + "\n")
    assert code == 0, told
    study = read_study(path)
    assert (study.name, study.rounds, study.quorum, study.deadline_s) == ("good-name", 7, 2, 3600.0)
    assert (study.backbone.name, study.backbone.digest) == ("sam-vit-b", "a" * 64)
    assert told.count("ICM202") == 3
    assert told.count("ICM205") == 1


def test_without_a_terminal_all_faults_are_told_at_once_and_nothing_is_written(tmp_path: Path):
    path = tmp_path / "study.toml"
    code, told = run("new-study", str(path), "--labels", "lesion=a", "--quorum", "many", "--backbone", "sam-vit-q")
    assert code == 1
    assert [line[:6] for line in told.splitlines()] == ["ICM221", "ICM202", "ICM202", "ICM202"]
    assert not list(tmp_path.iterdir())


def test_a_seed_out_of_range_is_told_once_and_before_anything_is_asked(tmp_path: Path, terminal: None):
    code, told = run("new-study", str(tmp_path / "study.toml"), *ANSWERS[:-1], "-1")
    assert code == 1
    assert [line[:12] for line in told.splitlines()] == ["ICM202 seed:"]
    assert not list(tmp_path.iterdir())


def test_weights_for_a_backbone_that_brings_its_own_are_refused_and_nothing_is_written(tmp_path: Path):
    code, said = run("new-study", str(tmp_path / "s.toml"), *ANSWERS, "--weights", "0" * 64)
    assert code == 1
    assert "ICM210 weights: lite-medsam brings its own weights" in said
    assert not (tmp_path / "s.toml").exists()


def test_weights_are_known_by_their_digest(tmp_path: Path):
    weights = tmp_path / "sam.pth"
    weights.write_bytes(b"weights")
    code, _ = run("new-study", str(tmp_path / "s.toml"), *ANSWERS, "--backbone", "sam-vit-b", "--weights", str(weights))
    assert code == 0
    assert read_study(tmp_path / "s.toml").backbone.digest == hashlib.sha256(b"weights").hexdigest()


def test_a_file_that_is_there_stays(tmp_path: Path):
    path = tmp_path / "study.toml"
    path.write_text("mine")
    code, told = run("new-study", str(path), *ANSWERS)
    assert (code, told[:6], path.read_text()) == (1, "ICM220", "mine")
    assert run("new-study", str(path), *ANSWERS, "--force")[0] == 0
    code, told = run("new-study", str(tmp_path), *ANSWERS, "--force")
    assert (code, told[:6]) == (1, "ICM220"), "a folder is nothing to replace"


CHANGES: list[dict[str, Any]] = [
    {},
    {"rounds": 3, "training": {"views": ["identity", "dark"], "learning_rate": 5e-05}, "aggregation": {"personal": True}},
    {
        "labels": [
            {"name": "b", "values": [0]},
            {"name": "l", "values": [1], "kind": {"scheme": "SCT", "value": "1", "meaning": "x"}},
        ]
    },
]


@pytest.mark.parametrize("changes", CHANGES)
def test_the_file_is_the_study_and_its_comments_are_the_defaults(changes: dict[str, Any], make_study):
    study: Study = make_study(**changes)
    text = study_toml(study)
    (written,) = [tomllib.loads(text)]
    assert Study.model_validate_json(json.dumps(written)) == study
    uncommented = re.sub(r"^# ([a-z_]+ = (?!\{).*)$", r"\1", text, flags=re.MULTILINE)
    assert uncommented != text
    assert Study.model_validate_json(json.dumps(tomllib.loads(uncommented))) == study, "defaults are shown as they are"
    assert max(map(len, text.splitlines())) <= 130


def test_the_schema_accepts_what_the_study_accepts_and_points_at_the_rest(make_study):
    jsonschema = pytest.importorskip("jsonschema")
    code, told = run("schema", "study")
    assert code == 0
    schema = json.loads(told)
    checker = jsonschema.Draft202012Validator(schema)
    good = tomllib.loads(study_toml(make_study()))
    assert not list(checker.iter_errors(good))
    bad = {**good, "round": 3, "quorum": 0, "name": "NO"}
    assert len(list(checker.iter_errors(bad))) == 3
    assert schema["properties"]["rounds"]["description"] == "Number of rounds."
    assert checker.is_valid({**good, "profile": "lite"})
    assert not checker.is_valid({**good, "profile": "heavy"})


def test_the_file_names_its_schema_for_editors(tmp_path: Path):
    run("new-study", str(tmp_path / "study.toml"), *ANSWERS)
    first = (tmp_path / "study.toml").read_text().splitlines()[0]
    assert first == "#:schema ./study.schema.json"
    assert (tmp_path / "study.schema.json").read_text() == run("schema", "study")[1]


def test_the_other_files_have_schemas_too():
    assert "sites" in json.loads(run("schema", "consortium")[1])["properties"]
    assert "policy" in json.loads(CliRunner().invoke(client, ["schema"]).output)["properties"]
    assert run("schema", "nothing")[0] == 1
