"""Attacks on seeded patients: they find what is there to find, and little where the step is private; the command says so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from icmoe.cli import app
from icmoe.exchange import global_state
from icmoe.model import build_model
from icmoe.modelfile import ModelHeader, write_model
from icmoe.privacy_audit import run
from icmoe.privacy_audit.canaries import audit_canaries
from icmoe.privacy_audit.checks import Finding
from icmoe.privacy_audit.inversion import invert_gradient
from icmoe.privacy_audit.membership import balanced_halves, likelihood_ratios, membership_attack, roc
from icmoe.privacy_audit.seeded import objective_of, seeded_bytes, seeded_rows, seeded_study
from icmoe.study_privacy import SitePrivacy

SITE = SitePrivacy(noise_multiplier=4.0, delta=1e-3, patients=12, sample_rate=0.25, steps=4)


@pytest.fixture(scope="module")
def private():
    return seeded_study(SITE)


@pytest.fixture(scope="module")
def plain(private):
    training = private.training.model_copy(update={"local_epochs": 20, "learning_rate": 1e-2})
    return private.model_copy(update={"privacy": private.privacy.model_copy(update={"site": None}), "training": training})


def test_the_curve_by_hand() -> None:
    assert roc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == (1.0, 1.0)
    assert roc(np.array([1.0, 4.0]), np.array([2.0, 3.0])) == (0.5, 0.5)
    assert roc(np.zeros(5), np.zeros(7)) == (0.5, 0.0)
    others = np.arange(200.0)  # two may be accused: the threshold is the third
    assert roc(np.array([197.0, 197.5, 198.5, 300.0]), others)[1] == 0.75


def test_each_patient_is_in_half_of_the_trainings() -> None:
    member_TP = balanced_halves(8, 30, seed=1)
    assert (member_TP.sum(axis=0) == 4).all()
    assert len({tuple(row) for row in member_TP.tolist()}) == 8


def test_the_ratio_allows_for_patients_that_are_always_easy() -> None:
    rng = np.random.default_rng(0)
    member_TP = balanced_halves(8, 300, seed=0)
    hardness_P = 10.0 * rng.standard_normal(300)
    loss_TP = hardness_P - 2.0 * member_TP + 0.3 * rng.standard_normal((8, 300))
    scores_TP = likelihood_ratios(loss_TP, member_TP)
    assert roc(scores_TP[member_TP], scores_TP[~member_TP])[0] > 0.99
    assert roc(-loss_TP[member_TP], -loss_TP[~member_TP])[0] < 0.6  # the loss alone says little
    nothing_TP = hardness_P + 0.3 * rng.standard_normal((8, 300))
    scores_TP = likelihood_ratios(nothing_TP, member_TP)
    assert roc(scores_TP[member_TP], scores_TP[~member_TP])[0] == pytest.approx(0.5, abs=0.05)


def test_members_are_found_after_plain_training_and_hardly_after_private(plain, private) -> None:
    def attacked(study):
        data = seeded_rows(study, [1] * 32, seed=0)
        return membership_attack(build_model(study, seed=1), study, data, models=6, rounds=1, seed=0)

    found = attacked(plain)
    assert found.auc > 0.66
    assert found.tpr_at_1_fpr > 0.05
    # The noise is the operating system's. 35 attacks were seen to have mean 0.50 and standard deviation 0.066: six, 0.027.
    assert np.mean([attacked(private).auc for _ in range(6)]) < 0.62


def test_features_are_read_back_from_a_plain_gradient_and_not_from_a_noised_one(plain, private) -> None:
    """An attacker begins anew where a guess leads nowhere; which one does hangs on the last bits, so on the processor too."""

    def read_back(study, iterations: int):
        data, model = seeded_rows(study, [1, 1], seed=1), objective_of(study).model
        return (invert_gradient(model, study, data, sigma=4.0, iterations=iterations, seed=seed) for seed in range(1, 7))

    found = next((one for one in read_back(plain, 300) if one.cosine > 0.45), None)
    assert found is not None
    assert abs(found.random_cosine) < 0.3  # 64 numbers: the standard deviation of chance is 1/8
    assert found.psnr_db > found.random_psnr_db + 2.0
    assert all(one.cosine < 0.4 for one in read_back(private, 100))


def test_of_several_guesses_the_one_that_fits_the_release_best_is_kept(plain) -> None:
    def attacked(starts: int, numbers: list[int]):
        data, model = seeded_rows(plain, [1, 1], seed=1), objective_of(plain).model
        told = {"starts": starts, "on_start": numbers.append}
        return invert_gradient(model, plain, data, sigma=0.0, iterations=20, seed=0, **told)

    numbers: list[int] = []
    tried = [attacked(starts, numbers) for starts in (1, 2, 3)]
    assert numbers == [1, 1, 2, 1, 2, 3]
    assert tried[0].mismatch >= tried[1].mismatch >= tried[2].mismatch
    assert tried[0].mismatch > tried[2].mismatch  # a later guess was better
    assert tried[0].random_cosine != tried[2].random_cosine
    assert tried[2].starts == 3


def test_noise_of_the_router_does_not_keep_the_attack_from_its_steps(plain) -> None:
    noisy = plain.model_copy(update={"model": plain.model.model_copy(update={"router_noise": 5.0})})
    data, model = seeded_rows(noisy, [1, 1], seed=1), objective_of(noisy).model
    assert invert_gradient(model, noisy, data, sigma=0.0, iterations=40, seed=0).mismatch < 0.1


def test_canaries_that_are_sampled_over_many_steps_keep_the_claim_and_show_less_noise() -> None:
    """Rate 1/4, 40 steps, noise 1.5: epsilon 5.08 at 1e-4 by PRV; half the noise shows in the bound, not above the claim."""
    privacy = SitePrivacy(noise_multiplier=1.5, delta=1e-4, patients=1000, sample_rate=0.25, steps=40)
    right, wrong = (
        audit_canaries(privacy, sigma=sigma, steps=40, claimed_epsilon=5.08, canaries=1000, seed=1) for sigma in (1.5, 0.75)
    )
    assert right.kept
    assert right.lower_bound > 0.9
    assert wrong.lower_bound > right.lower_bound + 0.5


def write(path, study) -> str:
    header = ModelHeader(study=study, method="router-aware", round=1, phantoms=True)
    write_model(path, global_state(build_model(study, seed=1)), header)
    return str(path)


def test_the_command_prints_claim_bound_and_attacks(private, plain, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_ITERATIONS", 5)
    monkeypatch.setattr(run, "_MODELS", 6)
    quick = plain.model_copy(update={"training": plain.training.model_copy(update={"local_epochs": 1})})
    answers = {}
    for name, study in {"private": private, "plain": quick}.items():
        path = write(tmp_path / f"{name}.safetensors", study)
        result = CliRunner().invoke(app, ["audit-privacy", "--model", path, "--canaries", "1000", "--json"])
        assert result.exit_code == 0, result.output
        answers[name] = json.loads(result.stdout)
    claim, found = answers["private"]["claim"], answers["private"]["canaries"]
    assert (claim["unit"], claim["delta"], claim["accountant"]) == ("patient", 1e-3, "prv")
    assert 0.0 <= found["lower_bound"] <= claim["epsilon"] == found["claimed_epsilon"]
    assert found["canaries"] == 1000
    assert found["steps"] == 4
    assert {"auc", "tpr_at_1_fpr"} <= answers["private"]["membership"].keys()
    assert answers["plain"]["inversion"]["starts"] == 6  # as many as the test above lets an attacker have
    assert "consistent with the claim" in answers["private"]["meaning"]
    assert answers["plain"]["claim"] is answers["plain"]["canaries"] is None
    assert "promises a patient nothing" in answers["plain"]["meaning"]


def test_a_refuted_claim_is_an_error(private, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_ITERATIONS", 1)
    monkeypatch.setattr(run, "_MODELS", 6)
    monkeypatch.setattr("icmoe.privacy.noised", lambda total, setting, sigma: total / setting.expected_batch)
    path = write(tmp_path / "model.safetensors", private.model_copy(update={"rounds": 4}))
    result = CliRunner().invoke(app, ["audit-privacy", "--model", path, "--canaries", "1000"])
    assert result.exit_code == 1
    assert "ICM425" in result.output
    assert "refutes the claim" in result.output


def test_something_to_audit_has_to_be_named() -> None:
    result = CliRunner().invoke(app, ["audit-privacy"])
    assert result.exit_code == 1
    assert "ICM210" in result.output


def test_a_mixture_is_refused(private, tmp_path) -> None:
    member = {f"{name}|{key}": tensor for name in "ab" for key, tensor in global_state(build_model(private, seed=1)).items()}
    header = ModelHeader(study=private, method="personalised", round=1, phantoms=True, weights={"a": 0.5, "b": 0.5})
    write_model(tmp_path / "mixture.safetensors", member, header)
    result = CliRunner().invoke(app, ["audit-privacy", "--model", str(tmp_path / "mixture.safetensors")])
    assert result.exit_code == 1
    assert "ICM426" in result.output


def test_patients_that_do_not_fit_into_memory_are_refused_before_any_is_drawn(private, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "audit_canaries", lambda *_, **__: pytest.fail("minutes of work are lost"))
    monkeypatch.setattr(run, "seeded_rows", lambda *_, **__: pytest.fail("drawn"))
    monkeypatch.setattr("icmoe.memory._available_bytes", lambda: 2 * 10**6)
    rare = private.privacy.site.model_copy(update={"sample_rate": 0.001, "patients": 10_000, "delta": 1e-5})
    study = private.model_copy(update={"privacy": private.privacy.model_copy(update={"site": rare})})
    result = CliRunner().invoke(app, ["audit-privacy", "--model", write(tmp_path / "model.safetensors", study)])
    assert result.exit_code == 1
    assert "ICM315" in result.output
    assert "for 4000 (allowed: 0.0 GB, which are free). Nothing was audited." in " ".join(result.output.split())


def test_the_memory_that_seeded_patients_take_is_foretold(private) -> None:
    data = seeded_rows(private, [1] * 8, seed=1)
    tensors = [data.batch.features.embedding_BCHW, *data.batch.features.blocks, data.batch.target_BKhw]
    assert seeded_bytes(private, 8) == 1.5 * sum(tensor.nbytes for tensor in tensors)


def test_a_model_that_cannot_be_audited_is_refused_before_the_checks_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmoe.privacy_audit.report.run_checks", lambda say: pytest.fail(f"{say}: minutes of work are lost"))
    result = CliRunner().invoke(app, ["audit-privacy", "--model", str(tmp_path / "absent"), "--checks"])
    assert result.exit_code == 1
    assert "ICM205" in result.output


def test_a_check_that_finds_something_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Finding("fresh_noise", passed=False, measured=0.9, limit=0.1, what="correlation")
    monkeypatch.setattr("icmoe.privacy_audit.report.run_checks", lambda _: [found])
    result = CliRunner().invoke(app, ["audit-privacy", "--checks"])
    assert result.exit_code == 1
    assert "ICM425 fresh_noise" in result.output
