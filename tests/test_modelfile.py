"""Model files: what is written is read back, equal content gives equal bytes, anything else is refused by number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icmoe.errors import IcmoeError
from icmoe.exchange import global_state, state_digest
from icmoe.model import build_model
from icmoe.modelfile import ModelHeader, read_model, write_model
from icmoe.tensor_file import METADATA_KEY


@pytest.fixture
def header(make_study) -> ModelHeader:
    return ModelHeader(study=make_study(), method="router-aware", round=2, phantoms=True)


@pytest.fixture
def state(header: ModelHeader) -> dict[str, torch.Tensor]:
    return global_state(build_model(header.study, seed=7))


def refusal(path: Path) -> str:
    with pytest.raises(IcmoeError) as caught:
        read_model(path)
    return str(caught.value)


def tampered(header: ModelHeader, **changes: object) -> dict[str, str]:
    return {METADATA_KEY: json.dumps(json.loads(header.metadata()[METADATA_KEY]) | changes)}


def test_round_trip(header: ModelHeader, state, tmp_path: Path) -> None:
    write_model(tmp_path / "m.safetensors", state, header)
    model, found = read_model(tmp_path / "m.safetensors")
    assert found == header
    assert not model.training
    assert state_digest(global_state(model)) == state_digest(state)


def test_equal_content_gives_equal_bytes_whatever_the_order(header: ModelHeader, state, tmp_path: Path) -> None:
    write_model(tmp_path / "a", state, header)
    write_model(tmp_path / "b", dict(reversed(state.items())), header)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_left_when_writing_fails(header: ModelHeader, state, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(OSError, match=r"m\.safetensors"):
        write_model(tmp_path / "m.safetensors", state, header)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        (lambda data: data[:-9], 209),
        (lambda data: b"", 209),
        (lambda data: b"\x80\x04" + data, 209),
        (lambda data: b"PK\x03\x04 a zip", 209),
    ],
    ids=["truncated", "empty", "pickle", "zip"],
)
def test_a_damaged_file_is_refused(damage, number: int, header: ModelHeader, state, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_model(path, state, header)
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(path).startswith(f"ICM{number} ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").startswith("ICM205 ")


def test_headers_that_do_not_fit_are_refused(header: ModelHeader, state, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    cases = {
        "ICM209 ": [
            None,
            {"format": "pt"},
            *({METADATA_KEY: text} for text in ("{", "[]", "[" * 100_000)),
            tampered(header, study_digest="0" * 64),
        ],
        "ICM208 ": [tampered(header, format_version=2), tampered(header, format_version="1")],
    }
    cases["ICM209 "] += [tampered(header, round=-1), tampered(header, method=5), tampered(header, format="other")]
    cases["ICM209 "] += [tampered(header, weights=weights) for weights in ({}, {"a": 0.5}, {"a": 1.0, "b": 1.0})]
    for number, metadata in [(number, case) for number, several in cases.items() for case in several]:
        save_file(state, path, metadata=metadata)
        assert refusal(path).startswith(number), metadata
        assert refusal(path).count("ICM") == 1, "one sentence"


def test_a_study_edited_in_the_header_is_noticed(header: ModelHeader, state, tmp_path: Path) -> None:
    study = header.study.model_dump(mode="json") | {"rounds": 99}
    save_file(state, tmp_path / "m", metadata=tampered(header, study=study))
    assert "study and digest in the header differ" in refusal(tmp_path / "m")


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "type", "nan"])
def test_tensors_that_do_not_fit_the_study_are_refused(change: str, header: ModelHeader, state, tmp_path: Path) -> None:
    name = "head.0.weight" if "head.0.weight" in state else sorted(state)[-1]
    if change == "missing":
        del state[name]
    else:
        changed = {
            "extra": ("stranger", torch.zeros(3)),
            "shape": (name, torch.zeros(3)),
            "type": (name, state[name].double()),
            "nan": (name, torch.full_like(state[name], torch.nan)),
        }
        state[changed[change][0]] = changed[change][1]
    write_model(tmp_path / "m", state, header)
    lines = refusal(tmp_path / "m").splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"ICM301 {tmp_path / 'm'}, ")
    assert lines[0].endswith("It was not used. Fetch the file again and compare its digest.")
