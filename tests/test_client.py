"""A hospital's ClientApp, asked through real Flower messages: what it answers, what it refuses, what it keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from typer.testing import CliRunner

from fl_client import cli
from fl_client.app import make_client_app
from fl_client.participant import Participant, read_site, site_from_environment
from fl_client.personal import personal_path
from fl_client.site import ENVIRONMENT
from icmoe.data.folder import read_folder
from icmoe.errors import CATALOGUE, IcmoeError
from icmoe.evaluation import score_slices
from icmoe.exchange import global_state, update_of
from icmoe.features import FeatureCache
from icmoe.kinds import is_personal
from icmoe.messages import ARRAYS, CONFIG, NUMBERS, ROUND_KEY, STUDY_KEY, UPDATE
from icmoe.model import build_model
from icmoe.packing import unpack_records
from icmoe.study import Study, canonical, derived_seed
from icmoe.training import train_round
from simulations.phantoms import PhantomSite, write_phantoms

CONTEXT = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hospital") / "export"
    write_phantoms(root, seed=1, size_px=32, sites=[PhantomSite(name="Alder", train_patients=2, val_patients=1, test_patients=1)])
    return root


@pytest.fixture(scope="module")
def site(hospital: Path, make_study, tmp_path_factory: pytest.TempPathFactory) -> Participant:
    from icmoe.backbone import load_backbone
    from icmoe.prepare import encode_slices

    shared, personal = make_study(), make_study(name="own", aggregation={"personal": True})
    data = read_folder(hospital, shared.labels)["Alder"]
    folder = tmp_path_factory.mktemp("cache")
    backbone = load_backbone("sam-vit-test", image_size=32, device=torch.device("cpu"))
    encode_slices(data.slices, shared, backbone, FeatureCache.of(folder, shared))
    return Participant(
        name="Alder",
        studies=(shared, personal),
        train=data.of("train"),
        val=data.of("val"),
        cache_folder=folder,
        state_folder=tmp_path_factory.mktemp("state"),
    )


def ask(site: Participant, content: RecordDict, kind: str = "train") -> Message:
    reply = make_client_app(lambda *_: site)(Message(content, dst_node_id=5, message_type=kind), CONTEXT)
    if reply.has_content():
        unpack_records(reply.content)  # as the coordinator does
    return reply


def request(study: Study, round_number: int = 1, seed: int = 1, **extra: object) -> RecordDict:
    arrays = ArrayRecord({name: Array(t.numpy()) for name, t in global_state(build_model(study, seed=seed)).items()})
    return RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({STUDY_KEY: study.digest, ROUND_KEY: round_number, **extra})})


def number_of(reply: Message) -> int:
    assert reply.has_error()
    return int(reply.error.reason[3:6])


def test_a_site_introduces_itself_with_its_size_in_tens(site: Participant) -> None:
    content = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: site.studies[0].digest})})
    about = ask(site, content, "query.site").content[CONFIG]
    assert dict(about) == {"site": "Alder", "slices": 10}  # six slices, rounded up
    exact = ask(replace(site, exact_counts=True), content, "query.site").content[CONFIG]
    assert exact["slices"] == 6


def test_the_update_is_exactly_the_declared_tensors_and_numbers(site: Participant) -> None:
    study = site.studies[0]
    reply = ask(site, request(study))
    model = build_model(study, seed=1)
    start = global_state(model)
    assert set(reply.content) == {UPDATE, NUMBERS}
    assert set(reply.content[UPDATE]) == set(update_of(model, start, personal=False, shape=study.model))
    assert set(reply.content[NUMBERS]) == {"slices", "usage", "loss", "steps", "seconds", "val-dice", "val-patients"}
    assert sum(reply.content[NUMBERS]["usage"]) == pytest.approx(1.0)
    assert reply.content[NUMBERS]["val-patients"] == 1
    moved = sum(float(np.abs(array.numpy()).sum()) for array in reply.content[UPDATE].values())
    assert moved > 0
    again = ask(site, request(study))
    assert all(again.content[UPDATE][name].data == array.data for name, array in reply.content[UPDATE].items())


def test_each_round_draws_anew_from_study_site_and_round(site: Participant, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def spy(*arguments, seed: int, **settings):
        seeds.append(seed)
        return train_round(*arguments, seed=seed, **settings)

    monkeypatch.setattr("fl_client.local_round.train_round", spy)
    study = site.studies[0]
    for number in (1, 2, 1):
        content = request(study)
        content[CONFIG][ROUND_KEY] = number
        assert ask(site, content).has_content()
    assert seeds == [derived_seed(study, "train", "Alder", number) for number in (1, 2, 1)]


def test_a_site_takes_the_steps_that_it_is_told_and_scores_each_patient_alike(site: Participant) -> None:
    study, two = site.studies[0], replace(site, val=site.train, steps_per_round=5)
    model = build_model(study, seed=1).eval()
    with torch.no_grad():
        model.head.classify.bias[1] += 3.0  # lesion nearly everywhere
    content = request(study)
    content[ARRAYS] = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in global_state(model).items()})
    numbers = ask(two, content).content[NUMBERS]
    assert numbers["steps"] == 5 != ask(site, content).content[NUMBERS]["steps"]
    scores = score_slices(model, two.val, study.labels, two.cache(study), torch.device("cpu"), surfaces=False)
    assert (len(scores), numbers["val-patients"]) == (2, 2)
    assert 0.0 < numbers["val-dice"] == pytest.approx((scores[0].dice + scores[1].dice) / 2)  # as it came, before its training


def test_personal_parts_stay_at_the_site_and_continue_from_round_to_round(site: Participant) -> None:
    study = site.studies[1]
    first = ask(site, request(study, 1))
    assert not [name for name in first.content[UPDATE] if is_personal(name, study.model)]
    kept = personal_path(site.state_folder, study, "Alder", 1)
    assert kept.is_file()
    second = ask(site, request(study, 2))
    assert not second.has_error()
    assert personal_path(site.state_folder, study, "Alder", 2).read_bytes() != kept.read_bytes()
    kept.write_bytes(b"damaged")
    assert number_of(ask(site, request(study, 2))) == 304  # the round before is needed


def test_a_site_that_missed_rounds_goes_on_with_its_last_personal_parts(site: Participant, make_study, tmp_path: Path) -> None:
    study = make_study(name="own", rounds=7, aggregation={"personal": True})
    here = replace(site, studies=(study,), state_folder=tmp_path, audited=True)
    assert ask(here, request(study, 3)).has_content(), "it came late: there are none yet"
    kept = personal_path(tmp_path, study, "Alder", 3).read_bytes()
    assert ask(here, request(study, 5)).has_content(), "it was away in round 4"
    assert ask(here, request(study, 7), "evaluate").has_content(), "and when the last round was played"
    assert ask(here, request(study, 4)).has_content(), "the coordinator lost a commit"
    assert personal_path(tmp_path, study, "Alder", 3).read_bytes() == kept
    assert not personal_path(tmp_path, study, "Alder", 5).exists(), "it is of a round that is lost"


def test_a_site_without_validation_patients_sends_no_score(site: Participant) -> None:
    numbers = ask(replace(site, val=()), request(site.studies[0])).content[NUMBERS]
    assert numbers["val-patients"] == 0


REFUSED = {
    "an extra key": (lambda study: request(study, learning_rate=0.1), 301),
    "an extra record": (lambda study: RecordDict({**request(study), "code": ConfigRecord({"run": "x"})}), 301),
    "no arrays": (lambda study: RecordDict({CONFIG: request(study)[CONFIG]}), 301),
    "a round beyond the study": (lambda study: request(study, 3), 301),
    "round zero": (lambda study: request(study, 0), 301),
    "a round that is no number": (lambda study: request(study, True), 301),
    "another study": (
        lambda study: RecordDict({**request(study), CONFIG: ConfigRecord({STUDY_KEY: "0" * 64, ROUND_KEY: 1})}),
        302,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_what_does_not_belong_in_a_message_is_refused_by_number(name: str, kind: str, site: Participant) -> None:
    content, number = REFUSED[name]
    assert number_of(ask(site, content(site.studies[0]), kind)) == number


def test_arrays_that_are_none_and_records_of_another_type_are_refused_before_anything_is_built(site: Participant, caplog) -> None:
    study = site.studies[0]
    broken, untyped = request(study), request(study)
    broken[ARRAYS]["head.classify.bias"] = Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY\x01\x00\x10\x00{'descr': bad   ")
    untyped[ARRAYS] = ConfigRecord({"head.classify.bias": 1.0})
    assert [number_of(ask(site, content)) for content in (broken, untyped)] == [301, 301]
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("harm", ["NaN", "another shape", "another type", "missing", "extra"])
def test_a_doctored_global_model_is_refused(harm: str, site: Participant) -> None:
    content = request(site.studies[0])
    tensors = {name: array.numpy().copy() for name, array in content[ARRAYS].items()}
    if harm == "NaN":
        tensors["head.classify.bias"][0] = np.nan
    elif harm == "another shape":
        tensors["head.classify.bias"] = np.zeros(9, np.float32)
    elif harm == "another type":
        tensors["head.classify.bias"] = tensors["head.classify.bias"].astype(np.float64)
    elif harm == "missing":
        del tensors["head.classify.bias"]
    else:
        tensors["backbone.patch_embed"] = np.zeros(3, np.float32)
    content[ARRAYS] = ArrayRecord({name: Array(tensor) for name, tensor in tensors.items()})
    assert number_of(ask(site, content)) == 301


def test_the_text_of_an_exception_never_leaves(site: Participant) -> None:
    marker = "Mustermann-1970"
    reply = make_client_app(lambda *_: (_ for _ in ()).throw(RuntimeError(marker)))(
        Message(request(site.studies[0]), dst_node_id=5, message_type="train"), CONTEXT
    )
    assert reply.error.reason == f"ICM304 {CATALOGUE[304].title}"
    broken = replace(site, cache_folder=site.cache_folder / marker)
    reply = ask(broken, request(site.studies[0]))
    assert number_of(reply) == 111
    assert marker not in reply.error.reason


def write_study_file(path: Path, study: Study) -> Path:
    values = json.loads(canonical(study))
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict | list)]
    lines += [f"[[labels]]\nname = {json.dumps(label['name'])}\nvalues = {label['values']}" for label in values["labels"]]
    sections = {name: keys for name, keys in values.items() if isinstance(keys, dict)}
    sections |= {f"privacy.{name}": keys for name, keys in sections.pop("privacy", {}).items() if keys}
    for section, keys in sections.items():
        rows = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
        lines.append(f"[{section}]\n" + "\n".join(rows))
    path.write_text("\n".join(lines))
    return path


def write_site_file(folder: Path, hospital: Path, **changes: str) -> Path:
    text = {
        "name": '"Alder"',
        "data": f'"{hospital}"',
        "cache": '"cache"',
        "allow_test_only": "true",
    } | changes
    path = folder / "site.toml"
    path.write_text("\n".join(f"{key} = {value}" for key, value in text.items()))
    return path


def command(path: Path, *words: str) -> Result:
    return CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(path), *words])


def test_a_site_file_leads_to_a_site_that_trains(
    hospital: Path, make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    path = write_site_file(tmp_path, hospital)
    assert "ICM316" in command(path, "prepare").stderr  # approval first
    assert command(path, "approve", str(write_study_file(tmp_path / "study.toml", study)), "--yes").exit_code == 0
    with pytest.raises(IcmoeError) as caught:
        read_site(path, study.digest)
    assert caught.value.faults[0].number == 207  # then features
    prepared = command(path, "prepare")
    assert prepared.exit_code == 0, prepared.output
    monkeypatch.setenv(ENVIRONMENT, str(path))
    found = site_from_environment(CONTEXT, study.digest)
    assert found.studies[0].digest == study.digest
    assert not found.exact_counts
    assert not found.share_summary
    path.write_text("share_summary = true\n" + path.read_text())
    assert site_from_environment(CONTEXT, study.digest).share_summary
    reply = make_client_app(site_from_environment)(Message(request(study), dst_node_id=5, message_type="train"), CONTEXT)
    assert reply.content[NUMBERS]["slices"] == 10


def test_the_command_line_shows_the_site(hospital: Path, make_study, tmp_path: Path) -> None:
    path = write_site_file(tmp_path, hospital)
    command(path, "approve", str(write_study_file(tmp_path / "study.toml", make_study())), "--yes")
    shown = command(path, "show", "--json")
    assert shown.exit_code == 0
    record = json.loads(shown.output)
    (study,) = record["studies"]
    assert (study["study"], study["images_found"]) == ("tiny", 12)
    assert record["share_summary"] is False  # nothing leaves that the site file does not allow
    assert study["summary"] | {"images": 10, "patients": 10} == study["summary"]


BAD_SITES = {
    "an unknown key": ({"nmae": '"x"'}, 201),
    "a wrong type": ({"threads": '"two"'}, 202),
    "a name with a path": ({"name": '"../x"'}, 202),
    "a folder that is not there": ({"data": '"nowhere"'}, 109),
    "approval by the site file": ({"studies": '["study.toml"]'}, 201),
    "hours that are none": ({"policy": '{hours = "9-17"}'}, 202),
    "a coordinator without a port": ({"coordinator": '{address = "x", ca = "a", key = "b"}'}, 202),
    "another site": ({"name": '"Birch"'}, 210),
    "a path with a zero byte": ({"state": r'"a\u0000b"'}, 202),
    "a pattern that repeats too often": ({"ingest": '{folder = "x", patient_pattern = "(a{99999999999999999999})"}'}, 202),
    "a number of too many digits": ({"threads": "9" * 5000}, 204),
    "tables nested beyond reading": ({"cache": "[" * 20_000}, 204),
}


@pytest.mark.parametrize("name", BAD_SITES)
def test_a_bad_site_file_is_one_numbered_sentence(name: str, hospital: Path, make_study, tmp_path: Path) -> None:
    changes, number = BAD_SITES[name]
    path = write_site_file(tmp_path, hospital)
    command(path, "approve", str(write_study_file(tmp_path / "study.toml", make_study())), "--yes")
    write_site_file(tmp_path, hospital, **changes)
    done = command(path, "show")
    assert done.exit_code == 1
    assert f"ICM{number}" in done.output + done.stderr
    assert "Traceback" not in done.output


def test_without_a_site_or_its_file_the_command_says_so(tmp_path: Path) -> None:
    missing = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(tmp_path / "none.toml"), "show"])
    assert missing.exit_code == 1
    assert "ICM205" in missing.output + missing.stderr
    unnamed = CliRunner().invoke(cli.app, ["show"])
    assert unnamed.exit_code == 1
    assert "ICM203" in unnamed.output + unnamed.stderr


def test_the_environment_must_name_the_site_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(IcmoeError, match="ICM205"):
        site_from_environment(CONTEXT, "0" * 64)


@pytest.mark.parametrize("command", ["show", "prepare", "ingest", "forget"])
def test_help_needs_no_site(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"])
    assert shown.exit_code == 0
    assert f" {command} [OPTIONS]" in shown.output


def test_a_site_named_behind_the_command_is_told_where_it_belongs() -> None:
    done = CliRunner().invoke(cli.app, ["ingest"])
    assert done.exit_code == 1
    assert "before the command" in done.output + done.stderr


def test_the_shown_exclusions_are_few_of_each_kind() -> None:
    lines = cli._shortened([f"ICM116 F-{n}: junk." for n in range(9)] + ["ICM108 Alder: none."])
    assert lines[5:] == ["ICM116 holds for 4 more; show --json lists all.", "ICM108 Alder: none."]
