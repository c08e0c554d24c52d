"""A site's own model: what is mixed, how it is chosen, that it is remade to the byte, and that it stays at the site."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_client import write_site_file, write_study_file
from typer.testing import CliRunner

from fl_client import cli
from icmoe.backbone import load_backbone
from icmoe.cli import app as icmoe_app
from icmoe.data.folder import read_folder
from icmoe.dataset import TrainingSet
from icmoe.evaluation import score_slices
from icmoe.exchange import State, global_state, load_state, state_digest
from icmoe.features import FeatureCache
from icmoe.mixture import Mixture, joined, mixture_of, parted
from icmoe.model import build_model
from icmoe.modelfile import ModelHeader, read_model, write_model
from icmoe.personalise import CANDIDATES, GLOBAL, OWN, TUNED, TUNING_RATE, OwnData, choose, personalise, train_alone, tune
from icmoe.prepare import encode_slices
from icmoe.study import Study, derived_seed
from icmoe.training import train_round
from simulations.phantoms import PhantomSite, write_phantoms

CPU = torch.device("cpu")
DICE = st.floats(0.0, 1.0)
TABLES = st.integers(0, 5).flatmap(
    lambda patients: st.fixed_dictionaries({name: st.lists(DICE, min_size=patients, max_size=patients) for name in CANDIDATES})
)
DEFAULT = next(iter(CANDIDATES))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@given(TABLES)
def test_the_choice_is_never_below_the_default_on_any_validation_patient(table: dict[str, list[float]]) -> None:
    choice = choose(table, DEFAULT)
    assert all(mine >= theirs for mine, theirs in zip(table[choice], table[DEFAULT], strict=True))


@given(TABLES, st.floats(0.011, 0.5))
def test_a_site_whose_own_model_is_clearly_better_for_everyone_is_not_left_with_less(
    table: dict[str, list[float]], gain: float
) -> None:
    table[OWN] = [dice + gain for dice in table[DEFAULT]]
    choice = choose(table, DEFAULT)
    assert not table[OWN] or mean(table[choice]) >= mean(table[OWN])


def test_without_validation_patients_and_where_patients_disagree_the_default_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose({DEFAULT: [], OWN: []}, DEFAULT) == DEFAULT
    assert choose({DEFAULT: [0.5, 0.5], OWN: [0.9, 0.499]}, DEFAULT) == DEFAULT
    assert choose({DEFAULT: [0.5, 0.5], OWN: [0.505, 0.505]}, DEFAULT) == DEFAULT
    assert choose({DEFAULT: [0.5, 0.5], OWN: [0.9, 0.5]}, DEFAULT) == DEFAULT  # better for each, not for some alone
    assert choose({DEFAULT: [0.5, 0.5], OWN: [0.6, 0.6], TUNED: [0.7, 0.6]}, DEFAULT) == TUNED
    monkeypatch.setattr("icmoe.personalise.MARGIN", 0.25)
    assert choose({DEFAULT: [0.5], OWN: [0.75]}, DEFAULT) == OWN  # just by the margin


@settings(deadline=None, max_examples=20)
@given(weight=st.floats(0.01, 0.99))
def test_a_mixture_is_the_weighted_mean_of_probabilities(weight: float, make_study, make_features) -> None:
    study = make_study()
    features, _ = make_features(study)
    models = {"a": build_model(study, seed=1).eval(), "b": build_model(study, seed=2).eval()}
    mixed = Mixture(models, {"a": weight, "b": 1.0 - weight}).eval()
    with torch.no_grad():
        a, b = (models[name](features).logits_BKhw.softmax(dim=1) for name in "ab")
        found = mixed(features).logits_BKhw.exp()
        turned = Mixture(models, {"b": 1.0 - weight, "a": weight}).eval()(features).logits_BKhw.exp()
    assert torch.equal(turned, found)  # a weight belongs to its member, whatever the order they are named in
    torch.testing.assert_close(found, weight * a + (1.0 - weight) * b)


@pytest.mark.parametrize("weights", [{}, {"a": 0.9}, {"a": 1.1}, {"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.0}, {"b": 1.0}])
def test_weights_that_are_no_mean_are_refused(weights: dict[str, float], make_study) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture({"a": build_model(make_study(), seed=1)}, weights)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hospital") / "export"
    write_phantoms(root, seed=1, size_px=32, sites=[PhantomSite(name="Alder", train_patients=2, val_patients=2, test_patients=1)])
    return root


@pytest.fixture(scope="module")
def data(export: Path, make_study, tmp_path_factory: pytest.TempPathFactory) -> OwnData:
    study = make_study()
    rows = read_folder(export, study.labels)["Alder"]
    cache = FeatureCache.of(tmp_path_factory.mktemp("cache"), study)
    encode_slices(rows.slices, study, load_backbone("sam-vit-test", image_size=32, device=CPU), cache)
    return OwnData(site="Alder", train=rows.of("train"), val=rows.of("val"), cache=cache, device=CPU)


@pytest.fixture(scope="module")
def states(data: OwnData, make_study) -> dict[str, State]:
    study: Study = make_study()
    start = global_state(build_model(study, seed=5))
    return {GLOBAL: start, TUNED: tune(start, study, data), OWN: train_alone(study, data)}


def test_tuning_starts_from_the_global_model_and_is_the_same_each_time(data: OwnData, states, make_study) -> None:
    again = tune(states[GLOBAL], make_study(), data)
    assert state_digest(again) == state_digest(states[TUNED]) != state_digest(states[GLOBAL])


def test_tuning_is_one_short_pass_whatever_the_rounds_and_the_pull_of_the_study(data: OwnData, states, make_study) -> None:
    other = make_study(rounds=7, training={"proximal_mu": 0.5, "local_epochs": 3, "schedule": "constant"})
    assert state_digest(tune(states[GLOBAL], other, data)) == state_digest(states[TUNED])
    slower = make_study(training={"learning_rate": make_study().training.learning_rate * TUNING_RATE, "schedule": "cosine"})
    short = slower.model_copy(update={"rounds": 1, "training": slower.training.model_copy(update={"local_epochs": 1})})
    model = build_model(short, seed=0)
    load_state(model, states[GLOBAL])
    seed = derived_seed(short, "tune", "Alder")
    train_round(model, TrainingSet(data.train, short, data.cache), short, round_number=1, seed=seed, device=CPU)
    assert state_digest(global_state(model)) == state_digest(states[TUNED])


def test_training_alone_goes_on_after_a_stop_with_the_same_bytes(data: OwnData, states, make_study) -> None:
    kept: dict[int, State] = {}
    train_alone(make_study(), data, on_round=lambda state, number: kept.update({number: state}))
    assert sorted(kept) == [1, 2]
    resumed = train_alone(make_study(), data, state=kept[1], done=1)
    assert state_digest(resumed) == state_digest(kept[2]) == state_digest(states[OWN])


def test_training_alone_is_the_sites_local_training_round_by_round(data: OwnData, states, make_study) -> None:
    study = make_study()
    model, slices = build_model(study, seed=derived_seed(study, "model")), TrainingSet(data.train, study, data.cache)
    for number in (1, 2):
        seed = derived_seed(study, "train", "Alder", number)
        train_round(model, slices, study, round_number=number, seed=seed, device=CPU)
    assert state_digest(global_state(model)) == state_digest(states[OWN])


def test_training_alone_takes_what_no_slice_shows_for_background_whatever_the_study_says(data: OwnData, make_study) -> None:
    """Nobody else teaches the class there, and to leave it open would let it spread over the site's own images."""
    labels = [*make_study().model_dump(mode="json")["labels"], {"name": "vessel", "values": [7]}]
    wide = [make_study(labels=labels, rounds=1, training={"untaught": says}) for says in ("unknown", "background")]
    unknown, background = (state_digest(train_alone(study, data)) for study in wide)
    assert unknown == background


def test_the_chosen_model_has_the_scores_that_chose_it(data: OwnData, states, make_study) -> None:
    study = make_study()
    found = personalise(study, states, data)
    assert set(found.val_dice) == set(CANDIDATES)
    assert found.weights == CANDIDATES[found.choice]
    scores = score_slices(mixture_of(study, found.states, found.weights), data.val, study.labels, data.cache, CPU)
    assert [score.dice for score in scores] == found.val_dice[found.choice]
    assert len(scores) == 2


def test_a_site_that_lacks_a_class_takes_the_global_model(data: OwnData, states, make_study) -> None:
    """Its validation patients lack the class as well, and may all prefer what never marks it."""
    study = make_study()
    bare = replace(data, train=[replace(item, classes=(0,)) for item in data.train])
    found = personalise(study, states, bare)
    assert (found.choice, found.weights, list(found.states)) == (GLOBAL, {GLOBAL: 1.0}, [GLOBAL])
    assert found.untaught == tuple(label.name for label in study.labels[1:])
    assert found.val_dice == personalise(study, states, data).val_dice, "told all the same"
    assert personalise(study, states, data).untaught == ()


def test_a_mixture_is_written_and_read_as_one_file(states, make_study, make_features, tmp_path: Path) -> None:
    study, path = make_study(), tmp_path / "m.safetensors"
    members, weights = {name: states[name] for name in (TUNED, OWN)}, {TUNED: 0.5, OWN: 0.5}
    assert {name: state_digest(state) for name, state in parted(joined(members)).items()} == {
        name: state_digest(state) for name, state in members.items()
    }
    header = ModelHeader(study=study, method="personalised", round=2, phantoms=True, weights=weights)
    write_model(path, joined(members), header, private=True)
    model, read = read_model(path)
    assert read == header
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    features, _ = make_features(study)
    with torch.no_grad():
        expected = mixture_of(study, members, weights)(features).logits_BKhw
        torch.testing.assert_close(model(features).logits_BKhw, expected, rtol=0.0, atol=0.0)


class TestCommand:
    """`fl_client personalise` at a hospital."""

    @pytest.fixture(scope="class")
    def hospital(self, export: Path, make_study, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("site")
        path, study = write_site_file(folder, export), write_study_file(folder / "study.toml", make_study())
        for words in (["approve", str(study), "--yes"], ["prepare"]):
            done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(path), *words])
            assert done.exit_code == 0, done.output
        models = {"final": (make_study(), "router-aware", 2), "other": (make_study(rounds=9), "router-aware", 9)}
        models |= {"early": (make_study(), "router-aware", 1), "alone": (make_study(), "alone", 2)}
        for name, (own, method, done_rounds) in models.items():
            header = ModelHeader(study=own, method=method, round=done_rounds, phantoms=True)
            write_model(folder / f"{name}.safetensors", global_state(build_model(own, seed=5)), header)
        return path

    def run(self, path: Path, study: str, model: str) -> tuple[int, str]:
        words = ["personalise", study, "--model", str(path.parent / model)]
        done = CliRunner().invoke(cli.app, ["--site", "Alder", "--config", str(path), *words])
        return done.exit_code, done.output

    def test_it_makes_a_private_model_that_icmoe_evaluate_reads(self, hospital: Path, export: Path) -> None:
        code, output = self.run(hospital, "tiny", "final.safetensors")
        assert code == 0, output
        assert output.count("<- chosen") == 1
        (made,) = hospital.parent.rglob("personalised.safetensors")
        assert {stat.S_IMODE(path.stat().st_mode) for path in made.parent.glob("*.safetensors")} == {0o600}
        cache = ["--cache", str(hospital.parent / "cache")]
        done = CliRunner().invoke(icmoe_app, ["evaluate", "--model", str(made), "--data", str(export), "--json", *cache])
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout)
        assert record["model"]["method"] == "personalised"
        assert 0.0 <= record["sites"]["Alder"]["dice"] <= 1.0

        before = made.read_bytes()
        (kept,) = made.parent.glob("alone-*.safetensors")
        alone = kept.stat().st_mtime_ns
        assert self.run(hospital, "tiny", "final.safetensors")[0] == 0
        assert made.read_bytes() == before
        assert kept.stat().st_mtime_ns == alone, "what was trained is not trained again"
        whole = kept.read_bytes()
        for cut in (b"", whole[: len(whole) // 2]):
            kept.write_bytes(cut)
            assert self.run(hospital, "tiny", "final.safetensors")[0] == 0
            assert (made.read_bytes(), kept.read_bytes()) == (before, whole), "unless a crash cut it off"

        listed = export / "splits" / "train.csv"
        text = listed.read_text()
        patients = sorted({line.split(",")[2] for line in text.splitlines()[1:]})
        listed.write_text("".join(line for line in text.splitlines(keepends=True) if f",{patients[-1]}," not in line))
        try:
            assert self.run(hospital, "tiny", "final.safetensors")[0] == 0
        finally:
            listed.write_text(text)
        (other,) = made.parent.glob("alone-*.safetensors")
        assert other != kept, "a model that a patient taught who has gone is neither used nor kept"
        assert made.read_bytes() != before

    @pytest.mark.parametrize(
        ("study", "model", "number"),
        [
            ("tiny", "other.safetensors", 215),
            ("tiny", "early.safetensors", 215),
            ("tiny", "alone.safetensors", 215),
            ("another", "final.safetensors", 316),
            ("tiny", "absent.safetensors", 205),
        ],
    )
    def test_what_does_not_belong_together_is_refused(self, study: str, model: str, number: int, hospital: Path) -> None:
        code, output = self.run(hospital, study, model)
        assert code == 1
        assert f"ICM{number}" in output
        assert "Traceback" not in output
