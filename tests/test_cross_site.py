"""Each model at each site: rows, spread over seeds, dashes where nobody was tested, and its table and picture in the report."""

from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from test_report import _Page, _results

from simulations.cross_site import cross_site, matrix_rows
from simulations.report import render
from simulations.screen import cross_table
from simulations.site_plots import _panels, check_plots, cross_plots, usage_plots

SUMMARY = {"images": 20, "patients": 10, "labels": [{"patients": 10, "images": 10}], "modalities": ["MR"]}
RELEASED = {**SUMMARY, "in_plane_mm": [0.5, 1.0], "between_mm": None, "side_px": [128, 160]}
WITHHELD = {**SUMMARY, "labels": [], "in_plane_mm": None, "between_mm": None, "side_px": None}


def local(first: float, second: float) -> dict[str, object]:
    by_site = {"A": {"A": first, "B": None, "C": 0.2}, "B": {"A": 0.1, "B": None, "C": second}}
    return {"test": {"sites": {}}, "by_site": by_site, "models": {"A": "a", "B": "b"}}


def shared(*dice: float | None) -> dict[str, object]:
    return {"test": {"sites": {name: {"dice": value} for name, value in zip("ABC", dice, strict=True)}}, "model": "m"}


def test_one_model_for_all_has_a_row_and_each_own_model_one_more():
    methods = {"fedavg": {"1": shared(0.5, None, 0.7), "2": shared(0.7, None, 0.7)}, "local": {"1": local(0.4, 0.6)}}
    rows = cross_site(methods, ["A", "B", "C"])
    assert [(row["method"], row["site"]) for row in rows] == [("fedavg", None), ("local", "A"), ("local", "B")]
    assert rows[0]["dice"]["A"] == {"mean": pytest.approx(0.6), "std": pytest.approx(0.02**0.5)}
    assert rows[0]["dice"]["B"] == {"mean": None, "std": None}
    assert rows[0]["mean"] == {"mean": pytest.approx(0.65), "std": pytest.approx(0.005**0.5)}
    assert rows[1]["mean"] == {"mean": pytest.approx(0.3), "std": None}


def test_a_personal_study_has_its_global_model_and_the_sites_own():
    rows = cross_site(
        {"personal": {"1": {**shared(0.5, 0.5, 0.5), "by_site": {"A": {"A": 0.9, "B": 0.1, "C": 0.2}}}}}, list("ABC")
    )
    assert [row["site"] for row in rows] == [None, "A"]


def test_columns_without_a_test_patient_are_left_out_of_the_report():
    results = _results(cross_site=cross_site({"fedavg": {"1": shared(0.5, None, 0.7)}, "local": {"1": local(0.4, 0.6)}}, "ABC"))
    columns, rows = matrix_rows(results)
    assert columns == ["A", "C", "mean of sites"]
    assert rows == [
        ("FedAvg", "0.500", "0.700", "0.600"),
        ("Local of A", "0.400", "0.200", "0.300"),
        ("Local of B", "0.100", "0.600", "0.350"),
    ]
    page = _Page(render(results, []))
    words = " ".join(page.words)
    assert "Each model at each site" in words
    assert "Local of B" in words
    assert any("Local of B: A 0.100, C 0.600, mean of sites 0.350" in text for text in page.alternatives)


@pytest.mark.parametrize("width", [80, 40])
def test_the_terminal_shows_the_matrix_where_it_fits(width: int):
    results = _results(cross_site=cross_site({"fedavg": {"1": shared(0.5, None, 0.7)}, "local": {"1": local(0.4, 0.6)}}, "ABC"))
    console = Console(width=width, file=io.StringIO())
    console.print(cross_table(results, console))
    printed = " ".join(console.file.getvalue().split())
    assert ("Local of B" in printed and "0.350" in printed) == (width == 80)
    assert ("in the report" in printed) == (width == 40)


def test_results_without_the_matrix_have_no_section():
    assert cross_plots(_results()) == []
    assert "Each model at each site" not in render(_results(), [])


def test_usage_by_round_has_a_panel_per_expert():
    (plot,) = usage_plots(_results())
    assert "basic-1: A 75% to 75%, B 25% to 25%; semantic-1: A 25% to 25%, B 75% to 75%." in plot.alternative
    assert all(f">{expert}</text>" in plot.svg for expert in ("basic-1", "semantic-1"))
    assert [name for _, name, _ in plot.legend] == ["A", "B"]


def test_usage_by_round_goes_from_the_first_round_to_the_last():
    results = _results()
    method = results["methods"]["router-aware"]
    for run in method.values():
        run["rounds"][0]["sites"]["A"] = {**run["rounds"][0]["sites"]["A"], "usage": [0.5, 0.5]}
    assert "basic-1: A 50% to 75%, B 25% to 25%" in usage_plots(results)[0].alternative


def test_no_panel_cuts_off_what_another_expert_is_used_more():
    figure = Figure()
    _panels({"A": {1: [0.1, 0.9], 2: [0.2, 0.8]}}, ["basic-1", "semantic-1"])(figure.subplots())
    assert len(figure.axes) == 2
    for panel in figure.axes:
        low, high = panel.get_ylim()
        assert low == 0
        assert high > max(max(line.get_ydata()) for line in panel.get_lines())


def test_the_plots_of_the_data_show_what_was_released_and_no_more():
    check = {"summaries": {"A": RELEASED, "B": WITHHELD}, "findings": [], "declined": [], "faults": []}
    results = _results(data_check=check)
    told = {plot.key: plot.alternative for plot in check_plots(results)}
    assert set(told) == {"check-counts", "check-rates", "check-in-plane-mm", "check-side-px"}
    assert "A: at most 20 images of 10 patients; B: at most 20 images of 10 patients" in told["check-counts"]
    assert told["check-rates"].endswith("A: lesion 50%.")
    assert told["check-in-plane-mm"].endswith("A: 0.5 to 1 mm.")
    page = _Page(render(results, []))
    assert len(page.ids) == len(set(page.ids))
    assert check_plots(_results()) == []
