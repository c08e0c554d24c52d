"""The only way out: what the study declares leaves, anything else is held back by number and the log says what."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from test_client import ask, hospital, number_of, request, site

from fl_client.audit import read_log
from fl_client.egress import Request, release, rounded_to
from fl_client.ledger import read_ledger
from fl_client.manifest import Outgoing, manifest_of, update_shapes
from fl_client.participant import Participant
from fl_client.policy import Policy
from icmoe.errors import IcmoeError
from icmoe.exchange import state_digest
from icmoe.messages import NUMBERS, UPDATE
from icmoe.receipts import AUDIT_KEY, LEDGER_KEY, head_of
from icmoe.study import Study

__all__ = ["hospital", "site"]
ROOT = Path(__file__).parents[1]
CONTENT = {"RecordDict", "ArrayRecord", "MetricRecord", "ConfigRecord", "Array"}


@pytest.fixture
def audited(site: Participant, tmp_path: Path) -> Participant:
    return replace(site, audited=True, state_folder=tmp_path / "state")


def calls(path: Path) -> set[str]:
    """Return the names that a module calls, whatever stands before the dot."""
    functions = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {function.id if isinstance(function, ast.Name) else getattr(function, "attr", "") for function in functions}


def imported(path: Path) -> set[str]:
    """Return the names under which Flower's parts are known in a module, and what they were called before."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
            found |= {alias.name for alias in node.names} | {alias.asname or "" for alias in node.names}
    return found


def test_no_other_module_of_the_site_makes_a_message_or_a_record_of_one() -> None:
    for path in sorted((ROOT / "fl_client").glob("*.py")):
        if path.name == "egress.py":
            assert calls(path) >= {"Message", *CONTENT}  # the search finds them where they are
            continue
        assert not (calls(path) | imported(path)) & CONTENT, path
        assert "Message" not in calls(path), path
        if path.name != "flower_private.py":  # which replaces what Flower itself answers for a process that died
            assert not calls(path) & {"Error", "make_message"}, path


def usual(study: Study) -> Outgoing:
    """Return an answer as training makes it."""
    experts = study.model.experts
    return Outgoing(
        tensors={name: torch.full(shape, 1e-3) for name, shape in update_shapes(study).items()},
        numbers={
            "slices": 10,
            "usage": [1.0 / experts] * experts,
            "loss": 0.7,
            "steps": 4,
            "seconds": 0.5,
            "val-dice": 0.4,
            "val-patients": 1,
        },
    )


def faults(study: Study, outgoing: Outgoing, kind: str = "train", **settings: object) -> list[str]:
    return list(manifest_of(study, "Alder", kind, **settings).faults(outgoing))


def with_number(outgoing: Outgoing, key: str, value: object) -> Outgoing:
    return replace(outgoing, numbers={**(outgoing.numbers or {}), key: value})


def with_tensor(outgoing: Outgoing, value: object, name: str = "head.classify.bias") -> Outgoing:
    return replace(outgoing, tensors={**(outgoing.tensors or {}), name: value})


def test_what_the_study_declares_may_leave(make_study) -> None:
    for study in (make_study(), make_study(aggregation={"personal": True}), make_study(model={"adaptive_experts": 0})):
        assert faults(study, usual(study)) == []
    study = make_study()
    scores = Outgoing(numbers={"val-dice": 0.0, "val-patients": 0})
    assert faults(study, scores, "evaluate") == []
    assert faults(study, Outgoing(texts={"site": "Alder", "slices": 20}), "site") == []
    assert faults(study, Outgoing(texts={"site": "Alder", "slices": 17}), "site", exact=True) == []


SITE = {"noise_multiplier": 2.0, "delta": 1e-3, "patients": 23, "sample_rate": 0.2, "steps": 5}


def test_under_privacy_only_public_constants_go_with_the_update(make_study) -> None:
    study = make_study(privacy={"site": SITE})
    whole = usual(study)
    constants = {"slices": 23, "usage": whole.numbers["usage"], "steps": 5}
    assert faults(study, replace(whole, numbers=constants)) == []
    for key, value in (("loss", 0.7), ("seconds", 0.5), ("val-dice", 0.4), ("slices", 20), ("slices", 24), ("steps", 4)):
        assert faults(study, replace(whole, numbers={**constants, key: value})), key
    noised = make_study(privacy={"site": {**SITE, "scores": "noised"}})
    assert faults(noised, replace(whole, numbers={**constants, "val-dice": 0.4, "val-patients": 3})) == []


BAD_NUMBERS: dict[str, list[object]] = {
    "slices": [0, 7, 15, -10, 10.0, True, 10**9, [10], "10"],
    "usage": [
        [],
        [1.0],
        [0.5, 0.5, 0.5],
        [0.505, 0.25, 0.25],
        [1.5, -0.5, 0.0],
        [math.nan, 0.5, 0.5],
        [1, 0, 0],
        1.0,
        "1",
        [[1.0], [0.0], [0.0]],
    ],
    "loss": [math.nan, math.inf, -1e7, "0.7", [0.7], True],
    "steps": [0, -1, 4.0, True, 10**9],
    "seconds": [-1.0, math.inf, math.nan, 1e9],
    "val-dice": [-0.1, 1.1, math.nan, "0.4"],
    "val-patients": [-1, 1.0, True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_NUMBERS.items() for value in values])
def test_a_number_of_another_type_or_range_is_held_back(key: str, value: object, make_study) -> None:
    study = make_study()
    (fault,) = faults(study, with_number(usual(study), key, value))
    assert fault.startswith(f"{key} is not ")


BAD_TENSORS: dict[str, Callable[[torch.Tensor], object]] = {
    "float64": lambda tensor: tensor.double(),
    "float16": lambda tensor: tensor.half(),
    "whole numbers": lambda tensor: tensor.int(),
    "another shape": lambda tensor: tensor[:1],
    "one dimension more": lambda tensor: tensor[None],
    "NaN": lambda tensor: torch.full_like(tensor, math.nan),
    "infinity": lambda tensor: torch.full_like(tensor, math.inf),
    "too far": lambda tensor: torch.full_like(tensor, 1e9),
    "no tensor": lambda tensor: tensor.tolist(),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_tensor_that_is_not_declared_is_held_back(name: str, make_study) -> None:
    study = make_study()
    whole = usual(study)
    bad = BAD_TENSORS[name](whole.tensors["head.classify.bias"])
    assert len(faults(study, with_tensor(whole, bad))) == 1


KEYS = st.text(min_size=1, max_size=30)
VALUES = st.one_of(st.integers(), st.floats(), st.lists(st.floats(), max_size=4), st.booleans(), st.text(max_size=9))


@settings(max_examples=150, deadline=None)
@given(extra=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), part=st.sampled_from(["tensors", "numbers", "texts"]))
def test_whatever_is_added_is_held_back(make_study, extra: dict[str, object], part: str) -> None:
    study = make_study()
    whole = usual(study)
    before = getattr(whole, part) or {}
    extra = {key: value for key, value in extra.items() if key not in before}
    values = {key: torch.zeros(2) for key in extra} if part == "tensors" else extra
    found = faults(study, replace(whole, **{part: {**before, **values}}))
    assert bool(found) == (bool(extra) or part == "texts")
    assert not any(key in fault for key in extra for fault in found if len(key) > 12)  # nor does the log repeat its name


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_left_out_or_replaced_is_held_back(make_study, data: st.DataObject) -> None:
    study = make_study()
    whole = usual(study)
    part = data.draw(st.sampled_from(["tensors", "numbers"]))
    values = dict(getattr(whole, part))
    key = data.draw(st.sampled_from(sorted(values)))
    value = data.draw(st.one_of(st.none(), st.text(max_size=9), st.booleans(), st.just(math.nan), st.binary(max_size=4)))
    if data.draw(st.booleans()):
        del values[key]
    else:
        values[key] = value
    assert faults(study, replace(whole, **{part: values}))


@given(text=st.text(max_size=200))
def test_no_text_but_a_summary_leaves_as_one(make_study, text: str) -> None:
    study = make_study()
    assert faults(study, Outgoing(texts={"summary": text}), "summary")
    assert text == "Alder" or faults(study, Outgoing(texts={"site": text, "slices": 10}), "site")


def test_the_norm_of_an_update_is_bounded_by_study_and_site(make_study) -> None:
    study = make_study()
    whole = usual(study)
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in whole.tensors.values()))
    assert faults(study, whole, largest_norm=1.01 * norm) == []
    assert faults(study, whole, largest_norm=0.99 * norm) == [f"norm of the update is above {0.99 * norm:.4g}"]
    manifest = manifest_of(study, "Alder", "train", largest_norm=1e30)
    assert manifest.largest_norm == manifest_of(study, "Alder", "train").largest_norm  # a site can only lower it


def asked(site: Participant, kind: str = "train") -> Request:
    study = site.studies[0]
    message = Message(request(study), dst_node_id=5, message_type=kind)
    return Request(site=site, study=study, kind=kind, round_number=1, message=message)


def test_the_exact_number_of_images_leaves_a_simulation_only(audited: Participant) -> None:
    exact = with_number(usual(audited.studies[0]), "slices", 6)
    with pytest.raises(IcmoeError, match="slices is not a whole number from 10 to "):
        release(asked(audited), exact)
    assert release(asked(replace(audited, exact_counts=True)), exact).content[NUMBERS]["slices"] == 6


def test_the_norm_that_a_site_allows_holds_for_what_it_trained(audited: Participant) -> None:
    strict = replace(audited, policy=Policy(largest_update_norm=1e-6))
    assert number_of(ask(strict, request(audited.studies[0]))) == 416
    held = next(line for line in read_log(audited.state_folder) if line["event"] == "held back")
    assert held["why"] == ["norm of the update is above 1e-06"]


def test_what_is_held_back_is_in_the_log_without_its_value(audited: Participant) -> None:
    secret = "Mustermann-1970"
    whole = with_number(usual(audited.studies[0]), secret, 1.0)
    with pytest.raises(IcmoeError, match="ICM416 Alder, train: release is not what the study declares: 1 names"):
        release(asked(audited), whole)
    (line,) = read_log(audited.state_folder)
    assert (line["event"], line["why"]) == ("held back", ["1 names that are not declared"])
    assert secret.encode() not in (audited.state_folder / "audit.jsonl").read_bytes()


def test_a_bad_update_of_training_is_refused_by_number_and_the_round_is_spent(audited: Participant, monkeypatch) -> None:
    monkeypatch.setattr("fl_client.app.train_here", lambda *_: {"images": [1.0] * 64})
    reply = ask(audited, request(audited.studies[0]))
    assert number_of(reply) == 416
    assert [line["event"] for line in read_log(audited.state_folder)] == ["received", "spent", "held back", "declined"]
    assert len(read_ledger(audited.state_folder, "Alder").entries) == 1


def test_a_simulated_site_is_guarded_too(site: Participant, monkeypatch) -> None:
    monkeypatch.setattr("fl_client.app.train_here", lambda *_: {"images": [1.0] * 64})
    assert number_of(ask(site, request(site.studies[0]))) == 416


def test_how_far_the_records_have_come_goes_with_every_update(audited: Participant) -> None:
    reply = ask(audited, request(audited.studies[0]))
    numbers, last = reply.content[NUMBERS], read_log(audited.state_folder)[-1]
    assert head_of(list(numbers[LEDGER_KEY])) == read_ledger(audited.state_folder, "Alder").head
    audit = head_of(list(numbers[AUDIT_KEY]))
    assert (audit.count, audit.digest) == (last["line"], last["hash"])
    assert set(last["numbers"]) == set(numbers) - {LEDGER_KEY, AUDIT_KEY}


def test_a_refusal_is_written_down_as_well(audited: Participant) -> None:
    assert number_of(ask(audited, request(audited.studies[0], 1), "query.summary")) == 301
    assert number_of(ask(replace(audited, val=(), cache_folder=Path("nowhere")), request(audited.studies[0]))) == 111
    line = read_log(audited.state_folder)[-1]
    assert (line["event"], line["number"], line["kind"], line["round"]) == ("declined", 111, "train", 1)


def test_the_number_of_a_refusal_leaves_also_where_the_log_cannot_be_written(audited: Participant) -> None:
    (audited.state_folder / "audit.jsonl").mkdir(parents=True)
    assert number_of(ask(audited, request(audited.studies[0]))) == 335


def test_a_site_may_send_fewer_bits(audited: Participant) -> None:
    coarse = replace(audited, policy=Policy(mantissa_bits=8))
    arrays = ask(coarse, request(audited.studies[0])).content[UPDATE]
    sent = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    bits = torch.cat([tensor.flatten() for tensor in sent.values()]).view(torch.int32)
    assert not bool((bits & (2**15 - 1)).any())
    assert bool(bits.any())
    assert read_log(audited.state_folder)[-1]["digest"] == state_digest(sent)


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=20), bits=st.integers(4, 23))
def test_rounding_stays_within_half_a_unit_of_the_last_bit(values: list[float], bits: int) -> None:
    exact = torch.tensor(values)
    rounded = rounded_to(exact, bits)
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(rounded), finite)
    error = (rounded - exact).double().abs()[finite]
    allowed = exact.double().abs()[finite] * 2.0**-bits + 2.0 ** (-126 - bits)  # half of it, but at the largest floats
    assert bool((error <= allowed).all())
    ordinary = exact.double().abs()[finite] < 2.0**127
    assert bool((error[ordinary] <= 0.5 * allowed[ordinary]).all())
    assert torch.equal(rounded_to(rounded, bits)[finite], rounded[finite])
