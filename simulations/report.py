"""The report of a simulation: one self-contained HTML page that can be mailed, archived and opened without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from icmoe.atomic import write_atomically
from icmoe.backbones import BACKBONES
from icmoe.config import flat
from icmoe.data.splits import SPLITS
from icmoe.predict.pictures import Colours
from simulations.cross_site import matrix_rows
from simulations.expert_use import use_tables
from simulations.findings import (
    ALONE,
    Estimate,
    Results,
    common_methods,
    estimate,
    method_name,
    methods,
    number,
    over_patients,
    over_sites,
    own_methods,
    remarks,
    runs,
    site_estimate,
    sites,
    total,
    worst_site,
    worth_it,
)
from simulations.overlays import CLASS_COLOURS, EXPERT_COLOURS, OUTLINE_COLOUR, Overlay, panels
from simulations.plots import Plot, plots
from simulations.results import CHECK_COLUMNS, check_rows
from simulations.site_plots import check_plots, cross_plots, usage_plots

METHOD_MEANINGS = {
    "router-aware": "each expert averaged by how much each site's router used it",
    "fedavg": "all parts averaged by training slices",
    "fedprox": "FedAvg with a pull towards the round's global model at the site",
    "fedadam": "FedAvg with Adam at the server",
    "fedyogi": "FedAvg with Yogi at the server",
    "personal": "adaptive experts and router stay at the site",
    "personalised": "each site's own model, made there from the router-aware one and its local one; scored on its own patients",
    "local": "each site alone, no exchange",
    "pooled": "all images in one place, which hospitals may not do; the upper reference",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the final table: its name and a (Dice, HD95) pair of texts per column; `best` is a column or None."""

    name: str
    cells: tuple[tuple[str, str], ...]
    best: int | None


def write_report(results: dict[str, Any], overlays: Sequence[Overlay], path: Path) -> None:
    """Write the report atomically.

    Parameters
    ----------
    results
        Results of a simulation, schema version 1; methods, scores and plots that are absent are left out.
    overlays
        Slices to show, such as those of the best, median and worst test patient.
    path
        The HTML file; its folder is made.

    Raises
    ------
    ValueError
        Where the results have another schema version.
    """
    write_atomically(path, render(results, overlays).encode())


def render(results: Results, overlays: Sequence[Overlay]) -> str:
    """Return the report as HTML; see `write_report`."""
    if results.get("schema_version") != 1:
        raise ValueError(f"results have schema version {results.get('schema_version')!r}: 1 expected")
    environment = Environment(
        loader=PackageLoader("simulations", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    matrix_columns, cross_rows = matrix_rows(results)
    return environment.get_template("report.html.j2").render(
        results=results,
        facts=_facts(results),
        configuration=flattened(results.get("configuration", {})),
        methods=[(method_name(name), METHOD_MEANINGS.get(name, "")) for name in methods(results)],
        columns=_column_names(results),
        rows=final_table(results),
        findings=worth_it(results),
        comparisons=results.get("comparisons", []),
        remarks=remarks(results),
        plots=_pictures(plots(results) + usage_plots(results)),
        cross_columns=matrix_columns,
        cross_rows=cross_rows,
        cross_plots=_pictures(cross_plots(results)),
        check_plots=_pictures(check_plots(results)),
        use_tables=use_tables(results["expert_use"]) if results.get("expert_use") else [],
        overlays=[(overlay.title, panels(overlay)) for overlay in overlays],
        class_colours=_coloured(results.get("labels", [])[1:], CLASS_COLOURS),
        expert_colours=_coloured(
            next((overlay.expert_names for overlay in overlays if overlay.experts_HW is not None), ()), EXPERT_COLOURS
        ),
        outline_colour=_hex(OUTLINE_COLOUR),
        site_rows=_site_rows(results),
        check=results.get("data_check"),
        check_columns=CHECK_COLUMNS,
        check_rows=check_rows(results["data_check"]) if results.get("data_check") else [],
        cost_rows=_cost_rows(results),
        exclusions=_exclusions(results),
        seconds=[(name, _text(number(value), 1)) for name, value in results.get("seconds", {}).items()],
        models=[(method_name(m), run["model"]) for m in methods(results) for run in runs(results, m) if run.get("model")],
        frozen=_frozen(results),
        note=_backbone_note(results),
    )


def _pictures(drawn: Sequence[Plot]) -> list[tuple[Plot, Markup]]:
    return [(plot, Markup(plot.svg)) for plot in drawn]  # noqa: S704 - our own plots; Matplotlib escapes names


def flattened(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return nested settings as dotted keys with their values as text."""
    return [(key, value if isinstance(value, str) else json.dumps(value, default=str)) for key, value in flat(table)]


def final_table(results: Results) -> list[Row]:
    """Return mean, worst site, all patients and each site, one column per method, then "own patients" columns."""
    tests = [(name, "test") for name in common_methods(results)]
    columns = tests + [(name, "own_test") for name in own_methods(results)]

    def row(name: str, dice: Sequence[Estimate], hd95_mm: Sequence[float | None]) -> Row:
        # "Own patients" columns answer another question and do not compete.
        competing = {index: value.mean for index, value in enumerate(dice[: len(tests)]) if value.mean is not None}
        best = max(competing, key=lambda index: competing[index]) if len(competing) > 1 else None
        return Row(name, tuple(_cell(*pair) for pair in zip(dice, hd95_mm, strict=True)), best)

    nothing = [None] * len(columns)
    pools = [estimate(list(over_patients(results, method, part=part).values())) for method, part in columns]
    rows = [
        row("All patients", pools, nothing),
        row(
            "Mean over sites",
            [over_sites(results, method, "dice", part=part) for method, part in columns],
            [over_sites(results, method, "hd95_mm", part=part).mean for method, part in columns],
        ),
        row("Worst site", [worst_site(results, method, part=part) for method, part in columns], nothing),
    ]
    for site in sites(results):
        dice = [site_estimate(results, method, site, "dice", part=part) for method, part in columns]
        hd95_mm = [site_estimate(results, method, site, "hd95_mm", part=part).mean for method, part in columns]
        rows.append(row(site, dice, hd95_mm))
    return rows


def _cell(dice: Estimate, hd95_mm: float | None) -> tuple[str, str]:
    deviation = "" if dice.deviation is None else f" ± {dice.deviation:.3f}"
    return _text(dice.mean, 3) + deviation, "" if hd95_mm is None else f"{hd95_mm:.1f} mm"


def _coloured(names: Sequence[str], colours: Colours) -> list[tuple[str, str]]:
    return [(name, _hex(colours[index % len(colours)])) for index, name in enumerate(names)]


def _hex(colour: tuple[int, int, int]) -> str:
    return f"#{bytes(colour).hex()}"


def _text(value: float | None, digits: int) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,.{digits}f}"


def _column_names(results: Results) -> list[str]:
    own = [f"{method_name(method)}, own patients" for method in own_methods(results)]
    return [method_name(method) for method in common_methods(results)] + own


def _facts(results: Results) -> list[tuple[str, str]]:
    backbone = results.get("backbone", {})
    rounds = max((len(run.get("rounds", [])) for m in methods(results) for run in runs(results, m)), default=0)
    return [
        ("Classes", ", ".join(results.get("labels", []))),
        ("Sites", ", ".join(sites(results))),
        ("Experts", ", ".join(results.get("experts", [])) or "none"),
        ("Backbone, frozen", f"{backbone.get('name', 'unknown')}, {backbone.get('image_size', '?')} pixels"),
        ("Rounds", str(rounds)),
        ("Seeds", ", ".join(str(seed) for seed in results.get("seeds", []))),
    ]


def _site_rows(results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in sites(results):
        site = results["sites"][name]
        counts = [[str(site.get(key, {}).get(split, 0)) for split in SPLITS] for key in ("patients", "slices")]
        found = f"{site.get('images_found', '?')} / {site.get('images_used', '?')}"
        rows.append((name, found, " / ".join(counts[0]), " / ".join(counts[1])))
    return rows


def _cost_rows(results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for method in methods(results):
        megabytes = [None if method in ALONE else total(results, method, key) for key in ("bytes_up", "bytes_down")]
        seconds = [total(results, method, "seconds", phase) for phase in ("train", "evaluate", "aggregate")]
        traffic = [_text(None if value is None else value / 1e6, 1) for value in megabytes]
        rows.append((method_name(method), *traffic, *(_text(value, 1) for value in seconds)))
    return rows


def _exclusions(results: Results) -> list[tuple[str, str]]:
    return [
        (name, str(fault.get("sentence") or f"ICM{fault.get('number', '?')}"))
        for name in sites(results)
        for fault in results["sites"][name].get("exclusions", [])
    ]


def _backbone_note(results: Mapping[str, Any]) -> str:
    """Return what is to be said of the backbone; nothing of one that is not known here."""
    known = BACKBONES.get(results.get("backbone", {}).get("name", ""))
    return known.note if known else ""


def _frozen(results: Results) -> bool | None:
    """Return whether the backbone's weights are proven unchanged; None where a digest is absent."""
    backbone = results.get("backbone", {})
    digests = [backbone.get("weights_digest_before"), backbone.get("weights_digest_after")]
    return None if None in digests else digests[0] == digests[1]
