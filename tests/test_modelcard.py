"""Each model has a card: what is known stands in it, what is not known is a dash, and no name breaks its table."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from fl_server.app import run_study, start_state
from fl_server.new_study import study_toml
from fl_server.study_card import write_study_card
from icmoe.backbones import BACKBONES
from icmoe.exchange import global_state
from icmoe.model import build_model
from icmoe.modelcard import PrivacySpent, SiteLine, write_card
from icmoe.modelfile import ModelHeader, write_model
from icmoe.study import read_study
from simulations.cards import write_cards


@pytest.fixture
def header(make_study) -> ModelHeader:
    return ModelHeader(study=make_study(), method="router-aware", round=2, phantoms=False)


@pytest.fixture
def model(header: ModelHeader, tmp_path: Path) -> Path:
    path = tmp_path / "study.model.safetensors"
    write_model(path, global_state(build_model(header.study, seed=1)), header)
    return path


def rows(card: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in card.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def test_the_card_names_model_study_backbone_and_what_each_site_reached(header: ModelHeader, model: Path):
    sites = [SiteLine(name="Alder", patients=20, dice=0.81234), SiteLine(name="Birch", patients=None, dice=None)]
    path = write_card(model, header, sites, scored_on="test patients")
    assert path.name == "study.model.md"
    found = rows(path.read_text())
    assert hashlib.sha256(model.read_bytes()).hexdigest() in found["model file"][0]
    assert header.study.digest in found["study"][0]
    assert header.study.backbone.digest in found["backbone"][0]
    assert found["licence of the backbone"] == [BACKBONES["sam-vit-test"].licence]
    assert (found["Alder"], found["Birch"]) == (["20", "0.812"], ["-", "-"])
    assert "differential privacy" not in found
    assert "without differential privacy" in path.read_text()
    assert "For tests only" in path.read_text()
    assert "phantoms" not in path.read_text()


def test_a_site_that_only_tested_has_no_training_patients_on_the_card(model: Path):
    sites = {name: {"patients": {"train": count}} for name, count in (("Alder", 11), ("Birch", 1), ("Cedar", 0))}
    test = {"sites": {name: {"dice": 0.5} for name in sites}}
    run = {"model": model.name, "test": test, "rounds": []}
    write_cards({"methods": {"router-aware": {"1": run}}, "sites": sites}, model.parent)
    found = rows(model.with_suffix(".md").read_text())
    assert [found[name][0] for name in sites] == ["20", "10", "0"]


@pytest.mark.parametrize(("count", "words"), [(1, ", 1 round, seed"), (2, ", 2 rounds, seed")])
def test_a_single_round_is_no_plural(count: int, words: str, header: ModelHeader, model: Path):
    card = write_card(model, header.model_copy(update={"round": count}), [], scored_on="test patients").read_text()
    assert words in card


def test_epsilon_stands_with_delta_unit_and_accountant_where_privacy_was_spent(header: ModelHeader, model: Path):
    spent = PrivacySpent(epsilon=3.14159, delta=1e-5, unit="patient", adjacency="add/remove", accountant="PRV")
    card = write_card(model, header, [], scored_on="test patients", privacy=[spent]).read_text()
    said = rows(card)["differential privacy"][0]
    assert all(part in said for part in ("epsilon 3.14 ", "delta 1e-05", "patient", "PRV"))
    assert "without differential privacy" not in card


def test_a_name_cannot_break_out_of_its_cell(header: ModelHeader, model: Path):
    name = "A | B\n| evil | 1 | 1.000 |\n<b>*"
    card = write_card(model, header, [SiteLine(name=name, patients=10, dice=0.5)], scored_on="test patients").read_text()
    assert len([line for line in card.splitlines() if "evil" in line]) == 1
    assert "evil" not in rows(card)
    assert "<b>" not in card.replace("\\<b\\>", "")


@pytest.mark.parametrize("data_check", ['{"summaries": {}}', "", "[]", '{"summaries": {"Alder": {}}}', "[" * 100_000])
def test_a_study_that_ends_leaves_its_model_and_the_card_of_it(data_check: str, make_study, tmp_path: Path):
    path = tmp_path / "study.toml"
    path.write_text(study_toml(make_study()))
    study = read_study(path)
    state = start_state(study)
    state.round, state.closed = study.rounds, True
    state.history.append({"sites": {"Alder": {"val_dice": 0.5}}})
    state.commit(path.with_suffix(".state.safetensors"))
    path.with_suffix(".data_check.json").write_text(data_check)
    run_study(None, path, run="1")  # type: ignore[arg-type]  # nothing is left to ask the sites
    found = rows((tmp_path / "study.model.md").read_text())
    assert hashlib.sha256((tmp_path / "study.model.safetensors").read_bytes()).hexdigest() in found["model file"][0]
    assert found["Alder"] == ["-", "0.500"]


SITE = {"epsilon": 3.0, "delta": 0.1, "patients": 4, "sample_rate": 0.5, "steps": 2}
SERVER = {"noise_multiplier": 1.0, "delta": 0.01, "sites": 3, "divisor": 1.0, "adjacency": "replace"}
UNCOUPLED = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0}


@pytest.mark.parametrize("where", [("site",), ("server",), ("site", "server")])
def test_the_card_of_a_private_study_says_what_was_spent_and_never_that_it_was_not_private(
    where: tuple[str, ...], make_study, model: Path, tmp_path: Path
):
    chosen = {"site": SITE, "server": SERVER}
    study = make_study(privacy={key: chosen[key] for key in where}, aggregation=UNCOUPLED)
    header = ModelHeader(study=study, method="router-aware", round=2, phantoms=False)
    record = {
        "epsilon": 7.5,
        "delta": 0.01,
        "unit": "site",
        "adjacency": "replace",
        "accountant": "Gaussian, exact",
        "clip_norm": 1.0,
    }
    history = [{"sites": {}, "privacy": record if "server" in where else None}]
    card = write_study_card(model, header, history, tmp_path / "absent.json").read_text()
    said = [line for line in card.splitlines() if line.startswith("| differential privacy")]
    wanted = {
        "site": "epsilon 3 at delta 0.1, unit: patient (add/remove)",
        "server": "epsilon 7.5 at delta 0.01, unit: site (replace)",
    }
    assert [wanted[key] in line for key, line in zip(where, said, strict=True)] == [True] * len(where)
    assert "without differential privacy" not in card


def test_a_rehearsal_s_cards_give_tens_and_a_site_s_own_model_its_own_score(header: ModelHeader, model: Path):
    own = model.with_name("own.safetensors")
    own.write_bytes(model.read_bytes())
    common = {"sites": {"Alder": {"dice": 0.5}, "Birch": {"dice": 0.6}}}
    runs = {
        "router-aware": {"1": {"model": model.name, "test": common, "own_test": None}},
        "local": {
            "1": {"model": None, "models": {"Alder": own.name}, "test": common, "own_test": {"sites": {"Alder": {"dice": 0.7}}}}
        },
    }
    results = {"methods": runs, "sites": {name: {"patients": {"train": 13}} for name in ("Alder", "Birch")}}
    write_cards(results, model.parent)
    shared, alone = (rows(path.with_suffix(".md").read_text()) for path in (model, own))
    assert (shared["Alder"], shared["Birch"]) == (["20", "0.500"], ["20", "0.600"])
    assert alone["Alder"] == ["20", "0.700"]
    assert "Birch" not in alone


def test_a_rehearsal_s_card_says_what_both_promises_came_to(make_study, model: Path):
    study = make_study(privacy={"site": SITE}, aggregation=UNCOUPLED)
    write_model(
        model, global_state(build_model(study, seed=1)), ModelHeader(study=study, method="fedavg", round=2, phantoms=True)
    )
    site = {**SITE, "unit": "patient", "adjacency": "add or remove one patient", "accountant": "prv"}
    server = {"epsilon": 7.5, "delta": 0.01, "unit": "site", "adjacency": "replace", "accountant": "Gaussian, exact"}
    run = {"model": model.name, "test": {"sites": {}}, "own_test": None, "rounds": [{"privacy": server}]}
    results = {"methods": {"fedavg": {"1": run}}, "sites": {"Alder": {"patients": {"train": 13}}}, "privacy": site}
    write_cards(results, model.parent)
    said = [line for line in model.with_suffix(".md").read_text().splitlines() if line.startswith("| differential privacy")]
    assert ["patient" in said[0], "site" in said[1], len(said)] == [True, True, 2]


def test_the_card_of_a_study_has_last_scores_and_the_patients_of_those_who_tell(header: ModelHeader, model: Path, tmp_path: Path):
    history = [{"sites": {"Alder": {"val_dice": 0.1}, "Cedar": {"val_dice": 0.2}}}, {"sites": {"Alder": {"val_dice": 0.75}}}]
    check = tmp_path / "study.data_check.json"
    assert rows(write_study_card(model, header, history, check).read_text())["Alder"] == ["-", "0.750"]
    check.write_text('{"summaries": {"Alder": {"patients": 30}}}')
    found = rows(write_study_card(model, header, history, check).read_text())
    assert (found["Alder"], found["Cedar"]) == (["30", "0.750"], ["-", "-"])
