"""Renders a report as one self-contained HTML file, which loads nothing and has no scripts."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from qat_lightning.base import formats
from qat_lightning.report.content import Network, Report
from qat_lightning.report.rows import metric_names, score_rows, worst_first


def render(report: Report) -> str:
    """Returns the HTML of a report.

    Args:
        report: The report. Its empty parts are left out.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = formats.printable
    return environment.get_template("page.html.jinja").render(
        report=report,
        formats=formats,
        metrics=metric_names(report.scores),
        compared=any(score.network == "float" for score in report.scores) and len(report.scores) > 1,
        splits=list(dict.fromkeys(score.split for score in report.scores)),
        scores=score_rows(report.scores),
        speeds=[list(group) for _, group in groupby(report.speeds, key=attrgetter("runtime"))],
        **_plots(report),
    )


def _plots(report: Report) -> dict[str, Any]:
    from qat_lightning.report.page.curve_plots import curve_plots
    from qat_lightning.report.page.plots import (
        HISTOGRAM_KEYS,
        histograms,
        layer_plots,
        score_plots,
        speed_plots,
    )

    def network(index: int, network: Network) -> dict[str, Any]:
        return {
            "network": network,
            "layers": worst_first(network.layers),
            "plots": layer_plots(f"n{index}", network.layers),
            "histograms": histograms(f"n{index}", network.layers),
        }

    return {
        "score_plots": score_plots(report.scores) if len(report.scores) > 1 else [],
        "speed_plots": speed_plots(report.speeds),
        "curve_plots": curve_plots(report.epochs, report.marks),
        "histogram_keys": HISTOGRAM_KEYS,
        "networks": [network(index, each) for index, each in enumerate(report.networks)],
    }
