"""A private study from approval to results: what is shown, what leaves, what is refused, what the server takes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from books import pay
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from test_client import ask, command, hospital, number_of, request, site, write_site_file, write_study_file
from test_run_sim import RUN_SIM, environment, run

from fl_client.approval import read_approvals
from fl_client.budget import Budget
from fl_client.ledger import read_ledger
from fl_client.policy import Policy, policy_faults
from fl_client.records import Records
from fl_server.replies import parse_replies
from icmoe.accounting import Spending, epsilon
from icmoe.config import parse
from icmoe.errors import IcmoeError
from icmoe.messages import CONFIG, NUMBERS, STUDY_KEY, UPDATE
from icmoe.profiles import LITE, spelled_out
from icmoe.study import Study, read_study

__all__ = ["environment", "hospital", "site"]
SITE = {"noise_multiplier": 2.0, "delta": 0.1, "patients": 4, "sample_rate": 0.5, "steps": 2, "accountant": "rdp"}


BUDGET = '{epsilon = 1000.0, delta = 0.1, accountant = "rdp"}'


def private_file(path: Path, make_study, **changes: object) -> Path:
    """The study as a hospital receives it."""
    write_study_file(path, make_study())
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**SITE, **changes}.items()]
    path.write_text(path.read_text() + "\n".join(["", "[privacy.site]", *lines, ""]))
    return path


@pytest.fixture(scope="module")
def withheld(make_study) -> Study:
    return make_study(privacy={"site": SITE})


@pytest.fixture(scope="module")
def noised(make_study) -> Study:
    return make_study(privacy={"site": {**SITE, "scores": "noised"}})


def test_loss_seconds_and_scores_stay_and_n_k_is_the_public_constant(site, withheld: Study) -> None:
    reply = ask(replace(site, studies=(withheld,)), request(withheld))
    numbers = reply.content[NUMBERS]
    assert set(numbers) == {"slices", "usage", "steps"}
    assert (numbers["slices"], numbers["steps"]) == (4, 2)
    assert sum(numbers["usage"]) == pytest.approx(1.0)
    introduction = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: withheld.digest})})
    about = ask(replace(site, studies=(withheld,)), introduction, "query.site")
    assert about.content[CONFIG]["slices"] == 4  # two patients of three slices are there
    evaluated = ask(replace(site, studies=(withheld,)), request(withheld), "evaluate")
    assert dict(evaluated.content[NUMBERS]) == {}


def test_noised_scores_leave_and_differ_each_time(site, noised: Study) -> None:
    private = replace(site, studies=(noised,))
    found = [ask(private, request(noised), "evaluate").content[NUMBERS] for _ in range(8)]
    assert all(set(numbers) == {"val-dice", "val-patients"} for numbers in found)
    assert all(0.0 <= numbers["val-dice"] <= 1.0 and numbers["val-patients"] >= 1 for numbers in found)
    assert len({numbers["val-dice"] for numbers in found}) > 1
    assert set(ask(private, request(noised)).content[NUMBERS]) == {"slices", "usage", "steps", "val-dice", "val-patients"}


def test_two_equal_requests_get_different_updates(site, withheld: Study) -> None:
    private = replace(site, studies=(withheld,))
    first, second = (ask(private, request(withheld)).content[UPDATE] for _ in range(2))
    assert any(first[name].data != second[name].data for name in first)


def test_a_summary_is_outside_the_budget_and_declined(site, withheld: Study) -> None:
    content = RecordDict({CONFIG: ConfigRecord({STUDY_KEY: withheld.digest})})
    sharing = replace(site, share_summary=True, studies=(withheld,))
    assert number_of(ask(sharing, content, "query.summary")) == 214


def test_a_site_with_too_few_patients_answers_by_number_and_sends_nothing(site, make_study) -> None:
    study = make_study(privacy={"site": {**SITE, "patients": 8}})
    reply = ask(replace(site, studies=(study,)), request(study))
    assert number_of(reply) == 402
    assert not reply.has_content()


def test_the_server_takes_what_a_private_site_sends_and_nothing_else(site, withheld: Study) -> None:
    reply = ask(replace(site, studies=(withheld,)), request(withheld))
    current = {name: array.numpy() for name, array in request(withheld)["arrays"].items()}

    def parsed(**numbers: object):
        content = RecordDict({UPDATE: reply.content[UPDATE], NUMBERS: MetricRecord({**reply.content[NUMBERS], **numbers})})
        message = Message(content, dst_node_id=5, message_type="train")
        message.metadata._src_node_id = 7  # as if it came from the node
        return parse_replies([message], {7: "Alder"}, withheld, current)

    ((update,), faults) = parsed()
    assert faults == []
    assert (update.size, update.loss, update.train_s, update.steps) == (4, None, None, 2)
    for wrong, said in (
        ({"loss": 0.5}, "withholds: loss"),
        ({"seconds": 1.0}, "withholds: seconds"),
        ({"slices": 6}, "public one: 6"),
    ):
        updates, (fault,) = parsed(**wrong)
        assert updates == []
        assert said in str(fault)


def test_approval_shows_epsilon_with_all_that_it_means(hospital: Path, make_study, tmp_path: Path) -> None:
    path = write_site_file(tmp_path, hospital, budget=BUDGET)
    shown = command(path, "approve", str(private_file(tmp_path / "study.toml", make_study)), "--yes")
    assert shown.exit_code == 0, shown.output + shown.stderr
    text = " ".join(shown.output.replace("│", " ").split())
    for said in (
        "epsilon",
        "delta 0.1",
        "unit: the patient with all slices",
        "adjacency: add or remove one patient",
        "accountant: rdp",
        "public number of patients 4",
        "2 of 2 steps of 2 patients expected",
        "both noised",
        "epsilon 1000 at delta 0.1 per patient, all studies together: 0 is spent",
    ):
        assert said in text, text
    assert "mean loss" not in text


def test_approval_is_refused_where_the_patients_do_not_fit(hospital: Path, make_study, tmp_path: Path) -> None:
    path = write_site_file(tmp_path, hospital, budget=BUDGET)
    done = command(path, "approve", str(private_file(tmp_path / "study.toml", make_study, patients=8)), "--yes")
    assert done.exit_code == 1
    assert "ICM402" in done.stderr
    assert "fewer patients than the batch: 2" in done.stderr
    assert not read_approvals(tmp_path / "state")


def test_the_policy_knows_the_studys_epsilon(withheld: Study, make_study) -> None:
    assert policy_faults(Policy(require_dp=True), withheld) == []
    assert policy_faults(Policy(max_epsilon=100.0), withheld) == []
    (fault,) = policy_faults(Policy(max_epsilon=0.5), withheld)
    assert fault.number == 319
    assert "epsilon is above the site's" in str(fault)
    faults = policy_faults(Policy(require_dp=True, max_epsilon=100.0), make_study())
    assert len(faults) == 2


def test_the_lite_profile_is_spelled_out_and_can_be_overruled(tmp_path: Path) -> None:
    labels = [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1]}]
    base = {"name": "x", "seed": 1, "labels": labels, "backbone": {"digest": "0" * 64}}
    lite = parse(Study, spelled_out({**base, "profile": "lite"}, where="x"), where="x")
    assert lite.model.bottleneck == LITE["model"]["bottleneck"]
    assert not lite.backbone.block_features
    assert "profile" not in lite.model_dump()
    wider = parse(Study, spelled_out({**base, "profile": "lite", "model": {"bottleneck": 16}}, where="x"), where="x")
    assert (wider.model.bottleneck, wider.model.semantic_experts) == (16, 1)
    text = f'profile = "light"\nname = "x"\nseed = 1\n[backbone]\ndigest = "{"0" * 64}"\n'
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(IcmoeError) as caught:
        read_study(tmp_path / "study.toml")
    assert "profile = 'light' (allowed: lite)" in str(caught.value)


def test_the_lite_profile_trains_about_forty_thousand_parameters() -> None:
    from icmoe.privacy import only_trained
    from simulations.benchmarks.private_step import build_model, lite_study

    study = lite_study()
    model = build_model(study, seed=1)
    with only_trained(model, study):
        assert 38_000 < sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad) < 46_000


def test_a_private_rehearsal_prints_its_promise(environment, tmp_path: Path) -> None:
    scenario, out = tmp_path / "private.toml", tmp_path / "out"
    scenario.write_text(
        '[study]\nrounds = 1\nprofile = "lite"\n[study.privacy.site]\nepsilon = 8.0\ndelta = 0.1\npatients = 2\n'
        'sample_rate = 0.5\nsteps = 2\n[simulation]\nmethods = ["router-aware"]\n'
    )
    done = run(
        [*RUN_SIM, "--scenario", str(scenario), "--backbone", "sam-vit-test", "--image-size", "64", "--out", str(out)],
        environment,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    promise = results["privacy"]
    assert 7.8 <= promise["epsilon"] <= 8.0
    assert (promise["delta"], promise["unit"], promise["accountant"]) == (0.1, "patient", "prv")
    said = "at delta 0.1 for each patient of a site (adjacency: add or remove one patient; accountant prv"
    assert said in done.stdout
    assert said in (out / "report.html").read_text()
    (record,) = results["methods"]["router-aware"]["1"]["rounds"]
    assert record["loss"] is None
    assert set(record["sites"]) == {"Alder", "Birch", "Cedar", "Dogwood"}


def test_the_evidence_asks_for_what_its_table_says() -> None:
    from simulations.evidence.privacy import VARIANTS, WARM_ALONE, Cohort, Run, study_of, table_of, wanted

    cohort = Cohort(patients=500, smallest=125, slices=1, sites={})
    plain, private = (study_of(cohort, target, "base", 2) for target in (None, 3.0))
    assert plain.privacy.site is None
    site = private.privacy.site
    assert site is not None
    assert (site.patients, site.delta, site.epsilon, site.sample_rate, site.slices_per_patient) == (125, 2e-4, 3.0, 0.224, 1)
    studies = {variant: study_of(cohort, 8.0, variant, 2).digest for variant in VARIANTS}
    assert studies.pop("warm-up") == studies["base"]  # the same study from another start
    assert len(set(studies.values())) == len(studies)
    assert study_of(cohort, 8.0, "full model", 2).model.experts == 6
    keys = list(wanted(3, ["sgd", WARM_ALONE]))
    assert len(set(keys)) == len(keys) == 4 * 3 + 2 * 3
    assert {target for target, variant, _ in keys if variant == WARM_ALONE} == {None}
    runs = [Run(100, 8.0, "base", seed, 0.1 * seed, 7.9, 3.5, 60.0, 800.0) for seed in (1, 2, 3)]
    assert table_of(runs).row_count == 1


def test_finished_runs_of_the_evidence_come_back_whole_or_are_refused_by_number(tmp_path: Path) -> None:
    from simulations.evidence.privacy import Run, finished

    path, run = tmp_path / "privacy.json", Run(100, None, "base", 1, 0.75, None, 0.0, 60.0, 800.0)
    assert finished(path) == []
    path.write_text(json.dumps([asdict(run)]))
    assert finished(path) == [run]
    for damaged in (path.read_text()[:-1], '[{"patients": 100}]', "{}"):
        path.write_text(damaged)
        with pytest.raises(IcmoeError, match="ICM525"):
            finished(path)
        assert path.read_text() == damaged


@pytest.mark.parametrize(("budget", "number"), [("", 410), ('{epsilon = 0.5, delta = 0.1, accountant = "rdp"}', 411)])
def test_approval_is_refused_where_the_budget_does_not_allow_it(
    budget: str, number: int, hospital: Path, make_study, tmp_path: Path
) -> None:
    path = write_site_file(tmp_path, hospital, **({"budget": budget} if budget else {}))
    done = command(path, "approve", str(private_file(tmp_path / "study.toml", make_study)), "--yes")
    assert (done.exit_code, f"ICM{number}" in done.stderr) == (1, True)
    assert read_approvals(tmp_path / "state") == ()


def test_a_study_without_privacy_is_not_approved_where_there_is_a_budget(hospital: Path, make_study, tmp_path: Path) -> None:
    path = write_site_file(tmp_path, hospital, budget=BUDGET)
    done = command(path, "approve", str(write_study_file(tmp_path / "study.toml", make_study())), "--yes")
    assert (done.exit_code, "ICM417" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    "budget", ["{epsilon = 0.0, delta = 0.1}", "{epsilon = -1.0, delta = 0.1}", "{epsilon = 1.0, delta = 1.0}"]
)
def test_a_budget_that_is_none_is_refused_by_number(budget: str, hospital: Path, tmp_path: Path) -> None:
    done = command(write_site_file(tmp_path, hospital, budget=budget), "ledger")
    assert (done.exit_code, "ICM202" in done.stderr) == (1, True)


def test_a_private_round_is_paid_for_before_and_refused_when_the_budget_is_used_up(site, withheld: Study, tmp_path: Path) -> None:
    one = epsilon([Spending(2.0, 0.5, 2)], delta=0.1, accountant="rdp")
    whole = epsilon([Spending(2.0, 0.5, 4)], delta=0.1, accountant="rdp")
    audited = replace(site, studies=(withheld,), audited=True, state_folder=tmp_path / "state")
    for budget, number in ((None, 410), (Budget(epsilon=0.5 * (one + whole), delta=0.1, accountant="rdp"), 411)):
        assert number_of(ask(replace(audited, budget=budget), request(withheld))) == number
    paying = replace(audited, budget=Budget(epsilon=whole, delta=0.1, accountant="rdp"))
    replies = [ask(paying, request(withheld, number)) for number in (1, 2, 2)]
    assert [reply.has_content() for reply in replies] == [True, True, True]
    assert all(replies[2].content[UPDATE][name].data == array.data for name, array in replies[1].content[UPDATE].items())
    assert number_of(ask(paying, request(withheld, 2, seed=2))) == 411  # another model is another round
    assert number_of(ask(replace(paying, budget=None), request(withheld, 1, seed=2))) == 410
    assert [entry.releases for entry in read_ledger(paying.state_folder, "Alder").entries] == [((2.0, 0.5, 2),)] * 2


@pytest.mark.parametrize("number", [411, 417])
def test_a_study_that_is_over_does_not_keep_the_site_from_starting(
    number: int, hospital: Path, make_study, tmp_path: Path
) -> None:
    """It has used up the budget, or had no privacy and the budget was written afterwards."""
    whole = Budget(epsilon=epsilon([Spending(2.0, 0.5, 4)], delta=0.1, accountant="rdp"), delta=0.1, accountant="rdp")
    after = f'{{epsilon = {whole.epsilon!r}, delta = 0.1, accountant = "rdp"}}'
    path, file = write_site_file(tmp_path, hospital, **({"budget": after} if number == 411 else {})), tmp_path / "study.toml"
    private_file(file, make_study) if number == 411 else write_study_file(file, make_study())
    assert command(path, "approve", str(file), "--yes").exit_code == 0
    write_site_file(tmp_path, hospital, budget=after)
    study, records = read_study(file), Records(state=tmp_path / "state", site="Alder")

    def faults() -> list[bool]:
        checks = json.loads(command(path, "check", "--json").stdout)["checks"]
        return [row["ok"] for row in checks if row["fault"] and row["fault"]["number"] == number]

    pay(records, study, 1, budget=whole if number == 411 else None, patients=4)
    assert faults() == ([] if number == 411 else [False])
    pay(records, study, 2, budget=whole if number == 411 else None, patients=4)
    assert faults() == [True]
    assert "withdraw tiny" in command(path, "check").stdout.replace("\n", " ")


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_budget_written_after_the_approval_excludes_a_study_without_privacy(kind: str, site, tmp_path: Path) -> None:
    budget = Budget(epsilon=1000.0, delta=0.1, accountant="rdp")
    audited = replace(site, audited=True, state_folder=tmp_path / "state", budget=budget)
    assert number_of(ask(audited, request(audited.studies[0]), kind)) == 417


def test_what_mixes_samples_or_lacks_patients_is_refused_before_anything_is_spent(site, make_study, tmp_path: Path) -> None:
    study = make_study(privacy={"site": {**SITE, "patients": 8}})
    budget = Budget(epsilon=1000.0, delta=0.1, accountant="rdp")
    audited = replace(site, studies=(study,), audited=True, state_folder=tmp_path / "state", budget=budget)
    assert number_of(ask(audited, request(study))) == 402
    assert read_ledger(audited.state_folder, "Alder").entries == ()
