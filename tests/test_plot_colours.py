"""Every method has a colour and a marker of its own in the report and in the figure; sites without test patients have no bars."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from simulations import readme_figure
from simulations.findings import METHOD_NAMES
from simulations.methods import METHODS
from simulations.plots import MARKERS, SERIES, SYMBOLS, method_colours, plots

TEMPLATE = (Path(readme_figure.__file__).parent / "report.html.j2").read_text()


def results_of(names: tuple[str, ...]) -> dict[str, Any]:
    """Results of methods at two sites, of which EZ has no test patient."""

    def run(dice: float) -> dict[str, Any]:
        sites = {"CS": {"dice": dice, "hd95_mm": None}, "EZ": {"dice": None, "hd95_mm": None}}
        row = {"val_dice": dice, "loss": 1 - dice, "usage": [0.5, 0.5]}
        test = {"sites": sites, "pooled": {"dice": dice}, "mean": {"dice": dice}, "worst_site": {"dice": dice}}
        return {"rounds": [{"round": 1, "sites": {"CS": row}, "usage_spread": 0.01}], "test": test, "own_test": None}

    methods = {name: {"1": run(0.3 + 0.05 * index)} for index, name in enumerate(names)}
    return {"methods": methods, "sites": {"CS": {}, "EZ": {}}, "experts": ["a", "b"], "labels": ["background", "lesion"]}


def test_each_method_has_a_colour_and_a_marker_of_its_own() -> None:
    results = results_of(METHODS)
    assert set(METHODS) == set(METHOD_NAMES)
    assert len(set(method_colours(results).values())) == len(METHODS)
    assert len(set(readme_figure.COLOURS)) == len(set(MARKERS)) == len(set(SYMBOLS)) == len(METHODS)
    legends = [plot.legend for plot in plots(results) if plot.key == "curve-val-dice"]
    assert [len({(symbol, colour) for symbol, _, colour in legend}) for legend in legends] == [len(METHODS)]


def test_light_and_dark_pages_have_each_colour_once() -> None:
    for index in range(len(SERIES)):
        assert len(re.findall(rf"--series-{index}: #[0-9a-f]{{6}};", TEMPLATE)) == 2
    assert len(set(re.findall(r"--series-\d: (#[0-9a-f]{6});", TEMPLATE))) == 2 * len(SERIES)


def test_a_site_without_test_patients_has_no_bar_in_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list[list[float | None]]()
    monkeypatch.setattr(readme_figure, "_series", lambda _, scores, *__: drawn.append([score.mean for score in scores]))
    figure = Figure()
    readme_figure._bars(figure, results_of(("router-aware", "fedavg")))
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["CS", "mean"]
    assert drawn == [pytest.approx([0.3, 0.3]), pytest.approx([0.35, 0.35])]
