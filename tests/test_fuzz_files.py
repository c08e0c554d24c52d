"""Every file that comes from elsewhere, made wrong in its bytes and in its fields: it is taken, or refused by number."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fuzzing import REAL, TEXTS, VALUES, WHOLE, Tree, accepted, bytes_of, fields_of, fuzz, toml
from hypothesis import given
from hypothesis import strategies as st
from loopback import NOW, Authority
from safetensors.numpy import save
from test_rounds import honest
from test_rounds import run as run_rounds_here

from fl_client.approval import approve, read_approvals
from fl_client.credentials import parse_ca
from fl_client.finished import finished_or, finished_path
from fl_client.kit import read_kit
from fl_client.manifest import Outgoing
from fl_client.site import read_site_file
from fl_server.certificates import make_key, server_certificate
from fl_server.consortium import read_consortium
from fl_server.outliers import outliers
from fl_server.receipts import receipt
from fl_server.run_state import RunState, latest_state
from icmoe.exchange import global_state
from icmoe.joining import CHECKSUMS, JoinRequest, checksum_text, fingerprint, key_digest, make_request, parse_request, proven_key
from icmoe.model import build_model
from icmoe.modelcard import SiteLine, write_card
from icmoe.modelfile import ModelHeader, read_model, write_model
from icmoe.receipts import Head, head_of, numbers_of, receipt_of, receipt_text
from icmoe.study import Study, read_study
from icmoe.summary import LabelSummary, SiteSummary, parse_summary
from icmoe.tensor_file import METADATA_KEY

CODE = {"scheme": "SCT", "value": "108369006", "meaning": "Neoplasm"}
LABELS = [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1, 255], "kind": CODE, "category": CODE}]
SITE_PRIVACY = {"noise_multiplier": 1.0, "delta": 1e-3, "patients": 100, "sample_rate": 0.2, "steps": 1}
SERVER = {"noise_multiplier": 1.0, "delta": 0.01, "sites": 3, "divisor": 1.0}
LOOSE = {"cap": 1.0, "min_contributors": 1, "shrinkage": False, "balance_step": 0.0}
STUDIES: dict[str, Tree] = {
    "plain": {"labels": LABELS},
    "private": {"labels": LABELS, "privacy": {"site": SITE_PRIVACY, "server": SERVER}, "aggregation": LOOSE},
    "robust": {"labels": LABELS, "quorum": 7, "aggregation": {"robust": "bulyan", "optimizer": "adam"}},
}
SITE = {
    "name": "Alder",
    "cache": "cache",
    "state": "state",
    "device": "cuda:0",
    "threads": 2,
    "share_summary": True,
    "ingest": {
        "folder": "/pacs",
        "labels": {"lesion": ["Tumor", "SCT:52988006"]},
        "exclude": ["*/old/*"],
        "patient_pattern": "^(P[0-9]+)/",
        "shares": [0.7, 0.1, 0.2],
    },
    "coordinator": {"address": "coordinator.example:443", "ca": "ca.crt", "key": "node.key", "health": "[::1]:50051"},
    "policy": {"min_quorum": 3, "labels": ["lesion"], "hours": "19:00-06:30", "max_epsilon": 8.0, "mantissa_bits": 10},
    "budget": {"epsilon": 8.0, "delta": 1e-4},
}
CONSORTIUM = {
    "name": "Lesion group",
    "valid_days": 300,
    "coordinator": {"address": "coordinator.example:443", "names": ["c.local", "10.0.0.1", "fe80::1"], "superlink_port": 8001},
    "sites": [{"name": "Alder"}, {"name": "Birch"}],
}
KIT = {"schema_version": 1, "consortium": "Lesion group", "site": "Alder", "address": "coordinator.example:443"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder / "authority")


@dataclass(frozen=True)
class Tables:
    """A kind of TOML file."""

    tree: Tree
    read: Callable[[Path], Any]

    def text(self, tree: Tree, path: Path) -> Any:
        path.write_text(toml(tree), encoding="utf-8")
        return self.read(path)


def tables(make_study, kind: str) -> Tables:
    if kind in STUDIES:
        tree = make_study(**STUDIES[kind]).model_dump(mode="json")
        return Tables(tree, read_study)
    return {"site": Tables(SITE, read_site_file), "consortium": Tables(CONSORTIUM, read_consortium)}[kind]


KINDS = [*STUDIES, "site", "consortium"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_wrong_below_is_right_at_first(kind: str, make_study, folder: Path) -> None:
    chosen = tables(make_study, kind)
    found = chosen.text(chosen.tree, folder / "right.toml")
    dumped = found.model_dump(mode="json", exclude_unset=kind not in STUDIES)
    assert dumped == (make_study(**STUDIES[kind]).model_dump(mode="json") if kind in STUDIES else chosen.tree)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@fuzz(50)
def test_a_table_with_fields_made_wrong(kind: str, data: st.DataObject, make_study, folder: Path) -> None:
    chosen = tables(make_study, kind)
    tree = data.draw(fields_of(chosen.tree))
    _taken(accepted(lambda: chosen.text(tree, folder / "fields.toml")), folder)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@fuzz(50)
def test_a_table_with_bytes_made_wrong(kind: str, data: st.DataObject, make_study, folder: Path) -> None:
    chosen, path = tables(make_study, kind), folder / "bytes.toml"
    path.write_bytes(data.draw(bytes_of(toml(chosen.tree).encode())))
    _taken(accepted(lambda: chosen.read(path)), folder)


def _taken(found: Any, folder: Path) -> None:
    """What was taken is whole: it can be written down and read again as the same."""
    if found is None:
        return
    again = type(found).model_validate_json(json.dumps(found.model_dump(mode="json"), allow_nan=False))
    assert again == found
    if isinstance(found, Study):
        assert again.digest == found.digest


@given(names=st.lists(st.from_regex(r"\A[A-Za-z0-9._:-]{1,253}\Z"), min_size=1, max_size=3))
@fuzz(60)
def test_every_name_that_a_consortium_may_hold_fits_a_certificate(names: list[str], folder: Path, authority: Authority) -> None:
    tree = {**CONSORTIUM, "coordinator": {**CONSORTIUM["coordinator"], "names": names}}
    found = accepted(lambda: Tables(tree, read_consortium).text(tree, folder / "names.toml"))
    if found is not None:
        ca, key = authority.certificate, authority.key
        server_certificate(found.coordinator.certificate_names, make_key().public_key(), ca, key, 1, NOW)


def kit_in(folder: Path, authority: Authority, changed: dict[str, bytes], *, resum: bool) -> Any:
    files = {"ca.crt": authority.path.read_bytes(), "kit.toml": toml(KIT).encode()}
    sums = checksum_text({**files, **(changed if resum else {})})
    kit = folder / "kit"
    kit.mkdir(exist_ok=True)
    for name, data in {**files, CHECKSUMS: sums, **changed}.items():
        (kit / name).write_bytes(data)
    found, read = read_kit(kit, "Alder")
    return found, key_digest(parse_ca(read["ca.crt"], where="ca.crt"))


@given(data=st.data(), name=st.sampled_from(["ca.crt", "kit.toml", CHECKSUMS]), resum=st.booleans())
@fuzz(80)
def test_a_kit_made_wrong(data: st.DataObject, name: str, resum: bool, folder: Path, authority: Authority) -> None:
    right = {"ca.crt": authority.path.read_bytes(), "kit.toml": toml(KIT).encode()}
    whole, digest = kit_in(folder, authority, {}, resum=False)
    assert whole.model_dump(mode="json") == KIT
    wrong = data.draw(bytes_of(right.get(name, checksum_text(right))))
    if name == "kit.toml" and data.draw(st.booleans()):
        wrong = toml(data.draw(fields_of(KIT))).encode()
    found = accepted(lambda: kit_in(folder, authority, {name: wrong}, resum=resum and name != CHECKSUMS))
    assert found is None or resum or found == (whole, digest), "what differs from its checksum is not taken"


@pytest.fixture(scope="module")
def asked(authority: Authority) -> JoinRequest:
    return make_request("Alder", ec.generate_private_key(ec.SECP384R1()), authority.certificate)


@given(data=st.data())
@fuzz(100)
def test_a_request_to_join_made_wrong(data: st.DataObject, asked: JoinRequest) -> None:
    def proven(text: bytes) -> tuple[str, str, str]:
        request = parse_request(text, where="request.json")
        return request.site, request.ca, fingerprint(proven_key(request, where="request.json"))

    right = asked.model_dump_json(indent=1).encode()
    truth = proven(right)
    if data.draw(st.booleans()):
        wrong = json.dumps(data.draw(fields_of(json.loads(right)) | VALUES)).encode()
    else:
        wrong = data.draw(bytes_of(right))
    found = accepted(lambda: proven(wrong))
    assert found in (None, truth), "a changed request proves nothing else than the right one"


WHOLE_SUMMARY = SiteSummary(
    images=90,
    patients=40,
    labels=(LabelSummary(patients=30, images=70), LabelSummary(patients=10, images=None)),
    modalities=("CT", "MR"),
    in_plane_mm=(0.8, 1.2),
    between_mm=(5.0, 5.0),
    side_px=(256, 512),
)


@given(data=st.data())
@fuzz(100)
def test_summaries_made_wrong_and_what_is_found_in_those_that_pass(data: st.DataObject) -> None:
    text = WHOLE_SUMMARY.text()
    assert parse_summary(text, 3, where="Alder") == WHOLE_SUMMARY
    found = {"Alder": WHOLE_SUMMARY}
    for name in ("Birch", "Cedar"):
        raw = data.draw(bytes_of(text.encode())).decode(errors="replace")
        wrong = data.draw(
            fields_of(json.loads(text)).map(lambda tree: json.dumps(tree, separators=(",", ":"))) | st.just(raw) | VALUES
        )
        summary = accepted(lambda wrong=wrong: parse_summary(wrong, 3, where="Birch"))
        if summary is not None:
            assert summary.text() == wrong
            found[name] = summary
    found |= {"Dogwood": WHOLE_SUMMARY}
    assert all(str(finding).isprintable() for finding in outliers(found, ["background", "lesion", "rim"]))


HEADS = st.builds(Head, st.integers(0, 10**15 - 1), st.from_regex(r"\A[0-9a-f]{64}\Z"))


WORDS = st.tuples(st.integers(0, 2**53), *[st.integers(0, 2**32)] * 8).map(list)


@given(head=HEADS, wrong=VALUES | WORDS | st.lists(WHOLE | REAL, min_size=9, max_size=9))
@fuzz(300)
def test_a_receipt_made_wrong(head: Head, wrong: object, folder: Path) -> None:
    assert receipt_of(receipt_text(head)) == head == head_of(numbers_of(head))
    found = head_of(wrong)
    assert found is None or receipt_of(receipt_text(found)) == found, "what is kept can be handed back"
    assert receipt_of(wrong) is None or receipt_text(receipt_of(wrong)) == wrong
    (folder / "Alder.receipt").write_text(str(wrong), encoding="utf-8")
    assert isinstance(receipt(folder, "Alder"), Head)


@given(data=st.data())
@fuzz(100)
def test_a_receipt_file_with_bytes_made_wrong(data: st.DataObject, folder: Path) -> None:
    head = Head(17, "ab" * 32)
    (folder / "Birch.receipt").write_bytes(data.draw(bytes_of(receipt_text(head).encode())))
    assert isinstance(receipt(folder, "Birch"), Head)


def written(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Path:
    path.unlink(missing_ok=True)  # a reader may still have the old one mapped
    path.write_bytes(save(tensors, metadata=metadata))
    return path


BITS = {
    "BOOL": 8,
    "F4": 4,
    "U8": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "C64": 64,
    "F64": 64,
    "I64": 64,
}


def header_changed(content: bytes, data: st.DataObject) -> bytes:
    """Return a safetensors file whose table of tensors and whose metadata have fields changed."""
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    spoken = [key for key, text in table["__metadata__"].items() if text.startswith("{")]
    what = data.draw(st.sampled_from(["type", "spoken", "any"]))
    if what == "type":
        one = table[data.draw(st.sampled_from(sorted(set(table) - {"__metadata__"})))]
        first, last = one["data_offsets"]
        kind = data.draw(st.sampled_from(sorted(BITS)))
        one |= {"dtype": kind, "shape": [8 * (last - first) // BITS[kind]]}
    elif what == "spoken":
        for key in spoken:
            table["__metadata__"][key] = json.dumps(data.draw(fields_of(json.loads(table["__metadata__"][key]))))
    else:
        table = data.draw(fields_of(table))
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def wrong_tensors(content: bytes, data: st.DataObject) -> bytes:
    return header_changed(content, data) if data.draw(st.booleans()) else data.draw(bytes_of(content))


@given(data=st.data())
@fuzz(70)
def test_a_model_file_made_wrong(data: st.DataObject, make_study, folder: Path) -> None:
    study, path = make_study(), folder / "model.safetensors"
    header = ModelHeader(study=study, method="router-aware", round=2, phantoms=True)
    path.unlink(missing_ok=True)
    write_model(path, global_state(build_model(study, seed=7)), header)
    assert read_model(path)[1] == header
    content = path.read_bytes()
    if data.draw(st.booleans()):
        about = json.loads(header.metadata()[METADATA_KEY])
        wrong = data.draw(fields_of(about))
        small = {key: value for key, value in wrong.items() if key != "study"} | {"study": about["study"]}
        state = {name: tensor.numpy() for name, tensor in global_state(build_model(study, seed=7)).items()}
        content = save(state, metadata={METADATA_KEY: json.dumps(small if data.draw(st.booleans()) else wrong)})
    else:
        content = wrong_tensors(content, data)
    path.unlink()
    path.write_bytes(content)
    accepted(lambda: read_model(path))


@given(method=TEXTS, names=st.lists(TEXTS, max_size=4))
@fuzz(50)
def test_a_card_keeps_its_form_whatever_is_called_how(method: str, names: list[str], make_study, folder: Path) -> None:
    header = ModelHeader(study=make_study(), method=method, round=2, phantoms=True)
    (folder / "card.safetensors").write_bytes(b"")
    lines = []
    for each, called in ((header.model_copy(update={"method": "m"}), ["Alder"] * len(names)), (header, names)):
        rows = [SiteLine(name=name, patients=10, dice=0.5) for name in called]
        lines.append(write_card(folder / "card.safetensors", each, rows, scored_on="x").read_text().split("\n"))
    usual, found = lines
    assert len(found) == len(usual)
    for line, other in zip(found, usual, strict=True):
        assert line[:2] == other[:2]
        assert line.replace("\\|", "").count("|") == other.count("|")


@given(data=st.data())
@fuzz(50)
def test_a_committed_state_made_wrong_is_never_taken_for_another(data: st.DataObject, make_study, folder: Path) -> None:
    study, path = make_study(rounds=1), folder / "study.state.safetensors"
    if not path.exists():
        run_rounds_here(study, path, honest)
        (folder / "right").write_bytes(path.read_bytes())
    content = (folder / "right").read_bytes()
    path.unlink()
    path.write_bytes(content)
    right = RunState.load(path, study)
    path.unlink()
    path.write_bytes(wrong_tensors(content, data))
    found = accepted(lambda: latest_state(path, study))
    if found is not None:
        assert (found.round, found.closed, found.history) == (right.round, right.closed, right.history)
        assert {name: tensor.tobytes() for name, tensor in found.arrays.items()} == {
            name: tensor.tobytes() for name, tensor in right.arrays.items()
        }


@given(data=st.data())
@fuzz(80)
def test_a_kept_approval_made_wrong(data: st.DataObject, make_study, folder: Path) -> None:
    studies = {one.digest: one for one in (make_study(**STUDIES["plain"], name=name) for name in ("tiny", "second"))}
    state = folder / "state"
    for study in studies.values():
        approve(state, study, "0" * 64, NOW)
    path = state / "approvals" / f"{min(studies)}.json"
    content = path.read_bytes()
    assert len(read_approvals(state)) == 2
    fields = fields_of(json.loads(content)).map(lambda tree: json.dumps(tree).encode())
    path.write_bytes(data.draw(fields | bytes_of(content)))
    found = accepted(lambda: read_approvals(state))
    assert found is None or {one.study.digest: one.study for one in found} == studies


@given(data=st.data())
@fuzz(50)
def test_a_finished_update_made_wrong_never_leaves_as_another(data: st.DataObject, make_study, folder: Path) -> None:
    study, state = make_study(), folder / "finished"
    tensors = {name: tensor for name, tensor in global_state(build_model(study, seed=7)).items() if name.startswith("head.")}
    right = Outgoing(tensors=tensors, numbers={"slices": 10, "usage": [0.25, 0.25, 0.5], "loss": 0.5})
    path = finished_path(state, study, 1, "0" * 64)
    path.unlink(missing_ok=True)
    finished_or(state, study, 1, "0" * 64, lambda: right)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(wrong_tensors(content, data))
    found = finished_or(state, study, 1, "0" * 64, lambda: right)
    assert dict(found.numbers) == right.numbers
    assert {name: tensor.numpy().tobytes() for name, tensor in found.tensors.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in tensors.items()
    }
