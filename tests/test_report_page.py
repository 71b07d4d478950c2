from __future__ import annotations

import dataclasses
import html
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from io import StringIO

import matplotlib
import pytest
from rich.console import Console

from qat_lightning.base import formats
from qat_lightning.report.content import Mark, Report
from qat_lightning.report.page.curve_plots import curve_plots
from qat_lightning.report.page.html import render
from qat_lightning.report.page.plots import histograms, layer_plots
from qat_lightning.report.terminal import print_report
from tests import reports

every_report = pytest.mark.parametrize("make", reports.EVERY, ids=lambda make: make.__name__)

page_of = cache(lambda make: render(make()))

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """A page, read strictly: every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


@every_report
def test_page_stands_alone(make: Callable[[], Report]) -> None:
    text = page_of(make)
    page = Page(text)
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert all(value.startswith(("#", "data:")) for value in page.values("src", "href", "xlink:href"))
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text


@every_report
def test_ids_are_unique_and_referred_to_by_their_own_plot(make: Callable[[], Report]) -> None:
    text = page_of(make)
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = [value[1:] for value in page.values("href") if value.startswith("#")]
    links += re.findall(r"url\(#([^)]*)\)", text) + page.values("aria-labelledby")
    assert set(links) <= set(ids)


@every_report
def test_plots_have_only_colours_of_the_page(make: Callable[[], Report]) -> None:
    styles = Page(page_of(make)).values("style", "fill", "stroke")
    assert not [style for style in styles if re.search(r"#[0-9a-f]{3}|rgb", style)]


@every_report
def test_page_is_the_same_each_time(make: Callable[[], Report]) -> None:
    assert render(make()) == page_of(make)


@every_report
def test_every_layer_metric_and_finding_is_there(make: Callable[[], Report]) -> None:
    report = make()
    words = Page(page_of(make)).words
    named = [layer.name for network in report.networks for layer in network.layers]
    named += [name for score in report.scores for name in score.metrics]
    named += [*report.findings, *report.versions, *(part for each in report.networks for part in each.floats)]
    assert {formats.printable(name) for name in named} <= set(words)


def test_names_are_escaped() -> None:
    text = render(reports.hostile())
    assert "<script" not in text
    assert html.escape("<script>alert(1)</script>", quote=False) in text


def test_headings_are_those_of_what_there_is() -> None:
    def headings(report: Report) -> list[str]:
        return re.findall(r"<h2[^>]*>([^<]*)", render(report))

    assert headings(reports.empty()) == []
    assert headings(reports.realistic()) == [
        *(
            "Findings",
            "How good it is",
            "How fast it is",
            "Training",
            "Layers",
            "What became int8",
            "Versions",
        )
    ]
    without = dataclasses.replace(reports.realistic(), speeds=(), epochs=(), networks=())
    assert headings(without) == ["Findings", "How good it is", "Versions"]
    assert "Layers of generator" in headings(reports.large())


def test_differences_to_float_and_sizes() -> None:
    words = Page(render(reports.realistic())).words
    assert {"97.12 %", "96.76 %", "−0.36 pp", "4.50 MB", "3.76×", "2.63×", "exact"} <= set(words)


def test_layers_are_sorted_worst_first() -> None:
    report = reports.hostile()
    text = render(report)
    names = re.findall(r'<th scope="row" class="name"><code>.*?\.(\d)</code>', text)
    assert names == ["0", "1", "3", "4", "2"]  # nan, -inf, -3, 0, inf


def test_plots_say_what_they_leave_out() -> None:
    layers = reports.large().networks[0].layers
    plot = layer_plots("n", layers)[0]
    assert plot.note == "The 30 worst of 120 layers, the worst first."
    assert len(histograms("n", layers)) == 24
    assert curve_plots(reports.large().epochs, ())[-1].note == "28 more plots are left out."
    exact = [dataclasses.replace(layer, int8_sqnr=math.inf) for layer in layers]
    assert len(layer_plots("n", exact)) == 1


def test_curves_are_grouped_and_marked() -> None:
    report = reports.realistic()
    plots = curve_plots(report.epochs, report.marks)
    assert [plot.title for plot in plots] == ["Loss", "Accuracy", "Learning rate", "grad_norm"]
    assert [key.name for key in plots[0].keys] == ["train/loss", "val/loss"]
    for mark in report.marks:
        assert all(f">{mark.what}</text>" in plot.svg for plot in plots)
        assert all(f"{mark.what} from epoch {mark.epoch}" in plot.svg for plot in plots)


def test_a_single_epoch_has_a_whole_number() -> None:
    (plot,) = curve_plots(reports.tiny().epochs, [Mark(0, "observers frozen"), Mark(5, "never came")])
    assert re.findall(r">(\d+)</text>", plot.svg) == ["0"]
    assert "observers frozen" in plot.svg
    assert "never came" not in plot.svg


def test_matplotlib_stays_as_the_user_has_it() -> None:
    expected = page_of(reports.realistic)
    with matplotlib.rc_context(
        {"font.size": 31, "axes.facecolor": "red", "axes.grid": True, "svg.fonttype": "path"}
    ):
        before = dict(matplotlib.rcParams)
        assert render(reports.realistic()) == expected
        assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_pyplot_is_not_imported_and_the_backend_is_not_chosen() -> None:
    code = """
import sys, matplotlib
from tests import reports
from qat_lightning.report.page.html import render
sys.modules["matplotlib.pyplot"] = None  # torchmetrics imports it
render(reports.realistic())
assert matplotlib.get_backend(auto_select=False) is None
"""
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)


def printed(report: Report) -> str:
    output = StringIO()
    print_report(report, Console(width=80, file=output))
    return output.getvalue()


def test_terminal_shows_the_same_in_80_columns() -> None:
    lines = [line.rstrip() for line in printed(reports.realistic()).splitlines()]
    assert max(map(len, lines)) <= 80
    assert "int8        ONNX Runtime       96.76 %  −0.36 pp    0.1113  4.50 MB    3.76×" in lines
    assert "OpenVINO      int8         1  2.33 ± 0.07       430     2.63×" in lines
    assert sum(line.startswith(("features.", "classifier")) for line in lines) == 5


def test_terminal_leaves_paths_whole() -> None:
    path = "outputs/" + "long/" * 40 + "int8.onnx"
    scores = tuple(dataclasses.replace(score, file=path) for score in reports.tiny().scores)
    assert path in printed(dataclasses.replace(reports.tiny(), scores=scores)).replace("\r", "")


@every_report
def test_terminal_takes_every_report(make: Callable[[], Report]) -> None:
    text = printed(make())
    assert all(char.isprintable() or char == "\n" for char in text)
