"""Errors are part of the product: each number is raised somewhere, listed in README, and reads as one sentence."""

from __future__ import annotations

import ast
import multiprocessing
import pickle
import re
from pathlib import Path

import pytest

from icmoe.errors import CATALOGUE, Fault, IcmoeError, exit_on_fault

ROOT = Path(__file__).resolve().parents[1]


def raised() -> set[int]:
    """Return the numbers that the packages use in a call, wherever it stands."""
    found = set()
    for package in ("icmoe", "fl_client", "fl_server", "simulations"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name == "errors.py":
                continue
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            for call in calls:
                values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg in {"number", "missing"})]
                constants = [inner for value in values for inner in ast.walk(value) if isinstance(inner, ast.Constant)]
                found |= {constant.value for constant in constants if isinstance(constant.value, int)}
    return found & set(range(100, 600))


def test_every_number_is_in_use_or_retired() -> None:
    unused = set(CATALOGUE) - raised()
    assert {number for number in unused if "retired" not in CATALOGUE[number].title} == set()


def test_every_number_lies_in_a_range_of_the_design() -> None:
    assert all(100 < number < 600 for number in CATALOGUE)


def test_readme_lists_the_catalogue_word_for_word() -> None:
    rows = re.findall(r"^\| ICM(\d+) \| (.+) \| (.+) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert {int(number): (title, remedy) for number, title, remedy in rows} == {
        number: (entry.title, entry.remedy) for number, entry in CATALOGUE.items()
    }


def test_a_fault_is_one_line_with_number_value_limit_deed_and_remedy() -> None:
    fault = Fault(number=202, where="study.toml", value="rounds = 0", limit="at least 1", did="Nothing was started.")
    assert str(fault) == (
        "ICM202 study.toml: value is outside its allowed range or of another type: rounds = 0 (allowed: at least 1). "
        "Nothing was started. Give a value in the allowed range."
    )
    assert fault.record()["sentence"] == str(fault)


def test_a_fault_quotes_what_came_from_elsewhere_in_one_line_that_commands_no_terminal() -> None:
    fault = Fault(number=201, where="request.json", value="a\x1b[2J\nICM999 all is well\ud800")
    assert str(fault).startswith(r"ICM201 request.json: key is not known: a\x1b[2J\nICM999 all is well\ud800. ")
    assert "Größe" in str(Fault(number=201, value="Größe"))


@pytest.mark.parametrize("number", CATALOGUE)
def test_the_barest_fault_still_says_what_to_do(number: int) -> None:
    line = str(Fault(number=number))
    assert line.startswith(f"ICM{number} {CATALOGUE[number].title}.")
    assert line.endswith(CATALOGUE[number].remedy)
    assert "\n" not in line


def test_an_error_keeps_all_its_faults_between_processes() -> None:
    error = IcmoeError(Fault(number=101, where="a"), Fault(number=103, where="b"))
    assert pickle.loads(pickle.dumps(error)).faults == error.faults
    with pytest.raises(ValueError, match="at least one"):
        IcmoeError()


def test_the_command_line_prints_every_fault_and_exits_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, exit_on_fault():
        raise IcmoeError(Fault(number=101, where="a [b].png"), Fault(number=205, where="c"))
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in lines] == ["ICM101", "ICM205"]
    assert "a [b].png" in lines[0]


def test_errors_travel_through_a_process_pool() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(IcmoeError) as caught:
        pool.apply(_fail)
    assert caught.value.faults == (Fault(number=211, value="cuda"),)


def _fail() -> None:
    raise IcmoeError(Fault(number=211, value="cuda"))
