"""The report and the README's picture, rendered from small made-up results."""

import copy
import html
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from simulations.findings import curve, last_usage, over_patients, remarks, total, worst_site, worth_it
from simulations.overlays import OUTLINE_COLOUR, Overlay, panels, pictures
from simulations.plots import plots
from simulations.readme_figure import SIZE_LIMIT_BYTES, figure_from_results
from simulations.report import final_table, flattened, render, write_report

SECTIONS = ["Worth it?", "Final scores", "The study", "Learning, sites and experts", "Traffic and time", "Exclusions"]
PLOTS = [
    "Validation Dice by round",
    "Training loss by round",
    "Test Dice by site and method",
    "Usage by site and expert",
    "Spread of usage between sites",
    "Bytes sent over all rounds",
    "Seconds per phase over all rounds",
]


def _scores(dice, patients=1, hd95_mm=None):
    return {"dice": dice, "iou": dice, "hd95_mm": hd95_mm, "surface_dice": None, "patients": patients}


def _run(dice, *, exchange=True, rounds=2):
    """Return one seed's run: site A has three test patients, B one; Dice `dice` at A and `dice` - 0.2 at B."""
    record = {"rounds": [], "test": {"sites": {"A": _scores(dice, 3, 4.0), "B": _scores(dice - 0.2)}}}
    for number in range(1, rounds + 1):
        site = {"loss": 1.0 / number, "val_dice": 0.1 * number, "usage": [0.75, 0.25], "steps": 2, "seconds": 1.0}
        entry = {"round": number, "sites": {"A": site, "B": {**site, "val_dice": None, "usage": [0.25, 0.75]}}}
        if exchange:
            seconds = {"train": 2.0, "evaluate": 1.0, "aggregate": 0.5}
            own = {"loss": 1.0 / number, "val_dice": 0.1 * number, "usage_spread": 0.25, "bytes_up": 2_000_000, "bytes_down": 4e6}
            entry |= {**own, "seconds": seconds}
        record["rounds"].append(entry)
    return record


def _results(**changes):
    site = {"images_found": 9, "images_used": 8, "patients": {"train": 2, "val": 1}, "slices": {"train": 5, "val": 2, "test": 1}}
    local = {"1": _run(0.5, exchange=False), "2": _run(0.5, exchange=False)}
    for run in local.values():
        run["own_test"] = {"A": _scores(0.6, 3), "B": _scores(0.4)}
    return {
        "schema_version": 1,
        "kind": "icmoe-simulation",
        "created": "2026-01-02T03:04:05+00:00",
        "phantoms": False,
        "test_only": False,
        "configuration": {"study": {"name": "made-up", "rounds": 2}},
        "seeds": [1, 2],
        "backbone": {"name": "b", "digest": "d" * 64, "weights_digest_before": "e" * 64, "weights_digest_after": "e" * 64},
        "versions": {"torch": "2"},
        "labels": ["background", "lesion"],
        "experts": ["basic-1", "semantic-1"],
        "sites": {
            "A": {
                **site,
                "patients": {"train": 2, "val": 1, "test": 3},
                "exclusions": [{"number": 102, "sentence": "ICM102 broken"}],
            },
            "B": {**site, "patients": {"train": 2, "val": 1, "test": 1}, "exclusions": []},
        },
        "methods": {
            "router-aware": {"1": _run(0.8), "2": _run(0.84)},
            "fedavg": {"1": _run(0.79), "2": _run(0.85)},
            "local": local,
        },
        "summary": {},
        "comparisons": [{"sentence": "reaches 0.9 of pooled", "value": 0.9, "bar": 0.95, "met": False}],
        "seconds": {"total": 12.0},
        **changes,
    }


def _overlay(title="median patient"):
    image_HW = np.linspace(0, 1, 24 * 30).reshape(24, 30)
    truth_HW, prediction_HW = np.zeros((2, 24, 30), np.uint8)
    truth_HW[5:12, 5:12] = 1
    prediction_HW[7:14, 5:12] = 1
    return Overlay(title, image_HW, truth_HW, prediction_HW)


class _Page(HTMLParser):
    VOID = ("meta", "br", "img")

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.references, self.alternatives, self.words = [], [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [values[name] for name in ("href", "src", "xlink:href", "action") if name in values]
        self.alternatives += [values[name] for name in ("alt", "aria-label") if name in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_every_section_and_plot_is_there_and_every_tag_is_closed():
    page = _Page(render(_results(), [_overlay()]))
    words = " ".join(page.words)
    assert all(title in words for title in [*SECTIONS, *PLOTS, "Test patients", "ICM102 broken", "weights proven unchanged"])


def test_nothing_is_fetched_and_nothing_runs():
    page = render(_results(), [_overlay()])
    assert not re.search(r"http|<script|@import|url\((?!#)|\son\w+=|<link|<iframe", page)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in _Page(page).references)


def test_ids_are_unique_and_their_references_exist():
    page = _Page(render(_results(), [_overlay(), _overlay("best patient")]))
    assert len(page.ids) == len(set(page.ids))
    local = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert local
    assert local <= set(page.ids)


def test_names_are_escaped_everywhere():
    evil = '<b onload="x">&$\\frac{1}$'
    results = _results(experts=[evil, "e2"], labels=["background", evil], configuration={evil: evil}, versions={evil: evil})
    results["sites"][evil] = results["sites"].pop("A")
    results["sites"][evil]["exclusions"] = [{"number": 102, "sentence": evil}]
    for runs in results["methods"].values():
        for run in runs.values():
            for table in [run["test"]["sites"], *(entry["sites"] for entry in run["rounds"])]:
                table[evil] = table.pop("A")
    results["methods"][evil] = copy.deepcopy(results["methods"]["fedavg"])
    page = render(results, [_overlay(evil)])
    assert "<b on" not in page
    assert "&lt;b onload" in page
    assert any(evil in words for words in _Page(page).alternatives)


def test_each_picture_has_its_numbers_in_words():
    for plot in plots(_results()):
        assert plot.title in plot.alternative or plot.key == "usage"
        assert re.search(r"\d", plot.alternative)
        assert f'aria-label="{html.escape(plot.alternative)}"' in render(_results(), [])
    assert {panel.alternative for panel in panels(_overlay())} == {
        "median patient: the image",
        "median patient: truth, 49 of 720 pixels marked",
        "median patient: prediction, 49 of 720 pixels marked",
    }


def test_plots_follow_the_page_colours_and_are_sound_xml():
    for plot in plots(_results()):
        ET.fromstring(plot.svg)
        assert "var(--" in plot.svg
        assert not re.search(r"#0[1-4]0[1-4]0[1-4]|#0a0a0", plot.svg)


def test_equal_results_give_equal_pages():
    assert render(_results(), [_overlay()]) == render(_results(), [_overlay()])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"phantoms": True}, "Phantoms: these images are drawn by a program"),
        ({"test_only": True}, "Test only: the backbone is a seeded stand-in"),
        ({"backbone": {"weights_digest_before": "a", "weights_digest_after": "b"}}, "ICM401"),
        ({"backbone": {"name": "lite-medsam"}}, "unofficial repackaging"),
    ],
)
def test_what_limits_the_numbers_is_said_only_where_it_holds(changes, words):
    assert words in render(_results(**changes), [])
    assert words not in render(_results(), [])


def test_null_scores_are_dashes_not_zeros():
    results = _results()
    for runs in results["methods"].values():
        for run in runs.values():
            run["test"]["sites"]["B"] = dict.fromkeys(run["test"]["sites"]["B"]) | {"patients": 0}
            run["rounds"][0] |= {"val_dice": None, "loss": float("nan")}
    rows = {row.name: row.cells for row in final_table(results)}
    assert rows["B"][0] == ("\N{EN DASH}", "")
    assert rows["Mean over sites"][0][0].startswith("0.820")
    assert [point.round for point in curve(results, "local", "val_dice")] == [1, 2]
    render(results, [])


@pytest.mark.parametrize("left_out", [["fedavg"], ["local", "fedavg"], ["router-aware"], ["router-aware", "fedavg", "local"]])
def test_missing_methods_are_left_out(left_out):
    results = _results()
    for name in left_out:
        del results["methods"][name]
    page = render(results, [])
    assert all(section in page for section in SECTIONS)
    assert ("plain FedAvg 0" in page) is (left_out == [])


def test_bare_results_still_render():
    assert "No round was recorded" in render({"schema_version": 1}, [])


def test_another_schema_is_refused_by_value():
    with pytest.raises(ValueError, match=r"version 2: 1 expected"):
        render(_results(schema_version=2), [])


def test_final_table_holds_hand_computed_scores():
    rows = {row.name: row for row in final_table(_results())}
    # Router-aware: A 0.80 and 0.84 with three patients, B 0.60 and 0.64 with one; sd of (x, x + 0.04) is 0.028.
    assert rows["All patients"].cells[0] == ("0.770 ± 0.028", "")
    assert rows["Mean over sites"].cells[0] == ("0.720 ± 0.028", "4.0 mm")
    assert rows["Worst site"].cells[0] == ("0.620 ± 0.028", "")
    assert rows["A"].cells[0] == ("0.820 ± 0.028", "4.0 mm")
    assert rows["A"].cells[3] == ("0.600 ± 0.000", "")
    assert [rows[name].best for name in ("A", "B")] == [0, 0]


def test_personalised_models_are_shown_on_their_own_patients_alone_and_do_not_compete():
    results = _results()
    run = _run(0.95, exchange=False)
    results["methods"]["personalised"] = {"1": run | {"rounds": [], "own_test": run["test"]["sites"]}}
    rows = {row.name: row for row in final_table(results)}
    assert rows["A"].best == 0
    assert [dice for dice, _ in rows["A"].cells] == ["0.820 ± 0.028", "0.820 ± 0.042", "0.500 ± 0.000", "0.950", "0.600 ± 0.000"]
    page = render(results, [])
    assert page.count('<th scope="col">Personalised') == 1
    assert "Personalised: each at its own." in page


def test_who_decided_has_its_legend_only_where_it_is_shown():
    overlay = _overlay()
    assert "Who decided" not in render(_results(), [overlay])
    overlay.experts_HW, overlay.expert_names = np.zeros((24, 30), np.uint8), ("basic-1", "semantic-1")
    assert 'background: #56b4e9"></span>semantic-1' in render(_results(), [overlay])


def test_own_test_may_be_a_whole_evaluation_record():
    results, wrapped = _results(), _results()
    for run in wrapped["methods"]["local"].values():
        run["own_test"] = {"sites": run["own_test"], "mean": {"dice": 0.5}, "pooled": {"dice": 0.5}}
    assert over_patients(wrapped, "local", part="own_test") == over_patients(results, "local", part="own_test")
    assert final_table(wrapped) == final_table(results)


def _answers(ours, theirs):
    results = _results()
    results["methods"] = {
        "router-aware": {str(seed): _run(dice) for seed, dice in enumerate(ours)},
        "fedavg": {str(seed): _run(dice) for seed, dice in enumerate(theirs)},
    }
    (finding,) = worth_it(results)
    return finding.answer, finding.sentence


@pytest.mark.parametrize(
    ("ours", "theirs", "answer", "words"),
    [
        ((0.80, 0.82), (0.70, 0.71), "yes", "+10.5 points (+10.0 to +11.0 over 2 seeds)"),
        ((0.70, 0.71), (0.80, 0.82), "no", "-10.5 points"),
        ((0.80, 0.70), (0.70, 0.80), "not shown", "sign differs"),
        ((0.702, 0.702), (0.70, 0.70), "not shown", "too small to matter"),
        ((0.90,), (0.70,), "not shown", "One seed"),
        ((0.90, 0.90), (0.90, 0.90), "not shown", "sign differs"),
    ],
)
def test_worth_it_says_what_the_numbers_say(ours, theirs, answer, words):
    found, sentence = _answers(ours, theirs)
    assert found == answer
    assert words in sentence


def test_a_hospital_is_compared_with_its_own_model_on_its_own_patients():
    home = worth_it(_results())[0]
    # Ours 0.77 over patients, own models (3 x 0.6 + 0.4) / 4 = 0.55.
    assert "0.770, each site's own model 0.550: +22.0 points" in home.sentence
    assert home.sentence.endswith("better one at 2 of 2 sites.")


def test_sites_without_own_score_do_not_enter_that_comparison():
    results = _results()
    for run in results["methods"]["local"].values():
        del run["own_test"]["B"]
    assert "0.820, each site's own model 0.600" in worth_it(results)[0].sentence


def test_even_use_is_reported_as_fedavg_in_practice():
    results = _results()
    assert not any("close to FedAvg" in line for line in remarks(results))
    for run in results["methods"]["router-aware"].values():
        run["rounds"][-1]["usage_spread"] = 0.01
    assert any("close to FedAvg" in line for line in remarks(results))


def test_sums_curves_and_usage():
    results = _results()
    assert total(results, "fedavg", "bytes_up") == 4_000_000
    assert total(results, "fedavg", "seconds", "aggregate") == 1.0
    assert total(results, "local", "seconds", "aggregate") is None
    assert [round(point.mean, 6) for point in curve(results, "local", "loss")] == [1.0, 0.5]
    assert last_usage(results) == ("router-aware", ["A", "B"], [[0.75, 0.25], [0.25, 0.75]])
    assert worst_site(results, "fedavg").mean == pytest.approx(0.62)
    assert flattened({"a": {"b": [1, 2], "c": None}, "d": "x"}) == [("a.b", "[1, 2]"), ("a.c", "null"), ("d", "x")]


def test_curves_are_means_over_sites_for_every_method_however_a_round_weighs_its_own():
    results = _results()
    for method in ("router-aware", "local"):
        for run in results["methods"][method].values():
            for entry in run["rounds"]:
                entry["sites"]["A"] |= {"loss": 1.0, "val_dice": 0.8}
                entry["sites"]["B"] |= {"loss": 3.0, "val_dice": 0.4}
                if method == "router-aware":
                    entry |= {"loss": 1.2, "val_dice": 0.76}  # by slices and patients, nine tenths of them at A
    for key, value in (("loss", 2.0), ("val_dice", 0.6)):
        ours, alone = (curve(results, method, key)[0].mean for method in ("router-aware", "local"))
        assert ours == alone == pytest.approx(value)
    assert "Router-aware: 2.000 in round 1" in render(results, [])


def test_alone_methods_show_no_traffic():
    results = _results()
    for run in results["methods"]["local"].values():
        run["rounds"][0] |= {"bytes_up": 7, "bytes_down": 7}
    (traffic,) = (plot for plot in plots(results) if plot.key == "bytes")
    assert "Local" not in traffic.alternative


def test_overlay_paints_classes_and_outlines_the_truth():
    image, truth, prediction = pictures(_overlay())
    assert image.shape == truth.shape == prediction.shape == (256, 320, 3)
    assert (np.ptp(image.astype(int), axis=2) == 0).all()
    assert np.ptp(truth[90, 85].astype(int)) > 50
    outline_HW = (prediction == OUTLINE_COLOUR).all(axis=2)
    assert 0.005 < outline_HW.mean() < 0.02
    rows, columns = np.nonzero(outline_HW)
    assert (rows.min(), columns.min()) == pytest.approx((5 * 320 / 30, 5 * 320 / 30), abs=1.5)


def test_overlay_refuses_other_shapes_by_value():
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        Overlay("x", np.zeros((3, 4)), np.zeros((3, 3), np.uint8), np.zeros((3, 4), np.uint8))


def test_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out" / "report.html"
    write_report(_results(), [_overlay()], path)
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="schema"):
        write_report(_results(schema_version=9), [], path)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_readme_figure_is_small_and_of_the_stated_size(tmp_path):
    noise = Overlay(
        "median", np.random.default_rng(0).random((128, 128)), np.eye(128, dtype=np.uint8), np.eye(128, dtype=np.uint8)
    )
    for name, overlay in (("a.png", _overlay()), ("b.png", noise)):
        figure_from_results(_results(phantoms=True), [_overlay("best"), overlay], tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert len(data) < SIZE_LIMIT_BYTES
        assert Image.open(io.BytesIO(data)).size == (1400, 600)
    with pytest.raises(ValueError, match="0 overlays"):
        figure_from_results(_results(), [], tmp_path / "c.png")
